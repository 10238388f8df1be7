"""The frames: what one side packs, the other reads; and what breaks the format is refused."""

from __future__ import annotations

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onehop.errors import WireError
from onehop.protocol import wire

IDS = st.integers(1, 2**64 - 1)
BODIES = st.one_of(
    st.binary(max_size=64), st.sampled_from([wire.SECOND_FRAME_FROM - 1, wire.SECOND_FRAME_FROM]).map(bytes)
)
# Any str whose bytes can be told apart again: no lone surrogate but those that stand for a byte.
NAMES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=63),
    st.binary(max_size=wire.NAME_LIMIT).map(lambda raw: raw.decode("utf-8", "surrogateescape")),
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=100)


def second_of(frame: wire.Frame) -> tuple[bytes, bytes | memoryview | None]:
    return (frame, None) if isinstance(frame, bytes) else frame


# Header -------------------------------------------------------------------------------------------


@given(
    kind=st.sampled_from(sorted(wire.KINDS)), extent=st.integers(0, 2**16 - 1), number=st.integers(0, 2**32 - 1), id=IDS
)
def test_header_reads_what_was_packed(kind: int, extent: int, number: int, id: int) -> None:
    assert wire.header(wire.pack(kind, 0, extent, number, id)) == (kind, 0, extent, number, id)


def test_header_of_a_short_frame_is_refused_and_its_kind_is_none() -> None:
    for length in range(wire.HEADER_SIZE):
        frame = wire.pack(wire.PING)[:length]
        with pytest.raises(WireError, match=f"a frame of {length} bytes; the header alone takes 16"):
            wire.header(frame)
        assert wire.kind_of(frame) == 0
        assert not wire.has_second_frame(b"\xff" * length)


def test_kind_of_a_frame_tells_answers_for_calls_from_the_rest() -> None:
    assert {wire.kind_of(wire.pack(kind)) for kind in wire.KINDS} == wire.KINDS
    for_calls = {wire.ACK, wire.REPLY, wire.ITEM, wire.PROGRESS, wire.REJECT, wire.PONG}
    assert {kind for kind in wire.KINDS if kind >= wire.FIRST_FOR_CALLS} == for_calls


def test_second_frame_is_announced_exactly_for_large_bodies() -> None:
    for size in (0, wire.SECOND_FRAME_FROM - 1):
        frame = wire.answer(wire.REPLY, 0, 1, bytes(size))
        assert isinstance(frame, bytes)
        assert not wire.has_second_frame(frame)
    head, body = wire.answer(wire.REPLY, 0, 1, memoryview(bytes(wire.SECOND_FRAME_FROM)))
    assert isinstance(head, bytes)
    assert wire.has_second_frame(head)
    assert isinstance(body, memoryview), "a large body is not copied"


# Durations ----------------------------------------------------------------------------------------


@given(st.floats(0, 5e6))
def test_duration_never_travels_shorter_and_at_most_a_millisecond_longer(seconds: float) -> None:
    told = wire.milliseconds(seconds)
    if seconds * 1000 >= wire.LONGEST:
        assert told == wire.LONGEST
    else:
        assert seconds * 1000 <= told <= seconds * 1000 + 1


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (None, wire.NO_DEADLINE), (0.0, 0), (-1.0, 0), (-math.inf, 0), (math.nan, 0), (1e-9, 1), (0.001, 1),
        (1.5, 1500), (4_294_967.0, 4_294_967_000), (4_294_967.294, wire.LONGEST), (1e300, wire.LONGEST),
        (math.inf, wire.LONGEST),
    ],
)  # fmt: skip
def test_duration_travels_as_whole_milliseconds_rounded_up(seconds: float | None, told: int) -> None:
    assert wire.milliseconds(seconds) == told


# Address ------------------------------------------------------------------------------------------


@given(NAMES, NAMES, NAMES)
def test_names_come_back_as_they_were_even_where_they_are_no_text(service: str, server: str, method: str) -> None:
    assert wire.split_names(wire.names(service, server, method)) == (service, server, method)


def test_name_of_255_bytes_passes_and_one_more_is_refused_with_its_part_named() -> None:
    assert wire.split_names(wire.names("s" * 255, "", "ü" * 127)) == ("s" * 255, "", "ü" * 127)
    for at, part in enumerate(("service", "server", "method")):
        parts = ["", "", ""]
        parts[at] = "ü" * 128
        with pytest.raises(WireError, match=f"the {part} name .* has 256 bytes; 255 is the limit"):
            wire.names(*parts)


