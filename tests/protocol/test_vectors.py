"""The golden vectors: what each frame means and which bytes it is, in both directions."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from onehop.errors import WireError
from onehop.protocol import wire
from onehop.protocol.inbox import Inbox

FOLDER = Path(__file__).parent / "vectors"
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reference" / "wire.md").read_text()
KIND_NAMES = {
    getattr(wire, name): name
    for name in (
        "HELLO", "REQUEST", "CAST", "CREDIT", "CANCEL", "GOODBYE", "PING", "ACK", "REPLY", "ITEM", "PROGRESS", "REJECT",
        "PONG",
    )
    if hasattr(wire, name)  # an earlier release, which has fewer, is held to the frozen ones
}  # fmt: skip
FLAG_NAMES = {
    name: getattr(wire, name)
    for name in ("BODY_FOLLOWS", "FAILED", "STREAM", "FANOUT", "MONITORED", "ANSWER", "FINAL")
    if hasattr(wire, name)
}


def octets(text: str) -> bytes:
    return bytes.fromhex(re.sub(r"#.*", "", text))


def read(path: Path) -> list[Any]:
    vectors = tomllib.loads(path.read_text())["vector"]
    return [pytest.param(each, id=f"{path.stem}: {each['name']}") for each in vectors]


VECTORS = [each for path in sorted(FOLDER.glob("*.toml")) if path.stem != "refused" for each in read(path)]
REFUSED = read(FOLDER / "refused.toml")


def repeated(spec: dict[str, Any]) -> bytes:
    return bytes.fromhex(spec["byte"]) * spec["times"]


def frame_of(vector: dict[str, Any]) -> wire.Frame:
    """The message as the vector gives it."""
    first = octets(vector["hex"])
    if "body_repeated" in vector:
        first += repeated(vector["body_repeated"])
    return (first, repeated(vector["second"])) if "second" in vector else first


def body_of(vector: dict[str, Any]) -> bytes:
    for key in ("second", "body_repeated"):
        if key in vector:
            return repeated(vector[key])
    return octets(vector.get("body", ""))


def names_of(vector: dict[str, Any]) -> tuple[str, str, str]:
    service = vector.get("service", "")
    if "service_bytes" in vector:
        service = octets(vector["service_bytes"]).decode("utf-8", "surrogateescape")
    return service, vector.get("server", ""), vector.get("method", "")


def hello_of(vector: dict[str, Any]) -> wire.Hello:
    given = {
        key: vector[key]
        for key in ("version", "oldest", "features", "first", "host", "realm", "release")
        if key in vector
    }
    given |= {key: octets(vector[key]) for key in ("node", "expected", "key", "grant") if key in vector}
    return wire.Hello(**given)


def encode(vector: dict[str, Any]) -> wire.Frame:
    """What our encoder makes of the vector's meaning."""
    kind, id = getattr(wire, vector["kind"]), vector.get("id", 0)
    # The encoder sets by itself what follows from the content.
    given = set(vector.get("flags", [])) - {"BODY_FOLLOWS", "MONITORED"}
    flags = sum(FLAG_NAMES[name] for name in given)
    match vector["kind"]:
        case "HELLO":
            return wire.hello(hello_of(vector), is_answer=vector["answer"])
        case "REQUEST" | "CAST":
            remaining = None if vector["remaining"] == wire.NO_DEADLINE else vector["remaining"] / 1000
            monitor = vector["monitor"] / 1000 if "monitor" in vector else None
            return wire.request(kind, flags, id, remaining, monitor, wire.names(*names_of(vector)), body_of(vector))
        case "ACK":
            return wire.ack(vector["ids"], vector["load"])
        case "REPLY" | "ITEM":
            return wire.answer(kind, flags, id, body_of(vector), vector.get("load", 0), vector.get("number", 0))
        case "REJECT":
            return wire.reject(id, vector["reason"], vector.get("text", ""))
        case "GOODBYE":
            return wire.goodbye(vector.get("text", ""), final=bool(flags))
        case "PING" if "service" in vector:
            return wire.echo(id, wire.names(*names_of(vector)))
        case _:
            return wire.pack(kind, flags, number=vector.get("items", 0), id=id)


