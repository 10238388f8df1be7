"""Messages as bytes: JSON, exactly as lossy as ``oslo_serialization.jsonutils``, on whose coercions services rely.

A request is ``[context, message]``; a reply is ``[value]`` or ``[null, failure]``.
"""

from __future__ import annotations

import json
import traceback
from math import isfinite
from types import TracebackType
from typing import Any

import msgspec
from oslo_messaging import RemoteError
from oslo_messaging._drivers import common
from oslo_serialization import jsonutils

Failure = tuple[type[BaseException], BaseException, TracebackType | None]

_encode_any = json.JSONEncoder(default=jsonutils.to_primitive).encode
_encode_plain = msgspec.json.Encoder().encode
_decode_plain = msgspec.json.Decoder().decode

# What cannot be encoded raises one of these.
UNENCODABLE = (ValueError, TypeError, RecursionError, OverflowError)


def encode(value: Any) -> bytes:
    """The JSON of a list or dict, such that ``decode(encode(x)) == jsonutils.loads(jsonutils.dumps(x))``.

    Raises:
        ValueError, TypeError, RecursionError: what ``jsonutils.dumps`` raises for this value.
    """
    try:
        body = _encode_plain(value)  # first: what has no end is refused here
        if _is_plain(value):
            return body
    except Exception:  # objects, integers beyond 64 bits, lone surrogates, great depth: the general encoder knows
        pass
    return _encode_any(value).encode()


def _is_plain(value: Any) -> bool:
    """Whether both encoders mean the same by the list or dict ``value``, which ends."""
    containers = [value]
    for each in containers:
        if type(each) is dict:
            for key in each:
                if type(key) is not str:
                    return False
            each = each.values()
        for member in each:
            kind = type(member)
            if kind is str or member is None or kind is bool or kind is int:
                continue
            if kind is dict or kind is list or kind is tuple:
                containers.append(member)
            elif kind is not float or not isfinite(member):
                return False
    return True


def decode(body: bytes | memoryview) -> Any:
    """The value of ``body``.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return _decode_plain(body)
    except msgspec.DecodeError:
        return json.loads(bytes(body))  # NaN, Infinity, lone surrogates


def encode_failure(failure: Failure, limit: int | None = None) -> bytes:
    """A reply that says that the method raised. Always possible: what has no form on the wire is left out.

    Args:
        limit: characters of the message and of the traceback, at most, where the whole is too large to send.
    """
    try:
        if limit is None:
            return encode([None, common.serialize_remote_exception(failure)])
    except Exception:  # the exception's arguments, or its own __str__
        pass
    kind, value, trace = failure
    try:
        message = str(value)[:limit]
    except Exception:
        message = f"{kind.__name__} whose text cannot be made"
    lines = [*traceback.format_tb(trace, limit and -1), f"{kind.__name__}: {message}\n"]
    plain = {"class": kind.__name__, "module": kind.__module__, "message": message}
    return encode([None, encode(plain | {"tb": lines, "args": [message], "kwargs": {}}).decode()])


def rebuild_failure(text: str, allowed: list[str]) -> Any:
    """The exception of a failure that came in a reply, of its own class where its module is ``allowed``."""
    plain = jsonutils.loads(text)
    trace = plain.get("tb") or []
    try:
        rebuilt = common.deserialize_remote_exception(text, allowed)
    except Exception:  # whatever the constructor of that class makes of the arguments
        return RemoteError(plain.get("class"), plain.get("message"), trace)
    if type(rebuilt).__module__ == "builtins":  # oslo.messaging put the traceback into the message: take it out again
        rebuilt.args = tuple(plain["args"])
        rebuilt.add_note("".join(trace))
    return rebuilt
