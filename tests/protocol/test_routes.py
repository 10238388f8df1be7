"""Routes: who offers what, and whose turn it is."""

from __future__ import annotations

from collections import Counter
from hashlib import sha256
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from onehop.interfaces import Record
from onehop.protocol import wire
from onehop.protocol.calls import Call
from onehop.protocol.peers import DRAINING, KNOWN, TRANSITIONS, USABLE, Peer, PeerTable
from onehop.protocol.routes import Route, Routes, choose, routes_to


def peer_of(number: int, services: dict[str, tuple[str, ...]] | None = None, state: str = "serving") -> Peer:
    services = {"clock": ("a",)} if services is None else services
    id = number.to_bytes(16, "big")
    return Peer(id, Record(node=id.hex(), host="h", endpoints=("ipc:///s",), services=services, state=state))


def picture(*peers: Peer) -> Routes:
    return Routes().changed(peers)


def load(peer: Peer, in_flight: int = 0, reported: int = 0) -> None:
    for _ in range(in_flight):
        peer.calls.begin(Call(wire.REQUEST))
    peer.calls.load = reported


# The picture --------------------------------------------------------------------------------------


def test_routes_stand_in_the_order_of_node_ids_then_of_the_record() -> None:
    second, first = peer_of(2, {"clock": ("b", "a")}), peer_of(1)
    assert [(route.peer, route.server) for route in picture(second, first).of("clock")] == [
        (first, "a"), (second, "b"), (second, "a"),
    ]  # fmt: skip


def test_peer_is_a_route_in_usable_states_only() -> None:
    for state in TRANSITIONS:
        peer = peer_of(1)
        peer.state = state
        assert bool(routes_to(peer)) == (state in USABLE)


def test_peer_without_record_or_draining_by_its_record_is_no_route() -> None:
    peer = peer_of(1)
    peer.record = None
    assert routes_to(peer) == ()
    assert routes_to(peer_of(1, state="draining")) == ()


def test_named_server_is_never_replaced_by_another() -> None:
    routes = picture(peer_of(1, {"clock": ("a", "b"), "lock": ("c",)}), peer_of(2))
    assert {route.server for route in routes.of("clock", "a")} == {"a"}
    assert len(routes.of("clock", "a")) == 2
    assert routes.of("clock", "c") == ()
    assert routes.of("nothing", "a") == ()
    assert routes.of("clock", "a") is routes.of("clock", "a"), "made once"


def test_server_names_that_nobody_has_are_not_remembered() -> None:
    routes = picture(peer_of(1))
    for number in range(100):
        assert routes.of("clock", f"host-{number}") == ()
    assert len(routes._by_server) < 10


def test_fanout_addresses_each_server_of_a_peer_once() -> None:
    routes = picture(peer_of(1, {"clock": ("a", "a", "b")}))
    assert [route.server for route in routes.of("clock")] == ["a", "a", "b"]
    assert [route.server for route in routes.distinct("clock")] == ["a", "b"]
    assert [route.server for route in routes.distinct("clock", "a")] == ["a"]


def test_picture_is_not_changed_but_replaced() -> None:
    peer, other = peer_of(1), peer_of(2)
    before = picture(peer, other)
    peer.state = DRAINING
    after = before.changed([peer])
    assert len(before.of("clock")) == 2
    assert [route.peer for route in after.of("clock")] == [other]
    other.state = DRAINING
    last = after.changed([other])
    assert last.by_service == {}
    peer.state = other.state = KNOWN
    assert last.changed([peer, other]).by_service == before.by_service


SERVICES = st.dictionaries(st.sampled_from(["clock", "lock"]), st.lists(st.sampled_from("ab"), max_size=3).map(tuple))
CHANGES = st.tuples(st.integers(0, 4), SERVICES, st.sampled_from(sorted(TRANSITIONS)), st.booleans())


@given(st.lists(st.lists(CHANGES, max_size=4), max_size=10))
def test_picture_of_changes_is_the_picture_of_everything(
    rounds: list[list[tuple[int, dict[str, tuple[str, ...]], str, bool]]],
) -> None:
    peers = [peer_of(number, {}) for number in range(5)]
    routes = picture(*peers)
    for changes in rounds:
        for number, services, state, known in changes:
            peer = peers[number]
            peer.state = state
            peer.record = peer_of(number, services).record if known else None
        routes = routes.changed([peers[number] for number in {number for number, *_ in changes}])
        everything = [route for peer in peers for route in routes_to(peer)]
        for service in ("clock", "lock"):
            assert list(routes.of(service)) == [route for route in everything if route.service == service]
            for server in "ab":
                assert list(routes.of(service, server)) == [
                    route for route in everything if (route.service, route.server) == (service, server)
                ]


