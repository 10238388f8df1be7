"""The rules of a link, one by one, on a socket that does as the test says.

"In the lock" means: from inside a look for messages, which the holder of the link's lock makes.
"""

from __future__ import annotations

import signal
import threading
import time

import pytest
from tests.transport.conftest import LinkBench, reply_to

from onehop.protocol import wire
from onehop.protocol.calls import LOST, REJECTED, REPLIED, Call
from onehop.transport.link import BATCH, Link

SOON = 2.0  # seconds: far below the deadlines here, far above what a busy machine needs
FAR = 30.0


def far() -> float:
    return time.monotonic() + FAR


def polls(bench: LinkBench) -> bool:
    """Whether somebody leads (or waits alone), has looked, and is (or is about to be) asleep on the descriptor."""
    link = bench.link
    return bench.socket.looked > 0 and bool(link._alone or (link._lead.locked() and not link._lock.locked()))


def exchange(bench: LinkBench, call: Call, frame: bytes, within: float = FAR) -> bool:
    """Send ``call`` and wait; whether it has news."""
    call.deadline = time.monotonic() + within
    bench.link.exchange(call, frame)
    return call.outcome is not None


def waiter(bench: LinkBench, background, within: float = FAR):  # type: ignore[no-untyped-def]
    """A thread that waits for a call of its own; (call, its result)."""
    call, _frame = bench.begin()
    return call, background(bench.link.wait, call, 0, time.monotonic() + within)


def test_lone_caller_sends_and_receives_by_itself(bench: LinkBench) -> None:
    call, frame = bench.begin()
    threads = set(threading.enumerate())
    bench.socket.arrived.append(reply_to(call))
    assert exchange(bench, call, frame)
    assert set(threading.enumerate()) <= threads
    assert (call.outcome, bytes(call.body), call.sent) == (REPLIED, b"reply", True)
    assert bench.socket.sent == [frame]


def test_edge_wakes_the_leader(bench: LinkBench, background, eventually) -> None:
    call, waiting = waiter(bench, background)
    eventually(lambda: polls(bench))
    bench.socket.arrived.append(reply_to(call))
    bench.socket.signal()
    assert waiting.result(SOON) is True


def test_frame_queued_in_the_lock_is_sent_after_its_release(bench: LinkBench, background) -> None:
    other = wire.pack(wire.CANCEL, id=7)
    bench.socket.looks.append(lambda: background(bench.link.post, None, other).result(SOON))
    bench.link.post(None, wire.pack(wire.CANCEL, id=6))
    assert bench.socket.sent == [wire.pack(wire.CANCEL, id=6), other]


def test_frame_queued_while_the_leader_reads_its_own_reply_is_sent(bench: LinkBench, background) -> None:
    call, frame = bench.begin()
    other = wire.pack(wire.CANCEL, id=7)

    def arrive() -> None:
        background(bench.link.post, None, other).result(SOON)
        bench.socket.arrived.append(reply_to(call))

    bench.socket.looks.append(arrive)
    assert exchange(bench, call, frame)
    assert bench.socket.sent == [frame, other]


def test_leader_is_woken_when_another_reads_its_reply(bench: LinkBench, background, eventually) -> None:
    call, waiting = waiter(bench, background)
    eventually(lambda: polls(bench))
    bench.socket.arrived.append(reply_to(call))  # no signal: the sender's look has eaten the edge
    bench.link.post(None, wire.pack(wire.CANCEL, id=7))
    assert waiting.result(SOON) is True


def test_leader_is_woken_when_another_leaves_a_full_batch_behind(bench: LinkBench, background, eventually) -> None:
    call, waiting = waiter(bench, background)
    eventually(lambda: polls(bench))
    bench.socket.arrived.extend([wire.answer(wire.REPLY, 0, 999, b"")] * BATCH)  # type: ignore[list-item]
    bench.socket.arrived.append(reply_to(call))
    bench.link.post(None, wire.pack(wire.CANCEL, id=7))
    assert waiting.result(SOON) is True
    assert bench.calls.late == BATCH


