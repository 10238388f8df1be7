"""The rules of the inbound socket, one by one, on a socket that does as the test says."""

from __future__ import annotations

import errno
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import FrameType

import pytest
from tests.transport.conftest import InboundBench

from onehop.protocol import wire
from onehop.protocol.inbox import Request
from onehop.transport.inbound import BATCH, CALM, HELD_UP
from onehop.transport.queue import LENT, TOGETHER, Queue
from onehop.transport.waiting import acquire, new_lock

SOON = 2.0
FAR = 30.0


def far() -> float:
    return time.monotonic() + FAR


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
    queue = inbound_bench.offer("clock")
    taking = background(inbound_bench.inbound.take, queue, far())
    eventually(inbound_bench.inbound._lead.locked)
    take_in(inbound_bench, "clock")
    assert taking.result(SOON).method == "read"
    assert not inbound_bench.inbound._lead.locked()


def test_taker_whose_time_is_up_gets_nothing(inbound_bench: InboundBench) -> None:
    queue = inbound_bench.offer("clock")
    began = time.monotonic()
    assert inbound_bench.inbound.take(queue, began + 0.1) is None
    assert 0.09 < time.monotonic() - began < 5


def test_request_that_comes_to_its_queue_after_that_was_closed_is_refused(inbound_bench: InboundBench) -> None:
    bench = inbound_bench
    queue = bench.offer("clock")

    def close() -> None:  # when the inbox has taken it, and before it is handed over
        assert len(bench.inbox.taken) == 1
        assert not queue
        queue.stop()
        bench.inbound.refuse_rest(queue)

    bench.socket.sends.append(close)
    bench.arrive(bench.request("nobody's"))  # so that something is sent between the two
    take_in(bench, "clock")
    bench.inbound.look(time.monotonic())
    assert bench.kinds_sent() == [wire.REJECT, wire.REJECT]
    assert bench.inbox.refused["draining"] == 1
    assert bench.inbox.taken == {}
    assert not queue


def test_interrupt_leaves_nobody_to_be_woken_in_the_place_of_one_who_waits(inbound_bench: InboundBench) -> None:
    queue = inbound_bench.offer("clock")
    lock = new_lock()
    lock.acquire()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if frame is not None and frame.f_code is acquire.__code__:  # while it waits, and not before or after
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        with pytest.raises(KeyboardInterrupt):
            queue.wait(lock, FAR)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not queue.idle


def test_leader_wakes_the_taker_of_another_queue(inbound_bench: InboundBench, background, eventually) -> None:
    first, second = inbound_bench.offer("clock"), inbound_bench.offer("alarm")
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
    first, second = inbound_bench.offer("clock"), inbound_bench.offer("alarm")
    leading = background(inbound_bench.inbound.take, first, far() if how != "timeout" else time.monotonic() + SOON)
    eventually(inbound_bench.inbound._lead.locked)
    following = background(inbound_bench.inbound.take, second, far())
    eventually(lambda: second.idle)
    if how == "request":
        take_in(inbound_bench, "clock")
    elif how == "stop":
        first.stop()
        inbound_bench.inbound.interrupt()
    assert (leading.result(2 * SOON) is not None) == (how == "request")
    eventually(inbound_bench.inbound._lead.locked)
    take_in(inbound_bench, "alarm")
    assert following.result(SOON).service == "alarm"


def test_answer_queued_in_the_lock_is_sent_after_its_release(inbound_bench: InboundBench, background) -> None:
    bench = inbound_bench
    queue = bench.offer("clock")
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
    queue, other = bench.offer("clock"), bench.offer("alarm")
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
    queue, other = bench.offer("clock"), bench.offer("alarm")
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
    queue = bench.offer("clock")
    bench.socket.sends.append(lambda: bench.arrive(bench.request("clock")))  # no signal
    bench.arrive(wire.pack(wire.PING, id=5))
    assert background(bench.inbound.take, queue, far()).result(SOON).service == "clock"


def test_answer_is_sent_once(inbound_bench: InboundBench) -> None:
    bench = inbound_bench
    queue = bench.offer("clock")
    take_in(bench, "clock")
    request = bench.inbound.take(queue, far())
    assert request is not None
    for _ in range(2):
        bench.inbound.answer(request, answer_of(request))
    assert bench.kinds_sent() == [wire.REPLY]