# The choice ---------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(0, 100), st.integers(0, 3), st.integers(0, 3))
def test_equal_load_is_strict_round_robin(size: int, start: int, in_flight: int, reported: int) -> None:
    peers = [peer_of(number) for number in range(size)]
    for peer in peers:
        load(peer, in_flight, reported)
    routes = picture(*peers).of("clock")
    chosen = [choose(routes, start + turn) for turn in range(3 * size)]
    assert chosen == [routes[(start + turn) % size] for turn in range(3 * size)]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=6), st.integers(0, 20))
def test_less_loaded_of_the_two_whose_turn_it_is_gets_the_request(loads: list[tuple[int, int]], turn: int) -> None:
    peers = [peer_of(number) for number in range(len(loads))]
    for peer, (in_flight, reported) in zip(peers, loads, strict=True):
        load(peer, in_flight, reported)
    routes = picture(*peers).of("clock")
    weights = [sum(each) for each in loads]
    first, second = turn % len(loads), (turn + 1) % len(loads)
    assert choose(routes, turn) is routes[second if weights[second] < weights[first] else first]


def test_two_servers_of_one_peer_share_its_load_and_take_turns() -> None:
    peer = peer_of(1, {"clock": ("a", "b")})
    load(peer, 5, 5)
    routes = picture(peer).of("clock")
    assert [choose(routes, turn).server for turn in range(4)] == ["a", "b", "a", "b"]


def test_load_that_was_reported_once_fades_so_that_its_server_is_asked_again() -> None:
    peers = [peer_of(number) for number in range(3)]
    load(peers[0], reported=40)
    routes = picture(*peers).of("clock")
    asked: Counter[Route] = Counter(choose(routes, turn) for turn in range(60))
    assert asked[routes[0]] > 5


# The subset ---------------------------------------------------------------------------------------


def servers_of_clients(clients: int, servers: list[bytes], subset: int) -> list[set[bytes]]:
    """For each client the servers that it goes to."""
    found = []
    records = [
        Record(node=id.hex(), host="h", endpoints=("ipc:///s",), services={"clock": (id.hex(),)}) for id in servers
    ]
    for number in range(clients):
        peers = PeerTable(sha256(b"client %d" % number).digest()[:16], lambda: 0.5)
        routes = Routes(peers.node, subset).changed(peers.learn(records))
        found.append({route.peer.id for route in routes.candidates("clock")})
    return found


def ids(number: int) -> list[bytes]:
    return [sha256(b"server %d" % each).digest()[:16] for each in range(number)]


def test_ten_thousand_clients_spread_over_a_hundred_servers_within_15_percent_of_even() -> None:
    chosen = Counter(server for servers in servers_of_clients(10_000, ids(100), 12) for server in servers)
    even = 10_000 * 12 / 100
    assert len(chosen) == 100
    assert max(chosen.values()) <= even * 1.15
    assert min(chosen.values()) >= even * 0.85


@given(st.integers(1, 40), st.integers(1, 15), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_a_server_that_leaves_moves_only_its_own_share(number: int, subset: int, random: Random) -> None:
    servers = ids(number)
    gone = random.choice(servers)
    before = servers_of_clients(20, servers, subset)
    after = servers_of_clients(20, [server for server in servers if server != gone], subset)
    for old, new in zip(before, after, strict=True):
        assert len(old) == min(subset, number)
        assert old - {gone} <= new
        assert len(new - old) == (gone in old and number > subset)


def test_subset_is_of_peers_and_keeps_all_that_one_peer_offers() -> None:
    peers = [peer_of(number, {"clock": ("a", "a", "b")}) for number in range(1, 6)]
    for peer in peers:
        peer.distance = peer.id
    routes = Routes(b"", 2).changed(peers)
    assert [(route.peer, route.server) for route in routes.candidates("clock")] == [
        (peer, server) for peer in peers[:2] for server in ("a", "a", "b")
    ]


def test_named_server_and_fan_out_know_no_subset() -> None:
    routes = Routes(b"", 2).changed([peer_of(number, {"clock": (str(number),)}) for number in range(1, 30)])
    assert len(routes.candidates("clock")) == 2
    assert len(routes.distinct("clock")) == 29
    for number in range(1, 30):
        assert [route.server for route in routes.candidates("clock", str(number))] == [str(number)]


def test_when_each_of_the_subset_was_tried_the_others_are() -> None:
    routes = Routes(b"", 2).changed([peer_of(number) for number in range(1, 5)])
    near = routes.candidates("clock")
    assert routes.untried("clock", "", ()) == near
    assert routes.untried("clock", "", near[:1]) == near[1:]
    assert set(routes.untried("clock", "", near)) == set(routes.of("clock")) - set(near)
    assert routes.untried("clock", "", routes.of("clock")) == ()


def test_the_next_nearest_steps_in_for_a_peer_that_cannot_be_used() -> None:
    peers = [peer_of(number) for number in range(1, 6)]
    for peer in peers:
        peer.distance = peer.id
    routes = Routes(b"", 2).changed(peers)
    peers[0].state = DRAINING
    assert [route.peer for route in routes.changed(peers[:1]).candidates("clock")] == peers[1:3]
