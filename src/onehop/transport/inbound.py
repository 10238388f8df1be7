"""The serving side: one socket that many peers connect to, and the queues its requests go to.

As on a link, whoever holds the socket's lock sends and receives for all (and after **every** release looks whether
an answer was queued meanwhile), and one thread leads. Who leads depends on who is there: a node that runs handlers has
a receiving thread; one whose listeners are polled (the oslo driver) is received for by whichever listener waits; in an
asyncio node the loop does it; and where nobody is there, the housekeeping thread looks now and then.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from time import monotonic
from typing import Any

from onehop.protocol import wire
from onehop.protocol.inbox import Inbox, Message, Request
from onehop.protocol.turns import successor
from onehop.protocol.wire import Frame
from onehop.transport.carrier import InboundSocket
from onehop.transport.waiting import LONGEST_WAIT, PATIENCE, Wake, acquire, new_lock, release, start_thread

BATCH = 64
"""Messages read in one hold of the lock."""
CALM = 100
"""Single messages in a row after which no second one is expected behind each."""
QUICK = 0.0003
"""Seconds; a method that takes no longer on average is run by few threads, which stay awake."""
TOGETHER = 16
"""Answers of quick methods that a thread may keep back to send them together, while there is more to run."""
RESTLESS = 0.001
"""Seconds after which the receiver looks whether requests that wait for a worker have moved."""
FOREVER = float("inf")


class Queue:
    """Requests of one instance of a service that wait to be run.

    Few threads do quick work: one worker is woken for a batch, and takes one request after the other. Who starts a
    method that is not known to be quick, while others wait, wakes the next worker first; and the receiver wakes one
    when nothing moved for a moment, since a quick method may take its time for once.

    Args:
        run: what a worker (or, for inline methods, the receiving thread) does with a request; its answer goes to
            :meth:`Inbound.put`. None where the queue is polled.
        workers: threads at most.
        methods: that ``run`` knows; how long each takes is remembered.
        inline: those of them that the receiving thread may run itself.

    Attributes:
        begun: requests that workers have begun.
        inbound: where the requests come from, and the answers go.
    """

    inbound: Inbound

    def __init__(
        self,
        run: Callable[[Request], None] | None = None,
        workers: int = 0,
        methods: Iterable[str] = (),
        inline: frozenset[str] = frozenset(),
    ) -> None:
        self.tasks: deque[Request] = deque()
        self.idle: list[Any] = []
        self.stopped = False
        self.run = run
        self.inline = inline
        self.begun = 0
        self._workers = workers
        self._started = 0
        self._starting = new_lock()
        self._seconds = dict.fromkeys(methods, FOREVER)

    def __len__(self) -> int:
        return len(self.tasks)

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
        while self.idle:
            try:
                release(self.idle.pop())
            except IndexError:
                return

    def wait(self, lock: Any, seconds: float) -> None:
        """Sleep on ``lock`` (which the caller holds) until woken, unless there is something to do already."""
        self.idle.append(lock)
        if not self.tasks and not self.stopped:  # looked at after the lock can be found
            acquire(lock, seconds)
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
        run, tasks, seconds = self.run, self.tasks, self._seconds
        assert run is not None
        lock = new_lock()
        lock.acquire()
        kept = 0
        while True:
            try:
                request = tasks.popleft()
            except IndexError:
                if kept:
                    kept = 0
                    self.inbound.turn(self)
                elif self.stopped:
                    return
                else:
                    self._sleep(lock)
                continue
            self.begun += 1
            method = request.names[2]
            mean = seconds.get(method, 0.0)  # of a method there is not: its refusal is quick
            if mean > QUICK:
                if kept:
                    self.inbound.turn(self)
                if tasks:
                    self.wake_one()
            began = monotonic()
            run(request)
            took = monotonic() - began
            if method in seconds:
                seconds[method] = took if mean == FOREVER else mean + (took - mean) / 8
            kept += 1
            if not tasks or kept >= TOGETHER or self.inbound.resting:
                kept = 0
                self.inbound.turn(self)


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
        self.resting = False
        self.led_by_loop = False
        self._inbox = inbox
        self._monitored = monitored
        self._lock = new_lock()
        self._lead = new_lock()
        self._leading_for: Queue | None = None
        self._takers: dict[Any, Any] = {}
        self._out: deque[tuple[Request, Frame | None, bool]] = deque()
        self._incoming: list[Message] = []
        self._more = False
        self._calm = 0
        self._found = False
        self._wake = Wake(socket.fd)
        self._inline: deque[Request] = deque()
        self._asleep = False
        self._alone = False
        self._watched: dict[Queue, int] = {}
        self._watched_at = 0.0
        self.closing = False
        self._closed = False

    # Answers --------------------------------------------------------------------------------------

    def put(self, request: Request, frame: Frame | None, last: bool = True) -> None:
        """Queue an answer; whoever runs the request sees that it is sent.

        Args:
            frame: None where nothing is to be sent and the request only gives its room back.
            last: whether the request is finished with it.
        """
        self._out.append((request, frame, last))

    def answer(self, request: Request, frame: Frame | None, last: bool = True) -> None:
        """:meth:`put` an answer and see that it is sent; does not wait."""
        self._out.append((request, frame, last))
        self.turn()

    def count_refused(self, reason: str) -> None:
        """Count a request that is answered as not run."""
        self._hold()
        try:
            self._inbox.refused[reason] += 1
        finally:
            self._lock.release()

    def refuse(self, request: Request, reason: str) -> None:
        """Answer that ``request`` did not run, and count it; a cast only gives its room back."""
        self.count_refused(reason)
        self.answer(request, wire.reject(request.id, reason) if request.kind == wire.REQUEST else None)

    def change(self, action: Callable[..., None], *arguments: Any) -> None:
        """Do ``action(inbox, *arguments)`` under its lock, and send what it wants sent."""
        self._hold()
        try:
            action(self._inbox, *arguments)
            if not self._closed and self._inbox.outgoing:
                self._send_outgoing([])
                self._wake.set()  # a send may eat the edge
        finally:
            self._lock.release()
        self.turn()

    def _hold(self) -> None:
        """Take ``_lock``, from a leader that keeps it while it waits too."""
        if not self._lock.acquire(False):
            self._calm = 0  # not to take it again before us
            self._wake.set()
            self._lock.acquire()

    def turn(self, queue: Queue | None = None) -> None:
        """Send and receive for everybody, unless somebody who will look again has the socket.

        Args:
            queue: the caller takes the next request of this one itself: nobody else has to be woken for it.
        """
        while self._out:
            if not self._lock.acquire(False):
                if self._alone:
                    self._wake.set()
                return
            if self._pump(queue) and self._asleep:
                self._wake.set()

    def _send(self, moved: list[Request]) -> None:
        """Send what is queued, under ``_lock``."""
        out, finish = self._out, self._inbox.finish
        while out:
            request, frame, last = out.popleft()
            if last and not finish(request):
                continue  # answered before: an answer is sent once
            if self._closed:
                self.counts["answers after close"] += 1
            elif frame is not None:
                self._send_to(request.identity, frame, moved)

    def _send_to(self, identity: bytes, frame: Frame, moved: list[Request]) -> None:
        try:
            socket = self.socket
            if not (
                socket.send(identity, frame) if type(frame) is bytes else socket.send_large(identity, *frame)
            ):  # fmt: skip
                # Far above what a caller within its window can be owed: it does not read. Waiting for it would hold up
                # everybody else.
                self.counts["answers to a peer that does not read"] += 1
        except ConnectionResetError:
            self.counts["answers to a peer that is gone"] += 1
            moved.extend(self._inbox.gone(identity))

    def _send_outgoing(self, moved: list[Request]) -> None:
        inbox = self._inbox
        while inbox.outgoing:
            waiting, inbox.outgoing = inbox.outgoing, []
            for identity, frame in waiting:
                self._send_to(identity, frame, moved)

    # In one hold of the lock ----------------------------------------------------------------------

    def _pump(self, queue: Queue | None = None, leading: bool = False, alone: bool = False) -> bool:
        """Send and receive in one hold of ``_lock``, which the caller took; then hand over what came.

        Args:
            queue: the caller looks at this one next.
            leading: whether the leader asks, who then calls :meth:`_run_inline`.
            alone: whether it may wait for a message too, and keep the lock meanwhile.

        Returns:
            Whether more may be there to receive.
        """
        moved: list[Request] = []
        more = False
        try:
            if self._out:
                self._send(moved)
            if len(self._inline) >= BATCH:
                more = True  # first run what is there: what is not read waits in the senders, whose windows bound it
            elif not self.closing:
                # While inline requests come one by one, a second look behind each would find nothing, and cost as much;
                # the sending of the answer is followed by one.
                incoming, inbox = self._incoming, self._inbox
                if self._calm <= CALM:
                    more = self.socket.drain(BATCH, incoming)
                elif not alone:
                    more = self.socket.drain(1, incoming)
                else:
                    # Nor does anybody want the lock: the answer is sent and the next request read in one hold. Whoever
                    # comes finds it taken, then sees _alone and ends the wait; or has queued before we look at _out.
                    self._alone = more = True
                    self._found = False
                    if not self._out:
                        self.socket.receive(self._wake, int(LONGEST_WAIT) * 1000, incoming)
                        if not incoming:
                            self._calm = 0
                if incoming:
                    self._calm = 0 if self._found or len(incoming) > 1 else self._calm + 1
                    self._found = True
                    inbox.receive_all(incoming, monotonic(), moved)
                    if inbox.outgoing:
                        self._send_outgoing(moved)
                        more = True  # a send may eat the edge of what came meanwhile
                else:
                    self._found = False
        finally:  # an interrupt (Ctrl-C) must not keep from others what was taken in for them
            self._more = more
            self._alone = False
            if self._incoming:
                self._more = True
                self._wake.set()
            self._lock.release()
            if moved:
                self._dispatch(moved, queue, leading)
        return more

    def _dispatch(self, moved: list[Request], mine: Queue | None, leading: bool) -> None:
        """Give each new request to its queue; wake whoever waits for news of one that runs."""
        filled: Queue | None = None
        for request in moved:
            if request.queued:
                if request.waiter is not None:
                    release(request.waiter)
                continue
            request.queued = True
            if request.monitor is not None:
                self._monitored()
            target: Queue = request.target
            if request.names[2] in target.inline:
                self._inline.append(request)
                continue
            target.tasks.append(request)
            if target is filled and target.run is not None:
                self._watched.setdefault(target, -1)
                continue  # one worker is woken for a batch
            filled = target
            self._calm = 0
            if target is mine:
                mine = None  # the first is taken by who asks
            else:
                try:
                    if not target.wake_one() and not leading and target is self._leading_for:
                        self._wake.set()
                except RuntimeError:
                    target.tasks.remove(request)
                    self.refuse(request, "full")
            if target.run is not None and len(target.tasks) > 1:
                self._watched.setdefault(target, -1)
        if not leading and ((self._watched and self.resting) or (self._inline and self._asleep)):
            self._wake.set()

    def _run_inline(self) -> None:
        """Run the inline methods; for the leader, whose next look sends the last answers."""
        inline, kept = self._inline, 0
        while inline:
            request = inline.popleft()
            request.target.run(request)
            kept += 1
            if kept >= TOGETHER:
                kept = 0
                self.turn()

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
        if self._lead.acquire(False):
            try:
                self._receive(None, 0.0)
            finally:
                self._lead.release()
                self._hand_on()

    def take(self, queue: Queue, until: float) -> Request | None:
        """The next request of ``queue``; None when ``until`` came first, or the queue is stopped and empty."""
        tasks, lead = queue.tasks, self._lead
        lock: Any = None
        try:
            while True:
                if tasks:
                    try:
                        return tasks.popleft()
                    except IndexError:
                        continue  # another was quicker
                if queue.stopped or monotonic() >= until:
                    return None
                if lead.acquire(False):
                    try:
                        self._receive(queue, until)
                    finally:
                        lead.release()
                        self._hand_on()
                elif lock is None:  # whoever leads wakes us when it leaves, once we are among the takers
                    lock = new_lock()
                    lock.acquire()
                    self._takers[lock] = lock
                else:
                    queue.wait(lock, until - monotonic())
        finally:
            if lock is not None:
                del self._takers[lock]
                self._hand_on()

    def _hand_on(self) -> None:
        """Whoever stops leading sees that another does while somebody waits (turns, rule 2)."""
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
            while not self.closing:
                self._lock.acquire()
                self._pump(queue, leading=True, alone=queue is None and until == FOREVER and not self._watched)
                if self._inline:
                    self._run_inline()
                if self._out:
                    continue
                if queue is not None and (queue.tasks or queue.stopped):
                    return
                if self._more:
                    continue
                now = monotonic()
                if until <= now:
                    return
                left = until - now
                self._asleep = True
                if self._watched:
                    if now - self._watched_at >= RESTLESS:
                        self._watch(now)
                    left = min(left, RESTLESS)
                else:
                    self.resting = True
                # Looked at after others can see that we sleep: they wake us for whatever comes later.
                if not (self._out or self._more or self._inline or (self.resting and self._watched)):
                    self._wake.wait(left)
                self._asleep = self.resting = False
        finally:
            self._leading_for = None
            self._asleep = self.resting = False

    def enter_loop(self) -> tuple[int, int]:
        """From now on an event loop leads, by :meth:`lead`. Returns the descriptors that call for it."""
        self._lead.acquire()
        self.has_receiver = self.led_by_loop = True
        return self.socket.fd, self._wake.fd

    def lead(self) -> float:
        """One turn of a leader that waits elsewhere.

        Returns:
            Seconds after which it is to come again, if no descriptor calls for it earlier.
        """
        self._asleep = self.resting = False
        self._wake.clear()
        if self.closing:
            return FOREVER
        self._lock.acquire()
        self._pump(leading=True)
        if self._inline:
            self._run_inline()
        if self._more or self._out:
            return 0.0
        pause = FOREVER
        self._asleep = True
        if self._watched:
            now = monotonic()
            if now - self._watched_at >= RESTLESS:
                self._watch(now)
            pause = RESTLESS
        else:
            self.resting = True
        # Looked at after others can see that we sleep: they wake us for whatever comes later.
        return 0.0 if self._out or self._more or self._inline or (self.resting and self._watched) else pause

    def leave_loop(self) -> tuple[int, int]:
        """The event loop leads no more. Returns the descriptors that called for it."""
        self.led_by_loop = False
        self._lead.release()
        return self.socket.fd, self._wake.fd

    def _watch(self, now: float) -> None:
        """Wake a worker where requests wait and none was begun since the last time."""
        self._watched_at = now
        for queue, begun in list(self._watched.items()):
            if not queue.tasks or (queue.begun == begun and not queue.wake_one()):
                del self._watched[queue]
            else:
                self._watched[queue] = queue.begun

    def forget(self) -> None:
        """In a forked child: the socket is the parent's."""
        self.closing = self._closed = True
        self._lock, self._lead = new_lock(), new_lock()

    def close(self, linger: float) -> bool:
        """Stop receiving and give the socket back; what was answered may leave for ``linger`` seconds.

        Returns:
            Whether the socket could be given back.
        """
        self.closing = True
        self._wake.set()
        if not acquire(self._lead, PATIENCE):
            return False  # an inline handler hangs: the socket stays with the thread that has it
        with self._lock:
            self._send([])
            self._closed = True
            self.socket.close(linger)
        return True