def test_follower_is_woken_by_the_leader_who_reads_its_reply(bench: LinkBench, background, eventually) -> None:
    _first, leading = waiter(bench, background)
    eventually(lambda: polls(bench))
    second, following = waiter(bench, background)
    eventually(lambda: second.waiter is not None)
    bench.socket.arrived.append(reply_to(second))
    bench.socket.signal()
    assert following.result(SOON) is True
    assert not leading.ended


@pytest.mark.parametrize("how", ["reply", "timeout"])
def test_leader_that_leaves_hands_the_lead_on(bench: LinkBench, background, eventually, how: str) -> None:
    first, leading = waiter(bench, background, within=FAR if how == "reply" else SOON)
    eventually(lambda: polls(bench))
    others = [waiter(bench, background) for _ in range(3)]
    eventually(lambda: all(call.waiter is not None for call, _ in others) or how == "timeout")
    if how == "reply":
        bench.socket.arrived.append(reply_to(first))
        bench.socket.signal()
    assert leading.result(2 * SOON) is (how == "reply")
    for call, waiting in others:  # each in turn: whoever leads must look when the edge comes, and hand on
        bench.socket.arrived.append(reply_to(call))
        bench.socket.signal()
        assert waiting.result(SOON) is True


def test_follower_whose_time_is_up_leaves_alone(bench: LinkBench, background, eventually) -> None:
    first, leading = waiter(bench, background)
    eventually(lambda: polls(bench))
    _second, following = waiter(bench, background, within=0.1)
    assert following.result(SOON) is False
    bench.socket.arrived.append(reply_to(first))
    bench.socket.signal()
    assert leading.result(SOON) is True


def test_leader_leaves_with_its_time_though_nobody_gives_the_lock_back(bench: LinkBench, background) -> None:
    assert bench.link._lock.acquire(False)  # as by a thread that was interrupted before it could see to that
    try:
        _call, leading = waiter(bench, background, within=0.1)
        assert leading.result(SOON) is False
    finally:
        bench.link._lock.release()


def test_newcomer_that_becomes_leader_while_its_reply_is_read_sees_it(bench: LinkBench, background, eventually) -> None:
    call, _frame = bench.begin()
    started = []

    def arrive() -> None:
        started.append(background(bench.link.wait, call, 0, far()))
        eventually(bench.link._lead.locked)  # it leads, and waits for the lock
        bench.socket.arrived.append(reply_to(call))

    bench.socket.looks.append(arrive)
    bench.link.post(None, wire.pack(wire.CANCEL, id=7))
    assert started[0].result(SOON) is True


def test_many_threads_on_a_slow_socket_each_get_their_reply(bench: LinkBench, background) -> None:
    def answer() -> None:
        asked = set()
        while len(asked) < 400:
            for frame in list(bench.socket.sent):
                assert isinstance(frame, bytes)
                number = wire.header(frame).id
                if number not in asked:
                    asked.add(number)
                    bench.socket.arrived.append(wire.answer(wire.REPLY, 0, number, b"%d" % number))  # type: ignore[arg-type]
                    bench.socket.signal()

    def work() -> bool:
        good = True
        for _ in range(50):
            call, frame = bench.begin()
            good &= exchange(bench, call, frame) and call.body == b"%d" % call.id
        return good

    answering = background(answer)
    assert all(each.result(within=30) for each in [background(work) for _ in range(8)])
    answering.result()
    assert bench.calls.pending == {}


# Alone --------------------------------------------------------------------------------------------


def late(number: int) -> bytes:
    frame = wire.answer(wire.REPLY, 0, number, b"")
    assert isinstance(frame, bytes)
    return frame


