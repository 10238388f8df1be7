"""Waiting in threads: the caller's own thread reads the link.

No thread of ours stands between a caller and its reply. A caller that waits alone sends, waits and receives by
itself. Where several wait, one leads (``protocol/turns.py``) and hands over what belongs to the others.

Two rules more than in ``link.py``:

* A leader announces itself in ``_leader``, then looks at its outcome; who completes a call sets the outcome, then reads
  ``_leader``. One of them sees the other.
* A leader takes ``_lock`` waiting: holders never wait while they have it, and a leader that spun on a readable
  descriptor would starve the holder.
"""

from __future__ import annotations

import threading
import time
from _thread import get_ident
from collections.abc import Callable, Coroutine
from time import monotonic
from typing import Any, TypeVar

from onehop.protocol.calls import LOST, REJECTED, Call, CallTable
from onehop.protocol.turns import successor
from onehop.protocol.wire import Body, Frame
from onehop.transport.carrier import LinkSocket
from onehop.transport.engine import TICK, Engine
from onehop.transport.inbound import Inbound
from onehop.transport.link import BATCH, STUCK, Link
from onehop.transport.requests import Attempt, Terms
from onehop.transport.waiting import LONGEST_WAIT, PATIENCE, Wake, Watch, acquire, new_lock, release, start_thread

Result = TypeVar("Result")

BATCHES = 16
"""Batches that the housekeeping reads in one look: within 2 s as much as a window allows to be owed."""
CROWD_MEMORY = 200
"""Calls for which a link that saw two callers at once does not try the lone path."""


