"""The serving side: one socket that many peers connect to, and the queues its requests go to.

As on a link, whoever holds the socket's lock sends and receives for all (and after **every** release looks whether
an answer was queued meanwhile), and one thread leads. Who leads depends on who is there: a node that runs handlers has
a receiving thread; one whose listeners are polled (the oslo driver) is received for by whichever listener waits; and
where nobody is there, the housekeeping thread looks now and then.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from time import monotonic
from typing import Any

from onehop.protocol import wire
from onehop.protocol.inbox import Inbox, Request
from onehop.protocol.turns import successor
from onehop.protocol.wire import Frame
from onehop.transport.carrier import InboundSocket, Unreachable
from onehop.transport.waiting import PATIENCE, Wake, acquire, new_lock, release, start_thread

BATCH = 64
FOREVER = float("inf")


class Queue:
    """Requests of one instance of a service that wait to be run.

    Args:
        run: what a worker (or, for inline methods, the receiving thread) does with a request; None where the queue
            is polled.
        workers: threads at most.
        inline: methods that ``run`` finishes so quickly that the receiving thread may do it.
    """

    def __init__(
        self, run: Callable[[Request], None] | None = None, workers: int = 0, inline: frozenset[str] = frozenset()
    ) -> None:
        self.tasks: deque[Request] = deque()
        self.idle: list[Any] = []
        self.stopped = False
        self.run = run
        self.inline = inline
        self._workers = workers
        self._started = 0
        self._starting = new_lock()

    def __len__(self) -> int:
        return len(self.tasks)

    def put(self, request: Request) -> bool:
        """Add a request and wake one who waits for it; False where nobody did."""
        self.tasks.append(request)
        if self._wake_one():
            return True
        if self._started < self._workers:
            with self._starting:
                if self._started < self._workers:
                    try:
                        start_thread("onehop-worker", self._work)
                        self._started += 1
                    except RuntimeError:  # the machine gives no more threads: those there are will do it
                        if self._started == 0:
                            self.tasks.remove(request)
                            raise
        return False

    def stop(self) -> None:
        """Nothing more will come: workers end when the queue is empty, polls return."""
        self.stopped = True
        while self._wake_one():
            pass

    def _wake_one(self) -> bool:
        try:
            release(self.idle.pop())
        except IndexError:
            return False
        return True

    def wait(self, lock: Any, seconds: float) -> None:
        """Sleep on ``lock`` (which the caller holds) until woken, unless there is something to do already."""
        self.idle.append(lock)
        if not self.tasks and not self.stopped:  # looked at after the lock can be found
            acquire(lock, seconds)
        try:
            self.idle.remove(lock)
        except ValueError:
            acquire(lock, 0)  # it was taken out to wake us: take the wake-up too

    def _work(self) -> None:
        assert self.run is not None
        lock = new_lock()
        lock.acquire()
        while True:
            try:
                request = self.tasks.popleft()
            except IndexError:
                if self.stopped:
                    return
                self.wait(lock, FOREVER)
            else:
                self.run(request)


class Inbound:
    """The inbound socket of a node, with the inbox behind it.

    Args:
        socket: the carrier's end.
        inbox: what decides; touched only under this object's lock.
        monitored: called when a request came in whose caller wants signs of life: a timer may be due earlier.
    """

    def __init__(self, socket: InboundSocket, inbox: Inbox, monitored: Callable[[], None]) -> None:
        self.socket = socket
        self.counts: Counter[str] = Counter()
        self.has_receiver = False
        self._inbox = inbox
        self._monitored = monitored
        self._lock = new_lock()
        self._lead = new_lock()
        self._leading_for: Queue | None = None
        self._takers: dict[Any, Any] = {}
        self._out: deque[tuple[Request, Frame | None, bool]] = deque()
        self._wake = Wake(socket.fd)
        self._inline: deque[Request] = deque()
        self._running = new_lock()
        self._closing = False
        self._closed = False

    # Answers --------------------------------------------------------------------------------------

    def answer(self, request: Request, frame: Frame | None, *, last: bool = True) -> None:
        """Queue an answer and see that it is sent; does not wait.

        Args:
            frame: None where nothing is to be sent and the request only gives its room back.
            last: whether the request is finished with it.
        """
        self._out.append((request, frame, last))
        self._turn()

    def refuse(self, request: Request, reason: str) -> None:
        """Answer that ``request`` did not run, and count it; a cast only gives its room back."""
        with self._lock:
            self._inbox.refused[reason] += 1
        self.answer(request, wire.reject(request.id, reason) if request.kind == wire.REQUEST else None)

    def change(self, action: Callable[..., None], *arguments: Any) -> None:
        """Do ``action(inbox, *arguments)`` under its lock, and send what it wants sent."""
        with self._lock:
            action(self._inbox, *arguments)
            if not self._closed:
                self._send_outgoing([])
                if self.socket.readable():  # a send may eat the edge
                    self._wake.set()
        self._turn()

    def _send(self, moved: list[Request]) -> None:
        """Send what is queued, under ``_lock``."""
        out, inbox = self._out, self._inbox
        while out:
            request, frame, last = out.popleft()
            if last and not inbox.finish(request):
                continue  # answered before: an answer is sent once
            if self._closed:
                self.counts["answers after close"] += 1
            elif frame is not None:
                self._send_one(request.identity, frame, moved)

    def _send_one(self, identity: bytes, frame: Frame, moved: list[Request]) -> None:
        try:
            if not self.socket.send(identity, frame):
                # Far above what a caller within its window can be owed: it does not read. Waiting for it would
                # hold up everybody else.
                self.counts["answers to a peer that does not read"] += 1
        except Unreachable:
            self.counts["answers to a peer that is gone"] += 1
            moved.extend(self._inbox.gone(identity))

    def _send_outgoing(self, moved: list[Request]) -> None:
        inbox = self._inbox
        while inbox.outgoing:
            waiting, inbox.outgoing = inbox.outgoing, []
            for identity, frame in waiting:
                self._send_one(identity, frame, moved)

    def _turn(self) -> None:
        """Send and receive for everybody, unless somebody who will look again has the socket."""
        while self._out and self._lock.acquire(False):
            if self._pump():
                self._wake.set()

    def _pump(self, leading: bool = False) -> bool:
        """Send and receive in one hold of ``_lock``, which the caller took; then hand over what came.

        Args:
            leading: whether the leader asks, who looks at its own queue next.

        Returns:
            Whether more may be there to receive.
        """
        moved: list[Request] = []
        more = False
        try:
            self._send(moved)
            if not self._closing:
                more = self._take_in(moved)
        finally:
            self._lock.release()
        if moved:
            self._dispatch(moved, leading)
        return more

    def _take_in(self, moved: list[Request]) -> bool:
        """Give the inbox what came and send what it answers, under ``_lock``; True when the batch was full."""
        socket, receive, now = self.socket, self._inbox.receive, 0.0
        more = False
        for _ in range(BATCH):
            message = socket.receive() if socket.readable() else None
            if message is None:
                break
            now = now or monotonic()
            receive(*message, now, moved)
        else:
            more = True
        if self._inbox.outgoing:
            self._send_outgoing(moved)
            more = more or socket.readable()  # a send may eat the edge of what came meanwhile
        return more

    def _dispatch(self, moved: list[Request], leading: bool) -> None:
        """Give each new request to its queue; wake whoever waits for news of one that runs."""
        for request in moved:
            if request.queued:
                if request.waiter is not None:
                    release(request.waiter)
                continue
            request.queued = True
            if request.monitor is not None:
                self._monitored()
            if request.method in request.target.inline:
                self._inline.append(request)
            else:
                try:
                    taken = request.target.put(request)
                except RuntimeError:
                    self.refuse(request, "full")
                    continue
                if not taken and not leading and request.target is self._leading_for:
                    self._wake.set()
        # Not at once: the answer's own turn may bring in the next request, and so on without an end to the depth.
        while self._inline and self._running.acquire(False):
            try:
                while self._inline:
                    request = self._inline.popleft()
                    request.target.run(request)
            finally:
                self._running.release()

    # Receiving ------------------------------------------------------------------------------------

    def start_receiver(self) -> None:
        """From now on a thread of its own receives, until :meth:`close`."""
        if not self.has_receiver:
            self.has_receiver = True
            start_thread("onehop-receiver", self._receive_always)

    def _receive_always(self) -> None:
        self._lead.acquire()
        try:
            self._receive(None, FOREVER)
        finally:
            self._lead.release()

    def look(self, now: float) -> None:
        """Timers, and a look at the socket if nobody leads."""
        self.change(Inbox.handle_timer, now)
        if not self._lead.locked() and self._lock.acquire(False):
            self._pump()
            self._turn()

    def take(self, queue: Queue, until: float) -> Request | None:
        """The next request of ``queue``; None when ``until`` came first, or the queue is stopped and empty."""
        lock = new_lock()
        lock.acquire()
        self._takers[lock] = lock
        try:
            while True:
                try:
                    return queue.tasks.popleft()
                except IndexError:
                    if queue.stopped or monotonic() >= until:
                        return None
                if self._lead.acquire(False):
                    try:
                        self._receive(queue, until)
                    finally:
                        self._lead.release()
                    continue
                # Whoever leads wakes us when it leaves: we are among the takers.
                queue.wait(lock, until - monotonic())
        finally:
            del self._takers[lock]
            if self._takers and not self._lead.locked():
                next_one = successor(self._takers)
                if next_one is not None:
                    release(next_one)

    def interrupt(self) -> None:
        """Let whoever leads look whether it still should."""
        self._wake.set()

    def _receive(self, queue: Queue | None, until: float) -> None:
        """Lead until ``queue`` has a request, ``until`` has come, or the socket closes."""
        self._leading_for = queue
        try:
            while not self._closing:
                self._lock.acquire()
                more = self._pump(leading=True)
                if self._out:
                    continue
                if queue is not None and (queue.tasks or queue.stopped):
                    return
                if more:
                    continue
                left = until - monotonic()
                if left <= 0:
                    return
                self._wake.wait(left)
        finally:
            self._leading_for = None

    def forget(self) -> None:
        """In a forked child: the socket is the parent's."""
        self._closing = self._closed = True
        self._lock, self._lead, self._running = new_lock(), new_lock(), new_lock()

    def close(self, linger: float) -> bool:
        """Stop receiving and give the socket back; what was answered may leave for ``linger`` seconds.

        Returns:
            Whether the socket could be given back.
        """
        self._closing = True
        self._wake.set()
        if not acquire(self._lead, PATIENCE):
            return False  # an inline handler hangs: the socket stays with the thread that has it
        with self._lock:
            self._send([])
            self._closed = True
            self.socket.close(linger)
        return True
