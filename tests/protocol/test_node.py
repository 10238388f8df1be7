"""One node's decisions together: two nodes, joined by function calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onehop.errors import ProtocolError, VersionMismatch, WireError
from onehop.interfaces import Record
from onehop.protocol import peers as states
from onehop.protocol import wire
from onehop.protocol.calls import LOST, REJECTED, REPLIED, TAKEN
from onehop.protocol.node import NodeProtocol
from onehop.protocol.peers import Peer
from onehop.protocol.routes import routes_to


def hello_of(talk: Any, **changes: Any) -> bytes:
    return wire.hello(wire.Hello(**{"node": talk.server.id, "expected": bytes(16), **changes}), is_answer=True)


# Connecting ---------------------------------------------------------------------------------------


def test_both_ends_know_each_other_after_a_hello(talk: Any) -> None:
    assert talk.peer.state == states.READY
    assert [sender.node for sender in talk.inbox.senders.values()] == [talk.caller.id]


def test_hello_names_who_is_wanted_and_where_numbers_begin(strangers: Any) -> None:
    frame = strangers.caller.connect(strangers.peer, 0.0)
    hello = wire.parse_hello(frame)
    assert hello == wire.Hello(strangers.caller.id, strangers.server.id, features=wire.ECHO, host="h1", first=1)
    assert not wire.header(frame).flags & wire.ANSWER


def test_peer_that_is_connected_is_not_connected_to_again(talk: Any) -> None:
    assert talk.caller.connect(talk.peer, 0.0) is None
    talk.lose()
    assert talk.peer.state == states.RESTING
    assert talk.caller.connect(talk.peer, 0.0) is not None
    assert talk.caller.connect(talk.peer, 0.0) is None


def test_window_of_the_node_holds_on_every_connection(converse: Callable[..., Any]) -> None:
    talk = converse(window_messages=3, window_bytes=10**6)
    for _ in range(2):
        assert talk.peer.calls.room[:2] == (3, 10**6)
        talk.lose()
        talk.connect(100.0)


@pytest.mark.parametrize("versions", [{"version": 9, "oldest": 2}, {"version": 0, "oldest": 0}])
def test_answer_without_a_common_version_names_both_and_what_to_do(strangers: Any, versions: Any) -> None:
    strangers.caller.connect(strangers.peer, 0.0)
    with pytest.raises(
        VersionMismatch, match=r"on 'h2' speaks wire versions . to ., this node 1 to 1; upgrade the older"
    ):
        strangers.deliver(hello_of(strangers, host="h2", **versions))
    assert strangers.peer.state == states.CONNECTING


@pytest.mark.parametrize("changes", [{"node": b"somebody else..."}, {"realm": "south"}])
def test_answer_of_another_node_or_realm_names_who_answered(strangers: Any, changes: Any) -> None:
    strangers.caller.connect(strangers.peer, 0.0)
    with pytest.raises(
        ProtocolError, match=f"the address of node {strangers.server.id.hex()} answers as node .* of realm"
    ):
        strangers.deliver(hello_of(strangers, **changes))
    assert strangers.peer.state == states.CONNECTING


def test_server_finds_the_same_version_mismatch_as_the_caller(strangers: Any) -> None:
    strangers.carry(wire.hello(wire.Hello(strangers.caller.id, bytes(16), version=9, oldest=2)))
    [(_, frame)] = strangers.inbox.outgoing
    assert wire.parse_hello(frame).version == wire.VERSION, "so the newer caller can say so too"


def test_second_answer_to_a_hello_changes_nothing(talk: Any) -> None:
    assert not talk.deliver(hello_of(talk))
    assert talk.peer.state == states.READY


@pytest.mark.parametrize("kind", [wire.REQUEST, wire.CAST, wire.CREDIT, wire.CANCEL, wire.ACK])
def test_kind_that_does_not_go_to_a_caller_is_refused_and_changes_nothing(talk: Any, kind: int) -> None:
    with pytest.raises(WireError, match=f"kind {kind}"):
        talk.caller.control(talk.peer, wire.pack(kind), 0.0, [])
    assert talk.peer.state == states.READY


def test_probe_asks_nothing_of_a_caller(talk: Any) -> None:
    assert not talk.deliver(wire.pack(wire.PING))
    assert talk.peer.state == states.READY


# Talking ------------------------------------------------------------------------------------------


def test_call_cast_and_stream_from_end_to_end(talk: Any) -> None:
    call, cast, lines = talk.request(), talk.request(wire.CAST), talk.request(flags=wire.STREAM)
    talk.carry_back()
    first, _, third = talk.moved
    talk.answer(first, b"noon", load=2)
    assert (call.outcome, call.body, cast.outcome, talk.peer.calls.load) == (REPLIED, b"noon", TAKEN, 2)
    lines.items, lines.granted = [], 1
    talk.carry(wire.pack(wire.CREDIT, number=1, id=lines.id))
    assert third.granted == 1
    talk.deliver(wire.answer(wire.ITEM, 0, third.id, b"one"))
    talk.answer(third, b"", wire.STREAM)
    assert (lines.items, lines.outcome) == ([b"one"], REPLIED)
    assert not talk.peer.calls.pending


def test_lost_connection_ends_calls_at_one_end_and_cancels_them_at_the_other(talk: Any) -> None:
    call = talk.request()
    assert talk.lose() == [call]
    assert (call.outcome, call.body) == (LOST, "the connection ended")
    assert talk.moved[0].cancelled


def test_late_reply_after_reconnection_is_counted_and_reaches_nobody(talk: Any) -> None:
    talk.request()
    [old] = talk.moved
    talk.lose(now=0.0)
    talk.connect(100.0)
    new = talk.request()
    talk.deliver(wire.answer(wire.REPLY, 0, old.id, b"late"))
    assert (new.outcome, talk.peer.calls.late) == (None, 1)
    assert new.id > old.id


def test_server_that_left_and_came_back_under_its_id_runs_what_it_is_sent(talk: Any) -> None:
    for _ in range(20):
        talk.request(wire.CAST)
    talk.caller.learn([])
    talk.lose()
    assert not talk.caller.peers.peers
    talk.caller.learn([talk.record()])
    talk.connect()
    talk.moved.clear()
    cast = talk.request(wire.CAST)
    talk.carry_back()
    assert cast.outcome == TAKEN
    assert len(talk.moved) == 1


# Routes -------------------------------------------------------------------------------------------


def test_peer_is_a_route_from_its_record_to_its_loss_and_again_after_its_pause(strangers: Any) -> None:
    def offered() -> int:
        return len(strangers.caller.routes.of("clock"))

    assert offered() == 1, "before any connection"
    strangers.connect()
    assert offered() == 1
    strangers.lose(now=10.0)
    assert offered() == 0
    assert strangers.caller.handle_timer(10.0) == []
    assert strangers.caller.handle_timer(20.0) == [strangers.peer]
    assert offered() == 0, "not before it has answered"
    strangers.connect(20.0)
    assert offered() == 1
    strangers.caller.learn([])
    assert offered() == 0


def test_goodbye_ends_the_route_and_not_the_calls(talk: Any) -> None:
    call = talk.request()
    talk.inbox.drain()
    talk.carry_back()
    assert talk.caller.routes.of("clock") == ()
    assert call.outcome is None
    before = talk.caller.routes
    talk.deliver(wire.goodbye("again"))
    assert talk.caller.routes is before


def test_final_goodbye_ends_what_is_open_as_refused_and_says_so_once(talk: Any) -> None:
    done, open_call, cast = talk.request(), talk.request(), talk.request(wire.CAST)
    talk.carry_back()
    talk.answer(talk.moved[0])
    talk.news.clear()
    talk.inbox.drain(final=True)
    talk.carry_back()
    assert talk.news == [open_call]
    assert (open_call.outcome, open_call.body[0]) == (REJECTED, "draining")
    assert (done.outcome, cast.outcome) == (REPLIED, TAKEN)
    assert not talk.peer.calls.pending
    assert talk.caller.routes.of("clock") == ()
    talk.deliver(wire.goodbye(final=True))
    assert talk.news == [open_call]


def test_record_that_stands_twice_in_a_view_counts_once(strangers: Any) -> None:
    strangers.caller.learn([strangers.record(), strangers.record()])
    assert len(strangers.caller.routes.of("clock")) == 1


def test_receivers_of_a_fan_out_are_all_who_are_known_reachable_or_not(talk: Any) -> None:
    assert [route.peer for route in talk.caller.receivers("clock")] == [talk.peer]
    talk.caller.lost(talk.peer, "the connection ended", 0.0)
    assert talk.caller.routes.of("clock") == ()
    (route,) = talk.caller.receivers("clock")
    assert route.peer is talk.peer
    assert talk.caller.receivers("clock", route.server) == (route,)
    assert talk.caller.receivers("clock", "another") == talk.caller.receivers("lock") == ()
    talk.caller.connect(talk.peer, 0.0)
    assert talk.caller.receivers("clock") == (route,), "while it is tried again too"


def record(number: int, services: tuple[str, ...]) -> Record:
    return Record(node=f"{number:032x}", host="h", endpoints=("ipc:///s",), services=dict.fromkeys(services, ("a",)))


STEPS = st.one_of(
    st.tuples(
        st.just("learn"),
        st.dictionaries(st.integers(1, 4), st.lists(st.sampled_from(["clock", "lock"]), unique=True).map(tuple)),
    ),
    st.tuples(st.sampled_from(["connect", "hello", "goodbye", "lost"]), st.integers(1, 4)),
    st.tuples(st.just("timer"), st.integers(0, 100)),
)


@given(st.lists(STEPS, max_size=40))
def test_routes_are_those_of_the_peers_whatever_happened(steps: list[tuple[str, Any]]) -> None:
    node = NodeProtocol(b"n" * 16, random=lambda: 0.5)
    now = 0.0
    for step, detail in steps:
        peer = node.peers.peers.get(detail.to_bytes(16, "big")) if isinstance(detail, int) else None
        if step == "learn":
            node.learn([record(number, services) for number, services in detail.items()])
        elif step == "timer":
            now += detail
            node.handle_timer(now)
        elif peer is None:
            continue
        elif step == "connect":
            node.connect(peer, now)
        elif step == "hello":
            node.control(peer, wire.hello(wire.Hello(peer.id, node.id), is_answer=True), now, [])
        elif step == "goodbye":
            node.control(peer, wire.goodbye(), now, [])
        else:
            node.lost(peer, "lost", now)
        for service in ("clock", "lock"):
            expected = [
                route
                for peer in sorted(node.peers.peers.values(), key=lambda peer: peer.id)
                for route in routes_to(peer)
                if route.service == service
            ]
            assert list(node.routes.of(service)) == expected


def replaced(node: NodeProtocol, *others: Record) -> Peer:
    """A server that many were connected to is lost, and another comes in its place, for which ``node`` has to wait."""
    node.learn([record(1, ("clock",)), *others])
    peer = node.peers.peers[(1).to_bytes(16, "big")]
    node.connect(peer, 0.0)
    node.peers.event(peer, states.HELLO)
    peer.place = 1_000
    node.lost(peer, "the connection ended", 0.0)
    node.learn([record(2, ("clock",)), *others], 1.0)
    return node.peers.peers[(2).to_bytes(16, "big")]


def test_a_server_started_anew_is_a_route_again_and_connected_to_when_our_turn_has_come() -> None:
    node = NodeProtocol(b"n" * 16, random=lambda: 0.0)
    new = replaced(node)
    assert node.routes.of("clock") == ()
    assert node.handle_timer(5.9) == []
    assert node.routes.of("clock") == ()
    assert node.handle_timer(6.1) == [new]
    assert [route.peer for route in node.routes.of("clock")] == [new]
    assert node.connect(new, 6.1) is not None
    assert node.handle_timer(7.0) == [], "once"


def test_a_server_started_anew_is_not_connected_to_where_others_are_nearer() -> None:
    node = NodeProtocol(b"n" * 16, random=lambda: 0.0, subset=1)
    new = replaced(node, *(record(number, ("clock",)) for number in range(3, 9)))
    assert node.handle_timer(6.1) == []
    assert new in [route.peer for route in node.routes.of("clock")]
    assert new not in [route.peer for route in node.routes.candidates("clock")]


def test_a_peer_that_does_not_answer_is_a_route_only_where_there_is_no_other(talk: Any) -> None:
    node, other = talk.caller, b"another-server-1"
    node.learn([talk.record(), talk.record(node=other.hex())])
    assert node.judged(talk.peer, False, 0.0)
    assert not node.judged(talk.peer, False, 0.0), "that is no news"
    assert [route.peer.id for route in node.routes.candidates("clock")] == [other]
    assert len(node.receivers("clock")) == 2, "a fan-out is for everybody"
    node.learn([talk.record()])
    assert [route.peer for route in node.routes.candidates("clock")] == [talk.peer]
    assert [route.peer for route in node.routes.candidates("clock", "a")] == [talk.peer]
    node.learn([talk.record(), talk.record(node=other.hex())])
    assert node.judged(talk.peer, True, 0.0)
    assert len(node.routes.candidates("clock")) == 2


def test_retries_of_a_node_are_counted_over_all_that_it_sends(talk: Any) -> None:
    talk.request()
    granted = 0
    while talk.caller.may_retry(0.0):
        granted += 1
    assert granted >= 10
    assert not talk.caller.may_retry(0.05)
    assert talk.caller.may_retry(1.0)


def test_an_answer_to_a_hello_tells_which_features_the_peer_has(talk: Any) -> None:
    assert talk.peer.features == wire.ECHO
