"""The wire format, version 1: where each thing stands in a frame.

The only file that knows positions. ``docs/reference/wire.md`` is normative, its sections are cited here, and
``tests/protocol/vectors/`` pins every kind of frame byte for byte.

A message is one ZeroMQ frame: a header of 16 bytes, what the kind adds, and the body. A body of
``SECOND_FRAME_FROM`` bytes or more rides as a second frame of the same message, so that it is not copied.
"""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

from onehop.errors import WireError

VERSION = 1
OLDEST = 1
"""The versions spoken here: from ``OLDEST`` to ``VERSION``."""

ECHO = 1
FEATURES = ECHO
"""Feature bits, as a hello tells them (wire 3.1), and those that are spoken here."""

HEADER = struct.Struct("<BBHIQ")
"""kind, flags, extent, number, id (wire 2)."""
HEADER_SIZE = HEADER.size
TOO_SHORT = struct.error
"""What unpacking a header raises for a frame that is shorter than one."""
_MONITOR = struct.Struct("<I")
_HELLO = struct.Struct("<BBHIQ16s16s")

# Kinds (wire 3). Those a link hands to a waiting call come last, so that one comparison tells them apart.
HELLO, REQUEST, CAST, CREDIT, CANCEL, GOODBYE, PING = range(1, 8)
ACK, REPLY, ITEM, PROGRESS, REJECT, PONG = range(16, 22)
FIRST_FOR_CALLS = ACK
KINDS = frozenset((*range(HELLO, PING + 1), *range(ACK, PONG + 1)))

# Flags (wire 2.2). A flag that a kind does not list must be zero.
BODY_FOLLOWS = 0x01
FAILED = 0x02
STREAM = 0x04
FANOUT = 0x08
MONITORED = 0x10
ANSWER = 0x20
FINAL = 0x40
_FLAGS = {
    HELLO: ANSWER,
    GOODBYE: FINAL,
    REQUEST: BODY_FOLLOWS | STREAM | MONITORED,
    CAST: BODY_FOLLOWS | FANOUT,
    REPLY: BODY_FOLLOWS | FAILED | STREAM,
    ITEM: BODY_FOLLOWS,
}

SECOND_FRAME_FROM = 64 * 1024
NO_DEADLINE = 0xFFFF_FFFF
LONGEST = NO_DEADLINE - 1
NAME_LIMIT = 255

# Why a request was refused (wire 3.9); the position is the number on the wire.
REASONS = (
    "other",
    "full",
    "draining",
    "expired",
    "no service",
    "no server",
    "duplicate",
    "hello first",
    "wrong node",
    "too large",
    "cancelled",
    "malformed",
)
REASON_NUMBERS = {word: number for number, word in enumerate(REASONS)}

Body = bytes | memoryview
Frame = bytes | tuple[bytes, Body]
"""What is sent: one frame, or a header frame with a large body behind it."""


class Hello(NamedTuple):
    """The first message on a connection, and the answer to it (wire 3.1).

    ``first`` is the lowest number that a request on this connection may have.
    """

    node: bytes
    expected: bytes
    version: int = VERSION
    oldest: int = OLDEST
    features: int = 0
    first: int = 1
    host: str = ""
    realm: str = ""
    release: str = ""
    key: bytes = b""
    grant: bytes = b""


class Header(NamedTuple):
    """The 16 bytes every frame begins with (wire 2.1)."""

    kind: int
    flags: int
    extent: int
    number: int
    id: int


def pack(kind: int, flags: int = 0, extent: int = 0, number: int = 0, id: int = 0) -> bytes:
    """A header alone: the whole frame of CREDIT, CANCEL, PING, PONG, and the start of others."""
    return HEADER.pack(kind, flags, extent, number, id)


def header(frame: bytes) -> Header:
    """The checked header of a frame that came from a peer.

    Raises:
        WireError: shorter than a header, of unknown kind, or with a flag its kind does not have.
    """
    if len(frame) < HEADER_SIZE:
        raise WireError(f"a frame of {len(frame)} bytes; the header alone takes {HEADER_SIZE}")
    fields = HEADER.unpack_from(frame)
    kind, flags = fields[0], fields[1]
    if kind not in KINDS:
        raise WireError(f"unknown kind {kind}")
    if flags & ~_FLAGS.get(kind, 0):
        raise WireError(f"kind {kind} with flags {flags:#04x}; it has only {_FLAGS.get(kind, 0):#04x}")
    return Header(*fields)


