"""Peers: the table is the law, and numbers outlive connections."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onehop.interfaces import Record
from onehop.protocol import peers as states
from onehop.protocol import wire
from onehop.protocol.calls import Call, room_for
from onehop.protocol.peers import FIRST_PAUSE, LONGEST_PAUSE, TRANSITIONS, USABLE, Peer, PeerTable
from onehop.registry.hosts import RETURNS_A_SECOND

EVENTS = [
    states.CONNECT, states.HELLO, states.GOODBYE, states.LOST, states.FORGOTTEN,
    states.IDLE, states.REPLACED, states.HELD_BACK, states.RESTED, states.SILENT, states.ANSWERED,
]  # fmt: skip
WAYS = {
    states.KNOWN: [],
    states.CONNECTING: [states.CONNECT],
    states.READY: [states.CONNECT, states.HELLO],
    states.STALLED: [states.CONNECT, states.HELLO, states.SILENT],
    states.DRAINING: [states.CONNECT, states.HELLO, states.GOODBYE],
    states.RESTING: [states.CONNECT, states.LOST],
    states.GONE: [states.FORGOTTEN],
}


def record(number: int, **fields: Any) -> Record:
    return Record(
        node=f"{number:032x}", host="h", **{"endpoints": ("ipc:///s",), "services": {"clock": ("a",)}, **fields}
    )


def table(*numbers: int, random: float = 0.5) -> PeerTable:
    peers = PeerTable(bytes(16), lambda: random)
    peers.learn([record(number) for number in numbers])
    return peers


def only(peers: PeerTable) -> Peer:
    [peer] = peers.peers.values()
    return peer


def in_state(state: str) -> tuple[PeerTable, Peer]:
    peers = table(1)
    peer = only(peers)
    for event in WAYS[state]:
        assert peers.event(peer, event)
    assert peer.state == state
    return peers, peer


def begin(peer: Peer) -> int:
    return peer.calls.begin(Call(wire.CAST))


# The table ----------------------------------------------------------------------------------------


def test_table_names_every_state_and_no_unknown_event() -> None:
    assert set(WAYS) == set(TRANSITIONS)
    assert {event for row in TRANSITIONS.values() for event in row} == set(EVENTS)
    assert {state for row in TRANSITIONS.values() for state in row.values()} <= set(TRANSITIONS)
    assert not TRANSITIONS[states.GONE], "nobody comes back from there"
    assert set(TRANSITIONS) >= USABLE


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("state", WAYS)
def test_listed_event_leads_where_the_table_says_and_unlisted_one_changes_nothing(state: str, event: str) -> None:
    peers, peer = in_state(state)
    before = {name: getattr(peer, name) for name in Peer.__slots__} | {"known": dict(peers.peers)}
    told = peers.event(peer, event, now=7.0)
    assert told == (event in TRANSITIONS[state])
    if told:
        assert peer.state == TRANSITIONS[state][event]
    else:
        assert before == {name: getattr(peer, name) for name in Peer.__slots__} | {"known": peers.peers}


@given(st.lists(st.sampled_from(EVENTS), max_size=30))
def test_peer_is_in_the_table_exactly_until_it_is_gone(events: list[str]) -> None:
    peers = table(1)
    peer = only(peers)
    for event in events:
        peers.event(peer, event)
        assert (peer.state == states.GONE) == (peer.id not in peers.peers)


# Records ------------------------------------------------------------------------------------------


def test_first_view_makes_peers_and_an_equal_one_changes_nothing() -> None:
    peers = PeerTable(bytes(16), lambda: 0.5)
    view = [record(1), record(2)]
    assert {peer.id[-1] for peer in peers.learn(view)} == {1, 2}
    assert peers.learn(view) == []
    assert {peer.state for peer in peers.peers.values()} == {states.KNOWN}


def test_new_record_takes_the_place_of_the_old_one() -> None:
    peers = table(1)
    peer = only(peers)
    newer = record(1, state="draining")
    assert peers.learn([newer]) == [peer]
    assert peer.record is newer


@pytest.mark.parametrize(
    "broken",
    [
        Record(node="not hexadecimal", host="h", endpoints=("ipc:///s",)),
        Record(node="00" * 15, host="h", endpoints=("ipc:///s",)),
        Record(node="00" * 17, host="h", endpoints=("ipc:///s",)),
        Record(node="00" * 16, host="h"),
    ],
    ids=["no hexadecimal", "too short", "too long", "no endpoints"],
)
def test_record_that_names_nobody_who_can_be_reached_is_passed_over(broken: Record) -> None:
    peers = PeerTable(bytes(16), lambda: 0.5)
    assert len(peers.learn([broken, record(1)])) == 1
    assert len(peers.peers) == 1


@pytest.mark.parametrize("state", [states.KNOWN, states.RESTING])
def test_peer_without_connection_goes_with_its_record(state: str) -> None:
    peers, peer = in_state(state)
    assert peers.learn([]) == [peer]
    assert (peer.state, peers.peers) == (states.GONE, {})


@pytest.mark.parametrize("state", [states.CONNECTING, states.READY, states.DRAINING])
def test_peer_with_a_connection_outlives_its_record_until_the_connection_ends(state: str) -> None:
    peers, peer = in_state(state)
    assert peers.learn([]) == [peer]
    assert (peer.state, peer.record) == (state, None)
    assert peers.learn([]) == [], "said once"
    assert peers.event(peer, states.LOST)
    assert (peer.state, peers.peers) == (states.GONE, {})


def test_record_that_comes_back_finds_its_peer_still_connected() -> None:
    peers, peer = in_state(states.READY)
    peers.learn([])
    peers.learn([record(1)])
    assert only(peers) is peer
    peers.event(peer, states.LOST)
    assert peer.state == states.RESTING


def test_record_that_outlived_its_peer_goes_without_a_trace() -> None:
    peers, peer = in_state(states.DRAINING)
    assert peers.event(peer, states.LOST)
    assert peer.record is not None
    assert peers.learn([peer.record]) == [], "who said goodbye is not asked again for the same record"
    assert peers.learn([]) == []
    assert peers.peers == {}


# Pauses -------------------------------------------------------------------------------------------


def pause_after(failures: int, random: float) -> float:
    peers = table(1, random=random)
    peer = only(peers)
    for _ in range(failures):
        peers.event(peer, states.CONNECT)
        peers.event(peer, states.LOST, now=100.0)
    return peer.rested_at - 100.0


@given(st.integers(1, 50), st.floats(0, 1, exclude_max=True))
def test_pause_grows_with_failures_up_to_its_limit_and_is_spread_over_its_whole_length(
    failures: int, random: float
) -> None:
    longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(failures, 10))
    assert pause_after(failures, random) == pytest.approx(random * longest, abs=1e-9)
    assert pause_after(failures, 0.0) == 0.0
    assert pause_after(20, 0.999) < LONGEST_PAUSE


def test_success_makes_the_next_pause_short_again() -> None:
    peers = table(1)
    peer = only(peers)
    for _ in range(5):
        for event in (states.CONNECT, states.LOST):
            peers.event(peer, event)
    assert peer.failures == 5
    peers.event(peer, states.CONNECT)
    peers.event(peer, states.HELLO)
    assert peer.failures == 0


def test_rested_peer_is_tried_again_at_its_time_and_not_before() -> None:
    peers = table(1, 2)
    first, second = peers.peers.values()
    peers.event(first, states.CONNECT)
    peers.event(first, states.LOST, now=10.0)
    assert peers.due(first.rested_at - 0.001) == []
    assert peers.due(first.rested_at) == [first]
    assert (first.state, second.state) == (states.RESTING, states.KNOWN)


def test_peer_that_failed_is_usable_again_when_it_has_answered_and_not_before() -> None:
    peers = table(1)
    peer = only(peers)
    for event, usable in (
        (states.CONNECT, True), (states.LOST, False), (states.CONNECT, False), (states.LOST, False),
        (states.CONNECT, False), (states.HELLO, True), (states.IDLE, True),
    ):  # fmt: skip
        assert peers.event(peer, event)
        assert peer.usable == usable
        assert (peer.id in peers.away) == (not usable)


# Numbers and tables of calls ----------------------------------------------------------------------


def test_connection_that_ends_leaves_its_calls_behind_and_the_numbers_go_on() -> None:
    peers, peer = in_state(states.READY)
    peer.calls.room = room_for(7, 8)
    peer.calls.late, peer.calls.load = 3, 5
    old = peer.calls
    assert [begin(peer) for _ in range(3)] == [1, 2, 3]
    peers.event(peer, states.LOST)
    assert peer.calls is not old
    assert (*peer.calls.room[:2], peer.calls.late) == (7, 8, 3)
    assert peer.calls.load == 0, "of what waits there now nothing is known"
    assert len(old.pending) == 3
    assert not peer.calls.pending
    assert peer.calls.last == 3
    assert begin(peer) == 4


def test_peer_that_returns_under_its_id_goes_on_with_its_numbers() -> None:
    peers, peer = in_state(states.READY)
    used = {begin(peer) for _ in range(20)}
    peers.learn([])
    peers.event(peer, states.LOST)
    assert not peers.peers
    peers.learn([record(1)])
    again = only(peers)
    assert again is not peer
    assert begin(again) > max(used)


def test_number_used_while_a_peer_went_is_not_used_again() -> None:
    """Two threads take numbers 6 and 5; the one with 5 is the last to write down what it took."""
    peers, peer = in_state(states.READY)
    six = max(begin(peer) for _ in range(6))
    peer.calls.last = 5
    peers.learn([])
    peers.event(peer, states.LOST)
    peers.learn([record(1)])
    assert begin(only(peers)) > six


# Returning ----------------------------------------------------------------------------------------


def lose(peers: PeerTable, peer: Peer, place: int, now: float = 0.0) -> None:
    for event in (states.CONNECT, states.HELLO):
        assert peers.event(peer, event, now)
    peer.place = place
    assert peers.event(peer, states.LOST, now)


def test_a_crowd_that_lost_one_peer_returns_in_the_order_in_which_it_came() -> None:
    times = []
    for place in range(1, 1_001):
        peers = table(1, random=0.0)
        lose(peers, only(peers), place, now=100.0)
        times.append(only(peers).rested_at)
    assert times == sorted(times)
    assert max(times) < 100.0 + 15.0
    busiest = max(sum(start <= time < start + 1.0 for time in times) for start in times)
    assert busiest < 300


def test_a_crowd_tries_the_old_address_after_a_directory_that_was_lost_too_has_told_of_a_successor() -> None:
    for place in (100, 200, 1_000):
        peers = table(1, random=0.0)
        lose(peers, only(peers), place, now=0.0)
        back_at_the_directory = 0.1 + 1.2 * place / RETURNS_A_SECOND
        assert only(peers).rested_at > back_at_the_directory


def test_the_first_pause_grows_by_no_more_than_the_jitter_where_there_is_no_crowd() -> None:
    peers = table(1, random=1.0)
    lose(peers, only(peers), 1)
    assert only(peers).rested_at <= 2 * FIRST_PAUSE + 0.01


def test_who_fails_again_waits_with_full_jitter_over_twice_the_time_of_the_crowd() -> None:
    for random in (0.0, 0.5, 0.999):
        peers = table(1, random=random)
        peer = only(peers)
        lose(peers, peer, 1_000)
        turn = peer.turn
        peers.event(peer, states.CONNECT, 50.0)
        peers.event(peer, states.LOST, 50.0)
        assert peer.rested_at == pytest.approx(50.0 + random * 2 * turn)


@pytest.mark.parametrize(("place", "state"), [(1, states.KNOWN), (1_000, states.RESTING)])
def test_a_server_started_anew_is_held_back_until_our_turn_where_there_is_a_crowd(place: int, state: str) -> None:
    peers = table(1)
    lose(peers, only(peers), place)
    peers.learn([record(2)], now=10.0)
    heir = peers.peers[(2).to_bytes(16, "big")]
    assert heir.state == state
    if state == states.RESTING:
        assert heir.rested_at == pytest.approx(10.0 + 5.0)
        assert peers.expected("clock", "") == peers.expected("clock", "a") == heir.rested_at
        assert peers.expected("clock", "b") == peers.expected("lock", "") == states.NEVER
        assert peers.due(14.9) == []
        assert peers.due(15.1) == [heir]
        assert peers.event(heir, states.RESTED)
        assert heir.usable, "nothing is wrong with it"
    assert peers.expected("clock", "") == states.NEVER


@pytest.mark.parametrize(
    ("fields", "now"),
    [({"services": {"clock": ("b",)}}, 10.0), ({"services": {"lock": ("a",)}}, 10.0), ({}, states.HEIRS_AFTER + 1.0)],
    ids=["another server", "another service", "much later"],
)
def test_a_peer_that_is_no_lost_server_is_not_held_back(fields: dict[str, Any], now: float) -> None:
    peers = table(1)
    lose(peers, only(peers), 1_000)
    peers.learn([record(2, **fields)], now=now)
    assert peers.peers[(2).to_bytes(16, "big")].state == states.KNOWN


def test_a_peer_whose_connection_was_not_used_can_be_connected_to_at_once_and_goes_on_in_its_numbers() -> None:
    peers = table(1)
    peer = only(peers)
    for event in (states.CONNECT, states.HELLO):
        peers.event(peer, event)
    before = begin(peer)
    peer.calls.pending.clear()
    assert peers.event(peer, states.IDLE)
    assert peer.state in USABLE
    assert (peer.failures, peer.rested_at) == (0, 0.0)
    assert begin(peer) == before + 1


def test_an_address_at_which_another_node_answered_is_left_alone_for_a_minute() -> None:
    peers = table(1)
    peer = only(peers)
    peers.event(peer, states.CONNECT)
    assert peers.event(peer, states.REPLACED, 7.0)
    assert peer.rested_at == 7.0 + states.REPLACED_PAUSE
    assert peers.expected("clock", "") == states.NEVER, "nobody waits for it"


@pytest.mark.parametrize("way", ["killed", "drained", "withdrawn first"])
def test_turns_are_taken_however_the_server_went(way: str) -> None:
    peers = table(1)
    peer = only(peers)
    for event in (states.CONNECT, states.HELLO):
        peers.event(peer, event)
    peer.place = 1_000
    if way == "drained":
        peers.event(peer, states.GOODBYE)
    if way != "withdrawn first":
        peers.event(peer, states.LOST, 1.0)
    peers.learn([record(2)], now=2.0)  # the same view takes the old one away
    assert peers.peers[(2).to_bytes(16, "big")].state == states.RESTING


@pytest.mark.parametrize("state", [states.CONNECTING, states.READY, states.DRAINING])
@pytest.mark.parametrize("event", [states.LOST, states.REPLACED])
def test_a_connection_that_ends_leaves_no_peer_connected_whatever_its_state(state: str, event: str) -> None:
    peers, peer = in_state(state)
    assert peers.event(peer, event)
    assert peer.state in (states.RESTING, states.GONE)


def test_who_was_lost_is_left_alone_when_his_successor_is_there() -> None:
    peers = table(1)
    old = only(peers)
    lose(peers, old, 1_000)
    assert old.rested_at < 15.0
    peers.learn([record(1), record(2)], now=1.0)
    assert old.rested_at == 1.0 + states.REPLACED_PAUSE
    peers.learn([record(1), record(2), record(3, services={"lock": ("b",)})], now=2.0)
    assert old.rested_at == 1.0 + states.REPLACED_PAUSE


def test_who_was_lost_by_few_is_tried_again_soon_although_another_came_under_his_name() -> None:
    peers = table(1)
    old = only(peers)
    lose(peers, old, 2)
    before = old.rested_at
    peers.learn([record(1), record(2)], now=1.0)
    assert old.rested_at == before
