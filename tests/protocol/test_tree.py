"""Fan-outs through relays: who passes on to whom, and what the two say to each other."""

from __future__ import annotations

import json
import struct
from collections import Counter
from math import isqrt
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onehop.errors import WireError
from onehop.interfaces import Record
from onehop.protocol import tree, wire
from onehop.protocol.node import NodeProtocol
from onehop.protocol.peers import GONE, IDLE, KNOWN, LOST, READY, Peer
from onehop.protocol.routes import Route

OWN = b"origin-node-0001"


def route_to(id: bytes, *, relay: bool = True, server: str = "a") -> Route:
    record = Record(node=id.hex(), host="h", endpoints=("ipc:///s", "tcp://10.0.0.1:9501"), relay=relay)
    return Route(Peer(id, record), "clock", server)


def routes(number: int, willing: float = 1.0, seed: int = 0) -> list[Route]:
    random = Random(seed)
    return [route_to(random.randbytes(16), relay=random.random() < willing) for _ in range(number)]


def relays(of: list[Route], own: bytes = OWN, turn: int = 0) -> dict[Route, tuple[Route, ...]]:
    return {chunk.relay: tuple(chunk.receivers) for chunk in tree.plan(of, own, turn)[0]}


# Who passes on to whom ----------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.binary(min_size=16, max_size=16), st.booleans(), st.sampled_from("abc")), max_size=80),
    st.integers(0, 1_000),
)
def test_each_receiver_is_sent_to_once_and_relays_are_willing(told: list[tuple[bytes, bool, str]], turn: int) -> None:
    everyone = [route_to(id, relay=willing, server=server) for id, willing, server in told]
    peers: dict[bytes, Peer] = {}
    everyone = [route._replace(peer=peers.setdefault(route.peer.id, route.peer)) for route in everyone]
    everyone = list(dict.fromkeys(everyone))
    chunks, direct = tree.plan(everyone, OWN, turn)
    reached = Counter([*direct, *(route for chunk in chunks for route in chunk.receivers)])
    assert reached == Counter(everyone)
    for chunk in chunks:
        assert chunk.receivers
        assert chunk.relay.peer.record is not None
        assert chunk.relay.peer.record.relay
        assert chunk.relay in direct, "its own copy comes from the origin"


@pytest.mark.parametrize("number", [100, 1_000, 2_500, 10_000])
def test_about_the_root_of_all_receivers_are_relays_each_for_as_many(number: int) -> None:
    chunks, direct = tree.plan(routes(number), OWN, 0)
    assert len(chunks) == len(direct)
    assert 0.6 * isqrt(number) <= len(chunks) <= 1.6 * isqrt(number)
    assert max(len(chunk.receivers) for chunk in chunks) <= 1.5 * isqrt(number)


def test_beyond_ten_thousand_chunks_become_larger_and_not_more() -> None:
    chunks, _direct = tree.plan(routes(40_000), OWN, 0)
    assert len(chunks) <= 160


def test_the_same_arguments_give_the_same_plan() -> None:
    everyone = routes(300)
    assert tree.plan(everyone, OWN, 5) == tree.plan(everyone, OWN, 5)


def test_relays_stay_for_a_while_and_then_others_take_their_turn() -> None:
    everyone = routes(1_000)
    first = relays(everyone)
    assert relays(everyone, turn=tree.STAY - 1) == first
    later = relays(everyone, turn=tree.STAY)
    assert len(later.keys() & first.keys()) < len(first) / 2
    together = [relay for turn in range(40) for relay in relays(everyone, turn=turn * tree.STAY)]
    assert len(set(together)) > 600
    assert max(Counter(together).values()) < 15


def test_origins_have_relays_of_their_own() -> None:
    everyone = routes(1_000)
    assert len(relays(everyone).keys() & relays(everyone, own=b"another-origin-1").keys()) < 15


def test_who_comes_or_goes_changes_its_own_chunk_only() -> None:
    everyone = routes(1_000)
    before, after = relays(everyone), relays(everyone[1:])
    kept = {relay: chunk for relay, chunk in before.items() if after.get(relay) == chunk}
    assert len(kept) >= len(before) - 2


def test_an_origin_is_not_its_own_relay() -> None:
    everyone = routes(20)
    for route in everyone:
        assert route not in relays(everyone, own=route.peer.id)


