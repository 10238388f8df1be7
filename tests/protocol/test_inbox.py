"""Requests taken in: who may send them, whether they are new, whether there is room, and what is owed."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onehop.protocol import wire
from onehop.protocol.calls import REJECTED, REPLIED, TAKEN
from onehop.protocol.inbox import (
    ADDRESSES_KEPT,
    AGAIN,
    GIVEN_UP,
    NEW,
    SILENT_AFTER,
    UNKNOWN,
    WINDOW_KEPT,
    WINDOWS_KEPT,
    Inbox,
    Message,
    Request,
    Sender,
    Window,
)  # fmt: skip

IDENTITY = b"\0conn"
OTHER = b"another-node-001"


def hello_of(node: bytes, **changes: Any) -> bytes:
    return wire.hello(wire.Hello(node, bytes(16), **changes))


# Windows ------------------------------------------------------------------------------------------


class PlainWindow:
    """The same, by remembering everything."""

    def __init__(self, reach: int, first: int) -> None:
        self.reach, self.first, self.highest = reach, first, first - 1
        self.come: set[int] = set()

    def take(self, number: int) -> str:
        if number <= self.highest and (number < self.highest - self.reach or number < self.first):
            return UNKNOWN
        self.highest = max(number, self.highest)
        if number in self.come:
            return AGAIN
        self.come.add(number)
        return NEW


@given(reach=st.integers(1, 8), first=st.integers(1, 30), steps=st.lists(st.integers(-12, 12), max_size=120))
def test_window_tells_new_from_seen_as_one_that_remembers_everything(reach: int, first: int, steps: list[int]) -> None:
    window, plain = Window(reach, first), PlainWindow(reach, first)
    at = first
    for step in steps:
        at = max(first, at + step)
        assert window.take(at) == plain.take(at), at


@given(st.lists(st.integers(0, 2**64 - 1), max_size=200), st.integers(1, 16))
def test_window_takes_no_number_twice(numbers: list[int], reach: int) -> None:
    window = Window(reach)
    taken = [number for number in numbers * 2 if window.take(number) is NEW]
    assert len(taken) == len(set(taken))


@given(st.permutations(range(1, 33)))
def test_window_takes_every_number_within_reach_in_whatever_order(numbers: list[int]) -> None:
    window = Window(32)
    assert [window.take(number) for number in numbers] == [NEW] * 32
    assert [window.take(number) for number in numbers] == [AGAIN] * 32


@given(st.lists(st.integers(1, 200), max_size=100), st.integers(1, 16))
def test_window_remembers_no_more_than_twice_its_reach(steps: list[int], reach: int) -> None:
    window = Window(reach)
    number = 0
    for step in steps:
        number += step
        window.take(number)
        assert len(window._missing) <= 2 * reach


def test_sender_in_order_costs_its_window_nothing() -> None:
    window = Window(4096)
    assert all(window.take(number) is NEW for number in range(1, 10_000))
    assert not window._missing


def test_window_at_the_edge_of_its_reach() -> None:
    window = Window(10)
    window.take(100)
    assert [window.take(number) for number in (90, 89, 0)] == [NEW, UNKNOWN, UNKNOWN]
    assert window.take(2**64 - 1) is NEW


# Hello --------------------------------------------------------------------------------------------


def test_server_answers_a_hello_with_its_own_and_knows_the_sender(strangers: Any) -> None:
    strangers.connect(now=1.0)
    [sender] = strangers.inbox.senders.values()
    assert (sender.node, sender.host, sender.heard) == (strangers.caller.id, "h1", 1.0)


def test_request_before_hello_is_refused(strangers: Any) -> None:
    call = strangers.request()
    strangers.carry_back()
    assert call.outcome == REJECTED
    assert call.body[0] == "hello first"
    assert not strangers.moved
    assert strangers.inbox.refused == {"hello first": 1}


@pytest.mark.parametrize("changes", [{"expected": OTHER}, {"realm": "south"}])
def test_hello_for_another_node_or_realm_is_refused_and_its_sender_not_known(strangers: Any, changes: Any) -> None:
    strangers.carry(wire.hello(wire.Hello(**{"node": OTHER, "expected": bytes(16), **changes})))
    [(_, frame)] = strangers.inbox.outgoing
    assert wire.header(frame).id == 0
    assert wire.rejection(frame) == ("wrong node", f"this is node {strangers.server.id.hex()} of realm ''")
    assert not strangers.inbox.senders
    assert strangers.inbox.refused == {"wrong node": 1}


@pytest.mark.parametrize("versions", [{"version": 9, "oldest": 2}, {"version": 0, "oldest": 0}])
def test_hello_without_a_common_version_is_answered_and_its_sender_not_known(strangers: Any, versions: Any) -> None:
    strangers.carry(hello_of(OTHER, **versions))
    [(_, frame)] = strangers.inbox.outgoing
    assert wire.parse_hello(frame).node == strangers.server.id
    assert not strangers.inbox.senders
    assert strangers.inbox.counts == {"version mismatches": 1}


def test_draining_server_refuses_a_hello(strangers: Any) -> None:
    strangers.inbox.drain()
    strangers.carry(hello_of(OTHER))
    [(_, frame)] = strangers.inbox.outgoing
    assert (wire.header(frame).id, wire.rejection(frame)[0]) == (0, "draining")
    assert not strangers.inbox.senders


def test_hello_of_a_newer_peer_that_still_speaks_our_version_is_taken(strangers: Any) -> None:
    strangers.carry(hello_of(OTHER, version=9, oldest=1))
    assert len(strangers.inbox.senders) == 1


def test_second_hello_on_a_connection_changes_nothing_and_one_of_another_node_is_a_bad_frame(talk: Any) -> None:
    talk.request()
    talk.carry(hello_of(talk.caller.id))
    assert talk.carry_back() == 0, "it is ready already"
    talk.carry(hello_of(OTHER))
    assert [sender.node for sender in talk.inbox.senders.values()] == [talk.caller.id]
    assert talk.inbox.counts == {"bad frames": 1}
    talk.carry(talk.frame(1))
    assert talk.inbox.counts["duplicates"] == 1, "the window is the same"


def test_window_begins_at_the_first_number_that_the_hello_says(strangers: Any) -> None:
    strangers.carry(hello_of(OTHER, first=5000))
    strangers.inbox.outgoing.clear()
    for id in (5001, 5000):
        strangers.carry(strangers.frame(id))
    assert [request.id for request in strangers.moved] == [5001, 5000]
    assert not strangers.inbox.outgoing


def test_number_below_the_first_is_refused_not_acknowledged(strangers: Any) -> None:
    strangers.carry(hello_of(OTHER, first=5000))
    strangers.inbox.outgoing.clear()
    strangers.carry(strangers.frame(4999, wire.CAST))
    [(_, frame)] = strangers.inbox.outgoing
    assert wire.rejection(frame)[0] == "duplicate"


def test_windows_have_a_limit_and_the_oldest_goes_first() -> None:
    inbox = Inbox(b"s" * 16)
    for number in range(WINDOWS_KEPT + 1):
        inbox.receive(b"%d" % number, hello_of(number.to_bytes(16, "big")), None, 0.0, [])
        inbox.outgoing.clear()
    assert len(inbox._windows) == WINDOWS_KEPT
    assert bytes(16) not in inbox._windows


# Taking in ----------------------------------------------------------------------------------------


def test_request_is_taken_in_with_all_that_its_caller_said(talk: Any) -> None:
    large = bytes(wire.SECOND_FRAME_FROM)
    for body in (b"small", large):
        talk.request(flags=wire.STREAM, now=10.0, remaining=5.0, monitor=2.0, server="a", body=body)
    small, big = talk.moved
    assert (small.service, small.server, small.method, small.node) == ("clock", "a", "read", talk.caller.id)
    assert (small.id, small.kind, small.flags) == (1, wire.REQUEST, wire.STREAM | wire.MONITORED)
    assert (small.deadline, small.monitor) == (15.0, 2.0)
    assert (small.body, big.body) == (b"small", large)
    assert big.body is large, "not copied"
    assert small.target is talk.queue
    assert not small.cancelled
    assert not talk.inbox.outgoing, "a call is answered by its reply"


def test_cast_that_was_taken_in_never_expires(talk: Any) -> None:
    for _ in range(2):  # the long way, and the express lane
        talk.request(kind=wire.CAST, now=100.0, remaining=2.0)
    for request in talk.moved:
        assert request.deadline is None
        assert not talk.inbox.expired(request, 1e12)
    assert len(talk.moved) == 2


def test_cast_that_comes_too_late_is_refused(talk: Any) -> None:
    call = talk.request(kind=wire.CAST, remaining=0.0)
    talk.carry_back()
    assert (call.outcome, call.body[0]) == (REJECTED, "expired")
    assert not talk.inbox.taken


def test_request_without_deadline_never_expires(talk: Any) -> None:
    talk.request(remaining=None)
    [request] = talk.moved
    assert request.deadline is None
    assert not talk.inbox.expired(request, 1e12)


def test_cast_is_acknowledged_when_taken_in_with_the_length_of_its_queue(talk: Any) -> None:
    talk.queue.waiting = 3
    cast = talk.request(wire.CAST)
    talk.carry_back()
    assert cast.outcome == TAKEN
    assert talk.peer.calls.load == 3
    assert len(talk.moved) == 1


def test_reply_reaches_the_caller_and_gives_the_room_back_once(talk: Any) -> None:
    call = talk.request()
    [request] = talk.moved
    assert (len(talk.inbox.taken), talk.inbox.taken_bytes) == (1, request.size)
    talk.answer(request, b"noon")
    assert (call.outcome, call.body) == (REPLIED, b"noon")
    assert (len(talk.inbox.taken), talk.inbox.taken_bytes) == (0, 0)
    assert not talk.inbox.finish(request)
    assert talk.inbox.taken_bytes == 0


def test_request_goes_to_each_instance_in_turn_and_a_fanout_to_all(talk: Any) -> None:
    second = talk.offer("clock", "b")
    for _ in range(4):
        talk.request()
    assert [request.target is second for request in talk.moved] == [True, False, True, False] or [
        request.target is second for request in talk.moved
    ] == [False, True, False, True]
    talk.moved.clear()
    talk.request(wire.CAST, wire.FANOUT)
    assert {id(request.target) for request in talk.moved} == {id(talk.queue), id(second)}
    assert len(talk.inbox.outgoing) == 1, "one cast, one acknowledgement"
    for request in list(talk.inbox.taken):
        assert talk.inbox.finish(request)
    assert talk.inbox.taken_bytes == 0


def test_named_server_gets_its_requests_and_no_other(talk: Any) -> None:
    second = talk.offer("clock", "b")
    for _ in range(3):
        talk.request(server="b")
    assert all(request.target is second for request in talk.moved)


def test_unknown_service_and_unknown_server_are_told_apart(talk: Any) -> None:
    for details, told in (({"service": "lock"}, ("no service", "lock")), ({"server": "z"}, ("no server", "z"))):
        call = talk.request(**details)
        talk.carry_back()
        assert (call.outcome, call.body) == (REJECTED, told)
    assert talk.inbox.refused == {"no service": 1, "no server": 1}


def test_instance_that_is_withdrawn_gets_nothing_more_and_keeps_what_it_took(talk: Any) -> None:
    second = talk.offer("clock", "a")
    talk.request()
    talk.request()
    talk.inbox.withdraw("clock", "a", second)
    talk.inbox.withdraw("clock", "a", second)
    for _ in range(3):
        talk.request()
    assert all(request.target is talk.queue for request in talk.moved[2:])
    assert len(talk.inbox.taken) == 5
    talk.inbox.withdraw("clock", "a", talk.queue)
    call = talk.request()
    talk.carry_back()
    assert call.body[0] == "no service"
    talk.inbox.withdraw("never offered", "a", talk.queue)


def test_expired_request_is_refused_before_it_is_taken(talk: Any) -> None:
    call = talk.request(remaining=0.0)
    talk.carry_back()
    assert (call.outcome, call.body[0]) == (REJECTED, "expired")
    assert not talk.inbox.taken


def test_request_that_waited_too_long_has_expired_at_its_deadline(talk: Any) -> None:
    talk.request(now=100.0, remaining=2.0)
    [request] = talk.moved
    assert not talk.inbox.expired(request, 101.999)
    assert talk.inbox.expired(request, 102.0)


def test_number_of_requests_taken_in_is_bounded(converse: Callable[..., Any]) -> None:
    talk = converse(messages=2)
    calls = [talk.request() for _ in range(3)]
    talk.carry_back()
    assert [call.outcome for call in calls] == [None, None, REJECTED]
    assert calls[2].body == ("full", "2 requests are taken in and not answered")
    talk.answer(talk.moved[0])
    again = talk.request()
    talk.carry_back()
    assert again.outcome is None


def test_bytes_of_requests_taken_in_are_bounded_and_large_bodies_count(converse: Callable[..., Any]) -> None:
    large = bytes(wire.SECOND_FRAME_FROM)
    talk = converse(size=2 * len(large))
    calls = [talk.request(body=large) for _ in range(2)]
    talk.carry_back()
    assert [call.outcome for call in calls] == [None, REJECTED]
    assert calls[1].body[0] == "full"
    assert len(large) < talk.inbox.taken_bytes <= 2 * len(large)
    small = talk.request(body=bytes(1000))
    talk.carry_back()
    assert small.outcome is None


def test_fanout_is_taken_in_for_all_instances_or_none(converse: Callable[..., Any]) -> None:
    talk = converse(messages=2)
    for name in "bc":
        talk.offer("clock", name)
    cast = talk.request(wire.CAST, wire.FANOUT)
    talk.carry_back()
    assert (cast.outcome, len(talk.inbox.taken)) == (REJECTED, 0)


@pytest.mark.parametrize("kind", [wire.REQUEST, wire.CAST])
def test_copy_of_a_refused_request_is_refused_as_the_first_was(converse: Callable[..., Any], kind: int) -> None:
    talk = converse(messages=1)
    talk.request()
    call, frame = talk.begin(kind)
    talk.carry(frame)
    talk.answer(talk.moved[0])
    talk.carry(frame)
    assert [request.id for request in talk.moved] == [1], "its caller was told that it did not run"
    refusals = [wire.rejection(frame)[0] for _, frame in talk.inbox.outgoing if wire.kind_of(frame) == wire.REJECT]
    assert refusals == ["full", "full"]
    talk.carry_back()
    assert (call.outcome, call.body[0]) == (REJECTED, "full")


def test_copy_of_what_runs_is_not_refused_for_want_of_room(converse: Callable[..., Any]) -> None:
    talk = converse(messages=1)
    call, frame = talk.begin()
    talk.carry(frame)
    talk.carry(frame)
    talk.carry_back()
    assert call.outcome is None, "it runs, and its reply is on the way"


def test_window_remembers_the_last_refusals_as_far_as_it_reaches() -> None:
    window = Window(reach=4)
    for number in range(1, 11):
        assert window.take(number) is NEW
        window.refuse(number, "full")
    assert sorted(window.refused) == [7, 8, 9, 10]


def test_addresses_are_remembered_within_a_limit(talk: Any) -> None:
    for number in range(ADDRESSES_KEPT + 10):
        talk.carry(talk.frame(number + 1, service=f"s{number}"))
    assert 0 < len(talk.inbox._addresses) <= ADDRESSES_KEPT
    talk.inbox.outgoing.clear()
    talk.carry(talk.frame(2**32))
    assert len(talk.moved) == 1


# Bad frames ---------------------------------------------------------------------------------------


def test_request_whose_frames_are_not_as_it_says_is_malformed(talk: Any) -> None:
    head, body = talk.frame(1, body=bytes(wire.SECOND_FRAME_FROM))
    talk.carry(head)
    talk.carry((talk.frame(2), body))
    talk.carry(talk.frame(3)[:20])
    assert [wire.rejection(frame)[0] for _, frame in talk.inbox.outgoing] == ["malformed"] * 3
    assert talk.inbox.counts["bad frames"] == 3
    assert not talk.moved
    talk.inbox.outgoing.clear()
    talk.carry((head, body))
    assert len(talk.moved) == 1, "its number was not used up"


@pytest.mark.parametrize("kind", [wire.ACK, wire.REPLY, wire.ITEM, wire.PROGRESS, wire.REJECT, wire.PONG])
def test_answer_to_a_server_is_a_bad_frame(talk: Any, kind: int) -> None:
    talk.carry(wire.pack(kind, id=1))
    assert talk.inbox.counts == {"bad frames": 1}


@pytest.mark.parametrize("size", [0, 1, wire.HEADER_SIZE - 1])
def test_frame_without_a_whole_header_is_a_bad_frame_and_those_behind_it_are_read(talk: Any, size: int) -> None:
    frame = talk.frame(1)
    talk.inbox.receive_all([(IDENTITY, frame[:size], None), (IDENTITY, frame, None)], 0.0, talk.moved)
    assert talk.inbox.counts == {"bad frames": 1}
    assert [request.id for request in talk.moved] == [1]


# Duplicates ---------------------------------------------------------------------------------------


def test_request_that_comes_again_while_it_runs_is_passed_over(talk: Any) -> None:
    call, frame = talk.begin()
    talk.carry(frame)
    talk.carry(frame)
    talk.carry_back()
    assert (len(talk.moved), call.outcome) == (1, None)
    assert talk.inbox.counts["duplicates"] == 1
    talk.answer(talk.moved[0])
    assert call.outcome == REPLIED


def test_request_that_comes_again_after_its_reply_is_refused_and_does_not_run(talk: Any) -> None:
    call, frame = talk.begin()
    talk.carry(frame)
    assert talk.inbox.finish(talk.moved[0])
    talk.carry(frame)
    talk.carry_back()
    assert len(talk.moved) == 1
    assert (call.outcome, call.body[0]) == (REJECTED, "duplicate")


def test_cast_that_comes_again_is_acknowledged_again_and_does_not_run(talk: Any) -> None:
    _, frame = talk.begin(wire.CAST)
    talk.carry(frame)
    talk.carry(frame)
    assert [wire.header(frame).kind for _, frame in talk.inbox.outgoing] == [wire.ACK, wire.ACK]
    assert len(talk.moved) == 1


def test_cast_older_than_the_window_is_not_acknowledged(converse: Callable[..., Any]) -> None:
    talk = converse(reach=10)
    held_up, frame = talk.begin(wire.CAST)
    for _ in range(20):
        talk.request(wire.CAST)
    talk.carry_back()
    talk.carry(frame)
    talk.carry_back()
    assert (held_up.outcome, held_up.body[0]) == (REJECTED, "duplicate"), "it is unknown whether it came before"


def test_number_zero_is_no_request(talk: Any) -> None:
    talk.carry(talk.frame(0))
    talk.carry(talk.frame(0, wire.CAST))
    assert not talk.moved
    assert [wire.rejection(frame)[0] for _, frame in talk.inbox.outgoing] == ["duplicate"] * 2


def test_duplicate_is_known_over_a_new_connection(talk: Any) -> None:
    _, frame = talk.begin(wire.CAST)
    talk.carry(frame)
    talk.lose()
    talk.carry(hello_of(talk.caller.id), identity=b"\0new")
    talk.carry(frame, identity=b"\0new")
    assert len(talk.moved) == 1
    assert talk.inbox.counts["duplicates"] == 1


def test_two_senders_may_use_the_same_number(talk: Any) -> None:
    talk.carry(hello_of(OTHER), identity=b"\0two")
    talk.request()
    talk.carry(talk.frame(1), identity=b"\0two")
    assert [(request.id, request.node) for request in talk.moved] == [(1, talk.caller.id), (1, OTHER)]


def test_window_outlives_its_last_connection_for_its_time_and_not_longer(talk: Any) -> None:
    talk.request(now=5.0)
    talk.inbox.gone(next(iter(talk.inbox.senders)))
    talk.inbox.handle_timer(5.0 + WINDOW_KEPT)
    assert talk.caller.id in talk.inbox._windows
    talk.inbox.handle_timer(5.1 + WINDOW_KEPT)
    assert talk.caller.id not in talk.inbox._windows


def test_window_of_a_connection_that_stands_is_kept_however_silent(talk: Any) -> None:
    talk.inbox.handle_timer(10 * WINDOW_KEPT)
    assert talk.caller.id in talk.inbox._windows


# Under way ----------------------------------------------------------------------------------------


def test_credit_adds_up_and_tells_the_writer(talk: Any) -> None:
    call = talk.request(flags=wire.STREAM)
    [request] = talk.moved
    assert request.granted == 0
    for items in (2, 3):
        talk.carry(wire.pack(wire.CREDIT, number=items, id=call.id))
    assert request.granted == 5
    assert talk.moved == [request] * 3


def test_cancelled_request_must_not_run_and_is_counted_once(talk: Any) -> None:
    call = talk.request()
    assert talk.peer.calls.give_up(call)
    for _ in range(2):
        talk.carry(wire.pack(wire.CANCEL, id=call.id))
    request = talk.moved[0]
    assert request.cancelled
    assert talk.inbox.expired(request, 0.0)
    assert talk.inbox.counts == {"cancelled": 1}
    talk.lose()
    assert talk.inbox.counts == {"cancelled": 1}


@pytest.mark.parametrize("kind", [wire.CREDIT, wire.CANCEL])
def test_credit_and_cancel_that_met_the_reply_under_way_are_passed_over(talk: Any, kind: int) -> None:
    call = talk.request()
    talk.answer(talk.moved[0])
    talk.carry(wire.pack(kind, number=1, id=call.id))
    assert len(talk.moved) == 1
    assert not talk.inbox.counts
    assert not talk.inbox.outgoing


def test_one_sender_cannot_cancel_what_another_sent(talk: Any) -> None:
    talk.request()
    talk.carry(hello_of(OTHER), identity=b"\0two")
    talk.carry(wire.pack(wire.CANCEL, id=1), identity=b"\0two")
    assert not talk.moved[0].cancelled


def test_ping_is_answered_even_before_hello(strangers: Any) -> None:
    strangers.carry(wire.pack(wire.PING, id=25))
    [(_, frame)] = strangers.inbox.outgoing
    assert (wire.header(frame).kind, wire.header(frame).id) == (wire.PONG, 25)


def test_connection_that_ends_cancels_its_calls_and_keeps_its_casts(talk: Any) -> None:
    talk.request()
    talk.request(wire.CAST)
    talk.carry(hello_of(OTHER), identity=b"\0two")
    talk.carry(talk.frame(1), identity=b"\0two")
    call, cast, other = talk.moved
    assert talk.inbox.gone(b"\0conn") == [call]
    assert (call.cancelled, cast.cancelled, other.cancelled) == (True, False, False)
    assert talk.inbox.counts == {"cancelled": 1}
    assert len(talk.inbox.taken) == 3, "their room is given back when they are dealt with"
    assert talk.inbox.gone(b"\0conn") == []


def test_caller_that_says_goodbye_is_gone(talk: Any) -> None:
    talk.request()
    talk.carry(wire.goodbye("leaving"))
    assert talk.moved[0].cancelled
    assert talk.moved[1] is talk.moved[0], "who runs it hears of it"
    late = talk.request()
    talk.carry_back()
    assert late.body[0] == "hello first"


def test_draining_server_says_goodbye_refuses_what_is_new_and_finishes_what_it_took(talk: Any) -> None:
    taken = talk.request()
    talk.inbox.drain("draining")
    talk.carry_back()
    assert talk.peer.state == "draining"
    late = talk.request()
    talk.carry_back()
    assert (late.outcome, late.body[0]) == (REJECTED, "draining")
    talk.answer(talk.moved[0])
    assert taken.outcome == REPLIED


@pytest.mark.parametrize(
    ("deadline", "due", "cancelled", "now", "is_final"),
    [
        (10.0, None, False, 10.0 + GIVEN_UP - 0.1, False),
        (10.0, None, False, 10.0 + GIVEN_UP, True),
        (None, 10.0, False, 10.0 + GIVEN_UP - 0.1, False),
        (None, 10.0, False, 10.0 + GIVEN_UP, True),
        (None, None, False, 1e9, False),
        (10.0, None, True, 5.0, True),
    ],
)
def test_final_goodbye_does_not_go_to_one_who_may_still_wait_for_what_was_left_unanswered(
    talk: Any, deadline: float | None, due: float | None, cancelled: bool, now: float, is_final: bool
) -> None:
    talk.request()
    (request,) = talk.moved
    request.deadline, request.due, request.cancelled = deadline, due, cancelled
    talk.inbox.leave(request)
    assert talk.inbox.finish(request)
    talk.inbox.drain("drained", now, final=True)
    ((_, frame),) = talk.inbox.outgoing
    assert wire.is_final(frame) == is_final


def test_final_goodbye_proves_nothing_to_a_connection_that_something_was_not_said_to(talk: Any) -> None:
    talk.carry(talk.frame(1, wire.CAST))
    [cast] = talk.moved
    talk.inbox.leave_unsaid(IDENTITY)  # its acknowledgement
    talk.inbox.leave_unsaid(b"gone since")
    assert talk.inbox.finish(cast)
    talk.inbox.outgoing.clear()
    talk.inbox.drain("drained", 1e9, final=True)
    [(_, frame)] = talk.inbox.outgoing
    assert not wire.is_final(frame)


def test_cast_that_is_refused_after_all_is_counted_and_never_runs(talk: Any) -> None:
    talk.carry(talk.frame(1, wire.CAST))
    [cast] = talk.moved
    talk.inbox.refuse_taken(cast, "draining")
    assert talk.inbox.refused["draining"] == 1
    talk.inbox.outgoing.clear()
    talk.carry(talk.frame(1, wire.CAST))
    assert talk.inbox.outgoing == [(IDENTITY, wire.ack([1]))]  # it had been acknowledged
    assert talk.moved == [cast]


def senders_alive() -> int:
    return sum(isinstance(each, Sender) for each in gc.get_objects())


def test_connection_that_ended_is_kept_by_nothing_not_even_until_garbage_is_collected(talk: Any) -> None:
    gc.collect()
    gc.disable()
    try:
        before = senders_alive()
        for number in range(10):
            identity = b"conn %d" % number
            talk.inbox.receive(identity, hello_of(b"node %11d" % (number // 2)), None, 0.0, [])
            assert senders_alive() == before + 1
            talk.inbox.gone(identity)
            assert senders_alive() == before
    finally:
        gc.enable()


def test_connection_that_ended_with_a_request_running_is_kept_as_long_as_its_window_and_no_longer(talk: Any) -> None:
    gc.collect()
    gc.disable()
    try:
        before = senders_alive()
        talk.request()
        talk.lose()
        talk.answer(talk.moved[0])
        talk.moved.clear()
        talk.inbox.handle_timer(WINDOW_KEPT + 1.0)
        assert senders_alive() == before - 1
    finally:
        gc.enable()


# Time ---------------------------------------------------------------------------------------------


def test_monitored_request_gets_a_heartbeat_each_half_interval_until_it_is_finished(talk: Any) -> None:
    call = talk.request(now=0.0, monitor=4.0)
    assert talk.inbox.timer() == 2.0
    talk.inbox.handle_timer(1.9)
    assert not talk.inbox.outgoing
    for now in (2.0, 4.0):
        talk.inbox.handle_timer(now)
        talk.carry_back()
    assert call.signs == 2
    assert talk.inbox.timer() == 6.0
    talk.answer(talk.moved[0])
    assert talk.inbox.timer() is None
    talk.inbox.handle_timer(100.0)
    assert wire.PROGRESS not in {wire.header(frame).kind for _, frame in talk.inbox.outgoing}


def test_heartbeats_end_with_the_connection(talk: Any) -> None:
    talk.request(monitor=4.0)
    talk.lose()
    assert talk.inbox.timer() is None


def test_heartbeats_end_when_the_caller_gives_up_though_the_handler_runs_on(talk: Any) -> None:
    call = talk.request(now=0.0, monitor=4.0)
    talk.carry(wire.pack(wire.CANCEL, id=1))
    talk.inbox.handle_timer(2.0)
    assert not talk.inbox.outgoing
    assert talk.inbox.timer() is None
    assert call.signs == 0


def test_heartbeats_end_at_the_deadline(talk: Any) -> None:
    talk.request(now=0.0, monitor=4.0, remaining=3.0)
    talk.inbox.handle_timer(2.0)
    talk.carry_back()
    talk.inbox.handle_timer(4.0)
    assert not talk.inbox.outgoing
    assert talk.inbox.timer() is None


def test_request_without_monitor_gets_no_heartbeat(talk: Any) -> None:
    talk.request()
    assert talk.inbox.timer() is None


def test_silent_connection_is_probed_and_the_caller_passes_it_over(talk: Any) -> None:
    talk.inbox.handle_timer(SILENT_AFTER - 0.1)
    assert not talk.inbox.outgoing
    talk.inbox.handle_timer(SILENT_AFTER)
    [(_, frame)] = talk.inbox.outgoing
    assert (wire.header(frame).kind, wire.header(frame).id) == (wire.PING, 0)
    assert talk.carry_back() == 0
    talk.inbox.handle_timer(SILENT_AFTER + 1)
    assert not talk.inbox.outgoing, "once in a while"


def test_connection_that_sends_is_not_probed(talk: Any) -> None:
    talk.request(now=50.0)
    talk.inbox.handle_timer(SILENT_AFTER + 1)
    assert not talk.inbox.outgoing


# Several at once ----------------------------------------------------------------------------------


def batch_of(*frames: wire.Frame, identity: bytes = IDENTITY) -> list[Message]:
    return [(identity, *((frame, None) if isinstance(frame, bytes) else frame)) for frame in frames]


def answers(inbox: Inbox) -> list[tuple[int, int]]:
    """Kind and number of each frame that is to be sent; takes them."""
    outgoing, inbox.outgoing = inbox.outgoing, []
    return [(head.kind, head.id) for head in (wire.header(frame) for _, frame in outgoing)]


def forget_the_way(inbox: Inbox) -> None:
    """What is offered changes for a moment: nothing is known of where a plain request goes."""
    target: list[Any] = []
    inbox.offer("for a moment", "a", target)
    inbox.withdraw("for a moment", "a", target)


def test_messages_are_taken_out_of_the_list_they_came_in(talk: Any) -> None:
    messages = batch_of(*(talk.frame(id) for id in range(1, 6)))
    talk.inbox.receive_all(messages, 0.0, talk.moved)
    assert messages == []
    assert [request.id for request in talk.moved] == [1, 2, 3, 4, 5]
    talk.inbox.receive_all(messages, 0.0, talk.moved)
    assert len(talk.moved) == 5


def test_casts_of_one_connection_are_acknowledged_together_in_the_order_they_came(talk: Any) -> None:
    talk.carry(hello_of(OTHER), identity=b"\0two")
    talk.inbox.outgoing.clear()
    talk.queue.waiting = 3
    ours = [talk.frame(id, wire.CAST) for id in (4, 2, 9)]
    theirs = [talk.frame(id, wire.CAST) for id in (7, 5)]
    messages = [*batch_of(*ours[:2]), *batch_of(*theirs, identity=b"\0two"), *batch_of(talk.frame(1), ours[2])]
    talk.inbox.receive_all(messages, 0.0, talk.moved)
    assert talk.inbox.outgoing == [(IDENTITY, wire.ack([4, 2, 9], 3)), (b"\0two", wire.ack([7, 5], 3))]
    assert [request.id for request in talk.moved] == [4, 2, 7, 5, 1, 9]


def test_casts_that_take_the_long_way_are_acknowledged_with_the_others(talk: Any) -> None:
    talk.offer("alarm", "b")
    large = bytes(wire.SECOND_FRAME_FROM)
    frames = [
        talk.frame(1, wire.CAST),
        talk.frame(2, wire.CAST, wire.FANOUT),
        talk.frame(3, wire.CAST, service="alarm"),
        talk.frame(4, wire.CAST, body=large),
        talk.frame(5, wire.CAST),
    ]
    talk.inbox.receive_all(batch_of(*frames), 0.0, talk.moved)
    assert talk.inbox.outgoing == [(IDENTITY, wire.ack([1, 2, 3, 4, 5]))]


def test_casts_acknowledged_together_end_as_taken_at_their_caller(talk: Any) -> None:
    begun = [talk.begin(wire.CAST) for _ in range(3)]
    talk.inbox.receive_all(batch_of(*(frame for _, frame in begun)), 0.0, talk.moved)
    talk.carry_back()
    assert [call.outcome for call, _ in begun] == [TAKEN] * 3


def test_refused_cast_is_not_among_those_acknowledged(talk: Any) -> None:
    frames = [talk.frame(1, wire.CAST), talk.frame(2, wire.CAST, remaining=0.0), talk.frame(3, wire.CAST)]
    talk.inbox.receive_all(batch_of(*frames), 0.0, talk.moved)
    assert talk.inbox.outgoing == [(IDENTITY, wire.reject(2, "expired")), (IDENTITY, wire.ack([1, 3]))]


class Crowd(list[Message]):
    """Messages of which one is interrupted while it is looked at, as by Ctrl-C."""

    def __init__(self, messages: list[Message], at: int) -> None:
        super().__init__(messages)
        self.at: int | None = at

    def __iter__(self) -> Any:
        for number, message in enumerate(super().__iter__()):
            if number == self.at:
                self.at = None
                raise KeyboardInterrupt
            yield message


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("at", range(5))
def test_interrupt_among_messages_loses_none_of_them(talk: Any, at: int, warm: bool) -> None:
    talk.carry(talk.frame(99))
    if not warm:
        forget_the_way(talk.inbox)
    messages = Crowd(batch_of(*(talk.frame(id, wire.CAST) for id in range(1, 6))), at)
    talk.moved.clear()
    with pytest.raises(KeyboardInterrupt):
        talk.inbox.receive_all(messages, 0.0, talk.moved)
    assert [request.id for request in talk.moved] == list(range(1, at + 1))
    talk.inbox.receive_all(messages, 0.0, talk.moved)
    assert [request.id for request in talk.moved] == [1, 2, 3, 4, 5]
    assert messages == []
    acknowledged = [wire.acked(frame) for _, frame in talk.inbox.outgoing]
    assert [id for ids in acknowledged for id in ids] == [1, 2, 3, 4, 5]


class Interrupted(bytes):
    """The name of a connection that interrupts who looks it up: in the midst of a message."""

    def __hash__(self) -> int:
        raise KeyboardInterrupt


def test_interrupt_in_a_message_loses_that_one_and_no_other(talk: Any) -> None:
    messages = batch_of(*(talk.frame(id) for id in range(1, 6)))
    messages[2] = Interrupted(IDENTITY), *messages[2][1:]
    with pytest.raises(KeyboardInterrupt):
        talk.inbox.receive_all(messages, 0.0, talk.moved)
    assert len(messages) == 2
    talk.inbox.receive_all(messages, 0.0, talk.moved)
    assert [request.id for request in talk.moved] == [1, 2, 4, 5]
    assert talk.inbox.taken_bytes == sum(request.size for request in talk.moved)


# The express lane ---------------------------------------------------------------------------------


class Messages:
    """Messages without end, the same for the same seed: most of them plain, each tenth not quite.

    Numbers come again and run out of the window, names are known and unknown, extents lie, bodies fill the room.
    """

    ADDRESSES = (("clock", ""), ("clock", "a"), ("alarm", ""), ("alarm", "b"), ("lock", ""), ("alarm", "z"))

    def __init__(self, seed: int) -> None:
        self.pick = random.Random(seed)
        self.numbers = count(1)

    def some(self) -> list[Message]:
        return [self.one() for _ in range(self.pick.randrange(1, 12))]

    def one(self) -> Message:
        pick = self.pick
        identity = pick.choice([IDENTITY] * 8 + [b"\0two"] * 4 + [b"\0new"])
        if pick.random() < 0.1:
            frame = wire.pack(pick.choice(sorted(wire.KINDS)), number=2, id=self.number())
            return identity, pick.choice([frame, frame, frame[:9], hello_of(OTHER)]), None
        kind = pick.choice([wire.REQUEST, wire.CAST])
        flags = self.seldom(wire.STREAM if kind == wire.REQUEST else wire.FANOUT, 0)
        names = wire.names(*pick.choice(self.ADDRESSES[:2] * 4 + self.ADDRESSES), "read")
        body = self.seldom(bytes(wire.SECOND_FRAME_FROM), bytes(pick.choice([0, 1, 900])))
        remaining, monitor = pick.choice([None, 5.0, self.seldom(0.0, 60.0)]), self.seldom(2.0, None)
        frame = wire.request(kind, flags, self.number(), remaining, monitor, names, body)
        head, second = (frame, None) if isinstance(frame, bytes) else frame
        extent = int.from_bytes(head[2:4], "little") + self.seldom(pick.choice([-1, 1, 2000]), 0)
        announced = self.seldom(head[1] ^ wire.BODY_FOLLOWS, head[1])
        head = bytes((head[0], announced)) + extent.to_bytes(2, "little") + head[4:]
        return identity, head[: self.seldom(pick.randrange(len(head)), len(head))], self.seldom(b"body", second)

    def number(self) -> int:
        number = next(self.numbers)
        return self.seldom(max(0, number - self.pick.randrange(9)), number)

    def seldom(self, this: Any, that: Any) -> Any:
        return this if self.pick.random() < 0.05 else that


class Taker:
    """An inbox that is given the same messages in its own way."""

    def __init__(self) -> None:
        self.inbox = Inbox(b"s" * 16, messages=12, size=wire.SECOND_FRAME_FROM + 5_000, reach=4)
        self.queues = {name: [name] for name in ("clock a", "alarm a", "alarm b")}
        for name in self.queues:
            self.inbox.offer(*name.split(), self.queues[name])
        self.moved: list[Request] = []
        for identity, node in ((IDENTITY, OTHER), (b"\0two", b"third-node-00001")):
            self.inbox.receive(identity, hello_of(node, first=2), None, 0.0, self.moved)

    def change(self, how: str, now: float) -> None:
        inbox, extra = self.inbox, self.queues.setdefault("clock b", ["clock b"])
        match how:
            case "offer":
                inbox.offer("clock", "b", extra)
            case "withdraw":
                inbox.withdraw("clock", "b", extra)
            case "finish":
                for request in list(inbox.taken)[::2]:
                    assert inbox.finish(request)
            case "gone":
                inbox.gone(IDENTITY)
                inbox.receive(IDENTITY, hello_of(OTHER), None, now, self.moved)
            case "timer":
                inbox.handle_timer(now)
            case "drain":
                inbox.drain()

    def state(self) -> dict[str, Any]:
        """All that may be seen of it; who was acknowledged with whom is left open."""
        inbox = self.inbox
        acknowledged: dict[bytes, list[int]] = {}
        answered: dict[bytes, list[Any]] = {}
        for identity, frame in inbox.outgoing:
            if isinstance(frame, bytes) and wire.kind_of(frame) == wire.ACK:
                acknowledged.setdefault(identity, []).extend(wire.acked(frame))
            else:
                answered.setdefault(identity, []).append(frame)
        return {
            "moved": [self.told(request) for request in self.moved],
            "taken": ([self.told(request) for request in inbox.taken], inbox.taken_bytes),
            "refused": inbox.refused,
            "counts": inbox.counts,
            "acknowledged": {identity: sorted(ids) for identity, ids in acknowledged.items()},
            "answered": answered,
            "senders": {
                identity: (sender.node, sender.heard, {id: self.told(each) for id, each in sender.calls.items()})
                for identity, sender in inbox.senders.items()
            },
            "windows": {node: (each.next, each._missing) for node, each in inbox._windows.items()},
            "timer": inbox.timer(),
        }

    def told(self, request: Request) -> tuple[Any, ...]:
        return (
            request.identity, request.node, request.kind, request.flags, request.id, request.names, request.body,
            request.deadline, request.monitor, request.size, request.target, request.granted, request.cancelled,
        )  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
def test_express_lane_leaves_what_the_long_way_leaves(seed: int) -> None:
    messages = Messages(seed)
    alone, warm, together = everyone = Taker(), Taker(), Taker()
    for now in range(150):
        change = messages.pick.choice(["finish", "finish", messages.seldom("offer", ""), "withdraw", "gone", "timer"])
        for taker in everyone:
            taker.change("drain" if now == 140 else change, float(now))
        some = messages.some()
        for message in some:
            forget_the_way(alone.inbox)
            alone.inbox.receive(*message, float(now), alone.moved)
            warm.inbox.receive(*message, float(now), warm.moved)
        together.inbox.receive_all(some, float(now), together.moved)
        assert some == []
        assert warm.state() == alone.state()
        assert together.state() == alone.state()
        for taker in everyone:
            taker.moved.clear()
            taker.inbox.outgoing.clear()
    assert {"full", "expired", "malformed", "draining", "duplicate"} < alone.inbox.refused.keys()


def test_plain_request_is_known_by_its_address_from_the_second_on(talk: Any) -> None:
    for kind in (wire.REQUEST, wire.CAST) * 2:
        talk.request(kind, now=10.0, remaining=5.0)
    talk.request(now=10.0, remaining=None)
    first, *others = talk.moved
    for request in others:
        assert (request.names, request.target, request.body) == (first.names, first.target, first.body)
        assert (request.flags, request.monitor, request.size) == (0, None, first.size)
    assert [request.deadline for request in talk.moved] == [15.0, None, 15.0, None, None]
    assert [request.id for request in talk.moved] == [1, 2, 3, 4, 5]
    assert talk.inbox.taken_bytes == 5 * first.size


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("kind", [wire.REQUEST, wire.CAST])
def test_header_whose_extent_lies_beyond_its_frame_is_malformed_even_where_its_name_is_known(
    talk: Any, kind: int, warm: bool
) -> None:
    if warm:
        talk.request(body=b"")
    head = talk.frame(7, kind, body=b"")
    lying = head[:2] + (int.from_bytes(head[2:4], "little") + 1).to_bytes(2, "little") + head[4:]
    talk.moved.clear()
    talk.carry(lying)
    assert not talk.moved
    [(_, frame)] = talk.inbox.outgoing
    assert wire.rejection(frame)[0] == "malformed"
    assert talk.inbox.counts == {"bad frames": 1}
    talk.carry(head)
    assert [request.id for request in talk.moved] == [7], "its number was not used up"


@pytest.mark.parametrize("warm", [False, True])
def test_draining_server_refuses_what_took_the_express_lane_before(talk: Any, warm: bool) -> None:
    if warm:
        talk.request()
        talk.request()
    talk.inbox.drain()
    call = talk.request()
    talk.carry_back()
    assert (call.outcome, call.body[0]) == (REJECTED, "draining")
    assert len(talk.moved) == 2 * warm


def test_drain_among_the_messages_of_a_moment_refuses_those_behind_it(talk: Any) -> None:
    talk.request()
    talk.inbox.receive_all(batch_of(talk.frame(2), talk.frame(3)), 0.0, talk.moved)
    talk.inbox.drain()
    talk.inbox.outgoing.clear()
    talk.inbox.receive_all(batch_of(talk.frame(4), talk.frame(5)), 0.0, talk.moved)
    assert [request.id for request in talk.moved] == [1, 2, 3]
    assert answers(talk.inbox) == [(wire.REJECT, 4), (wire.REJECT, 5)]


def test_withdrawn_instance_gets_nothing_more_by_the_express_lane(talk: Any) -> None:
    talk.request()
    talk.request()
    talk.inbox.withdraw("clock", "a", talk.queue)
    call = talk.request()
    talk.carry_back()
    assert call.body[0] == "no service"
    assert len(talk.moved) == 2


def test_second_instance_gets_its_share_of_what_took_the_express_lane_before(talk: Any) -> None:
    for _ in range(3):
        talk.request()
    second = talk.offer("clock", "b")
    talk.moved.clear()
    for _ in range(4):
        talk.request()
    assert sum(request.target is second for request in talk.moved) == 2
    talk.inbox.withdraw("clock", "b", second)
    talk.moved.clear()
    for _ in range(3):
        talk.request()
    assert all(request.target is talk.queue for request in talk.moved)


def test_goodbye_among_the_messages_of_a_moment_ends_what_is_behind_it(talk: Any) -> None:
    talk.request()
    talk.moved.clear()
    talk.inbox.receive_all(batch_of(talk.frame(2), wire.goodbye(), talk.frame(3)), 0.0, talk.moved)
    assert [(request.id, request.cancelled) for request in talk.moved] == [(2, True), (1, True), (2, True)]
    assert answers(talk.inbox) == [(wire.REJECT, 3)]
    assert talk.inbox.refused == {"hello first": 1}


# Everything together ------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["request", "cast", "fanout", "cancel", "finish", "lose", "hello", "timer"]),
            st.integers(1, 12),
        ),
        max_size=60,
    )
)
def test_room_is_given_back_exactly_and_nothing_runs_twice_whatever_happens(steps: list[tuple[str, int]]) -> None:
    inbox = Inbox(b"s" * 16, messages=6, reach=4)
    for name in "ab":
        inbox.offer("clock", name, [])
    moved: list[Request] = []
    clock = count()
    section = wire.names("clock", "", "read")
    for step, number in steps:
        now = float(next(clock))
        frame: wire.Frame | None = None
        match step:
            case "hello":
                frame = hello_of(OTHER)
            case "request":
                frame = wire.request(wire.REQUEST, 0, number, 5.0, None, section, b"")
            case "cast" | "fanout":
                flags = wire.FANOUT if step == "fanout" else 0
                frame = wire.request(wire.CAST, flags, number, 5.0, None, section, b"")
            case "cancel":
                frame = wire.pack(wire.CANCEL, id=number)
            case "finish":
                for request in list(inbox.taken)[:number]:
                    assert inbox.finish(request)
            case "lose":
                inbox.gone(b"\0conn")
            case "timer":
                inbox.handle_timer(now)
        if isinstance(frame, bytes):
            inbox.receive(b"\0conn", frame, None, now, moved)
        assert inbox.taken_bytes == sum(request.size for request in inbox.taken)
        assert len(inbox.taken) <= 6
    ran = {(request.node, request.id, id(request.target)) for request in moved}
    assert len(ran) == len({id(request) for request in moved}), "a request that comes twice runs once at each instance"
    for request in list(inbox.taken):
        assert inbox.finish(request)
    assert (inbox.taken_bytes, inbox._beats) == (0, {})
    assert not any(sender.calls for sender in inbox.senders.values())


# Echoes -------------------------------------------------------------------------------------------


def echo(id: int, service: str = "clock", server: str = "") -> bytes:
    return wire.echo(id, wire.names(service, server, "read"))


@pytest.mark.parametrize("server", ["", "a"])
def test_an_echo_is_left_to_a_worker_of_the_instance_it_names(talk: Any, server: str) -> None:
    talk.carry(echo(7, server=server))
    [request] = talk.inbox.echoes
    assert (request.kind, request.id, request.target, request.names) == (
        wire.PING, 7, talk.queue, ("clock", server, ""),
    )  # fmt: skip
    assert request.cancelled, "it never runs"
    assert not talk.inbox.outgoing
    assert not talk.inbox.taken, "it takes nobody's room"


def test_an_echo_goes_to_the_instance_where_most_waits(talk: Any) -> None:
    talk.offer("clock", "b").waiting = 3
    talk.carry(echo(7))
    [request] = talk.inbox.echoes
    assert len(request.target) == 3


def test_a_second_echo_is_passed_over_while_a_worker_owes_the_first_and_that_is_counted(talk: Any) -> None:
    for id in (7, 8):
        talk.carry(echo(id))
    assert [request.id for request in talk.inbox.echoes] == [7]
    assert talk.inbox.counts["echoes beside another"] == 1
    talk.inbox.echoes[0].sender.echo = False  # it was answered
    talk.carry(echo(9))
    assert [request.id for request in talk.inbox.echoes] == [7, 9]


@pytest.mark.parametrize("frame", [wire.pack(wire.PING, id=7), echo(7, "lock"), echo(7, server="b")])
def test_a_ping_and_an_echo_for_nobody_are_answered_at_once(talk: Any, frame: bytes) -> None:
    talk.carry(frame)
    assert talk.inbox.outgoing == [(b"\0conn", wire.pack(wire.PONG, id=7))]
    assert not talk.inbox.echoes


def test_an_echo_before_hello_is_answered_at_once(strangers: Any) -> None:
    strangers.carry(echo(7))
    assert strangers.inbox.outgoing == [(b"\0conn", wire.pack(wire.PONG, id=7))]


@pytest.mark.parametrize("frame", [echo(7)[:-1], echo(7)[:17], wire.HEADER.pack(wire.PING, 0, 3, 0, 7) + b"abc"])
def test_an_echo_whose_address_cannot_be_read_is_dropped_and_counted(talk: Any, frame: bytes) -> None:
    talk.carry(frame)
    assert talk.inbox.counts["bad frames"] == 1
    assert not talk.inbox.echoes
    assert not talk.inbox.outgoing


# Room for several callers -------------------------------------------------------------------------

FLOOD = b"\0flood"


def connect_too(talk: Any, identity: bytes = FLOOD, node: bytes = OTHER) -> None:
    talk.carry(hello_of(node), identity=identity)
    talk.inbox.outgoing.clear()


def flood(talk: Any, number: int, first: int = 1, identity: bytes = FLOOD, **details: Any) -> int:
    """So many requests of another caller; how many were taken in."""
    before = len(talk.inbox.taken)
    for id in range(first, first + number):
        talk.carry(talk.frame(id, **details), identity=identity)
    return len(talk.inbox.taken) - before


@pytest.mark.parametrize("kind", [wire.REQUEST, wire.CAST])
def test_one_of_several_callers_leaves_room_for_the_others(converse: Any, kind: int) -> None:
    talk = converse(messages=90)
    connect_too(talk)
    assert flood(talk, 1_000, kind=kind) == 80
    assert talk.inbox.refused == {"full": 920}
    assert all(talk.request().outcome is None for _ in range(5))
    assert len(talk.inbox.taken) == 85


def test_room_that_comes_free_is_for_those_who_have_little(converse: Any) -> None:
    talk = converse(messages=90)
    connect_too(talk)
    flood(talk, 1_000)
    for _ in range(20):
        talk.request()
    full = len(talk.inbox.taken)
    assert full >= 89
    for request in list(talk.inbox.taken)[:5]:
        talk.inbox.finish(request)
    assert flood(talk, 100, first=2_000) == 0
    talk.request()
    assert len(talk.inbox.taken) == full - 5 + 1


def test_a_caller_alone_has_all_the_room(converse: Any) -> None:
    talk = converse(messages=90)
    for _ in range(100):
        talk.request()
    assert len(talk.inbox.taken) == 90


def test_large_requests_of_one_leave_room_in_bytes_for_the_others(converse: Any) -> None:
    talk = converse(size=90_000)
    connect_too(talk)
    flood(talk, 1_000, body=bytes(900))
    assert 80_000 < talk.inbox.taken_bytes < 83_000
    talk.request(body=bytes(5_000))
    assert len(talk.moved) == len(talk.inbox.taken)
    assert talk.moved[-1].sender.node == talk.caller.id


@given(st.data())
def test_what_each_caller_has_taken_is_known_whatever_happens(data: st.DataObject) -> None:
    from tests.protocol.conftest import Conversation

    talk = Conversation(messages=20, reach=64)
    talk.connect()
    numbers = {IDENTITY: 0, FLOOD: 0}
    connect_too(talk)
    for step in data.draw(st.lists(st.sampled_from(["call", "cast", "finish", "again", "leave"]), max_size=60)):
        identity = data.draw(st.sampled_from([IDENTITY, FLOOD]))
        if step in ("call", "cast"):
            numbers[identity] += 1
            talk.carry(talk.frame(numbers[identity], wire.CAST if step == "cast" else wire.REQUEST), identity=identity)
        elif step == "again" and numbers[identity]:
            talk.carry(talk.frame(data.draw(st.integers(1, numbers[identity]))), identity=identity)
        elif step == "finish" and talk.inbox.taken:
            talk.inbox.finish(data.draw(st.sampled_from(list(talk.inbox.taken))))
        elif step == "leave":
            talk.inbox.gone(identity)
            talk.carry(hello_of(OTHER if identity == FLOOD else talk.caller.id), identity=identity)
        senders = {id(request.sender): request.sender for request in talk.inbox.taken}
        senders |= {id(each): each for each in talk.inbox.senders.values()}
        for sender in senders.values():
            mine = [request for request in talk.inbox.taken if request.sender is sender]
            assert (sender.taken, sender.taken_bytes) == (len(mine), sum(request.size for request in mine))
            assert {r.id for r in mine if r.kind == wire.REQUEST} == sender.calls.keys()


# Coming back for what was asked -------------------------------------------------------------------

AGAIN_HERE = b"\0again"


def come_back(talk: Any) -> None:
    """The caller's connection ends, and it says hello on another."""
    talk.inbox.gone(IDENTITY)
    talk.carry(hello_of(talk.caller.id), identity=AGAIN_HERE)
    talk.inbox.outgoing.clear()


