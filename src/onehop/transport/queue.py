"""The queue between who receives a request and who runs it, and the workers of one.

See ``inbound.py`` for who receives.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from time import monotonic
from typing import TYPE_CHECKING, Any

from onehop.protocol.inbox import Request, Sender
from onehop.transport.waiting import acquire, new_lock, release, start_thread

if TYPE_CHECKING:
    from onehop.transport.inbound import Inbound

QUICK = 0.0003
"""Seconds; a method that takes no longer on average is run by few threads, which stay awake."""
LENT = 0.00015
"""Seconds; a method that takes no longer on average may be run by the receiver in the place of an idle worker."""
SHARE = 16
"""Requests of one caller in the queue, beyond which the others of its requests stand in a line of its own."""
TOGETHER = 16
"""Answers of quick methods that a thread may keep back to send them together, while there is more to run."""
FOREVER = float("inf")


class Queue:
    """Requests of one instance of a service that wait to be run.

    Few threads do quick work: one worker is woken for a batch, and takes one request after the other. Who starts a
    method that is not known to be quick, while others wait, wakes the next worker first; and the receiver wakes one
    when nothing moved for a moment, since a quick method may take its time for once. A lone request of a quick method
    is run by the receiver itself, in the place of an idle worker, so that no thread has to be woken for it.

    Who has many requests here waits for himself: beyond ``SHARE`` of them they stand in his own line, and for each
    request that is taken out of the queue the next line sends one there. So nobody waits behind more than a few of
    anybody's requests, and each caller's stay in their order.

    Args:
        run: what a worker (or, for inline methods, the receiving thread) does with a request; its answer goes to
            :meth:`Inbound.put`. None where the queue is polled.
        workers: threads at most.
        methods: that ``run`` knows; how long each takes is remembered.
        inline: those of them that the receiving thread may run itself.

    Attributes:
        begun: requests that workers have begun.
        lines: of callers with many requests, in turn; ``held``: how many requests stand there.
        pooled: whether a worker runs some of the methods.
        closed: whether nobody takes what is still on its way here; see :meth:`Inbound.refuse_rest`.
        beside: another queue that stops with it, right after.
        inbound: where the requests come from, and the answers go.
    """

    inbound: Inbound
    beside: Queue | None = None

    def __init__(
        self,
        run: Callable[[Request], None] | None = None,
        workers: int = 0,
        methods: Iterable[str] = (),
        inline: frozenset[str] = frozenset(),
    ) -> None:
        self.tasks: deque[Request] = deque()
        self.idle: list[Any] = []
        self.stopped = self.closed = False
        self.lines: dict[Sender, deque[Request]] = {}
        self.held = 0
        self.run = run
        self.inline = inline
        self.pooled = run is None or not inline.issuperset(methods)
        self.begun = 0
        self._workers = workers
        self._started = 0
        self._starting = new_lock()
        self._lining = new_lock()
        self._seconds = dict.fromkeys(methods, FOREVER)
        self._lendable = set(self._seconds)

    def __len__(self) -> int:
        return len(self.tasks) + self.held

    def hold(self, request: Request) -> None:
        """Have ``request`` stand in the line of its caller."""
        with self._lining:
            self.lines.setdefault(request.sender, deque()).append(request)
            self.held += 1
        if not self.tasks:  # looked at after whoever takes the last one can see the line
            self.advance()

    def advance(self) -> None:
        """Let the next line, if there is one, send its first request to the queue: for who has taken one from there."""
        with self._lining:
            for sender in self.lines:
                line = self.lines.pop(sender)
                self.tasks.append(line.popleft())
                self.held -= 1
                if line:
                    self.lines[sender] = line  # behind the others
                return

    def pop(self) -> Request:
        """Take the next request. Raises IndexError where there is none."""
        request = self.tasks.popleft()
        if self.lines:
            self.advance()
        return request

    def put(self, request: Request) -> bool:
        """Add a request and wake one who waits for it; False where nobody did."""
        self.tasks.append(request)
        return self.wake_one()

    def wake_one(self) -> bool:
        """Wake one who waits for a request, or add a worker; False where neither can be.

        Raises:
            RuntimeError: there is no worker yet, and the machine gives no thread for one.
        """
        try:
            release(self.idle.pop())
            return True
        except IndexError:
            if self._started >= self._workers:
                return False
        with self._starting:
            if self._started < self._workers:
                try:
                    start_thread("onehop-worker", self._work)
                    self._started += 1
                    return True
                except RuntimeError:  # the machine gives no more threads: those there are will do it
                    if self._started == 0:
                        raise
        return False

    def stop(self) -> None:
        """Nothing more will come: workers end when the queue is empty, polls return."""
        self.stopped = True
        if self.beside is not None:
            self.beside.stop()
        while self.idle:
            try:
                release(self.idle.pop())
            except IndexError:
                return

    def wait(self, lock: Any, seconds: float) -> None:
        """Sleep on ``lock`` (which the caller holds) until woken, unless there is something to do already."""
        self.idle.append(lock)
        try:
            if not self.tasks and not self.stopped:  # looked at after the lock can be found
                acquire(lock, seconds)
        finally:  # an interrupt (Ctrl-C) must not leave it there, to be woken in the place of one who waits
            try:
                self.idle.remove(lock)
            except ValueError:
                acquire(lock, 0)  # it was taken out to wake us: take the wake-up too

    def _sleep(self, lock: Any) -> None:
        """:meth:`wait` of a worker, whose lock is released only by who took it out of the list."""
        self.idle.append(lock)
        if self.tasks or self.stopped:
            try:
                self.idle.remove(lock)
                return
            except ValueError:
                pass  # it was taken out to wake us: the wake-up comes
        lock.acquire()

    def _work(self) -> None:
        lock = new_lock()
        lock.acquire()
        kept = 0
        while True:
            try:
                return self._work_on(lock, kept)
            except Exception as error:  # no memory for the answers, perhaps; the others need this worker
                time.sleep(self.inbound.note_broken_round(error))
                kept = 1

    def _work_on(self, lock: Any, kept: int) -> None:
        """Work until the queue is stopped and empty; so many answers are kept back already."""
        run, tasks, seconds = self.run, self.tasks, self._seconds
        assert run is not None
        while True:
            try:
                request = tasks.popleft()
                if self.lines:
                    self.advance()
            except IndexError:
                if kept:
                    kept = 0
                    self.inbound.turn(self)
                elif self.stopped:
                    with self._starting:
                        self._started -= 1
                    if tasks:  # it came as we left
                        self.wake_one()
                    return
                else:
                    self._sleep(lock)
                continue
            self.begun += 1
            method = request.names[2]
            mean = seconds.get(method, 0.0)  # of a method there is not: its refusal is quick
            if mean > QUICK:
                try:
                    if kept:
                        self.inbound.turn(self)
                    if tasks:
                        self.wake_one()
                except Exception:
                    tasks.appendleft(request)
                    raise
            began = monotonic()
            try:
                run(request)
            except Exception as error:  # no memory for the answer, perhaps; the others need this worker
                self.inbound.note_broken(request, error)
            self._learn(method, monotonic() - began)
            kept += 1
            if not tasks or kept >= TOGETHER or self.inbound.resting:
                kept = 0
                self.inbound.turn(self)

    def _learn(self, method: str, took: float) -> None:
        mean = self._seconds.get(method)
        if mean is not None:
            self._seconds[method] = took if mean == FOREVER else mean + (took - mean) / 8

    def lend(self, method: str) -> Any:
        """The place of an idle worker, for one run of ``method`` by who asks; None where a worker is to run it."""
        if method in self._lendable and not self.tasks and self._seconds[method] <= LENT:
            try:
                return self.idle.pop()
            except IndexError:
                pass
        return None

    def take_back(self, place: Any, method: str, took: float, held_up: bool) -> None:
        """The run for which ``place`` was lent is over.

        Args:
            took: seconds.
            held_up: whether it held up the receiver: ``method`` is left to the workers from now on.
        """
        self._learn(method, took)
        if held_up:
            self._lendable.discard(method)
        self.idle.append(place)
        if self.tasks or self.stopped:  # who came meanwhile did not find the worker
            self.wake_one()