def decode(message: wire.Frame) -> dict[str, Any]:
    """What our decoder reads from the bytes, in the words of the vectors; what is 0 or empty is left out."""
    frame, second = (message, None) if isinstance(message, bytes) else message
    head = wire.header(frame)
    kind = KIND_NAMES[head.kind]
    found: dict[str, Any] = {"flags": {name for name, bit in FLAG_NAMES.items() if head.flags & bit}}
    match kind:
        case "HELLO":
            found = {"answer": bool(head.flags & wire.ANSWER), "hello": wire.parse_hello(frame)}
        case "REQUEST" | "CAST":
            monitor, section, start = wire.address(frame, head)
            found |= {"id": head.id, "remaining": head.number, "names": wire.split_names(section)}
            found |= {"monitor": monitor and round(monitor * 1000), "body": frame[start:] if second is None else second}
        case "ACK":
            found |= {"ids": list(wire.acked(frame)), "load": head.extent}
        case "REPLY" | "ITEM":
            found |= {"id": head.id, "load": head.extent, "number": head.number}
            found |= {"body": frame[wire.HEADER_SIZE :] if second is None else second}
        case "REJECT":
            reason, text = wire.rejection(frame)
            found |= {"id": head.id, "reason": reason, "text": text}
        case "GOODBYE":
            found |= {"text": frame[wire.HEADER_SIZE :].decode()}
        case "PING" if head.extent:
            found |= {"id": head.id, "names": wire.split_names(wire.address(frame, head)[1])}
        case _:
            found |= {"id": head.id, "items": head.number}
    return {"kind": kind} | {key: value for key, value in found.items() if value}


def meaning(vector: dict[str, Any]) -> dict[str, Any]:
    """The vector's own keys, in the form that :func:`decode` gives."""
    if vector["kind"] == "HELLO":
        return {key: value for key, value in vector.items() if key in ("kind", "answer") and value} | {
            "hello": hello_of(vector)
        }
    plain = {
        key: vector[key]
        for key in ("kind", "id", "ids", "remaining", "monitor", "load", "number", "reason", "text", "items")
        if vector.get(key)
    }
    if "method" in vector:
        plain["names"] = names_of(vector)
    return plain | {
        key: value for key, value in (("flags", set(vector.get("flags", []))), ("body", body_of(vector))) if value
    }


@pytest.mark.parametrize("vector", VECTORS)
def test_encoder_makes_the_bytes_of_the_vector(vector: dict[str, Any]) -> None:
    assert encode(vector) == frame_of(vector)


@pytest.mark.parametrize("vector", VECTORS)
def test_decoder_reads_the_meaning_of_the_vector(vector: dict[str, Any]) -> None:
    assert decode(frame_of(vector)) == meaning(vector)


def test_every_kind_has_a_file_of_its_own_with_frames_of_that_kind_only() -> None:
    of_files = {path.stem: {each["kind"] for each in tomllib.loads(path.read_text())["vector"]}
                for path in FOLDER.glob("*.toml") if path.stem != "refused"}  # fmt: skip
    assert of_files == {name.lower(): {name} for name in KIND_NAMES.values()}


def test_every_flag_stands_in_a_vector() -> None:
    found = 0
    for vector in VECTORS:
        found |= octets(vector.values[0]["hex"])[1]
    assert found == sum(FLAG_NAMES.values())


