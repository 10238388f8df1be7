"""Waiting in an asyncio loop: the loop that calls and serves also reads the sockets.

No thread stands between. The loop watches each socket's descriptor by ``add_reader``; what is to be sent in one turn of
the loop leaves together, and whoever sends looks for what came, since a send may eat the descriptor's edge.

Everything of a link happens in the loop. The inbound socket is shared with the threads of plain handlers, under its
lock as ever; the loop leads there.
"""

from __future__ import annotations

import asyncio
import threading
from _thread import get_ident
from collections.abc import AsyncGenerator, Callable, Coroutine
from functools import partial
from time import monotonic
from typing import Any

from onehop.errors import SettingsError
from onehop.protocol.calls import LOST, REJECTED, Call, CallTable
from onehop.protocol.wire import Body, Frame
from onehop.transport.carrier import LinkSocket
from onehop.transport.engine import GOODBYE_LINGER, Engine
from onehop.transport.inbound import Inbound
from onehop.transport.link import BATCH, STUCK, Link
from onehop.transport.queue import FOREVER, Queue
from onehop.transport.requests import Attempt, Terms
from onehop.transport.waiting import PATIENCE, start_thread

SWEEP = 0.05
"""Seconds between two looks for calls whose deadline has come; a timer for each call would cost more than the call."""


class LoopLink(Link):
    """A link whose calls are waited for by tasks of one loop."""

    __slots__ = ("_again", "_called", "_loop", "_watched")

    def __init__(
        self,
        socket: LinkSocket,
        calls: CallTable,
        control: Callable[[Link, bytes], None],
        loop: asyncio.AbstractEventLoop,
        news: Callable[[Link], None],
    ) -> None:
        super().__init__(socket, calls, control)
        self._loop = loop
        self._called = False
        self._again: asyncio.TimerHandle | None = None
        self._watched = True
        loop.add_reader(socket.fd, self.look)
        loop.add_reader(socket.monitor_fd, news, self)

    def post(self, call: Call | None, frame: Frame) -> None:
        self._out.append((call, frame))
        if not self._called:
            self._called = True
            self._loop.call_soon(self.look)

    def glance(self) -> None:
        """Nothing: the loop reads what comes."""

    def look(self) -> None:
        self._called = False
        if self._closed:
            return
        self._lock.acquire()
        more = self._pump(None, BATCH)
        if self.drained:  # nothing more is read, and what comes would call for a look without an end
            self._loop.remove_reader(self.socket.fd)
        if self._stuck:
            if self._again is None:
                self._again = self._loop.call_later(STUCK, self._look_again)
        elif (more or self._out) and not self._called:
            self._called = True
            self._loop.call_soon(self.look)

    def _look_again(self) -> None:
        self._again = None
        self.look()

    def tell(self, calls: list[Call], me: Call | None = None) -> None:
        for call in calls:
            waiter = call.waiter
            if waiter is not None and not waiter.done():
                waiter.set_result(None)

    def interrupted(self) -> None:
        if not self._called:
            self._called = True
            self._loop.call_soon(self.look)

    def leave_loop(self) -> None:
        """Nothing calls for a look any more."""
        if self._watched:
            self._watched = False
            self._loop.remove_reader(self.socket.fd)
            self._loop.remove_reader(self.socket.monitor_fd)

    def end(self, why: str) -> bool:
        first = super().end(why)
        if first and not self._loop.is_closed():
            self.leave_loop()
        return first

    def close(self, linger: float) -> bool:
        return self._give_back(linger)