@pytest.mark.parametrize("section", [b"", b"\0", b"\0\0", b"\1a\0", b"\0\0\0\0", b"\0\0\2a", b"\1a\0\1", b"\xffa"])
def test_address_that_its_names_do_not_fill_is_refused(section: bytes) -> None:
    with pytest.raises(WireError, match="address section"):
        wire.split_names(section)


@given(
    kind=st.sampled_from([wire.REQUEST, wire.CAST]),
    id=IDS,
    remaining=st.none() | st.floats(0, 1000),
    names=st.tuples(NAMES, NAMES, NAMES),
    body=BODIES,
    monitor=st.none() | st.integers(1, 10**6),
)
def test_request_is_read_as_it_was_made(
    kind: int, id: int, remaining: float | None, names: tuple[str, str, str], body: bytes, monitor: int | None
) -> None:
    seconds = None if monitor is None or kind == wire.CAST else monitor / 1000
    frame, second = second_of(wire.request(kind, 0, id, remaining, seconds, wire.names(*names), body))
    head = wire.header(frame)
    assert (head.kind, head.id, head.number) == (kind, id, wire.milliseconds(remaining))
    assert bool(head.flags & wire.BODY_FOLLOWS) == (second is not None)
    told, section, start = wire.address(frame, head)
    if seconds is None:
        assert told is None
    else:
        assert told is not None
        assert seconds <= told < seconds + 0.0011
    assert wire.split_names(section) == names
    assert (frame[start:] if second is None else second) == body


def test_monitor_interval_is_a_millisecond_at_least() -> None:
    frame, _ = second_of(wire.request(wire.REQUEST, 0, 1, 1.0, 0.0, wire.names("s", "", "m"), b""))
    assert wire.address(frame, wire.header(frame))[0] == 0.001


def test_request_cut_anywhere_before_its_body_is_refused() -> None:
    whole, _ = second_of(wire.request(wire.REQUEST, wire.STREAM, 1, 1.0, 2.0, wire.names("clock", "a", "read"), b""))
    for length in range(wire.HEADER_SIZE, len(whole)):
        frame = whole[:length]
        with pytest.raises(WireError, match="interval" if length < wire.HEADER_SIZE + 4 else "address section of 13"):
            wire.address(frame, wire.header(frame))


# Answers ------------------------------------------------------------------------------------------


@given(st.lists(IDS, min_size=1, max_size=50), st.integers(0, 100_000))
def test_acknowledgement_holds_its_ids_in_order(ids: list[int], load: int) -> None:
    frame = wire.ack(ids, load)
    assert list(wire.acked(frame)) == ids
    assert wire.header(frame).extent == min(load, 0xFFFF)


@pytest.mark.parametrize("extra", range(1, 8))
def test_acknowledgement_whose_tail_is_no_row_of_ids_is_refused(extra: int) -> None:
    with pytest.raises(WireError, match="ids take 8 each"):
        wire.acked(wire.ack([1, 2]) + bytes(extra))


@pytest.mark.parametrize("kind", [wire.REPLY, wire.ITEM, wire.PROGRESS])
def test_load_beyond_what_can_be_told_is_told_as_the_most(kind: int) -> None:
    for body in (b"", bytes(wire.SECOND_FRAME_FROM)):
        frame, _ = second_of(wire.answer(kind, 0, 1, body, 10**6))
        assert struct.unpack_from("<H", frame, 2) == (0xFFFF,)


@pytest.mark.parametrize("reason", wire.REASONS)
def test_rejection_is_read_as_it_was_made(reason: str) -> None:
    frame = wire.reject(7, reason, "because of ü")
    assert wire.header(frame).id == 7
    assert wire.rejection(frame) == (reason, "because of ü")


def test_reason_of_a_newer_peer_reads_as_other() -> None:
    for number in (len(wire.REASONS), 0xFFFF_FFFF):
        assert wire.rejection(wire.pack(wire.REJECT, number=number, id=1) + b"new") == ("other", "new")