def test_answer_to_a_connection_that_is_gone_is_counted_and_cancels_what_it_asked(inbound_bench: InboundBench) -> None:
    bench = inbound_bench
    queue = bench.offer("clock")
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
    queue = bench.offer("clock")
    take_in(bench, "clock")
    request = bench.inbound.take(queue, far())
    assert request is not None
    bench.socket.full.add(b"\0conn")
    bench.inbound.answer(request, answer_of(request))
    assert bench.inbound.counts == {"answers to a peer that does not read": 1}
    assert bench.inbox.taken == {}


def test_stream_whose_item_found_no_room_is_not_ended_as_if_that_had_been_all(inbound_bench: InboundBench) -> None:
    bench = inbound_bench
    queue = bench.offer("clock")
    bench.arrive(bench.request("clock", flags=wire.STREAM))
    bench.socket.signal()
    request = bench.inbound.take(queue, far())
    assert request is not None

    def item(number: int) -> wire.Frame:
        return wire.answer(wire.ITEM, 0, request.id, b"\xc0", number=number)

    bench.inbound.answer(request, item(0), last=False)
    bench.socket.full.add(b"\0conn")
    bench.inbound.answer(request, wire.pack(wire.PROGRESS, id=request.id), last=False)
    assert not request.cancelled  # a sign of life is nothing that its reader would miss
    request.waiter = told = threading.Lock()
    told.acquire()
    bench.inbound.answer(request, item(1), last=False)
    assert told.acquire(timeout=SOON), "who makes them hears of it"
    bench.socket.full.clear()
    bench.inbound.answer(request, item(2), last=False)
    bench.inbound.answer(request, wire.answer(wire.REPLY, wire.STREAM, request.id, b"\xc0"))
    assert bench.kinds_sent() == [wire.ITEM]
    assert request.cancelled  # so that its handler makes no more of them
    assert bench.inbox.taken == {}
    assert bench.inbound.counts == {"answers to a peer that does not read": 2}


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_answer_that_could_not_be_sent_is_not_said_never_to_have_run(
    inbound_bench: InboundBench, error: type[BaseException]
) -> None:
    bench = inbound_bench
    queue = bench.offer("clock")
    take_in(bench, "clock")
    request = bench.inbound.take(queue, far())
    assert request is not None

    def fail() -> None:
        raise error

    bench.socket.sends.append(fail)
    with suppress(KeyboardInterrupt):
        bench.inbound.answer(request, answer_of(request))
    assert bench.inbox.taken == {}
    bench.inbound.change(lambda inbox: inbox.drain("drained", time.monotonic(), final=True))
    (said,) = [frame for _, frame in bench.socket.sent]
    assert (wire.kind_of(said), wire.is_final(said)) == (wire.GOODBYE, False)
    if error is MemoryError:
        assert bench.inbound.counts["answers that could not be sent"] == 1


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_what_one_is_told_in_vain_keeps_nothing_from_the_others(
    inbound_bench: InboundBench, error: type[BaseException]
) -> None:
    bench = inbound_bench

    def fail() -> None:
        raise error

    for number in range(3):
        bench.arrive(wire.pack(wire.PING, id=number))
    bench.socket.sends.append(fail)
    with suppress(KeyboardInterrupt):
        bench.inbound.look(time.monotonic())
    bench.inbound.look(time.monotonic())
    assert bench.kinds_sent() == [wire.PONG] * (2 if error is MemoryError else 3)


def test_echo_is_answered_when_its_service_is_withdrawn(inbound_bench: InboundBench, eventually) -> None:
    bench = inbound_bench
    begun, over = threading.Event(), threading.Event()

    def hang(request: Request) -> None:
        begun.set()
        over.wait(FAR)

    queue = bench.offer("clock", Queue(hang, 1, ["read"]))
    section = wire.names("clock", "", "")
    try:
        take_in(bench, "clock")
        bench.inbound.look(time.monotonic())
        assert begun.wait(SOON)
        bench.arrive(wire.echo(7, section))
        bench.inbound.look(time.monotonic())
        assert bench.kinds_sent() == []
        queue.stop()
        bench.inbound.answer_echoes(queue)
        bench.arrive(wire.echo(8, section))  # it was on its way
        bench.inbound.look(time.monotonic())
        assert bench.kinds_sent() == [wire.PONG, wire.PONG]
    finally:
        over.set()