@pytest.mark.parametrize("before", [0, 1, 3])
@pytest.mark.parametrize("behind", [0, 1, BATCH + 1])
def test_lone_caller_gets_its_reply_from_among_others_and_loses_none_of_them(
    bench: LinkBench, before: int, behind: int
) -> None:
    call, frame = bench.begin()
    bench.socket.arrived.extend([late(1000 + number) for number in range(before)])
    bench.socket.arrived.append(reply_to(call))
    bench.socket.arrived.extend([late(2000 + number) for number in range(behind)])
    assert exchange(bench, call, frame)
    assert call.body == b"reply"
    again, frame = bench.begin()
    bench.socket.arrived.append(reply_to(again))
    assert exchange(bench, again, frame)
    bench.link.look()
    assert bench.calls.late == before + behind


def test_lone_caller_hears_what_came_with_its_reply_and_is_for_no_call(bench: LinkBench) -> None:
    call, frame = bench.begin()
    bench.socket.arrived.extend([reply_to(call), wire.goodbye("bye")])
    assert exchange(bench, call, frame)
    bench.link.look()
    assert bench.cold == [wire.goodbye("bye")]


def test_lone_caller_shares_with_who_comes(bench: LinkBench, background, eventually) -> None:
    first, frame = bench.begin()
    alone = background(exchange, bench, first, frame)
    eventually(lambda: polls(bench))
    second, other = bench.begin()
    beside = background(exchange, bench, second, other)
    eventually(lambda: bench.socket.sent == [frame, other])
    for call, waiting in ((second, beside), (first, alone)):
        bench.socket.arrived.append(reply_to(call))
        bench.socket.signal()
        assert waiting.result(SOON) is True


def test_lone_caller_whose_time_is_up_leaves(bench: LinkBench) -> None:
    call, frame = bench.begin()
    began = time.monotonic()
    assert exchange(bench, call, frame, within=0.1) is False
    assert 0.09 < time.monotonic() - began < 5
    assert call.sent


def test_lone_caller_is_lost_when_the_link_ends(bench: LinkBench, background, eventually) -> None:
    call, frame = bench.begin()
    waiting = background(exchange, bench, call, frame)
    eventually(lambda: polls(bench))
    began = time.monotonic()
    assert bench.link.end("the connection ended")
    assert time.monotonic() - began < 5
    assert waiting.result(SOON) is True
    assert (call.outcome, call.body) == (LOST, "the connection ended")
    assert bench.link.close(0.0)


def test_frame_for_another_is_no_outcome_for_a_lone_caller(bench: LinkBench, background, eventually) -> None:
    call, frame = bench.begin()
    waiting = background(exchange, bench, call, frame)
    eventually(lambda: polls(bench))
    bench.socket.arrived.append(late(999))
    bench.socket.signal()
    eventually(lambda: bench.calls.late == 1)
    assert not waiting.ended
    bench.socket.arrived.append(reply_to(call))
    bench.socket.signal()
    assert waiting.result(SOON) is True


# No room ------------------------------------------------------------------------------------------


def test_frame_that_finds_no_room_is_sent_when_there_is_some(bench: LinkBench, background, eventually) -> None:
    bench.socket.room = 0
    call, frame = bench.begin()
    waiting = background(exchange, bench, call, frame)
    eventually(lambda: polls(bench))
    assert call.sent is False
    bench.socket.room = 1
    eventually(lambda: bench.socket.sent == [frame], within=SOON)
    bench.socket.arrived.append(reply_to(call))
    bench.socket.signal()
    assert waiting.result(SOON) is True


def test_frames_behind_one_that_finds_no_room_keep_their_order(bench: LinkBench) -> None:
    bench.socket.room = 0
    frames = [wire.pack(wire.CANCEL, id=number) for number in range(5)]
    for frame in frames:
        bench.link.post(None, frame)
    assert bench.socket.sent == []
    bench.socket.room = 5
    bench.link.look()
    assert bench.socket.sent == frames