def test_what_is_read_of_the_old_connection_takes_no_call_back_there(talk: Any) -> None:
    talk.carry(hello_of(talk.caller.id), identity=AGAIN_HERE)  # before the server knows that the first has ended
    talk.carry(talk.frame(1), identity=AGAIN_HERE)
    [request] = talk.moved
    talk.carry(talk.frame(1))  # the original, which had not been read
    assert (request.identity, talk.moved) == (AGAIN_HERE, [request])
    assert talk.inbox.gone(IDENTITY) == []
    assert not request.cancelled


def test_a_copy_of_what_was_refused_when_its_connection_ended_hears_that_it_did_not_run(talk: Any) -> None:
    talk.carry(talk.frame(1))
    [request] = talk.moved
    come_back(talk)
    talk.inbox.refuse_taken(request, "expired")  # its turn came, and nobody waited there
    assert talk.inbox.finish(request)
    talk.carry(talk.frame(1), identity=AGAIN_HERE)
    assert talk.inbox.outgoing == [(AGAIN_HERE, wire.reject(1, "expired"))]


def test_a_call_that_runs_when_its_caller_comes_back_for_it_is_answered_where_the_caller_is_now(talk: Any) -> None:
    talk.request(monitor=1.0)
    [request] = talk.moved
    come_back(talk)
    assert request.cancelled
    talk.carry(talk.frame(1, monitor=1.0), identity=AGAIN_HERE)
    assert talk.moved == [request], "it does not run a second time"
    assert (request.identity, request.cancelled) == (AGAIN_HERE, False)
    assert not talk.inbox.outgoing
    assert talk.inbox.counts["resumed"] == 1
    talk.inbox.handle_timer(5.0)
    assert talk.inbox.outgoing == [(AGAIN_HERE, wire.pack(wire.PROGRESS, id=1))]
    assert talk.inbox.finish(request)
    assert not talk.inbox.senders[AGAIN_HERE].calls