def test_who_runs_a_request_hears_that_its_caller_is_gone_when_a_sign_of_life_tells_so(
    inbound_bench: InboundBench,
) -> None:
    bench = inbound_bench
    queue = bench.offer("clock")
    take_in(bench, "clock")
    request = bench.inbound.take(queue, far())
    assert request is not None
    request.waiter = told = threading.Lock()
    told.acquire()
    bench.socket.gone.add(b"\0conn")
    bench.inbound.change(lambda inbox: inbox.outgoing.append((request.identity, wire.pack(wire.PROGRESS, id=1))))
    assert request.cancelled
    assert told.acquire(timeout=SOON)


def test_signal_handler_in_the_thread_that_receives_waits_for_nothing_for_ever(
    inbound_bench: InboundBench, eventually
) -> None:
    bench = inbound_bench
    queue = bench.offer("clock")
    changed = threading.Event()
    bench.socket.looks.append(lambda: bench.inbound.change(lambda inbox: changed.set()))  # as one that stops a listener
    take_in(bench, "clock")
    assert bench.inbound.take(queue, far()) is not None
    eventually(changed.is_set)


# Workers ------------------------------------------------------------------------------------------

SLOW = 0.02  # seconds; far above what counts as quick


class Work:
    """What handlers do: ``"quick"`` returns at once, ``"slow"`` takes its time, ``"held"`` waits for ``let_go``.

    "together" is slow, and waits until as many run as there are workers.

    "quick" and "held" are known to be quick, from many runs at which "held" had nothing to wait for.

    Attributes:
        ran: method and thread of each request, in the order they began.
        sent: how many answers had left when each began.
    """

    METHODS = ("quick", "slow", "held", "together")

    def __init__(self, bench: InboundBench, workers: int, eventually) -> None:  # type: ignore[no-untyped-def]
        self.bench = bench
        self.ran: list[tuple[str, int]] = []
        self.sent: list[int] = []
        self.let_go = threading.Event()
        self.everyone = threading.Barrier(workers)
        self.queue = bench.offer("clock", Queue(self.run, workers, self.METHODS))
        self.let_go.set()
        bench.inbound.start_receiver()
        self.ask(*["quick", "held"] * 50)
        eventually(lambda: self.answered(100))
        eventually(lambda: bench.inbound.resting and not bench.inbound._watched)
        self.let_go.clear()
        for record in (bench.socket.sent, self.ran, self.sent):
            record.clear()

    def run(self, request: Request) -> None:
        self.sent.append(len(self.bench.socket.sent))
        self.ran.append((request.method, threading.get_ident()))
        if request.method in ("slow", "together"):
            time.sleep(SLOW)
        elif request.method == "held":
            assert self.let_go.wait(FAR)
        if request.method == "together":
            self.everyone.wait(FAR)
        self.bench.inbound.put(request, answer_of(request))

    def ask(self, *methods: str) -> None:
        """Requests that come at one moment."""
        for method in methods:
            self.bench.arrive(self.bench.request("clock", method))
        self.bench.socket.signal()

    @property
    def threads(self) -> set[int]:
        return {thread for _, thread in self.ran}

    def answered(self, number: int) -> bool:
        return self.bench.kinds_sent() == [wire.REPLY] * number


@pytest.fixture
def make_work(inbound_bench: InboundBench, eventually) -> Iterator[Callable[[int], Work]]:
    made: list[Work] = []

    def make(workers: int) -> Work:
        made.append(Work(inbound_bench, workers, eventually))
        return made[-1]

    yield make
    for work in made:
        work.let_go.set()
        work.everyone.abort()


@pytest.fixture
def work(make_work: Callable[[int], Work]) -> Work:
    """Eight workers."""
    return make_work(8)