def test_call_that_was_given_up_before_it_left_is_not_sent(bench: LinkBench) -> None:
    bench.socket.room = 0
    call, frame = bench.begin()
    assert exchange(bench, call, frame, within=0.05) is False
    assert bench.calls.give_up(call)
    assert call.sent is False
    bench.socket.room = 5
    bench.link.look()
    assert bench.socket.sent == []


# What does not belong -----------------------------------------------------------------------------


@pytest.mark.parametrize("garbage", [b"", b"\x11", b"\xff" * 16, wire.pack(wire.REQUEST), b"\x10\0\0\0" + b"\0" * 15])
def test_garbage_is_counted_and_the_wait_goes_on(bench: LinkBench, garbage: bytes) -> None:
    call, frame = bench.begin()
    bench.link._control = lambda link, cold: wire.header(cold) and (_ for _ in ()).throw(wire.WireError("no"))  # type: ignore[assignment, attr-defined]
    bench.socket.arrived.extend([garbage, reply_to(call)])
    assert exchange(bench, call, frame)
    assert bench.link.bad_frames == 1


def test_cold_frames_are_given_to_control(bench: LinkBench) -> None:
    call, frame = bench.begin()
    bench.socket.arrived.extend([wire.goodbye("bye"), reply_to(call)])
    assert exchange(bench, call, frame)
    assert bench.cold == [wire.goodbye("bye")]


def test_reply_to_nobody_is_counted_as_late(bench: LinkBench) -> None:
    bench.socket.arrived.append(wire.answer(wire.REPLY, 0, 12345, b""))  # type: ignore[arg-type]
    bench.link.look()
    assert bench.calls.late == 1


# Exceptions ---------------------------------------------------------------------------------------


# One who asks many links -----------------------------------------------------------------------------


class Unseen(dict[object, object]):
    """Those who wait, as one sees them who looks before they come and again when they are there."""

    looked = False

    def __bool__(self) -> bool:
        before, self.looked = self.looked, True
        return before and len(self) > 0


def test_put_sends_without_a_look_and_a_glance_takes_in_one_message(bench: LinkBench) -> None:
    (first, frame), (second, _) = bench.begin(), bench.begin()
    bench.socket.arrived.extend([reply_to(first), reply_to(second)])
    bench.link.put(first, frame)
    assert (bench.socket.sent, first.sent, bench.socket.looked) == ([frame], True, 0)
    bench.link.glance()
    assert (first.outcome, second.outcome, bench.socket.limits) == (REPLIED, None, [1])
    bench.link.glance()
    bench.link.glance()
    assert second.outcome == REPLIED


def test_put_looks_for_who_waits(bench: LinkBench, background, eventually) -> None:
    call, waiting = waiter(bench, background)
    eventually(lambda: polls(bench))
    copy, frame = bench.begin()
    bench.socket.arrived.append(reply_to(call))  # no signal: the sending has eaten the edge
    bench.link.put(copy, frame)
    assert waiting.result(SOON) is True
    assert bench.socket.sent == [frame]


def test_leader_that_came_while_a_copy_was_put_is_woken(bench: LinkBench, background, eventually) -> None:
    call, waiting = waiter(bench, background)
    eventually(lambda: polls(bench))
    copy, frame = bench.begin()
    bench.link._waiting = Unseen(bench.link._waiting)
    bench.socket.arrived.append(reply_to(call))  # no signal, as before
    bench.link.put(copy, frame)
    assert waiting.result(SOON) is True


def test_leader_that_came_before_a_glance_hears_of_what_that_left(bench: LinkBench, background, eventually) -> None:
    call, waiting = waiter(bench, background)
    eventually(lambda: polls(bench))
    copy, _frame = bench.begin()
    bench.link._waiting = Unseen(bench.link._waiting)
    bench.socket.arrived.extend([reply_to(copy), reply_to(call)])  # no signal: the glance has eaten the edge
    bench.link.glance()
    assert copy.outcome == REPLIED
    assert waiting.result(SOON) is True