def test_a_node_that_was_lost_is_no_relay_before_it_is_reached_again() -> None:
    everyone = routes(400)
    lost = list(relays(everyone))[::2]
    for route in lost:
        route.peer.failures = 1
    chunks, direct = tree.plan(everyone, OWN, 0)
    assert not {chunk.relay for chunk in chunks} & set(lost)
    assert len(direct) == len(chunks)
    assert {route for chunk in chunks for route in chunk.receivers} >= set(lost)


def test_without_anybody_willing_all_goes_directly() -> None:
    everyone = routes(100, willing=0.0)
    assert tree.plan(everyone, OWN, 0) == ([], everyone)
    assert tree.plan([], OWN, 0) == ([], [])


def test_few_willing_nodes_get_more_each_but_not_everything() -> None:
    everyone = routes(1_000, willing=0.01)
    chunks, direct = tree.plan(everyone, OWN, 0)
    assert 3 <= len(chunks) <= 20
    assert max(len(chunk.receivers) for chunk in chunks) <= 4 * 1.5 * isqrt(1_000)
    alone = [route_to(bytes(16)), *routes(1_000, willing=0.0)]
    (chunk,), direct = tree.plan(alone, OWN, 0)
    assert (chunk.relay, len(chunk.receivers)) == (alone[0], 4 * (isqrt(1_001) * 3 // 2))
    assert len(direct) == 1_001 - len(chunk.receivers)


def test_a_peer_whose_record_is_gone_passes_nothing_on() -> None:
    everyone = routes(20)
    for route in everyone:
        route.peer.record = None
    assert tree.plan(everyone, OWN, 0)[0] == []
    assert tree.receiver_of(everyone[0]) == (everyone[0].peer.id.hex(), "a", "", ())


# What they say to each other ----------------------------------------------------------------------


@given(st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20), st.lists(st.text(), min_size=1))), st.binary())
def test_a_request_comes_back_as_it_went(told: list[tuple[str, str, list[str]]], body: bytes) -> None:
    receivers = [
        tree.Receiver(number.to_bytes(16, "big").hex(), server, host, tuple(endpoints))
        for number, (server, host, endpoints) in enumerate(told)
    ]
    raw = tree.request("clock", "set", receivers, body)
    assert tree.parse_request(raw) == ("clock", "set", receivers, body)
    service, method, found, rest = tree.parse_request(memoryview(raw))
    assert (service, method, found, bytes(rest)) == ("clock", "set", receivers, body)


def test_what_is_said_is_what_the_page_says() -> None:
    receivers = [tree.Receiver(bytes(range(16)).hex(), "a", "host-7", ("tcp://10.0.0.7:9502",))]
    assert tree.request("clock", "set", receivers, b"body") == (
        b'\x5b\0\0\0["clock","set",[["000102030405060708090a0b0c0d0e0f","a","host-7",["tcp://10.0.0.7:9502"]]]]body'
    )
    assert tree.receipts([tree.Receipt(tree.REFUSED, 0.5, "full", "no room")]) == b'[["refused",0.5,"full","no room"]]'


def test_names_that_are_no_text_come_back_too() -> None:
    receivers = [tree.Receiver("00" * 16, "a\udcff", "h", ("e",))]
    assert tree.parse_request(tree.request("cl\udcfe", "m", receivers, b""))[:3] == ("cl\udcfe", "m", receivers)


def head(value: object) -> bytes:
    raw = json.dumps(value).encode()
    return struct.pack("<I", len(raw)) + raw


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"\1\0\0", b"\xff\xff\xff\xff", b"\2\0\0\0[", b"\3\0\0\0\xff\xff\xff", head(None), head(7),
        head(["a", "b"]), head(["a", "b", [1]]), head(["a", "b", [["00" * 16, "s", "h"]]]),
        head(["a", "b", [["00" * 15, "s", "h", ["e"]]]]),
        head(["a", "b", [["00" * 16, "s", "h", []]]]),
        head(["a", "b", [["zz" * 16, "s", "h", ["e"]]]]), head(["a", "b", [[7, "s", "h", ["e"]]]]),
        head(["a", "b", [["00" * 16, 7, "h", ["e"]]]]), head(["a", "b", [["00" * 16, "s", 7, ["e"]]]]),
        head(["a", "b", [["00" * 16, "s", "h", [7]]]]), head(["a", "b", [["00" * 16, "s", "h", 7]]]),
        head(["a", "b", [["00" * 16, "s" * 256, "h", ["e"]]]]), head(["a" * 256, "b", [["00" * 16, "s", "h", ["e"]]]]),
        struct.pack("<I", 100_000) + b"[" * 100_000,
    ],
)  # fmt: skip
def test_a_request_that_is_none_is_refused(raw: bytes) -> None:
    with pytest.raises(WireError, match=r"relay|receiver|limit"):
        tree.parse_request(raw)