def test_workers_spread_over_a_method_that_is_not_known_to_be_quick(inbound_bench: InboundBench, eventually) -> None:
    bench = inbound_bench
    before = set(threading.enumerate())
    ran: list[int] = []
    everyone = threading.Barrier(3)

    def run(request: Request) -> None:
        everyone.wait(SOON)  # three at once, or it breaks
        time.sleep(SLOW)
        ran.append(request.id)
        bench.inbound.answer(request, answer_of(request))

    queue = bench.offer("clock", Queue(run, 3, {"read"}))
    bench.inbound.start_receiver()
    for _ in range(6):
        take_in(bench, "clock")
    eventually(lambda: sorted(ran) == [1, 2, 3, 4, 5, 6])
    eventually(lambda: bench.kinds_sent() == [wire.REPLY] * 6)
    queue.stop()
    bench.inbound.close(0.0)
    eventually(lambda: set(threading.enumerate()) <= before)


def test_quick_requests_of_a_moment_are_run_by_one_thread(work: Work, eventually) -> None:
    work.ask(*["quick"] * 60)
    eventually(lambda: work.answered(60))
    # A busy machine may take the processor from the worker for a moment, and the receiver then wakes another.
    assert max(Counter(thread for _, thread in work.ran).values()) >= 30


def test_slow_requests_of_a_moment_are_spread_over_all_threads(work: Work, eventually) -> None:
    work.ask(*["together"] * 16)
    eventually(lambda: work.answered(16))
    assert len(work.threads) == 8


def test_method_that_is_not_there_is_refused_as_quickly_as_a_quick_one_runs(work: Work, eventually) -> None:
    work.ask(*["none"] * 60)
    eventually(lambda: work.answered(60))
    assert max(Counter(thread for _, thread in work.ran).values()) >= 30


def test_method_known_as_quick_that_blocks_for_once_holds_up_the_others_for_a_moment_only(
    work: Work, eventually
) -> None:
    work.ask("held", *["quick"] * 10)
    eventually(lambda: work.answered(10), within=SOON)
    assert len(work.threads) > 1
    work.let_go.set()
    eventually(lambda: work.answered(11))


def test_quick_requests_behind_several_that_block_are_run_too(work: Work, eventually) -> None:
    work.ask(*["held"] * 6, "quick", "quick")
    eventually(lambda: work.answered(2), within=SOON)
    work.let_go.set()
    eventually(lambda: work.answered(8))


def test_requests_behind_as_many_that_block_as_there_are_workers_wait_and_are_not_lost(work: Work, eventually) -> None:
    work.ask(*["held"] * 8, *["quick"] * 5)
    eventually(lambda: len(work.ran) == 8)
    eventually(lambda: work.bench.inbound.resting)  # nobody can be woken: it does not go on looking
    assert work.answered(0)
    work.let_go.set()
    eventually(lambda: work.answered(13))


def test_answers_of_quick_requests_are_kept_back_together_and_never_too_many(
    make_work: Callable[[int], Work], eventually
) -> None:
    work = make_work(1)

    def some_were_kept() -> bool:  # none, where the worker was so late that nobody counts on it any more
        for record in (work.bench.socket.sent, work.ran, work.sent):
            record.clear()
        work.ask(*["quick"] * 60)
        eventually(lambda: work.answered(60))
        kept = [number - sent for number, sent in enumerate(work.sent)]
        assert max(kept) < TOGETHER
        return max(kept) > 0

    eventually(some_were_kept)


def test_answers_kept_back_leave_before_a_slow_method_begins(make_work: Callable[[int], Work], eventually) -> None:
    work = make_work(1)
    work.ask(*["quick"] * 3, "slow")
    eventually(lambda: work.answered(4))
    assert work.sent[-1] == 3


def test_answers_kept_back_leave_while_the_next_method_blocks(make_work: Callable[[int], Work], eventually) -> None:
    work = make_work(1)
    work.ask("quick", "quick", "held", "quick")
    # The worker counted on being back at once; the receiver, which looks before it rests, sends for it.
    eventually(lambda: work.answered(2), within=SOON)
    work.let_go.set()
    eventually(lambda: work.answered(4))


def test_answer_of_the_last_request_leaves_at_once(work: Work, eventually) -> None:
    for number in range(1, 20):
        work.ask("quick")
        eventually(lambda number=number: work.answered(number), within=SOON)