@pytest.mark.parametrize("vector", REFUSED)
def test_server_refuses_and_counts_what_breaks_the_format(vector: dict[str, Any]) -> None:
    inbox = Inbox(b"s" * 16)
    inbox.offer("s", "a", [])
    inbox.receive(b"id", wire.hello(wire.Hello(b"c" * 16, bytes(16))), None, 0.0, [])
    inbox.outgoing.clear()
    moved: list[Any] = []
    inbox.receive(b"id", octets(vector["hex"]), None, 0.0, moved)
    assert inbox.counts["bad frames"] == 1
    assert not moved
    if vector["why"] == "malformed":
        [(_, frame)] = inbox.outgoing
        assert isinstance(frame, bytes)
        assert wire.rejection(frame)[0] == "malformed"
    else:
        assert not inbox.outgoing


@pytest.mark.parametrize("vector", [each for each in REFUSED if each.values[0]["why"] in ("unknown kind", "flag")])
def test_header_that_breaks_the_format_is_a_wire_error_with_its_reason(vector: dict[str, Any]) -> None:
    with pytest.raises(WireError, match=vector["why"]):
        wire.header(octets(vector["hex"]))


def rows(section: str) -> list[list[str]]:
    """The cells of the tables in one section of the page."""
    [text] = re.findall(rf"^#+ {re.escape(section)}\b(.*?)(?=^#+ |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_page_lists_every_kind_with_its_number() -> None:
    listed = {int(row[0]): row[1] for row in rows("3. Kinds") if row[0].isdigit()}
    assert listed == KIND_NAMES
    assert set(listed) == wire.KINDS
    assert {int(row[0]) for row in rows("3. Kinds") if row[0].isdigit() and row[2] == "server"} == {
        kind for kind in wire.KINDS if kind >= wire.FIRST_FOR_CALLS
    }


def test_page_lists_every_flag_with_its_bit_and_its_kinds() -> None:
    listed = {row[1]: (int(row[0], 16), {*row[2].split(", ")}) for row in rows("2.2 Flags") if row[0].startswith("0x")}
    assert {name: bit for name, (bit, _) in listed.items()} == FLAG_NAMES
    for kind, name in KIND_NAMES.items():
        for bit in (1 << shift for shift in range(8)):
            allowed = any(bit == flag and name in kinds for flag, kinds in listed.values())
            frame = wire.pack(kind, bit)
            if allowed:
                assert wire.header(frame).flags == bit
            else:
                with pytest.raises(WireError):
                    wire.header(frame)


def test_page_lists_every_reason_with_its_number() -> None:
    listed = {row[1]: int(row[0]) for row in rows("3.9 REJECT") if row[0].isdigit()}
    assert listed == wire.REASON_NUMBERS


def test_page_tells_the_sizes_and_limits_that_hold() -> None:
    layout = [(int(row[0]), int(row[1])) for row in rows("2.1 Layout") if row[0].isdigit()]
    assert sum(size for _, size in layout) == wire.HEADER_SIZE
    assert [offset for offset, _ in layout] == [sum(size for _, size in layout[:at]) for at in range(len(layout))]
    limits = {row[0]: row[1] for row in rows("6. Limits")}
    assert limits["one name of an address"] == f"{wire.NAME_LIMIT} bytes"
    assert limits["body that rides in the first frame"] == f"{wire.SECOND_FRAME_FROM - 1:,} bytes"
    assert limits["duration, as told"] == f"{wire.LONGEST:,} ms"
    assert f"| {wire.NO_DEADLINE:,} | no deadline |" in PAGE
    assert f"# The wire format, version {wire.VERSION}" in PAGE


def test_every_section_that_the_sources_cite_is_in_the_page() -> None:
    headings = set(re.findall(r"^#+ ([0-9.]*[0-9])", PAGE, re.MULTILINE))
    cited = set()
    for path in (ROOT / "src").rglob("*.py"):
        for places in re.findall(r"\bwire ([0-9][0-9., to]*[0-9])\b", path.read_text()):
            cited.update(re.findall(r"[0-9.]*[0-9]", places))
    assert len(cited) > 10
    assert cited <= headings
