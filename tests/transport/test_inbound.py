"""The rules of the inbound socket, one by one, on a socket that does as the test says."""

from __future__ import annotations

import threading
import time

import pytest
from tests.transport.conftest import InboundBench

from onehop.protocol import wire
from onehop.protocol.inbox import Request
from onehop.transport.inbound import BATCH, Queue

SOON = 2.0
FAR = 30.0


def far() -> float:
    return time.monotonic() + FAR


def offer(bench: InboundBench, service: str, queue: Queue | None = None) -> Queue:
    queue = Queue() if queue is None else queue
    bench.inbound.change(lambda inbox: inbox.offer(service, "a", queue))
    return queue


def leads(bench: InboundBench, looked: int) -> bool:
    """Whether somebody leads, has looked since ``looked``, and is (or is about to be) asleep on the descriptor."""
    inbound = bench.inbound
    return inbound._lead.locked() and bench.socket.looked > looked and not inbound._lock.locked()


def take_in(bench: InboundBench, service: str, **details: str) -> None:
    bench.arrive(bench.request(service, **details))
    bench.socket.signal()


def answer_of(request: Request) -> bytes:
    frame = wire.answer(wire.REPLY, 0, request.id, b"\xc0")
    assert isinstance(frame, bytes)
    return frame


def test_taker_receives_by_itself(inbound_bench: InboundBench, background, eventually) -> None:
    queue = offer(inbound_bench, "clock")
    taking = background(inbound_bench.inbound.take, queue, far())
    eventually(inbound_bench.inbound._lead.locked)
    take_in(inbound_bench, "clock")
    assert taking.result(SOON).method == "read"
    assert not inbound_bench.inbound._lead.locked()


def test_taker_whose_time_is_up_gets_nothing(inbound_bench: InboundBench) -> None:
    queue = offer(inbound_bench, "clock")
    began = time.monotonic()
    assert inbound_bench.inbound.take(queue, began + 0.1) is None
    assert 0.09 < time.monotonic() - began < 1.1


def test_leader_wakes_the_taker_of_another_queue(inbound_bench: InboundBench, background, eventually) -> None:
    first, second = offer(inbound_bench, "clock"), offer(inbound_bench, "alarm")
    leading = background(inbound_bench.inbound.take, first, far())
    eventually(inbound_bench.inbound._lead.locked)
    following = background(inbound_bench.inbound.take, second, far())
    eventually(lambda: second.idle)
    take_in(inbound_bench, "alarm")
    assert following.result(SOON).service == "alarm"
    assert not leading.ended
    take_in(inbound_bench, "clock")
    assert leading.result(SOON).service == "clock"


@pytest.mark.parametrize("how", ["request", "timeout", "stop"])
def test_leader_that_leaves_hands_the_lead_on(inbound_bench: InboundBench, background, eventually, how: str) -> None:
    first, second = offer(inbound_bench, "clock"), offer(inbound_bench, "alarm")
    leading = background(inbound_bench.inbound.take, first, far() if how != "timeout" else time.monotonic() + 0.3)
    eventually(inbound_bench.inbound._lead.locked)
    following = background(inbound_bench.inbound.take, second, far())
    eventually(lambda: second.idle)
    if how == "request":
        take_in(inbound_bench, "clock")
    elif how == "stop":
        first.stop()
        inbound_bench.inbound.interrupt()
    assert (leading.result(SOON) is not None) == (how == "request")
    eventually(inbound_bench.inbound._lead.locked)
    take_in(inbound_bench, "alarm")
    assert following.result(SOON).service == "alarm"


def test_answer_queued_in_the_lock_is_sent_after_its_release(inbound_bench: InboundBench, background) -> None:
    bench = inbound_bench
    queue = offer(bench, "clock")
    for _ in range(2):
        take_in(bench, "clock")
    first = bench.inbound.take(queue, far())
    second = bench.inbound.take(queue, far())
    assert first is not None
    assert second is not None
    bench.socket.looks.append(lambda: background(bench.inbound.answer, second, answer_of(second)).result(SOON))
    bench.inbound.answer(first, answer_of(first))
    assert [frame for _, frame in bench.socket.sent] == [answer_of(first), answer_of(second)]
    assert bench.inbox.taken == {}


def test_leader_is_woken_when_who_answers_takes_in_its_request(
    inbound_bench: InboundBench, background, eventually
) -> None:
    bench = inbound_bench
    queue, other = offer(bench, "clock"), offer(bench, "alarm")
    take_in(bench, "alarm")
    request = bench.inbound.take(other, far())
    assert request is not None
    looked = bench.socket.looked
    leading = background(bench.inbound.take, queue, far())
    eventually(lambda: leads(bench, looked))
    bench.arrive(bench.request("clock"))  # no signal: the answering thread's look has eaten the edge
    bench.inbound.answer(request, answer_of(request))
    assert leading.result(SOON).service == "clock"