def test_worker_outlives_what_breaks_when_it_sends_and_looks(inbound_bench: InboundBench, eventually) -> None:
    bench = inbound_bench
    threads: list[int] = []
    looked = threading.Event()

    def fail() -> None:
        raise OSError(errno.ENOMEM, "no memory")

    def run(request: Request) -> None:
        assert looked.wait(SOON)  # or the look that brought it would be the one that breaks
        threads.append(threading.get_ident())
        bench.socket.looks.append(fail)
        bench.inbound.put(request, answer_of(request))

    bench.offer("clock", Queue(run, 1, ["read"]))
    for number in range(3):
        looked.clear()
        take_in(bench, "clock")
        bench.inbound.look(time.monotonic())
        looked.set()
        eventually(lambda number=number: bench.inbound.counts["rounds of receiving that broke"] == number + 1)
    eventually(lambda: bench.kinds_sent() == [wire.REPLY] * 3)
    assert len(set(threads)) == 1


def test_worker_loses_nothing_where_what_it_does_before_a_slow_method_breaks(
    inbound_bench: InboundBench, eventually
) -> None:
    bench = inbound_bench
    ran: list[str] = []
    all_came = threading.Event()

    def fail() -> None:
        raise OSError(errno.ENOMEM, "no memory")

    def run(request: Request) -> None:
        ran.append(request.method)
        assert all_came.wait(SOON)
        if len(ran) == 2:
            bench.socket.looks.append(fail)
        bench.inbound.put(request, answer_of(request))

    queue = bench.offer("clock", Queue(run, 1, ["read", "slow"]))
    queue._learn("read", 0.0)
    for method in ("read", "read", "slow"):
        bench.arrive(bench.request("clock", method))
    bench.inbound.look(time.monotonic())
    all_came.set()
    eventually(lambda: bench.kinds_sent() == [wire.REPLY] * 3)
    assert ran == ["read", "read", "slow"]
    assert bench.inbound.counts["rounds of receiving that broke"] == 1


def test_what_waits_in_a_line_that_nobody_sends_on_is_refused_too(inbound_bench: InboundBench) -> None:
    bench = inbound_bench
    queue = bench.offer("clock")
    take_in(bench, "clock")
    bench.inbound.look(time.monotonic())
    request = queue.tasks.popleft()
    queue.lines[request.sender], queue.held = deque([request]), 1  # as after an interrupt in the midst of a pop
    queue.stop()
    bench.inbound.refuse_rest(queue)
    assert bench.kinds_sent() == [wire.REJECT]


def test_workers_end_when_their_queue_is_stopped_and_run_what_is_left_first(work: Work, eventually) -> None:
    work.ask(*["together"] * 32)
    eventually(lambda: len(work.threads) == 8)
    workers = [thread for thread in threading.enumerate() if thread.ident in work.threads]
    work.queue.stop()
    eventually(lambda: not any(thread.is_alive() for thread in workers))
    eventually(lambda: work.answered(32))  # the last one may be in the hands of the receiver
    assert not work.queue.tasks


# Interrupts ---------------------------------------------------------------------------------------


class Interrupted(bytes):
    """The name of a connection that interrupts who looks it up: in the midst of a message."""

    def __hash__(self) -> int:
        raise KeyboardInterrupt


def test_interrupt_in_the_midst_of_a_batch_loses_the_message_in_hand_and_no_other(inbound_bench: InboundBench) -> None:
    bench = inbound_bench
    queue = bench.offer("clock")
    for number in range(5):
        frame = bench.request("clock")
        bench.arrive(frame, Interrupted(b"\0conn") if number == 2 else b"\0conn")
    with pytest.raises(KeyboardInterrupt):
        bench.inbound.look(time.monotonic())
    taken = [bench.inbound.take(queue, far()) for _ in range(4)]
    assert [request.id for request in taken if request is not None] == [1, 2, 4, 5]
    assert bench.inbound.take(queue, time.monotonic() + 0.2) is None


def test_interrupt_behind_a_look_loses_no_message_of_it(inbound_bench: InboundBench) -> None:
    bench = inbound_bench
    queue = bench.offer("clock")
    for _ in range(5):
        take_in(bench, "clock")

    def interrupt() -> None:
        raise KeyboardInterrupt

    bench.socket.found.append(interrupt)
    with pytest.raises(KeyboardInterrupt):
        bench.inbound.look(time.monotonic())
    taken = [bench.inbound.take(queue, far()) for _ in range(5)]
    assert [request.id for request in taken if request is not None] == [1, 2, 3, 4, 5]