@given(st.binary())
def test_any_bytes_are_a_request_or_an_error(raw: bytes) -> None:
    for text in (raw, struct.pack("<I", len(raw)) + raw):
        try:
            tree.parse_request(text)
        except WireError:
            pass
        try:
            tree.parse_receipts(text, 1)
        except WireError:
            pass


RECEIPTS = [
    tree.Receipt(tree.TAKEN, 0.25), tree.Receipt(tree.REFUSED, 1.0, "full", "no room"),
    tree.Receipt(tree.UNKNOWN, 2.0, "", "lost"), tree.Receipt(tree.NOT_SENT, 0.0),
]  # fmt: skip


def test_receipts_come_back_as_they_went() -> None:
    assert tree.parse_receipts(tree.receipts(RECEIPTS), 4) == RECEIPTS
    assert tree.parse_receipts(memoryview(tree.receipts(RECEIPTS)), 4) == RECEIPTS
    assert tree.parse_receipts(tree.receipts([]), 0) == []


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"[", b"7", b"\xff", tree.receipts(RECEIPTS[:3]), tree.receipts([*RECEIPTS, *RECEIPTS]), b"[1, 2, 3, 4]",
        json.dumps([["taken", "soon", "", ""]] * 4).encode(), json.dumps([["perhaps", 0.0, "", ""]] * 4).encode(),
        json.dumps([["taken", 0.0, ""]] * 4).encode(), b"[" * 100_000,
    ],
)  # fmt: skip
def test_receipts_that_are_none_are_refused(raw: bytes) -> None:
    with pytest.raises(WireError, match="answer of a relay"):
        tree.parse_receipts(raw, 4)


# Peers that another node told of ------------------------------------------------------------------


def node() -> NodeProtocol:
    return NodeProtocol(OWN, random=lambda: 0.5)


def told_of(id: bytes) -> Record:
    return Record(node=id.hex(), host="h", endpoints=("ipc:///s",))


@pytest.mark.parametrize("end", [LOST, IDLE])
def test_a_peer_that_only_another_node_told_of_is_forgotten_with_its_connection(end: str) -> None:
    protocol, id = node(), b"receiver-node-01"
    peer = protocol.peers.introduce(told_of(id))
    assert (peer.state, protocol.routes.by_service) == (KNOWN, {})
    assert protocol.peers.introduce(told_of(id)) is peer
    assert protocol.connect(peer, 0.0) is not None
    answer = wire.hello(wire.Hello(id, bytes(16)), is_answer=True)
    assert protocol.control(peer, answer, 0.0, [])
    assert peer.state == READY
    protocol.lost(peer, "it ended", 1.0, end)
    assert (peer.state, protocol.peers.peers) == (GONE, {})
    assert protocol.peers.introduce(told_of(id)).calls.last > 0, "numbers go on"


def test_a_peer_that_could_not_be_connected_to_is_forgotten_too() -> None:
    protocol = node()
    peer = protocol.peers.introduce(told_of(b"receiver-node-01"))
    protocol.connect(peer, 0.0)
    protocol.lost(peer, "nobody listens there", 1.0)
    assert not protocol.peers.peers
    assert not protocol.peers.away


def test_what_the_registry_says_of_a_peer_stands_before_what_others_say() -> None:
    protocol, id = node(), b"receiver-node-01"
    own = Record(node=id.hex(), host="h", endpoints=("ipc:///own",), services={"clock": ("a",)})
    protocol.learn([own])
    peer = protocol.peers.introduce(told_of(id))
    assert peer.record is own
    protocol.connect(peer, 0.0)
    protocol.lost(peer, "it ended", 1.0)
    assert protocol.peers.peers == {id: peer}


def test_the_registry_may_tell_of_a_peer_later() -> None:
    protocol, id = node(), b"receiver-node-01"
    peer = protocol.peers.introduce(told_of(id))
    protocol.connect(peer, 0.0)
    protocol.learn([Record(node=id.hex(), host="h", endpoints=("ipc:///own",), services={"clock": ("a",)})])
    assert [route.peer for route in protocol.routes.of("clock")] == [peer]
    protocol.learn([])
    assert protocol.routes.of("clock") == ()