def test_text_for_people_is_cut_to_its_limit_and_never_fails() -> None:
    assert len(wire.goodbye("x" * 5000)) == wire.HEADER_SIZE + 1024
    _, text = wire.rejection(wire.reject(1, "full", "ü" * 1000))
    assert text == "ü" * 512
    _, text = wire.rejection(wire.reject(1, "full", "x" + "ü" * 1000))
    assert text == "x" + "ü" * 511 + "\N{REPLACEMENT CHARACTER}"
    assert wire.rejection(wire.reject(1, "full", "\udc80")) == ("full", "?")


# Hello --------------------------------------------------------------------------------------------

HELLOS = st.builds(
    wire.Hello,
    node=st.binary(min_size=16, max_size=16),
    expected=st.binary(min_size=16, max_size=16),
    version=st.integers(0, 255),
    oldest=st.integers(0, 255),
    features=st.integers(0, 2**32 - 1),
    first=st.integers(0, 2**64 - 1),
    host=TEXTS,
    realm=TEXTS,
    release=TEXTS,
    key=st.binary(max_size=100),
    grant=st.binary(max_size=100),
)


@given(HELLOS, st.booleans())
def test_hello_is_read_as_it_was_made(content: wire.Hello, is_answer: bool) -> None:
    frame = wire.hello(content, is_answer=is_answer)
    assert wire.header(frame).flags == (wire.ANSWER if is_answer else 0)
    assert wire.parse_hello(frame) == content


@given(HELLOS, st.binary(max_size=100))
def test_fields_of_a_newer_hello_are_passed_over(content: wire.Hello, newer: bytes) -> None:
    assert wire.parse_hello(wire.hello(content) + newer) == content


def test_hello_cut_anywhere_is_refused() -> None:
    whole = wire.hello(wire.Hello(b"n" * 16, b"e" * 16, host="host", realm="realm", release="1", key=b"k", grant=b"g"))
    for length in range(len(whole)):
        with pytest.raises(WireError, match="ends within its fields"):
            wire.parse_hello(whole[:length])


def test_field_of_a_hello_has_65535_bytes_at_most() -> None:
    content = wire.Hello(b"n" * 16, b"e" * 16, realm="r" * 65535)
    assert wire.parse_hello(wire.hello(content)) == content
    for field in ("host", "realm", "release"):
        with pytest.raises(WireError, match="65,535"):
            wire.hello(wire.Hello(b"n" * 16, b"e" * 16, **{field: "ü" * 32768}))
    for field in ("key", "grant"):
        with pytest.raises(WireError, match="65,535"):
            wire.hello(wire.Hello(b"n" * 16, b"e" * 16, **{field: bytes(65536)}))


def test_text_of_a_hello_that_is_no_utf8_is_read_with_replacements() -> None:
    frame = wire.hello(wire.Hello(b"n" * 16, b"e" * 16, host="ab"))
    assert wire.parse_hello(frame.replace(b"ab", b"\xff\xfe")).host == "\N{REPLACEMENT CHARACTER}" * 2


def test_final_goodbye_is_told_from_every_other_frame() -> None:
    assert wire.is_final(wire.goodbye(final=True))
    assert not wire.is_final(wire.goodbye("draining"))
    assert not wire.is_final(wire.pack(wire.PING))
    assert not wire.is_final(b"\x06")


def test_monitored_request_whose_interval_is_0_is_refused() -> None:
    section = wire.names("clock", "", "read")
    frame = wire.request(wire.REQUEST, 0, 1, 1.0, 0.5, section, b"")
    assert isinstance(frame, bytes)
    without = frame[: wire.HEADER_SIZE] + b"\0\0\0\0" + frame[wire.HEADER_SIZE + 4 :]
    assert wire.address(frame, wire.header(frame))[0] == 0.5
    with pytest.raises(WireError, match="interval is 0"):
        wire.address(without, wire.header(without))


@given(
    st.sampled_from([wire.REQUEST, wire.CAST]),
    st.integers(0, 2**64 - 1),
    st.floats(0.001, 1e6),
    st.binary(max_size=300),
)
def test_plain_request_is_the_same_frame_as_a_request_without_a_monitor(kind, id, seconds, body) -> None:
    section = wire.names("clock", "a", "read")
    plain = wire.plain_request(kind, 0, id, wire.milliseconds(seconds), section, body)
    assert plain == wire.request(kind, 0, id, seconds, None, section, body)