def test_leader_is_told_of_what_an_interrupt_left_behind(inbound_bench: InboundBench, background, eventually) -> None:
    bench = inbound_bench
    queue, other = bench.offer("clock"), bench.offer("alarm")
    take_in(bench, "alarm")
    request = bench.inbound.take(other, far())
    assert request is not None
    looked = bench.socket.looked
    leading = background(bench.inbound.take, queue, far())
    eventually(lambda: leads(bench, looked))

    def interrupt() -> None:
        raise KeyboardInterrupt

    bench.arrive(bench.request("clock"))  # no signal: the answering thread's look has eaten the edge
    bench.socket.found.append(interrupt)
    with pytest.raises(KeyboardInterrupt):
        bench.inbound.answer(request, answer_of(request))
    assert leading.result(SOON).service == "clock"


# Inline -------------------------------------------------------------------------------------------


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

    bench.offer("clock", Queue(run, 1, {"read"}, frozenset({"read"})))
    take_in(bench, "clock")
    bench.inbound.look(time.monotonic())
    assert (ran, deepest) == (300, 1)


# A receiver that runs a lone request in the place of a worker --------------------------------------


class Lending:
    """A queue whose method the receiver has come to run itself.

    Attributes:
        ran: the name of the thread of each run.
        together: how many ran at one time, at most.
        within: called in each run.
    """

    def __init__(self, bench: InboundBench, workers: int, eventually) -> None:
        self.bench, self.eventually = bench, eventually
        self.ran: list[str] = []
        self.running = self.together = 0
        self.within: Callable[[], object] = lambda: None
        self.queue = bench.offer("clock", Queue(self.run, workers, {"read", "other"}))
        bench.inbound.start_receiver()

    def run(self, request: Request) -> None:
        self.running += 1
        self.together = max(self.together, self.running)
        self.ran.append(threading.current_thread().name)
        self.within()
        self.running -= 1
        self.bench.inbound.put(request, answer_of(request))

    def ask(self, method: str = "read") -> None:
        self.bench.arrive(self.bench.request("clock", method))
        self.bench.socket.signal()

    def serve(self, method: str = "read") -> str:
        """The name of the thread that ran a request that came alone."""
        ran, answered = len(self.ran), len(self.bench.socket.sent)
        self.ask(method)
        self.eventually(lambda: len(self.bench.socket.sent) > answered and len(self.ran) > ran)
        return self.ran[ran]

    def until_alone(self) -> None:
        """Until the receiver has run so many that one which comes early does not end the calm."""
        self.eventually(lambda: self.serve() and self.bench.inbound._calm > CALM + 20, within=20.0)

    def until_lent(self, method: str = "read") -> None:
        self.eventually(lambda: self.serve(method) == "onehop-receiver")


@pytest.fixture
def make_lending(inbound_bench: InboundBench, eventually) -> Callable[[int], Lending]:
    def make(workers: int) -> Lending:
        lending = Lending(inbound_bench, workers, eventually)
        lending.until_lent()
        return lending

    return make


@pytest.fixture
def lending(make_lending: Callable[[int], Lending]) -> Lending:
    return make_lending(8)


def test_request_that_comes_after_a_while_is_left_to_a_worker(lending: Lending, eventually) -> None:
    for _ in range(3):
        since = time.monotonic()
        eventually(lambda since=since: time.monotonic() - since > 2 * HELD_UP)
        assert lending.serve() == "onehop-worker"


def test_method_that_takes_its_time_is_left_to_the_workers(lending: Lending) -> None:
    lending.within = lambda: time.sleep(10 * LENT)
    assert [lending.serve("other") for _ in range(50)] == ["onehop-worker"] * 50


def test_receiver_that_is_held_up_is_stood_in_for_and_the_method_left_to_the_workers(lending: Lending) -> None:
    bench = lending.bench
    held, let_go = threading.Event(), threading.Event()

    def hold_up() -> None:
        if threading.current_thread().name == "onehop-receiver":
            held.set()
            assert let_go.wait(FAR)

    lending.within = hold_up

    def asked() -> bool:
        answered = len(bench.socket.sent)
        lending.ask()
        lending.eventually(lambda: held.is_set() or len(bench.socket.sent) > answered)
        return held.is_set()

    lending.eventually(asked)
    alarm = bench.offer("alarm")
    take_in(bench, "alarm")
    request = bench.inbound.take(alarm, far())
    assert request is not None, "nobody receives"
    let_go.set()
    lending.eventually(lambda: list(bench.inbox.taken) == [request])
    assert {lending.serve() for _ in range(200)} == {"onehop-worker"}
    lending.until_lent("other")