def test_a_caller_may_come_back_before_its_old_connection_is_known_to_have_ended(talk: Any) -> None:
    talk.request()
    [request] = talk.moved
    talk.carry(hello_of(talk.caller.id), identity=AGAIN_HERE)
    talk.carry(talk.frame(1), identity=AGAIN_HERE)
    assert talk.inbox.gone(IDENTITY) == []
    assert (request.identity, request.cancelled) == (AGAIN_HERE, False)


def test_a_call_that_never_arrived_runs_when_its_caller_comes_back(talk: Any) -> None:
    talk.begin()
    come_back(talk)
    talk.carry(talk.frame(1), identity=AGAIN_HERE)
    [request] = talk.moved
    assert request.identity == AGAIN_HERE


def test_a_call_that_was_answered_is_a_duplicate_when_its_caller_comes_back(talk: Any) -> None:
    talk.request()
    [request] = talk.moved
    talk.inbox.finish(request)
    come_back(talk)
    talk.carry(talk.frame(1), identity=AGAIN_HERE)
    assert len(talk.moved) == 1
    [(_, frame)] = talk.inbox.outgoing
    assert wire.rejection(frame)[0] == "duplicate"


def test_a_cast_that_was_taken_in_is_acknowledged_again_when_its_caller_comes_back(talk: Any) -> None:
    talk.request(wire.CAST)
    come_back(talk)
    talk.carry(talk.frame(1, wire.CAST), identity=AGAIN_HERE)
    assert len(talk.moved) == 1
    assert talk.inbox.outgoing == [(AGAIN_HERE, wire.ack([1]))]


def test_nobody_gets_the_answer_to_anothers_call_by_its_number(talk: Any) -> None:
    talk.request()
    talk.inbox.gone(IDENTITY)
    connect_too(talk)
    talk.carry(talk.frame(1), identity=FLOOD)
    first, second = talk.moved
    assert (first.identity, second.identity) == (IDENTITY, FLOOD)


def test_a_caller_that_comes_and_goes_leaves_nothing_behind(talk: Any) -> None:
    window = talk.inbox.senders[IDENTITY].window
    for number in range(100):
        talk.carry(hello_of(talk.caller.id), identity=b"%d" % number)
        talk.inbox.gone(b"%d" % number)
    assert len(window.connections) <= 2