class BlockingLink(Link):
    """A link whose calls are waited for by threads.

    Attributes:
        opening: held by the thread that waits for the hello.
    """

    __slots__ = ("_alone", "_crowd", "_lead", "_leader", "_waiting", "_wake", "opening")

    def __init__(self, socket: LinkSocket, calls: CallTable, control: Callable[[Link, bytes], None]) -> None:
        super().__init__(socket, calls, control)
        self.opening = new_lock()
        self._lead = new_lock()
        self._leader: Call | None = None
        self._waiting: dict[Any, Any] = {}
        self._crowd = 0
        self._alone = 0
        self._wake = Wake(socket.fd)

    def post(self, call: Call | None, frame: Frame) -> None:
        self._out.append((call, frame))
        self._turn()

    def put(self, call: Call, frame: Frame) -> None:
        if type(frame) is bytes and not self._waiting and self._lock.acquire(False):
            try:
                if self.ended is None and not self._out:
                    call.sent = True
                    call.sent = self.socket.send(frame)
            finally:
                self._lock.release()
            if self._waiting:  # since a moment: the send may have eaten the edge
                self._wake.set()
        if not call.sent:
            self._out.append((call, frame))
        self._turn()

    def glance(self) -> None:
        if not self._waiting and self._lock.acquire(False) and self._pump(None, 1) and self._waiting:
            self._wake.set()  # as in _turn
        self._turn()

    def exchange(self, call: Call, frame: Frame) -> None:
        """Send the registered ``call`` and wait until it has news, or its deadline has come."""
        if len(self.calls.pending) > 1:
            self._crowd = CROWD_MEMORY
        elif self._crowd:
            self._crowd -= 1
        elif type(frame) is bytes and self._lock.acquire(False):
            # The lone caller, who has the socket for as long as it takes. Whoever comes finds the lock taken, then sees
            # _alone and ends the wait; or has queued his frame before we looked at _out.
            self._alone = get_ident()
            incoming = self._incoming
            moved: list[Call] = []
            try:
                if self.ended is None and not self._out and not self._waiting:
                    call.sent = True
                    left = call.deadline - monotonic()
                    if left > LONGEST_WAIT:
                        left = LONGEST_WAIT
                    milliseconds = int(left * 1000) + 1 if left > 0 else 0  # below 0 would be for ever
                    call.sent = self.socket.exchange(frame, self._wake, milliseconds, incoming)
                if incoming:
                    self._take_in(moved)
            finally:
                self._alone = 0
                self._lock.release()
                if self._cold:
                    self._handle_cold()
                if self._waiting:
                    self._hand_on()
            if call.sent:
                if call.outcome is None or self._out:
                    self.tell(moved, call)
                    self._turn()
                    self.wait(call, 0, call.deadline)
                return
        self._out.append((call, frame))
        self._turn()
        self.wait(call, 0, call.deadline)

    def _turn(self) -> None:
        """Send and drain for everybody, unless somebody who will look again has the socket."""
        while self._out:
            if not self._lock.acquire(False):
                if self._alone:
                    self._wake.set()
                return
            # What a full batch left has no edge any more, and what found no room must be tried again soon (STUCK):
            # whoever leads must look. If nobody does, our caller will wait, and so lead.
            if self._pump(None, BATCH) or self._stuck:
                self._wake.set()
            if self._stuck:
                return

    def look(self) -> None:
        if not self._alone and self._lead.acquire(False):
            try:
                self._receive(None, 0, 0.0)
            finally:
                self._lead.release()
                self._hand_on()

    def wait(self, call: Call, seen: int, until: float) -> bool:
        """Wait until ``call`` has an outcome or a sign beyond ``seen``; False when ``until`` came first."""
        if call.outcome is not None or call.signs != seen:
            return True
        lock = new_lock()
        lock.acquire()
        waiting = self._waiting
        waiting[lock] = lock
        try:
            while call.outcome is None and call.signs == seen:
                if self._lead.acquire(False):
                    try:
                        self._receive(call, seen, until)
                    finally:
                        self._lead.release()
                else:
                    call.waiter = lock
                    if call.outcome is None and call.signs == seen:
                        acquire(lock, until - monotonic())
                if monotonic() >= until:
                    break
        finally:
            del waiting[lock]
            self._hand_on()
        return call.outcome is not None or call.signs != seen

    def _hand_on(self) -> None:
        """Whoever stops waiting sees that somebody leads while others wait (turns, rule 2)."""
        if self._waiting and not self._lead.locked():
            next_one = successor(self._waiting)
            if next_one is not None:
                release(next_one)

    def _receive(self, call: Call | None, seen: int, until: float) -> None:
        """Lead: send and receive for everybody until ``call`` has news or ``until`` has come."""
        self._leader = call
        lock, unread = self._lock, BATCHES
        try:
            if not lock.acquire(False):
                if call is None:
                    return
                if self._alone:  # or it has not looked yet whether somebody waits
                    self._wake.set()
                if not acquire(lock, until - monotonic()):
                    return
            while True:
                more = self._pump(call, BATCH)
                if call is None and more and unread:
                    unread -= 1  # else an answer behind many others would be late, and its peer be blamed for it
                elif call is None or call.outcome is not None or call.signs != seen:
                    if not self._out or self._stuck:
                        return
                elif not more and (self._stuck or not self._out):
                    left = until - monotonic()
                    if left <= 0:
                        return
                    self._wake.wait(min(left, STUCK) if self._stuck else left)
                if not lock.acquire(False):
                    if call is None:  # somebody has it who may wait for long, and who reads what is there
                        self._wake.set()
                        return
                    if not acquire(lock, until - monotonic()):
                        return
        finally:
            self._leader = None

    def tell(self, calls: list[Call], me: Call | None = None) -> None:
        for call in calls:
            if call is me:
                continue
            if call is self._leader:
                self._wake.set()
            elif call.waiter is not None:
                release(call.waiter)

    def interrupted(self) -> None:
        self._wake.set()

    def end(self, why: str) -> bool:
        self._wake.set()  # a lone caller gives the lock back
        first = super().end(why)
        if first:
            self._wake.set()
        return first

    def _take_lock(self) -> bool:
        # A signal handler may be here in the thread whose frame below waits alone: nothing else goes on in it.
        return self._alone == get_ident() or super()._take_lock()

    def _release_lock(self) -> None:
        if self._alone != get_ident():
            super()._release_lock()

    def forget(self) -> None:
        self._lead, self.opening = new_lock(), new_lock()
        super().forget()

    def close(self, linger: float) -> bool:
        # Waits for the leader to leave, which it does at once; but not where the leader is a frame that a signal
        # handler interrupted to get here: it cannot leave before the handler returns.
        if not acquire(self._lead, PATIENCE):
            return False
        try:
            if not self._give_back(linger):
                return False
            self._wake.close()
            return True
        finally:
            self._lead.release()


def run(steps: Coroutine[Any, Any, Result]) -> Result:
    """What a coroutine of a :class:`BlockingEngine` comes to: its waits wait in place, so it is through in one step."""
    try:
        steps.send(None)
    except StopIteration as end:
        result: Result = end.value
        return result
    raise AssertionError("a wait in a thread suspended its coroutine")