def test_no_more_run_at_one_time_than_there_are_workers(make_lending: Callable[[int], Lending]) -> None:
    lending = make_lending(1)
    for number in range(500):
        for _ in range(1 + number % 3):
            lending.ask()
        if number % 5:
            answered = len(lending.bench.socket.sent)
            lending.eventually(lambda answered=answered: len(lending.bench.socket.sent) > answered or not lending.queue)
    lending.eventually(lambda: not lending.bench.inbox.taken)
    assert lending.together == 1
    assert "onehop-receiver" in lending.ran


def test_request_that_came_while_the_only_place_was_lent_is_run(make_lending: Callable[[int], Lending]) -> None:
    lending = make_lending(1)
    bench = lending.bench
    asked: list[str] = []

    def ask() -> None:
        if not asked:
            asked.append("once")
            lending.ask("other")
            bench.inbound._lock.acquire()
            bench.inbound._pump()  # as a thread that answers does
            until = time.monotonic() + 0.05
            while time.monotonic() < until:
                assert lending.running == 1

    lending.within = ask
    ran = len(lending.ran)
    lending.eventually(lambda: lending.serve() == "onehop-receiver" or bool(asked))
    lending.eventually(lambda: not bench.inbox.taken)
    assert len(lending.ran) >= ran + 2
    assert lending.together == 1


def test_inline_request_that_another_thread_took_in_during_a_lent_run_is_run_before_the_next_wait(
    lending: Lending,
) -> None:
    bench = lending.bench
    inline: list[Request] = []
    bench.offer("alarm", Queue(inline.append, 0, ["read"], frozenset(["read"])))

    lending.until_alone()
    pumped: list[str] = []

    def pump() -> None:
        if threading.current_thread().name == "onehop-receiver" and not pumped:
            pumped.append("once")
            bench.arrive(bench.request("alarm"))
            bench.inbound._lock.acquire()
            bench.inbound._pump()  # as a thread that answers does

    lending.within = pump
    lending.eventually(lambda: lending.serve() and bool(pumped))
    lending.eventually(lambda: inline)  # and nothing more comes that could wake it


def test_answer_that_waits_leaves_before_a_lent_run_begins(lending: Lending) -> None:
    bench = lending.bench
    other = bench.offer("alarm")
    requests: list[Request] = []
    for _ in range(20):
        take_in(bench, "alarm")
        request = bench.inbound.take(other, far())
        assert request is not None
        requests.append(request)
    lending.until_alone()
    waits: list[int] = []
    lending.within = lambda: waits.append(len(bench.inbound._out))

    def lent() -> bool:
        request = requests.pop()

        def answer() -> None:  # in the look that takes the next request in: whoever has the lock is to send it
            if bench.inbound._incoming:
                bench.inbound.put(request, answer_of(request))
            else:
                bench.socket.found.append(answer)

        bench.socket.found.append(answer)
        return lending.serve() == "onehop-receiver"

    lending.eventually(lent)
    assert waits[-1] == 0


def test_receiver_outlives_a_run_that_raises_beside_its_answer(lending: Lending) -> None:
    def fail() -> None:
        if threading.current_thread().name == "onehop-receiver":
            raise OSError("the log is full")

    lending.within = fail
    bench = lending.bench

    def asked() -> bool:
        taken, answered = len(lending.ran), len(bench.socket.sent)
        lending.ask()
        lending.eventually(
            lambda: len(bench.socket.sent) > answered or (len(lending.ran) > taken and not bench.inbox.taken)
        )
        return "onehop-receiver" in lending.ran[taken:]

    lending.eventually(asked)
    lending.within = lambda: None
    lending.running = 0
    assert lending.serve("other")
    assert bench.inbound._lead.locked()
    assert bench.inbound._lent_runs == {}


