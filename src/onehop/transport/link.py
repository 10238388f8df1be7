"""A link: one connection to one peer, and the calls made over it.

What is the same for every way of waiting stands here; who waits, and how, is said by ``blocking.py`` (threads) and
``loop.py`` (an asyncio loop). No sender ever waits for the socket: frames are queued, and whoever has the socket sends
for all.

The rules which keep this free of lost wake-ups; each has a test that fails without it:

* A call is registered before its frame is queued; its outcome is set before anybody is woken.
* After **every** release of ``_lock`` the holder looks at ``_out`` again: a frame may have come in between.
* The socket's descriptor is an edge, and any send or look can eat it. So it is waited for only after a look that ran
  dry, in the same hold of ``_lock``; and who drains for somebody who waits wakes him.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any

from onehop.errors import WireError
from onehop.protocol import wire
from onehop.protocol.calls import REPLIED, Call, CallTable
from onehop.protocol.wire import Body, Frame
from onehop.transport.carrier import LinkSocket
from onehop.transport.waiting import PATIENCE, acquire, new_lock

BATCH = 64
"""Messages read in one hold of the lock, so that senders are not kept out."""
STUCK = 0.002
"""Seconds until frames that found no room are tried again."""


class Link(ABC):
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
        peer: whom it leads to.
        numbered, resting: the housekeeping's: the last call's number when it looked, and whether it looks no more
            before something comes.
        idle_at: the housekeeping's: when it is closed if nothing comes.
        liveness: the housekeeping's: whether the peer answers.
    """

    __slots__ = (
        "_closed", "_cold", "_control", "_incoming", "_lock", "_out", "_stuck", "bad_frames", "began", "calls",
        "drained", "ended", "error", "hello", "idle_at", "liveness", "numbered", "over", "peer", "ready", "resting",
        "socket",
    )  # fmt: skip

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
        self.peer: Any = None
        self.liveness: Any = None
        self.numbered = -1
        self.resting = False
        self.idle_at = 0.0
        self.hello = Call(wire.HELLO)
        calls.pending[0] = self.hello
        self._closed = False
        self._control = control
        self._lock = new_lock()
        self._out: deque[tuple[Call | None, Frame]] = deque()
        self._stuck = False
        self._incoming: list[tuple[bytes, Body | None]] = []
        self._cold: list[bytes] = []

    @abstractmethod
    def post(self, call: Call | None, frame: Frame) -> None:
        """Queue ``frame`` and see that it is sent; does not wait. ``call.sent`` tells when it left."""

    def put(self, call: Call, frame: Frame) -> None:
        """:meth:`post`, for one who will look for the answer: it may be sent without a look for what came."""
        self.post(call, frame)

    @abstractmethod
    def glance(self) -> None:
        """Take in one message, if it is there and nobody else does."""

    @abstractmethod
    def look(self) -> None:
        """Send and receive what is there, if nobody else does: for links on which nobody waits."""

    @abstractmethod
    def tell(self, calls: list[Call], me: Call | None = None) -> None:
        """Wake whoever waits for ``calls``, which have news; not the thread that asks, which waits for ``me``."""

    @abstractmethod
    def interrupted(self) -> None:
        """Have somebody look at what was read, and not taken in: who should have was interrupted."""

    @abstractmethod
    def close(self, linger: float) -> bool:
        """Give the socket back, letting what was sent leave for ``linger`` seconds; after :meth:`end`.

        May be called twice.

        Returns:
            Whether it could be given back.
        """

    # In one hold of the lock ----------------------------------------------------------------------

    def _pump(self, me: Call | None, limit: int) -> bool:
        """Send and read in one hold of ``_lock``, which the caller took; then tell whoever has news.

        Args:
            me: the call that the thread which asks waits for itself.
            limit: messages read at most.

        Returns:
            Whether more may be there to read. ``_stuck`` tells whether something found no room.
        """
        moved: list[Call] = []
        try:
            if self._out:
                self._stuck = not self._send()
            more = self._drain(limit, moved)
        finally:  # an interrupt (Ctrl-C) must not keep from others what was read for them
            if self._incoming:
                self.interrupted()
            self._lock.release()
            if moved:
                self.tell(moved, me)
            if self._cold:
                self._handle_cold()
        return more

    def _send(self) -> bool:
        """Send what is queued, under ``_lock``; False when there was no room for all."""
        out, socket = self._out, self.socket
        send = socket.send
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
            if not (send(frame) if type(frame) is bytes else socket.send_large(*frame)):
                if call is not None:
                    call.sent = False
                out.appendleft(entry)
                return False
        return True

    def _drain(self, limit: int, moved: list[Call]) -> bool:
        """Read what is there, under ``_lock``; True when the limit came first and more may be."""
        if self.ended is not None:
            return False
        more = self.socket.drain(limit, self._incoming)
        return self._take_in(moved) and more if self._incoming else more

    def _take_in(self, moved: list[Call]) -> bool:
        """Give what was read to the calls, under ``_lock``; False when nothing more comes."""
        cold = self._cold
        self.bad_frames += self.calls.receive_all(self._incoming, moved, cold)
        if cold and wire.is_final(cold[-1]):
            # At once: the connection's end may overtake whoever handles it. Nothing comes behind.
            self.drained, self.ended = True, "it was drained"
            return False
        return True

    def _handle_cold(self) -> None:
        while self._cold:
            try:
                self._control(self, self._cold.pop(0))
            except WireError:
                self.bad_frames += 1
            except IndexError:  # another thread took the last one
                return

    # The end --------------------------------------------------------------------------------------

    def answered(self) -> None:
        """The hello was answered as it should: requests may go."""
        self.calls.pending.pop(0, None)
        self.ready = True
        self.hello.outcome = REPLIED
        self.tell([self.hello])

    def retire(self, why: str) -> bool:
        """If nobody uses the link: say goodbye, and let nothing more be sent. False where somebody does.

        What is begun at this moment finds the link ended, and was not sent: it goes over the next one.
        """
        if not self._lock.acquire(False):
            return False
        try:
            if self.calls.pending or self._out or self.ended is not None:
                return False
            self.socket.send(wire.goodbye())
            self.ended, self.ready = why, False
        finally:
            self._lock.release()
            if self._out:  # queued meanwhile, by somebody who found the lock taken
                self.interrupted()
        return True

    def end(self, why: str) -> bool:
        """The connection is over: what still came is read, then every call ends as LOST. False the second time.

        ``ended`` is set before the calls are lost: a call registered later than that sees it.
        """
        moved: list[Call] = []
        held = self._take_lock()
        try:
            if self.over:
                return False
            self.over = True
            while held and self._drain(BATCH, moved):
                pass
            self.ready = False
            self.ended = self.ended or why
        finally:
            if held:
                self._release_lock()
        self._handle_cold()  # a final goodbye may be among them, which says what did not run
        left = self.calls.refuse("draining") if self.drained else self.calls.lose(why)
        self.tell([*moved, *left])
        return True

    def _take_lock(self) -> bool:
        # Not without an end: a signal handler may be here in the thread whose frame below holds the lock.
        return acquire(self._lock, PATIENCE)

    def _release_lock(self) -> None:
        self._lock.release()

    def forget(self) -> None:
        """In a forked child: the socket is the parent's. libzmq would let nobody out who touched it here."""
        self.ready = False
        self.over, self.ended = True, "it belongs to the parent of this forked process"
        self._lock = new_lock()
        self.calls.lose(self.ended)

    def _give_back(self, linger: float) -> bool:
        if not acquire(self._lock, PATIENCE):
            return False
        try:
            if not self._closed:
                self._closed = True
                self.socket.close(linger)
        finally:
            self._lock.release()
        return True