def echo(id: int, section: bytes) -> bytes:
    """A PING that a worker of the instance at this address is to answer (wire 3.12); from :func:`names`."""
    return HEADER.pack(PING, 0, len(section), 0, id) + section


def kind_of(frame: bytes) -> int:
    """The kind of a frame; 0, which is no kind, where it is shorter than a header."""
    return frame[0] if len(frame) >= HEADER_SIZE else 0


def has_second_frame(frame: bytes) -> bool:
    """Whether a frame's header announces its body as a second frame."""
    return len(frame) >= HEADER_SIZE and frame[1] & BODY_FOLLOWS != 0


def milliseconds(seconds: float | None) -> int:
    """A duration as it travels (wire 2.3): rounded up, cut to 49 days; None is "no deadline"."""
    if seconds is None:
        return NO_DEADLINE
    if not seconds > 0:
        return 0
    return LONGEST if seconds >= LONGEST / 1000 else math.ceil(seconds * 1000)


def names(service: str, server: str, method: str) -> bytes:
    """The address section of a request (wire 2.4): three names, each a length byte and UTF-8.

    Raises:
        WireError: a name is longer than 255 bytes.
    """
    section = bytearray()
    for what, name in (("service", service), ("server", server), ("method", method)):
        raw = name.encode("utf-8", "surrogateescape")
        if len(raw) > NAME_LIMIT:
            raise WireError(f"the {what} name {name[:40]!r}... has {len(raw)} bytes; {NAME_LIMIT} is the limit")
        section.append(len(raw))
        section += raw
    return bytes(section)


def split_names(section: bytes) -> tuple[str, str, str]:
    """Service, server and method of an address section.

    Raises:
        WireError: lengths that do not fill the section exactly.
    """
    found, at = [], 0
    for _ in range(3):
        if at >= len(section):
            raise WireError("an address section that ends within its names")
        end = at + 1 + section[at]
        found.append(section[at + 1 : end].decode("utf-8", "surrogateescape"))
        at = end
    if at != len(section):
        raise WireError(f"an address section of {len(section)} bytes whose names take {at}")
    return found[0], found[1], found[2]


def request(
    kind: int, flags: int, id: int, remaining: float | None, monitor: float | None, section: bytes, body: Body
) -> Frame:
    """A REQUEST or CAST (wire 3.2, 3.3).

    Args:
        remaining: seconds until the caller gives up; None for never.
        monitor: seconds without a heartbeat after which the caller gives up; None for no heartbeats.
        section: the address, from :func:`names`.
    """
    extra = b""
    if monitor is not None:
        flags |= MONITORED
        extra = _MONITOR.pack(max(1, milliseconds(monitor)))
    if len(body) < SECOND_FRAME_FROM:
        head = HEADER.pack(kind, flags, len(section), milliseconds(remaining), id)
        return b"".join((head, extra, section, body))
    head = HEADER.pack(kind, flags | BODY_FOLLOWS, len(section), milliseconds(remaining), id)
    return b"".join((head, extra, section)), body


def plain_request(kind: int, flags: int, id: int, milliseconds: int, section: bytes, body: Body) -> bytes:
    """A REQUEST or CAST with a small body and without a monitor, from the time as it travels."""
    return b"".join((HEADER.pack(kind, flags, len(section), milliseconds, id), section, body))


def address(frame: bytes, head: Header) -> tuple[float | None, bytes, int]:
    """Monitor interval (seconds), address section and start of the body of a REQUEST or CAST.

    Raises:
        WireError: the frame is shorter than its header says.
    """
    at, monitor = HEADER_SIZE, None
    if head.flags & MONITORED:
        if len(frame) < at + 4:
            raise WireError("a monitored request without its interval")
        monitor = _MONITOR.unpack_from(frame, at)[0] / 1000
        if not monitor:
            raise WireError("a monitored request whose interval is 0")
        at += 4
    end = at + head.extent
    if len(frame) < end:
        raise WireError(f"an address section of {head.extent} bytes in a frame of {len(frame)}")
    return monitor, frame[at:end], end