def test_leader_is_woken_when_who_answers_leaves_a_full_batch_behind(
    inbound_bench: InboundBench, background, eventually
) -> None:
    bench = inbound_bench
    queue, other = offer(bench, "clock"), offer(bench, "alarm")
    take_in(bench, "alarm")
    request = bench.inbound.take(other, far())
    assert request is not None
    looked = bench.socket.looked
    leading = background(bench.inbound.take, queue, far())
    eventually(lambda: leads(bench, looked))
    for _ in range(BATCH):
        bench.arrive(wire.pack(wire.PING, id=5))
    bench.arrive(bench.request("clock"))
    bench.inbound.answer(request, answer_of(request))
    assert leading.result(SOON).service == "clock"
    assert bench.kinds_sent().count(wire.PONG) == BATCH


def test_request_whose_edge_was_eaten_by_a_sending_is_seen(inbound_bench: InboundBench, background) -> None:
    bench = inbound_bench
    queue = offer(bench, "clock")
    bench.socket.sends.append(lambda: bench.arrive(bench.request("clock")))  # no signal
    bench.arrive(wire.pack(wire.PING, id=5))
    assert background(bench.inbound.take, queue, far()).result(SOON).service == "clock"


def test_answer_is_sent_once(inbound_bench: InboundBench) -> None:
    bench = inbound_bench
    queue = offer(bench, "clock")
    take_in(bench, "clock")
    request = bench.inbound.take(queue, far())
    assert request is not None
    for _ in range(2):
        bench.inbound.answer(request, answer_of(request))
    assert bench.kinds_sent() == [wire.REPLY]


def test_answer_to_a_connection_that_is_gone_is_counted_and_cancels_what_it_asked(inbound_bench: InboundBench) -> None:
    bench = inbound_bench
    queue = offer(bench, "clock")
    for _ in range(2):
        take_in(bench, "clock")
    first = bench.inbound.take(queue, far())
    second = bench.inbound.take(queue, far())
    assert first is not None
    assert second is not None
    bench.socket.gone.add(b"\0conn")
    bench.inbound.answer(first, answer_of(first))
    assert bench.inbound.counts == {"answers to a peer that is gone": 1}
    assert second.cancelled


def test_answer_to_a_connection_that_does_not_read_is_counted_and_holds_up_nobody(inbound_bench: InboundBench) -> None:
    bench = inbound_bench
    queue = offer(bench, "clock")
    take_in(bench, "clock")
    request = bench.inbound.take(queue, far())
    assert request is not None
    bench.socket.full.add(b"\0conn")
    bench.inbound.answer(request, answer_of(request))
    assert bench.inbound.counts == {"answers to a peer that does not read": 1}
    assert bench.inbox.taken == {}


def test_workers_wake_for_each_request_and_end_when_stopped(inbound_bench: InboundBench, eventually) -> None:
    bench = inbound_bench
    before = set(threading.enumerate())
    ran: list[int] = []
    everyone = threading.Barrier(3)

    def run(request: Request) -> None:
        everyone.wait(SOON)  # three at once, or it breaks
        ran.append(request.id)
        bench.inbound.answer(request, answer_of(request))

    queue = offer(bench, "clock", Queue(run, 3))
    for _ in range(6):
        take_in(bench, "clock")
    bench.inbound.look(time.monotonic())
    eventually(lambda: len(ran) == 6)
    eventually(lambda: bench.kinds_sent() == [wire.REPLY] * 6)
    queue.stop()
    eventually(lambda: set(threading.enumerate()) <= before)


def test_inline_method_runs_where_it_is_received_and_does_not_nest(inbound_bench: InboundBench) -> None:
    bench = inbound_bench
    depth, deepest, ran = 0, 0, 0

    def run(request: Request) -> None:
        nonlocal depth, deepest, ran
        depth += 1
        deepest = max(deepest, depth)
        ran += 1
        if ran < 300:
            bench.arrive(bench.request("clock"))  # found by the look that follows the answer
        bench.inbound.answer(request, answer_of(request))
        depth -= 1

    offer(bench, "clock", Queue(run, 1, frozenset({"read"})))
    take_in(bench, "clock")
    bench.inbound.look(time.monotonic())
    assert (ran, deepest) == (300, 1)


def test_exception_in_the_lock_releases_it(inbound_bench: InboundBench) -> None:
    bench = inbound_bench
    queue = offer(bench, "clock")

    def interrupt() -> None:
        raise KeyboardInterrupt

    bench.socket.looks.append(interrupt)
    with pytest.raises(KeyboardInterrupt):
        bench.inbound.take(queue, far())
    assert not bench.inbound._lock.locked()
    assert not bench.inbound._lead.locked()
    take_in(bench, "clock")
    assert bench.inbound.take(queue, far()) is not None


def test_close_ends_who_waits_and_counts_what_is_answered_after_it(
    inbound_bench: InboundBench, background, eventually
) -> None:
    bench = inbound_bench
    queue = offer(bench, "clock")
    take_in(bench, "clock")
    request = bench.inbound.take(queue, far())
    assert request is not None
    bench.inbound.start_receiver()
    eventually(bench.inbound._lead.locked)
    queue.stop()
    bench.inbound.close(0.0)
    assert bench.socket.closed
    assert bench.inbound.take(queue, far()) is None
    bench.inbound.answer(request, answer_of(request))
    assert bench.inbound.counts == {"answers after close": 1}
    bench.inbound.look(time.monotonic())
