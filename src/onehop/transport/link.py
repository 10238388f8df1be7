"""A link: one connection to a peer, read by the threads that wait for its answers.

No thread of ours stands between a caller and its reply. A caller that waits alone sends, polls and receives by
itself. Where several wait, one leads (``protocol/turns.py``). No sender ever waits for the socket: it appends its
frame and tries the lock; whoever holds it sends for all.

The rules which keep this free of lost wake-ups; each has a test that fails without it:

* A call is registered before its frame is queued; its outcome is set before anybody is woken.
* After **every** release of ``lock`` the holder looks at ``out`` again: a frame may have come in between.
* The socket's descriptor is an edge, and any send or look can eat it. So it is polled only after a look that found
  nothing, in the same hold of ``lock``; and who drains for a leader that polls wakes it through ``wake``.
* A leader announces itself in ``leader``, then looks at its outcome; a completer sets the outcome, then reads
  ``leader``. One of them sees the other.
* A leader takes ``lock`` waiting: holders never wait while they have it, and a leader that spun on a readable
  descriptor would starve the holder.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any

from onehop.errors import WireError
from onehop.protocol import wire
from onehop.protocol.calls import REPLIED, Call, CallTable
from onehop.protocol.turns import successor
from onehop.protocol.wire import Frame
from onehop.transport.carrier import LinkSocket
from onehop.transport.waiting import PATIENCE, Wake, acquire, new_lock, release

BATCH = 64
"""Messages read in one hold of the lock, so that senders are not kept out."""
STUCK = 0.002
"""Seconds until frames that found no room are tried again."""
CROWD_MEMORY = 200
"""Calls for which a link that saw two callers at once does not try the lone path."""


class Link:
    """One connection to one peer.

    Args:
        socket: the carrier's end.
        calls: the table of the calls made over it.
        control: told of each frame that is for no call; may raise WireError, which is counted.

    Attributes:
        hello: stands for the answer to our hello, with number 0: its outcome says whether the link is ready.
        ended: why no request may be sent any more; None while one may.
        over: whether the connection itself has ended.
        drained: whether the peer said that it runs nothing more of what it was sent.
        error: what the peer's hello was answered with, where the two cannot talk.
        began: when, on this process's monotonic clock.
        opening: held by the thread that waits for the hello.
    """

    def __init__(self, socket: LinkSocket, calls: CallTable, control: Callable[[Link, bytes], None]) -> None:
        self.socket = socket
        self.calls = calls
        self.ready = False
        self.ended: str | None = None
        self.over = False
        self.drained = False
        self.error: Exception | None = None
        self.bad_frames = 0
        self.began = monotonic()
        self.opening = new_lock()
        self._closed = False
        self.hello = Call(wire.HELLO)
        calls.pending[0] = self.hello
        self._control = control
        self._lock = new_lock()
        self._lead = new_lock()
        self._leader: Call | None = None
        self._waiting: dict[Any, Any] = {}
        self._out: deque[tuple[Call | None, Frame]] = deque()
        self._crowd = 0
        self._wake = Wake(socket.fd)

    # Sending --------------------------------------------------------------------------------------

    def post(self, call: Call | None, frame: Frame) -> None:
        """Queue ``frame`` and see that it is sent; does not wait. ``call.sent`` tells when it left."""
        self._out.append((call, frame))
        self._turn()

    def exchange(self, call: Call, frame: Frame, until: float) -> bool:
        """Send the registered ``call`` and wait for news of it; False when ``until`` came first."""
        if len(self.calls.pending) > 1:
            self._crowd = CROWD_MEMORY
        elif self._crowd:
            self._crowd -= 1
        elif not self._out and self._lead.acquire(False):
            # The lone caller: nobody else is here, so it leads from the start and nothing is handed over.
            try:
                self._out.append((call, frame))
                self._receive(call, 0, until)
            finally:
                self._leave()
            return call.outcome is not None or call.signs != 0 or self.wait(call, 0, until)
        self._out.append((call, frame))
        self._turn()
        return self.wait(call, 0, until)

    def _send(self) -> bool:
        """Send what is queued, under ``_lock``; False when there was no room for all."""
        out, send = self._out, self.socket.send
        while out:
            try:
                entry = out.popleft()
            except IndexError:
                return True
            call, frame = entry
            if self.ended is not None:
                continue
            if call is not None:
                call.sent = True
                if call.given_up:
                    call.sent = False
                    continue
            if not send(frame):
                if call is not None:
                    call.sent = False
                out.appendleft(entry)
                return False
        return True

    def _turn(self) -> None:
        """Send and drain for everybody, unless somebody who will look again has the socket."""
        while self._out and self._lock.acquire(False):
            sent, more = self._pump(None)
            # What a full batch left has no edge any more, and what found no room must be tried again soon (STUCK):
            # whoever leads must look. If nobody does, our caller will wait, and so lead.
            if more or not sent:
                self._wake.set()
            if not sent:
                return

    def _pump(self, me: Call | None) -> tuple[bool, bool]:
        """Send and read in one hold of ``_lock``, which the caller took; then tell whoever has news.

        Args:
            me: the call that the leader, who asks, waits for itself.

        Returns:
            Whether all that was queued was sent; whether more may be there to read.
        """
        moved: list[Call] = []
        cold: list[bytes] = []
        try:
            sent = self._send()
            more = self._drain(moved, cold)
        finally:  # an interrupt (Ctrl-C) must not keep from others what was read for them
            self._lock.release()
            if moved:
                self.tell(moved, me)
            self._handle(cold)
        return sent, more

    def look(self) -> None:
        """Send and receive what is there, if nobody else does: for links on which nobody waits."""
        if self._lead.acquire(False):
            try:
                self._receive(None, 0, 0.0)
            finally:
                self._leave()

    # Receiving ------------------------------------------------------------------------------------

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

    def _leave(self) -> None:
        self._lead.release()
        self._hand_on()

    def _hand_on(self) -> None:
        """Whoever stops waiting sees that somebody leads while others wait (turns, rule 2)."""
        if self._waiting and not self._lead.locked():
            next_one = successor(self._waiting)
            if next_one is not None:
                release(next_one)

    def _receive(self, call: Call | None, seen: int, until: float) -> None:
        """Lead: send and receive for everybody until ``call`` has news or ``until`` has come."""
        self._leader = call
        try:
            while True:
                self._lock.acquire()
                sent, more = self._pump(call)
                if call is None or call.outcome is not None or call.signs != seen:
                    if self._out and sent:
                        continue
                    return
                if more or (self._out and sent):
                    continue
                left = until - monotonic()
                if left <= 0:
                    return
                self._wake.wait(left if sent else min(left, STUCK))
        finally:
            self._leader = None

    def _drain(self, moved: list[Call], cold: list[bytes]) -> bool:
        """Read what is there, under ``_lock``; True when the batch was full and more may be."""
        if self.ended is not None:
            return False
        socket, receive_call = self.socket, self.calls.receive
        for _ in range(BATCH):
            if not socket.readable():
                return False
            message = socket.receive()
            if message is None:
                return False
            frame, body = message
            try:
                if wire.kind_of(frame) >= wire.FIRST_FOR_CALLS:
                    receive_call(frame, body, moved)
                else:
                    cold.append(frame)
                    if wire.is_final(frame):
                        # Noted at once: the connection's end may overtake whoever handles it. Nothing comes behind it.
                        self.drained, self.ended = True, "it was drained"
                        return False
            except WireError:
                self.bad_frames += 1
        return True

    def _handle(self, cold: list[bytes]) -> None:
        for frame in cold:
            try:
                self._control(self, frame)
            except WireError:
                self.bad_frames += 1

    def tell(self, calls: list[Call], me: Call | None = None) -> None:
        """Wake whoever waits for ``calls``, which have news; not the thread that asks, which waits for ``me``."""
        for call in calls:
            if call is me:
                continue
            if call is self._leader:
                self._wake.set()
            elif call.waiter is not None:
                release(call.waiter)

    # The end --------------------------------------------------------------------------------------

    def answered(self) -> None:
        """The hello was answered as it should: requests may go."""
        self.calls.pending.pop(0, None)
        self.ready = True
        self.hello.outcome = REPLIED
        self.tell([self.hello])

    def end(self, why: str) -> bool:
        """The connection is over: what still came is read, then every call ends as LOST. False the second time.

        ``ended`` is set before the calls are lost: a call registered later than that sees it.
        """
        moved: list[Call] = []
        cold: list[bytes] = []
        # Not without an end: a signal handler may be here in the thread whose frame below holds the lock.
        held = acquire(self._lock, PATIENCE)
        try:
            if self.over:
                return False
            self.over = True
            while held and self._drain(moved, cold):
                pass
            self.ready = False
            self.ended = self.ended or why
        finally:
            if held:
                self._lock.release()
        self._handle(cold)  # a final goodbye may be among them, which says what did not run
        left = self.calls.refuse("draining") if self.drained else self.calls.lose(why)
        self.tell([*moved, *left])
        self._wake.set()
        return True

    def forget(self) -> None:
        """In a forked child: the socket is the parent's. libzmq would let nobody out who touched it here."""
        self.ready = False
        self.over, self.ended = True, "it belongs to the parent of this forked process"
        self._lock, self._lead, self.opening = new_lock(), new_lock(), new_lock()
        self.calls.lose(self.ended)

    def close(self, linger: float) -> bool:
        """Give the socket back, letting what was sent leave for ``linger`` seconds; after :meth:`end`.

        Waits for the leader to leave, which it does at once. May be called twice.

        Returns:
            Whether it could be given back. Not where the leader is a frame that a signal handler interrupted to get
            here: it cannot leave before the handler returns.
        """
        if not acquire(self._lead, PATIENCE):
            return False
        self._lock.acquire()
        try:
            if not self._closed:
                self._closed = True
                self.socket.close(linger)
        finally:
            self._lock.release()
            self._lead.release()
        return True