def answer(kind: int, flags: int, id: int, body: Body, load: int = 0, number: int = 0) -> Frame:
    """A REPLY, ITEM or PROGRESS (wire 3.5 to 3.7); ``load`` is how many requests wait at the server."""
    if load > 0xFFFF:
        load = 0xFFFF
    if len(body) < SECOND_FRAME_FROM:
        return HEADER.pack(kind, flags, load, number, id) + body
    return HEADER.pack(kind, flags | BODY_FOLLOWS, load, number, id), body


def ack(ids: list[int], load: int = 0) -> bytes:
    """An ACK of one or more casts (wire 3.4): the first id in the header, the others behind it."""
    return HEADER.pack(ACK, 0, min(load, 0xFFFF), 0, ids[0]) + struct.pack(f"<{len(ids) - 1}Q", *ids[1:])


def acked(frame: bytes) -> tuple[int, ...]:
    """The ids of an ACK.

    Raises:
        WireError: the tail is not a row of ids.
    """
    tail = len(frame) - HEADER_SIZE
    if tail % 8:
        raise WireError(f"an acknowledgement with a tail of {tail} bytes; ids take 8 each")
    return struct.unpack_from(f"<Q{tail // 8}Q", frame, 8)


def reject(id: int, reason: str, text: str = "") -> bytes:
    """A REJECT (wire 3.9): the request did not run, and why."""
    return HEADER.pack(REJECT, 0, 0, REASON_NUMBERS[reason], id) + text.encode("utf-8", "replace")[:1024]


def rejection(frame: bytes) -> tuple[str, str]:
    """Reason and text of a REJECT. An unknown reason (of a newer peer) reads as ``"other"``."""
    number = HEADER.unpack_from(frame)[3]
    reason = REASONS[number] if number < len(REASONS) else "other"
    return reason, frame[HEADER_SIZE:].decode("utf-8", "replace")


def goodbye(text: str = "", *, final: bool = False) -> bytes:
    """A GOODBYE (wire 3.11): send me no more requests; I finish what I took, or (final) have finished it."""
    return HEADER.pack(GOODBYE, FINAL if final else 0, 0, 0, 0) + text.encode("utf-8", "replace")[:1024]


def is_final(frame: bytes) -> bool:
    """Whether a frame is a final GOODBYE."""
    return kind_of(frame) == GOODBYE and frame[1] & FINAL != 0


def hello(content: Hello, *, is_answer: bool = False, place: int = 0) -> bytes:
    """A HELLO (wire 3.1), or the answer to one.

    Args:
        place: in an answer: how many connections there are with this one.

    Raises:
        WireError: a field is longer than 65,535 bytes.
    """
    head = HEADER.pack(HELLO, ANSWER if is_answer else 0, 0, place, 0)
    version, oldest, features, first = content.version, content.oldest, content.features, content.first
    fixed = _HELLO.pack(version, oldest, 0, features, first, content.node, content.expected)
    texts = [text.encode("utf-8", "replace") for text in (content.host, content.realm, content.release)]
    fields = (*texts, content.key, content.grant)
    if max(map(len, fields)) > 0xFFFF:
        raise WireError("a field of a hello is longer than 65,535 bytes")
    return head + fixed + b"".join(struct.pack("<H", len(raw)) + raw for raw in fields)


def parse_hello(frame: bytes) -> Hello:
    """The content of a HELLO. Bytes behind the known fields are a newer peer's, and are passed over.

    Raises:
        WireError: the frame ends within its fields.
    """
    try:
        version, oldest, _, features, first, node, expected = _HELLO.unpack_from(frame, HEADER_SIZE)
        at = HEADER_SIZE + _HELLO.size
        found = []
        for _ in range(5):
            (length,) = struct.unpack_from("<H", frame, at)
            at += 2 + length
            if at > len(frame):
                raise WireError("a hello that ends within its fields")
            found.append(frame[at - length : at])
    except struct.error:
        raise WireError(f"a hello of {len(frame)} bytes that ends within its fields") from None
    host, realm, release = (raw.decode("utf-8", "replace") for raw in found[:3])
    return Hello(node, expected, version, oldest, features, first, host, realm, release, found[3], found[4])