def test_put_keeps_its_place_behind_what_waits_for_room(bench: LinkBench) -> None:
    frames = [wire.pack(wire.CANCEL, id=id) for id in (6, 7)]
    bench.socket.room = 0
    bench.link.post(None, frames[0])
    copy, frames[1] = bench.begin()
    bench.link.put(copy, frames[1])
    assert (bench.socket.sent, copy.sent) == ([], False)
    bench.socket.room = 10
    bench.socket.arrived.append(reply_to(copy))
    assert bench.link.wait(copy, 0, far())
    assert bench.socket.sent == frames


def test_put_sends_nothing_after_the_end(bench: LinkBench) -> None:
    copy, frame = bench.begin()
    bench.link.end("it ended")
    bench.link.put(copy, frame)
    bench.link.glance()
    assert (bench.socket.sent, copy.outcome, copy.sent) == ([], LOST, False)


def test_put_gives_the_lock_back_when_it_is_interrupted(bench: LinkBench) -> None:
    def interrupt() -> bool:
        raise Interrupt

    copy, frame = bench.begin()
    bench.socket.send = lambda frame: interrupt()  # type: ignore[method-assign]
    with pytest.raises(Interrupt):
        bench.link.put(copy, frame)
    assert not bench.link._lock.locked()


class Interrupt(Exception):
    pass


