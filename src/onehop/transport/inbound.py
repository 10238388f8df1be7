"""The serving side: one socket that many peers connect to, and the queues its requests go to.

As on a link, whoever holds the socket's lock sends and receives for all (and after **every** release looks whether
an answer was queued meanwhile), and one thread leads. Who leads depends on who is there: a node that runs handlers has
a receiving thread; one whose listeners are polled (the oslo driver) is received for by whichever listener waits; in an
asyncio node the loop does it; and where nobody is there, the housekeeping thread looks now and then.

While requests come one by one, the receiving thread keeps the lock while it waits for the next (whoever wants the lock
ends the wait), and runs those of quick methods itself, in the place of an idle worker. A guard sees to it that another
thread receives where such a run takes its time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Any

from onehop.protocol import wire
from onehop.protocol.inbox import Inbox, Message, Request
from onehop.protocol.turns import successor
from onehop.protocol.wire import Frame
from onehop.transport.carrier import InboundSocket
from onehop.transport.queue import FOREVER, SHARE, TOGETHER, Queue
from onehop.transport.waiting import LONGEST_WAIT, PATIENCE, Wake, acquire, new_lock, release, start_thread

log = logging.getLogger("onehop")

BATCH = 64
"""Messages read in one hold of the lock."""
CALM = 100
"""Messages, each of them waited for, after which no second one is expected behind each."""
RESTLESS = 0.001
"""Seconds after which the receiver looks whether requests that wait for a worker have moved."""
HELD_UP = 0.01
"""Seconds after which, or twice that, another thread receives in the place of one that a handler holds up."""
GUARDED = 0.1
"""Seconds for which the receiver is watched after such a run."""


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
        self.crowded = False
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
        self._wanting: deque[None] = deque()
        self._watched: dict[Queue, int] = {}
        self._watched_at = 0.0
        self._received_at = self._lone_at = 0.0
        self._lent: tuple[Request, Any] | None = None
        self._lent_runs: dict[float, Request] = {}
        self._lent_at = 0.0
        self._guard: Any = None
        self._guard_rests = False
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

    def refuse(self, request: Request, reason: str) -> None:
        """Answer that ``request`` did not run, and count it; a cast only gives its room back.

        An echo is answered here too: it is a request that never runs, and whoever came to refuse it is a worker.
        """
        if request.kind == wire.PING:
            request.sender.echo = False
            self.answer(request, wire.pack(wire.PONG, id=request.id), last=False)
            return
        self.change(Inbox.refuse_taken, request, reason)
        self.answer(request, wire.reject(request.id, reason) if request.kind == wire.REQUEST else None)

    def refuse_rest(self, queue: Queue) -> None:
        """Refuse what waits in ``queue``, which nobody polls any more, and what is still on its way there.

        Between the inbox, which takes nothing more for it, and the queue is whoever receives.
        """
        queue.closed = True
        while queue:
            try:
                request = queue.pop()
            except IndexError:  # a last poll was quicker; or who was to send the next line there was interrupted
                queue.advance()
            else:
                self.refuse(request, "draining")

    def answer_echoes(self, queue: Queue) -> None:
        """Answer what asks whether the workers of ``queue``, which is withdrawn, move: nothing more depends on them."""
        for request in list(queue.tasks):
            if request.kind == wire.PING:
                with suppress(ValueError):  # a worker has it
                    queue.tasks.remove(request)
                    self.refuse(request, "expired")

    def change(self, action: Callable[..., None], *arguments: Any) -> None:
        """Do ``action(inbox, *arguments)`` under its lock, and send what it wants sent."""
        moved: list[Request] = []
        if not self._hold():
            start_thread("onehop-later", self.change, action, *arguments)
            return
        try:
            action(self._inbox, *arguments)
            if not self._closed and self._inbox.outgoing:
                self._send_outgoing(moved)
                self._wake.set()  # a send may eat the edge
        finally:
            self._lock.release()
        if moved:  # who is gone was noticed by it
            self._dispatch(moved, None, leading=False, own=False)
        self.turn()

    def _hold(self) -> bool:
        """Take ``_lock``, from a leader that keeps it while it waits too.

        Returns:
            False where that takes so long that a signal handler may ask, in the thread whose frame below has it.
        """
        held: bool = self._lock.acquire(False)
        if not held:
            may_be_handler = threading.current_thread() is threading.main_thread()
            try:
                self._wanting.append(None)
                self._wake.set()
                held = acquire(self._lock, PATIENCE if may_be_handler else FOREVER)
            finally:
                self._wanting.pop()
        return held

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
            if last:
                if not finish(request):
                    continue  # answered before: an answer is sent once
            elif request.cancelled and request.kind == wire.REQUEST:
                continue  # nobody reads it
            if self._closed:
                self.counts["answers after close"] += 1
            elif frame is None:
                if request.kind == wire.REQUEST:
                    self._inbox.leave(request)
            else:
                sent = False
                try:
                    sent = self._send_to(request.identity, frame, moved)
                finally:  # an interrupt, too
                    if not sent:
                        head = frame if isinstance(frame, bytes) else frame[0]
                        if last or wire.kind_of(head) == wire.ITEM:
                            # Behind a missing item an end would read as if that had been all. So nothing more is
                            # answered, as where an answer is lost: its reader waits until the deadline.
                            self._inbox.leave(request)
                            request.cancelled = True
                            if finish(request):
                                moved.append(request)

    def _send_to(self, identity: bytes, frame: Frame, moved: list[Request]) -> bool:
        try:
            socket = self.socket
            if socket.send(identity, frame) if type(frame) is bytes else socket.send_large(identity, *frame):
                return True
            # Far above what a caller within its window can be owed: it does not read. Waiting for it would hold up
            # everybody else.
            self.counts["answers to a peer that does not read"] += 1
        except ConnectionResetError:
            self.counts["answers to a peer that is gone"] += 1
            moved.extend(self._inbox.gone(identity))
        except Exception as error:  # no memory, perhaps
            self._note("answers that could not be sent", error)
        return False

    def _send_outgoing(self, moved: list[Request]) -> None:
        inbox = self._inbox
        while inbox.outgoing:
            waiting, inbox.outgoing = inbox.outgoing, []
            waiting.reverse()
            try:
                while waiting:
                    identity, frame = waiting[-1]
                    if not self._send_to(identity, frame, moved):
                        inbox.leave_unsaid(identity)
                    waiting.pop()
            finally:  # an interrupt: the others are told in the next round
                inbox.outgoing[:0] = reversed(waiting)

    # In one hold of the lock ----------------------------------------------------------------------

    def _pump(self, queue: Queue | None = None, leading: bool = False, own: bool = False) -> bool:
        """Send and receive in one hold of ``_lock``, which the caller took; then hand over what came.

        Args:
            queue: the caller looks at this one next.
            leading: whether the leader asks, who then calls :meth:`_run_inline`.
            own: whether that is a thread which does nothing else: it may wait for a message too, and keep the lock
                meanwhile; and then calls :meth:`_run_lent`.

        Returns:
            Whether more may be there to receive.
        """
        moved: list[Request] = []
        echoes: list[Request] = []
        more = False
        try:
            if self._out:
                self._send(moved)
            if len(self._inline) >= BATCH:
                more = True  # first run what is there: what is not read waits in the senders, whose windows bound it
            elif not self.closing:
                incoming, inbox, again = self._incoming, self._inbox, self._found
                if self._calm <= CALM:
                    more = self.socket.drain(BATCH, incoming)
                elif not own or self._wanting:
                    # While requests come one by one, a second look behind each would find nothing, and cost as much;
                    # the sending of the answer is followed by one.
                    more = self.socket.drain(1, incoming)
                else:
                    # Nor does anybody want the lock: the answer is sent and the next request read in one hold. Whoever
                    # comes finds it taken, then sees _alone and ends the wait; or has queued before we look.
                    self._alone = more = True
                    if not (self._out or self._wanting or self._inline or self._watched):
                        again = not self.socket.receive(self._wake, int(LONGEST_WAIT) * 1000, incoming) and again
                self._found = bool(incoming)
                if incoming:
                    # A crowd's are there before they are waited for; a lone caller's are that, too, now and then.
                    if again or len(incoming) > 1:
                        self._calm = self._calm - 2 if len(incoming) == 1 and self._calm > 2 else 0
                    elif self._calm < 2 * CALM:
                        self._calm += 1
                    self._received_at = now = monotonic()
                    inbox.receive_all(incoming, now, moved)
                    if inbox.outgoing:
                        self._send_outgoing(moved)
                        more = True  # a send may eat the edge of what came meanwhile
                    if inbox.echoes:
                        echoes, inbox.echoes = inbox.echoes, echoes
        finally:  # an interrupt (Ctrl-C) must not keep from others what was taken in for them
            self._more = more
            self._alone = False
            if self._incoming:
                self._more = True
                self._wake.set()
            self._lock.release()
            if moved:
                self._dispatch(moved, queue, leading, own)
            if echoes:
                self._pass_on(echoes, leading)
        return more

    def _pass_on(self, echoes: list[Request], leading: bool) -> None:
        """Have a worker of each one's target answer it, before what waits there: it asks whether they move at all."""
        for request in echoes:
            target: Queue = request.target
            if not target.pooled:
                self.refuse(request, "expired")  # who receives runs its methods, and has just shown that it does
                continue
            target.tasks.appendleft(request)
            if target.stopped:  # looked at after it can be found
                self.answer_echoes(target)
                continue
            try:
                if not target.wake_one() and not leading and target is self._leading_for:
                    self._wake.set()
            except RuntimeError:
                log.debug("the machine gives no thread for a worker of %r: an echo waits for one", request.service)

    def _dispatch(self, moved: list[Request], mine: Queue | None, leading: bool, own: bool) -> None:
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
            if own and len(moved) == 1:
                before, self._lone_at = self._lone_at, self._received_at
                # Not in a crowd, which workers serve while the next are received; and not where requests are rare: the
                # watch over the receiver would cost more than to wake a worker.
                if (
                    self._calm >= CALM and self._lone_at - before < HELD_UP
                    and (place := target.lend(request.names[2])) is not None
                ):  # fmt: skip
                    self._lent = request, place
                    continue
            if (request.sender.taken > SHARE and target.tasks) or (target.lines and request.sender in target.lines):
                target.hold(request)
            else:
                target.tasks.append(request)
            if target is filled and target.run is not None:
                self._watched.setdefault(target, -1)
                continue  # one worker is woken for a batch
            filled = target
            if self._calm > CALM:
                self._calm = CALM
            if target is mine:
                mine = None  # the first is taken by who asks
            else:
                try:
                    if not target.wake_one():
                        if target.closed:
                            self.refuse_rest(target)
                        elif not leading and target is self._leading_for:
                            self._wake.set()
                except RuntimeError:
                    target.tasks.remove(request)
                    self.refuse(request, "full")
            if target.run is not None and len(target.tasks) > 1:
                self._watched.setdefault(target, -1)
        if not leading and (
            (self._watched and (self.resting or self._alone)) or (self._inline and (self._asleep or self._alone))
        ):
            self._wake.set()

    def _run_inline(self) -> None:
        """Run the inline methods; for the leader, whose next look sends the last answers."""
        inline, kept = self._inline, 0
        while inline:
            request = inline.popleft()
            try:
                request.target.run(request)
            except Exception as error:
                self.note_broken(request, error)
            kept += 1
            if kept >= TOGETHER:
                kept = 0
                self.turn()

    # Receiving ------------------------------------------------------------------------------------

    def start_receiver(self) -> None:
        """From now on a thread of its own receives, until :meth:`close`."""
        if not self.has_receiver:
            start_thread("onehop-receiver", self._receive_always)
            self.has_receiver = True

    def _receive_always(self, held_up: float | None = None) -> None:
        """Receive for good.

        Args:
            held_up: where a handler holds up who received so far, when its run began. The lead passes to this thread
                unless the run is over.
        """
        if held_up is None:
            self._lead.acquire()
        elif self._lent_runs.pop(held_up, None) is None:
            return
        leads = True
        try:
            while leads and not self.closing:
                try:
                    leads = self._receive(None, FOREVER)
                except Exception as error:  # no memory, perhaps: a node whose receiver is gone would be deaf
                    time.sleep(self.note_broken_round(error))
        finally:
            if leads:
                self._lead.release()

    def note_broken_round(self, error: Exception) -> float:
        """Count, and log ever more rarely, that a round of who receives broke; seconds until it is to go on."""
        self._note("rounds of receiving that broke", error)
        return HELD_UP

    def _note(self, what: str, error: Exception) -> None:
        self.counts[what] += 1
        if self.counts[what].bit_count() == 1:  # ever more rarely: it may go on for long
            with suppress(Exception):
                log.error("%s: the %d. time; it goes on", what, self.counts[what], exc_info=error)

    def _run_lent(self) -> bool:
        """Run the lone request of a quick method; False where it held up the receiver so long that another one leads.

        Who takes the run out of ``_lent_runs`` has the lead.
        """
        assert self._lent is not None
        (request, place), self._lent = self._lent, None
        if self._out:
            self.turn()
        queue: Queue = request.target
        self._lent_at = began = monotonic()
        self._lent_runs[began] = request
        if (self._guard is None or self._guard_rests) and not self._see_guarded():
            del self._lent_runs[began]
            queue.idle.append(place)
            queue.put(request)
            return True
        queue.begun += 1
        try:
            queue.run(request)  # type: ignore[misc]
        except Exception as error:
            self.note_broken(request, error)
        leads = self._lent_runs.pop(began, None) is not None
        queue.take_back(place, request.names[2], monotonic() - began, held_up=not leads)
        if not leads:
            self.turn()
        return leads

    def note_broken(self, request: Request, error: Exception) -> None:
        """What runs requests turns every exception into an answer. This one was met beside that, perhaps in the log."""
        self.counts["requests whose run broke"] += 1
        self.put(request, None)
        with suppress(Exception):
            log.error("%r of %r broke; its caller hears nothing", request.method, request.service, exc_info=error)

    def _see_guarded(self) -> bool:
        """See that somebody watches the receiver; False where the machine gives no thread for it."""
        if self._guard is None:
            guard = self._guard = new_lock()
            guard.acquire()
            try:
                start_thread("onehop-guard", self._guard_receiver, guard)
            except RuntimeError:
                self._guard = None
                return False
        elif self._guard_rests:
            self._guard_rests = False
            release(self._guard)
        return True

    def _guard_receiver(self, guard: Any) -> None:
        """Have another thread receive where a handler holds up the one that does."""
        runs, seen = self._lent_runs, None
        while True:
            if not runs and monotonic() - self._lent_at > GUARDED:
                self._guard_rests = True
                if not runs and not self.closing:  # looked at after others can see that we rest
                    guard.acquire()
                self._guard_rests = False
            if self.closing and not runs:
                self._guard = None
                if not runs:  # looked at after others can see that we are gone
                    return
                self._guard = guard
            acquire(guard, HELD_UP)
            run = next(iter(list(runs)), None)
            if run is not None and run == seen:
                try:
                    start_thread("onehop-receiver", self._receive_always, run)
                except RuntimeError:  # the machine gives no more threads: in the next round, perhaps
                    continue
            seen = run

    def look(self, now: float) -> None:
        """Timers, and a look at the socket if nobody leads."""
        self.change(Inbox.handle_timer, now)
        self.look_at_arrivals()
        if self._lead.acquire(False):
            try:
                self._receive(None, 0.0)
            finally:
                self._lead.release()
                self._hand_on()

    def look_at_arrivals(self) -> None:
        """See who has connected, and whether there is room for them."""
        self.crowded = self.socket.look_at_arrivals(self.counts)

    def take(self, queue: Queue, until: float) -> Request | None:
        """The next request of ``queue``; None when ``until`` came first, or the queue is stopped and empty."""
        tasks, lead = queue.tasks, self._lead
        lock: Any = None
        try:
            while True:
                if tasks:
                    try:
                        return queue.pop()
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

    def _receive(self, queue: Queue | None, until: float) -> bool:
        """Lead until ``queue`` has a request, ``until`` has come, or the socket closes; False where another leads."""
        leads = True
        self._leading_for = queue
        try:
            while not self.closing:
                self._lock.acquire()
                self._pump(queue, leading=True, own=queue is None and until == FOREVER and not self._watched)
                if self._inline:
                    self._run_inline()
                if self._lent is not None and not self._run_lent():
                    leads = False
                    break
                if self._out:
                    continue
                if queue is not None and (queue.tasks or queue.stopped):
                    break
                if self._more:
                    continue
                now = monotonic()
                if until <= now:
                    break
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
            if leads:
                self._leading_for = None
                self._asleep = self.resting = False
        return leads

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
        guard = self._guard
        if guard is not None:
            release(guard)
        if not acquire(self._lead, PATIENCE):
            return False  # an inline handler hangs: the socket stays with the thread that has it
        with self._lock:
            self._send([])
            self._closed = True
            self.socket.close(linger)
        self._wake.close()
        return True