class BlockingEngine(Engine):
    """An engine whose callers wait in their own threads. See :class:`Engine`."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.changed = threading.Condition(self.lock)
        self._keeper: threading.Thread | None = None
        self._watch = Watch()
        self._watch.add(self._wake.fd, None)

    def request(self, terms: Terms, kind: int, flags: int, method: str, body: Body) -> Call:
        """Send a request to one server and wait for its outcome.

        Returns:
            The call that came through: REPLIED, FAILED or TAKEN.

        Raises:
            NoRoute, Rejected, CallTimeout, PeerLost, TooLarge: as their docstrings say.
        """
        begun = self.begin(terms, kind, flags, method, body)
        if isinstance(begun, Attempt):
            return run(self.carry_through(begun, kind, flags, body))
        link, call, frame = begun
        try:
            link.exchange(call, frame)
        except BaseException:
            self.cancel(link, call)
            raise
        outcome = call.outcome
        if outcome is None or outcome is REJECTED or outcome is LOST:
            attempt = self.attempt(terms, method, link, call)
            return run(self.carry_through(attempt, kind, flags, body, under_way=True))
        return call

    def _new_link(self, socket: LinkSocket, calls: CallTable, control: Callable[[Link, bytes], None]) -> Link:
        link = BlockingLink(socket, calls, control)
        self._watch.add(socket.monitor_fd, link)
        return link

    def _unwatch(self, socket: LinkSocket) -> None:
        self._watch.discard(socket.monitor_fd)

    async def wait(self, link: Link, call: Call, seen: int, until: float) -> bool:
        assert isinstance(link, BlockingLink)
        if call is not link.hello:
            return link.wait(call, seen, until)
        # Many may wait for one hello, and all in one place: they would wake each other without an end.
        if acquire(link.opening, until - monotonic()):
            try:
                return link.wait(call, seen, until)
            finally:
                link.opening.release()
        return False

    async def wait_for(self, condition: Callable[[], bool], until: float) -> bool:
        if condition():
            return True
        self.registry.refresh()
        with self.changed:
            while not condition():
                left = until - monotonic()
                if left <= 0 or self.closed:
                    return condition()
                self.changed.wait(min(left, 60.0))
        return True

    async def _sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def spawn(self, steps: Coroutine[Any, Any, None]) -> None:
        start_thread("onehop-relay", run, steps)

    async def _cold(self, action: Callable[..., object], *arguments: Any) -> None:
        action(*arguments)

    def _tell_change(self) -> None:
        self.changed.notify_all()

    def _receive(self, inbound: Inbound) -> None:
        inbound.start_receiver()

    def _keep(self) -> None:
        if self._keeper is None:
            with self.lock:
                if self._keeper is None and not self.closed:
                    self._keeper = start_thread("onehop-keeper", self._keep_house)
                    self._keeping = True
        self._wake.set()

    def _keep_house(self) -> None:
        woken: list[Link] = []
        while not self.closed:
            try:
                woken = self._wait_for_news(self.tidy(woken))
            except Exception as error:
                self._note_broken_round(error)
                time.sleep(TICK)
                woken = []

    def _await_arrivals(self, inbound: Inbound) -> None:
        self._watch.add(inbound.socket.arrivals_fd, inbound)

    def _wait_for_news(self, seconds: float) -> list[Link]:
        woken, until = [], monotonic() + seconds
        ready = self._watch.wait(seconds)
        while self.inbound is not None and [whose for _, whose in ready] == [self.inbound]:
            self.inbound.look_at_arrivals()  # of a thousand that come at once each would be the reason of a round
            ready = self._watch.wait(max(until - monotonic(), 0.0))
        for descriptor, link in ready:
            if link is None:
                self._wake.clear()
                continue
            if link is self.inbound:
                self.inbound.look_at_arrivals()
                continue
            if descriptor == link.socket.fd:
                self._rest(link, False)  # until its callers leave it idle again, they are woken and not this thread
            woken.append(link)
        return woken

    def _rest(self, link: Link, idle: bool) -> None:
        idle = idle and self._watch.shares  # else it is looked after in each round
        super()._rest(link, idle)
        if idle:
            self._watch.add(link.socket.fd, link)
        else:
            self._watch.discard(link.socket.fd)

    def _leave(self, link: Link) -> None:
        super()._leave(link)
        self._watch.discard(link.socket.monitor_fd)

    def _stop_keeping(self) -> None:
        keeper = self._keeper
        if keeper is not None and keeper is not threading.current_thread():
            keeper.join(5.0)
        if keeper is None or not keeper.is_alive():
            self._wake.close()
            self._watch.close()

    def forget(self) -> None:
        super().forget()
        self.changed = threading.Condition(self.lock)