def test_exception_while_leading_hands_the_lead_on(bench: LinkBench, background, eventually) -> None:
    def interrupt(*_: object) -> None:
        raise Interrupt

    main = threading.main_thread().ident
    assert main == threading.get_ident()
    bench.begin()  # somebody else's: who is not alone leads
    first, frame = bench.begin()
    followers = []

    def disturb() -> None:
        eventually(lambda: polls(bench))
        second, following = waiter(bench, background)
        eventually(lambda: second.waiter is not None)
        followers.append((second, following))
        signal.pthread_kill(main, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        disturbing = background(disturb)
        with pytest.raises(Interrupt):
            exchange(bench, first, frame)
    finally:
        signal.signal(signal.SIGUSR1, before)
    disturbing.result()
    ((second, following),) = followers
    bench.socket.arrived.append(reply_to(second))
    bench.socket.signal()
    assert following.result(SOON) is True
    assert not bench.link._lead.locked()
    assert not bench.link._lock.locked()


def test_interrupt_in_the_midst_of_a_batch_loses_the_frame_in_hand_and_no_other(
    bench: LinkBench, background, eventually
) -> None:
    class Interrupting(dict[int, Call]):
        def get(self, id: int, default: object = None) -> object:  # type: ignore[override]
            if id == in_hand.id:
                raise Interrupt
            return super().get(id, default)

    calls = [waiter(bench, background) for _ in range(5)]
    eventually(lambda: polls(bench))
    eventually(lambda: sum(call.waiter is not None for call, _ in calls) >= 4)
    in_hand = calls[2][0]
    bench.calls.pending = Interrupting(bench.calls.pending)
    bench.socket.arrived.extend([reply_to(call) for call, _ in calls])  # no signal: the poster's look finds them
    with pytest.raises(Interrupt):
        bench.link.post(None, wire.pack(wire.CANCEL, id=7))
    for call, waiting in calls:
        if call is not in_hand:
            assert waiting.result(SOON) is True
    assert in_hand.outcome is None


def test_exception_in_the_lock_releases_it(bench: LinkBench) -> None:
    def interrupt() -> None:
        raise Interrupt

    call, frame = bench.begin()
    bench.socket.looks.append(interrupt)
    with pytest.raises(Interrupt):
        exchange(bench, call, frame)
    assert not bench.link._lead.locked()
    assert not bench.link._lock.locked()
    bench.socket.arrived.append(reply_to(call))
    assert bench.link.wait(call, 0, far())


def test_exception_in_the_lock_loses_no_reply_of_others(bench: LinkBench, background, eventually) -> None:
    def interrupt() -> None:
        raise Interrupt

    first, leading = waiter(bench, background)
    eventually(lambda: polls(bench))
    second, following = waiter(bench, background)
    eventually(lambda: second.waiter is not None)
    bench.socket.arrived.extend([reply_to(first), reply_to(second)])
    bench.socket.found.append(interrupt)  # after both were read
    with pytest.raises(Interrupt):
        bench.link.post(None, wire.pack(wire.CANCEL, id=7))
    assert leading.result(SOON) is True
    assert following.result(SOON) is True


# The end ------------------------------------------------------------------------------------------


def test_end_reads_what_still_came_and_loses_the_rest(bench: LinkBench, background, eventually) -> None:
    answered, first = waiter(bench, background)
    lost, second = waiter(bench, background)
    eventually(lambda: answered.waiter is not None or lost.waiter is not None)
    bench.socket.arrived.append(reply_to(answered))
    assert bench.link.end("the connection ended") is True
    assert first.result(SOON) is True
    assert second.result(SOON) is True
    assert (answered.outcome, lost.outcome, lost.body) == (REPLIED, LOST, "the connection ended")
    assert bench.link.end("again") is False
    assert (bench.link.ready, bench.link.ended) == (False, "the connection ended")


def test_final_goodbye_that_was_read_counts_though_the_end_comes_before_it_is_handled(
    bench: LinkBench, background, eventually
) -> None:
    ending = []

    def control(link: Link, frame: bytes) -> None:
        assert wire.is_final(frame)
        started = threading.Event()
        ending.append(background(lambda: (started.set(), link.end("the connection ended"))))
        started.wait()
        threading.Event().wait(0.2)  # time for the other to get as far as it may
        link.tell(bench.calls.refuse("draining"))

    bench.link._control = control  # type: ignore[assignment]
    call, waiting = waiter(bench, background)
    eventually(lambda: polls(bench))
    bench.socket.arrived.append(wire.goodbye("drained", final=True))
    bench.socket.signal()
    assert waiting.result(SOON) is True
    ending[0].result(SOON)
    assert call.outcome == REJECTED  # so it certainly did not run


def test_nothing_is_sent_after_the_end(bench: LinkBench) -> None:
    bench.link.end("the connection ended")
    bench.link.post(None, wire.pack(wire.CANCEL, id=7))
    call, frame = bench.begin()
    assert exchange(bench, call, frame, within=0.05) is False
    assert bench.socket.sent == []


def test_close_waits_for_the_leader_and_the_socket_is_not_used_after_it(
    bench: LinkBench, background, eventually
) -> None:
    _call, waiting = waiter(bench, background)
    eventually(lambda: polls(bench))
    bench.link.end("the connection ended")
    bench.link.close(0.0)
    bench.link.close(0.0)
    assert waiting.result(SOON) is True
    bench.link.look()
    bench.link.post(None, wire.pack(wire.CANCEL, id=7))


def test_lone_call_whose_deadline_has_passed_is_sent_and_not_waited_for(bench: LinkBench) -> None:
    call, frame = bench.begin()
    call.deadline = time.monotonic() - 1.0
    began = time.monotonic()
    bench.link.exchange(call, frame)
    assert time.monotonic() - began < SOON
    assert call.outcome is None
    assert bench.socket.sent == [frame]
    assert bench.socket.waits == [0], "less than 0 is for ever"


def test_link_whose_lock_somebody_keeps_is_not_given_back_and_holds_up_nobody(bench: LinkBench) -> None:
    bench.link.end("over")
    with bench.link._lock:
        assert bench.link.close(0.0) is False
    assert not bench.socket.closed
    assert bench.link.close(0.0) is True
    assert bench.socket.closed