def test_request_that_comes_when_all_workers_have_ended_is_run(inbound_bench: InboundBench, eventually) -> None:
    ran: list[Request] = []
    queue = Queue(ran.append, 1, ["read"])
    inbound_bench.offer("clock", queue)
    take_in(inbound_bench, "clock")
    inbound_bench.inbound.look(time.monotonic())
    eventually(lambda: len(ran) == 1 and queue.idle)
    queue.stop()
    eventually(lambda: queue._started == 0)
    take_in(inbound_bench, "clock")
    inbound_bench.inbound.look(time.monotonic())
    eventually(lambda: len(ran) == 2)
    eventually(lambda: queue._started == 0)


@pytest.mark.parametrize("what", ["stop", "close"])
def test_queue_stops_and_socket_closes_from_within_a_lent_run(lending: Lending, eventually, what: str) -> None:
    before = {thread for thread in threading.enumerate() if not thread.name.startswith("onehop")}
    done: list[str] = []

    def end() -> None:
        if threading.current_thread().name == "onehop-receiver" and not done:
            done.append(what)
            lending.queue.stop()
            if what == "close":
                assert lending.bench.inbound.close(0.0)
                done.append("closed")

    def asked() -> bool:  # one after the other: two that meet are left to the workers
        answered = len(lending.bench.socket.sent)
        lending.ask()
        lending.eventually(lambda: bool(done) or len(lending.bench.socket.sent) > answered)
        return bool(done)

    lending.within = end
    lending.eventually(asked)
    if what == "stop":
        assert lending.bench.inbound.close(0.0)
    else:
        eventually(lambda: done == ["close", "closed"])
    eventually(lambda: set(threading.enumerate()) <= before)


# A leader that keeps the lock while it waits ------------------------------------------------------


@pytest.fixture
def calm(inbound_bench: InboundBench, eventually) -> InboundBench:
    """An inbound socket whose receiver has run one inline request after the other, and waits for the next."""
    bench = inbound_bench

    def run(request: Request) -> None:
        bench.inbound.put(request, answer_of(request))

    bench.offer("clock", Queue(run, 0, ["read"], frozenset(["read"])))
    bench.inbound.start_receiver()
    grow_calm(bench, eventually)
    return bench


def grow_calm(bench: InboundBench, eventually) -> None:
    eventually(lambda: serves(bench, eventually) and bench.inbound._alone)


def serves(bench: InboundBench, eventually) -> bool:
    answered = len(bench.socket.sent)
    take_in(bench, "clock")
    eventually(lambda: len(bench.socket.sent) > answered)
    return True


def test_answer_of_another_thread_leaves_while_the_leader_waits_with_the_lock(calm: InboundBench, eventually) -> None:
    other = calm.offer("alarm")
    take_in(calm, "alarm")
    request = calm.inbound.take(other, far())
    assert request is not None
    grow_calm(calm, eventually)
    assert calm.inbound._lock.locked()
    calm.inbound.answer(request, answer_of(request))
    eventually(lambda: calm.socket.sent[-1][1] == answer_of(request))
    assert serves(calm, eventually)


def test_change_is_made_while_the_leader_waits_with_the_lock(calm: InboundBench, background, eventually) -> None:
    for _ in range(3):
        changing = background(calm.inbound.change, lambda inbox: inbox.outgoing.append((b"\0conn", b"news")))
        changing.result(SOON)
        assert calm.socket.sent[-1][1] == b"news"
        grow_calm(calm, eventually)


def test_change_is_made_while_requests_come_without_a_pause(calm: InboundBench, background, eventually) -> None:
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            take_in(calm, "clock")

    asking = background(ask)
    try:
        for _ in range(20):
            background(calm.inbound.change, lambda inbox: None).result(SOON)
    finally:
        over.set()
        asking.result(SOON)


def test_socket_closes_while_the_leader_waits_with_the_lock(calm: InboundBench) -> None:
    assert calm.inbound.close(0.0)
    assert calm.socket.closed


def test_request_for_a_worker_ends_the_calm(calm: InboundBench, eventually) -> None:
    done: list[Request] = []
    calm.offer("alarm", Queue(done.append, 1, ["read"]))
    grow_calm(calm, eventually)
    take_in(calm, "alarm")
    eventually(lambda: done)
    assert not calm.inbound._alone
    assert serves(calm, eventually)


def test_exception_in_the_lock_releases_it(inbound_bench: InboundBench) -> None:
    bench = inbound_bench
    queue = bench.offer("clock")

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
    queue = bench.offer("clock")
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
