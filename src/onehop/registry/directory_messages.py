"""What the directory of a host and its clients say to each other.

Messages are lines of JSON, each with a bounded length and a ``type``; an empty line is a sign of life, which the
directory answers with another. A client says :class:`Hello` first, and hears :class:`Told` with all that it wants to
know; from then on it hears of changes, and says what it wants besides (:class:`Want`) and who it is
(:class:`Announce`, :class:`Withdraw`). Its record stands as long as its connection.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from onehop.interfaces import Record
from onehop.registry.lines import Fault

VERSION = 1


class Hello(msgspec.Struct, tag="hello", omit_defaults=True):
    """Who connects: a node of ``realm`` that wants to know who offers ``services`` (``""``: any).

    Without a realm it only waits for the end of the directory. ``lease`` is the silence, in seconds, after which
    either end takes the other for gone.
    """

    version: int
    host: str
    lease: float
    realm: str | None = None
    services: tuple[str, ...] = ()


class Want(msgspec.Struct, tag="want"):
    """From now on tell who offers ``service`` too."""

    service: str


class Announce(msgspec.Struct, tag="announce"):
    """The sender's record, in the place of the one before."""

    record: Record


class Withdraw(msgspec.Struct, tag="withdraw"):
    """The sender takes its record back."""


class Told(msgspec.Struct, tag="told", omit_defaults=True):
    """What a directory knows: all of it at first, what was not told of ``service`` after :class:`Want`, then changes.

    ``place`` is said at first: a host may have several run directories, and who is ``here`` is in this one.
    ``crowd``, said once, is how many are connected, this one included: so they need not all return at once.
    ``here`` are nodes of its own host, of which it knows at first hand; ``announced`` those that said so themselves.
    Of the nodes that are no longer there (or no longer offer what was wanted) ``withdrawn`` surely are not; of
    ``lost`` ones the connection ended.
    """

    service: str | None = None
    place: str = ""
    crowd: int = 0
    here: tuple[Record, ...] = ()
    announced: tuple[Record, ...] = ()
    withdrawn: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


class Refusal(msgspec.Struct, tag="refusal"):
    """Why the directory ends the connection."""

    reason: str


_encode = msgspec.json.Encoder().encode
from_client = msgspec.json.Decoder(Hello | Want | Announce | Withdraw)
from_directory = msgspec.json.Decoder(Told | Refusal)


def line_of(message: msgspec.Struct) -> bytes:
    """``message`` as it goes over the wire."""
    return _encode(message) + b"\n"


def trimmed(record: Record | None, services: Iterable[str]) -> Record | None:
    """``record`` with those of its services alone that are wanted; None where there is none."""
    if record is None or "" in services:
        return record
    offered = {name: servers for name, servers in record.services.items() if name in services}
    if len(offered) == len(record.services):
        return record if offered else None
    idempotent = {name: methods for name, methods in record.idempotent.items() if name in offered}
    return msgspec.structs.replace(record, services=offered, idempotent=idempotent) if offered else None


def understood(decoder: msgspec.json.Decoder[Any], line: bytes) -> Any:
    """The message in ``line``. Raises :class:`Broken` where it is none."""
    try:
        return decoder.decode(line)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Fault(f"it sent no message of the directory's protocol: {error}") from error