class LoopEngine(Engine):
    """An engine whose callers are tasks of one loop. See :class:`Engine`.

    Made, and used, in the running loop; only what ``_cold`` does happens in threads.
    """

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.loop = running_loop()
        self._thread = get_ident()
        self.inherited = False
        self._changes: list[asyncio.Future[None]] = []
        self._spawned: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._sweeping = False
        self._leading = False
        self._again_at: asyncio.TimerHandle | None = None
        self._guard = self._until_loop_ends()
        self.loop.add_reader(self._wake.fd, self._keep_house)

    async def request(self, terms: Terms, kind: int, flags: int, method: str, body: Body) -> Call:
        """Send a request to one server and wait for its outcome.

        Returns:
            The call that came through: REPLIED, FAILED or TAKEN.

        Raises:
            NoRoute, Rejected, CallTimeout, PeerLost, TooLarge: as their docstrings say.
        """
        if get_ident() != self._thread or not self.loop.is_running():  # get_running_loop() asks the kernel
            self.check_loop()
        begun = self.begin(terms, kind, flags, method, body)
        if isinstance(begun, Attempt):
            return await self.carry_through(begun, kind, flags, body)
        link, call, frame = begun
        call.waiter = waiter = self.loop.create_future()
        link.post(call, frame)
        if not self._sweeping:
            self._sweeping = True
            self.loop.call_later(SWEEP, self._sweep)
        try:
            await waiter
        except BaseException:  # this task was cancelled: so is the call, at the server
            self.cancel(link, call)
            raise
        outcome = call.outcome
        if outcome is None or outcome is REJECTED or outcome is LOST:
            attempt = self.attempt(terms, method, link, call)
            return await self.carry_through(attempt, kind, flags, body, under_way=True)
        return call

    def _sweep(self) -> None:
        """Wake the tasks whose calls have reached their deadline."""
        now, pending = monotonic(), False
        for link in list(self._links.values()):
            for call in link.calls.pending.values():
                pending = True
                if call.deadline <= now and call.waiter is not None and not call.waiter.done():
                    call.waiter.set_result(None)
        self._sweeping = pending
        if pending:
            self.loop.call_later(SWEEP, self._sweep)

    def _new_link(self, socket: LinkSocket, calls: CallTable, control: Callable[[Link, bytes], None]) -> Link:
        return LoopLink(socket, calls, control, self.loop, self._hear)

    def _unwatch(self, socket: LinkSocket) -> None:
        for descriptor in (socket.fd, socket.monitor_fd):
            self.loop.remove_reader(descriptor)

    async def wait(self, link: Link, call: Call, seen: int, until: float) -> bool:
        if call.outcome is None and call.signs == seen and (left := until - monotonic()) > 0:
            self.check_loop()
            if call.waiter is None or call.waiter.done():
                call.waiter = self.loop.create_future()
            await asyncio.wait([call.waiter], timeout=left)  # not the future itself: others may wait for it too
        return call.outcome is not None or call.signs != seen

    async def wait_for(self, condition: Callable[[], bool], until: float) -> bool:
        if condition():
            return True
        await self._cold(self.registry.refresh)
        while True:
            change: asyncio.Future[None] = self.loop.create_future()
            self._changes.append(change)
            try:
                if condition():
                    return True
                left = until - monotonic()
                if left <= 0 or self.closed:
                    return False
                await asyncio.wait([change], timeout=min(left, 60.0))
            finally:
                self._changes.remove(change)

    def _tell_change(self) -> None:
        if self._changes:
            self.call_in_loop(self._wake_all)

    def _wake_all(self) -> None:
        for change in self._changes:
            if not change.done():
                change.set_result(None)

    def call_in_loop(self, action: Callable[..., object], *arguments: Any) -> None:
        """Have ``action`` done in the loop, unless that has ended; called by any thread."""
        try:
            self.loop.call_soon_threadsafe(action, *arguments)
        except RuntimeError:
            if not self.loop.is_closed():
                raise

    async def _sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def spawn(self, steps: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(steps)
        self._spawned.add(task)
        task.add_done_callback(self._spawned.discard)

    async def _cold(self, action: Callable[..., object], *arguments: Any) -> None:
        self.check_loop()
        # In a thread of its own: those of the loop's executor may all be busy with what the user gave them.
        done: asyncio.Future[None] = self.loop.create_future()

        def act() -> None:
            error: BaseException | None = None
            try:
                action(*arguments)
            except BaseException as raised:
                error = raised
            self.call_in_loop(_settle, done, error)

        start_thread("onehop-cold", act)
        await done

    async def start_in_loop(self) -> None:
        """Watch the registry; see :meth:`start`. The engine ends with its loop, where nobody ends it earlier."""
        await self._cold(self.start)
        await anext(self._guard)

    async def _until_loop_ends(self) -> AsyncGenerator[None, None]:
        try:
            yield  # until the loop shuts down its asynchronous generators
        finally:
            await self._end_in_loop(GOODBYE_LINGER)

    def on_change_in_loop(self, listener: Callable[[], None]) -> None:
        """Have ``listener`` called in the loop after each change of the view."""
        self.on_change(lambda: self.call_in_loop(listener))

    async def close_in_loop(self, linger: float = 1.0) -> None:
        """End everything now; see :meth:`close`."""
        self.check_loop()
        await self._end_in_loop(linger)
        await self._guard.aclose()

    async def _end_in_loop(self, linger: float) -> None:
        if self.end():
            await self._cold(self.dispose, linger)

    def close(self, linger: float = 1.0) -> None:
        """End everything from outside of the loop, which has ended, or stands still, or runs in another thread."""
        if self.loop.is_closed():
            self.closed = True
            self._wake.close()
            self._ended_links += self._links.values()
            self._links.clear()
            for link in self._ended_links:
                link.over, link.ended = True, "its loop has ended"  # nobody can be told
            self.dispose(linger)
        elif self.loop.is_running():
            ended = threading.Event()
            self.call_in_loop(self.end)
            self.call_in_loop(ended.set)
            ended.wait(PATIENCE)
            self.dispose(linger)
        else:
            super().close(linger)

    # Serving --------------------------------------------------------------------------------------

    async def offer_in_loop(self, service: str, server: str, queue: Queue, idempotent: tuple[str, ...]) -> None:
        """Take requests for ``service`` at ``server`` into ``queue`` and announce it; see :meth:`offer`."""
        await self._cold(partial(self.offer, receiver=True), service, server, queue, idempotent)

    async def withdraw_in_loop(self, queue: Queue) -> None:
        """Take nothing more for ``queue``; see :meth:`withdraw`."""
        await self._cold(self.withdraw, queue)

    def _receive(self, inbound: Inbound) -> None:
        if not inbound.has_receiver:
            self.call_in_loop(self._begin_to_lead, inbound)

    def _await_arrivals(self, inbound: Inbound) -> None:
        self.call_in_loop(self.loop.add_reader, inbound.socket.arrivals_fd, inbound.look_at_arrivals)

    def _begin_to_lead(self, inbound: Inbound) -> None:
        if inbound.has_receiver or self.closed:
            return
        for descriptor in inbound.enter_loop():
            self.loop.add_reader(descriptor, self._lead)
        self._lead()

    def _lead(self) -> None:
        self._leading = False
        if self.inbound is None or self.closed:
            return
        try:
            pause = self.inbound.lead()
        except Exception as error:  # it may have eaten the edge of what came: nothing would call for the next round
            pause = self.inbound.note_broken_round(error)
        if pause == 0.0:
            self.lead_soon()
        elif pause != FOREVER and self._again_at is None:
            self._again_at = self.loop.call_later(pause, self._lead_again)

    def _lead_again(self) -> None:
        self._again_at = None
        self._lead()

    def lead_soon(self) -> None:
        """Send what was answered in this turn of the loop at its end."""
        if not self._leading and not self.loop.is_closed():
            self._leading = True
            self.loop.call_soon(self._lead)

    # Housekeeping ---------------------------------------------------------------------------------

    def _keep(self) -> None:
        self._keeping = True
        self._wake.set()

    def _keep_house(self) -> None:
        self._wake.clear()
        if self._timer is not None:
            self._timer.cancel()
        if self.closed:
            return
        self._timer = self.loop.call_later(self.tidy(), self._keep_house)

    def _stop_keeping(self) -> None:
        if self.loop.is_closed():
            return
        for timer in (self._timer, self._again_at):
            if timer is not None:
                timer.cancel()
        self.loop.remove_reader(self._wake.fd)
        self._wake.close()
        if self.inbound is not None and self.inbound.socket.arrivals_fd >= 0:
            self.loop.remove_reader(self.inbound.socket.arrivals_fd)
        if self.inbound is not None and self.inbound.led_by_loop:
            self.inbound.closing = True  # a worker that looks at it must not take in what only the loop can run
            for descriptor in self.inbound.leave_loop():
                self.loop.remove_reader(descriptor)

    def check_loop(self) -> None:
        """Make sure that the running loop is this engine's.

        Raises:
            SettingsError: it is another, or none.
        """
        if running_loop() is not self.loop:
            raise SettingsError("this node belongs to another asyncio loop: a node is used in the loop it began in")

    def forget(self) -> None:
        # The descriptors stay with the loop: its selector is shared with the parent.
        self.inherited = True
        super().forget()


def running_loop() -> asyncio.AbstractEventLoop:
    """The loop that runs here.

    Raises:
        SettingsError: none does.
    """
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise SettingsError(
            "an asyncio node is used inside of a running loop; elsewhere, such as in a plain handler's thread, use "
            "onehop.Node, or asyncio.run_coroutine_threadsafe"
        ) from None


def _settle(done: asyncio.Future[None], error: BaseException | None) -> None:
    if done.done():  # who waited for it was cancelled
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)
