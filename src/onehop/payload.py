"""Values to bytes and back: MessagePack by msgspec.

What a plain round trip keeps: None, bool, int of any size, float (NaN and infinities too), str, bytes, list, dict
(with int, str, bytes, bool, float or None as keys), and aware datetimes. What it changes: tuple, set and frozenset come
back as list; naive datetime, date, time, timedelta, UUID, Decimal and enums as their text or value; dataclasses,
attrs classes and msgspec Structs as dict; bytearray and memoryview as bytes. Type hints of a handler, or ``returns``
of a client, restore all of these. Anything else is refused when it is sent. The table: ``docs/reference/payload.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from onehop.errors import DecodeError, EncodeError

_BIG_INTEGER = 1
"""The MessagePack extension for integers beyond 64 bits: two's complement, big-endian."""


def _refuse(value: Any) -> Any:
    raise EncodeError(
        f"a value of type {type(value).__module__}.{type(value).__qualname__} has no form on the wire; send plain "
        "values, a dataclass or a msgspec.Struct"
    )


def _extension(code: int, data: memoryview) -> Any:
    if code == _BIG_INTEGER:
        return int.from_bytes(data, "big", signed=True)
    raise DecodeError(f"MessagePack extension {code} is not one of onehop's")


_encode = msgspec.msgpack.Encoder(enc_hook=_refuse).encode
_decode = msgspec.msgpack.Decoder(ext_hook=_extension).decode
_decode_arguments = msgspec.msgpack.Decoder(tuple[list[Any], dict[str, Any]], ext_hook=_extension).decode


def encode(value: Any) -> bytes:
    """The bytes of ``value``.

    Raises:
        EncodeError: it holds something without a form; names the type.
    """
    try:
        try:
            return _encode(value)
        except OverflowError:
            # The encoder does not ask its hook about large integers; they are rare, so only then is the value walked.
            return _encode(_with_big_integers(value))
    except EncodeError:
        raise
    except RecursionError:
        raise EncodeError("the value is nested too deeply, or contains itself") from None
    except OverflowError:
        raise EncodeError("an integer beyond 64 bits has no form as a key, or inside an object") from None
    except (TypeError, ValueError, UnicodeError) as error:
        raise EncodeError(f"the value has no form on the wire: {error}") from error


def _with_big_integers(value: Any) -> Any:
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return msgspec.msgpack.Ext(_BIG_INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))
    if isinstance(value, Mapping):
        return {key: _with_big_integers(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_with_big_integers(each) for each in value]
    return value


def decode_arguments(body: bytes | memoryview) -> tuple[list[Any], dict[str, Any]] | None:
    """The arguments and keywords that ``body`` holds; None where it holds another value, or none.

    Raises:
        DecodeError: it holds a MessagePack extension that is not onehop's.
    """
    try:
        return _decode_arguments(body)
    except (msgspec.DecodeError, RecursionError, ValueError, OverflowError):
        return None


def decode(body: bytes | memoryview) -> Any:
    """The value of ``body``.

    Raises:
        DecodeError: the bytes are not a value.
    """
    try:
        return _decode(body)
    except DecodeError:
        raise
    except (msgspec.DecodeError, RecursionError, ValueError, OverflowError) as error:
        raise DecodeError(f"these {len(body)} bytes are not a value: {error}") from error


def restore(value: Any, wanted: Any) -> Any:
    """``value`` as the type ``wanted``, where the wire had only its text or a plain container.

    Raises:
        DecodeError: it does not fit; says where and why.
    """
    try:
        return msgspec.convert(value, wanted)
    except (msgspec.ValidationError, ValueError, TypeError) as error:
        raise DecodeError(str(error)) from error
