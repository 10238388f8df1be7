"""One connection of a simulated node to one peer, as ``transport/link.py`` is of a real one."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from onehop.errors import WireError
from onehop.protocol import wire
from onehop.protocol.calls import LOST, REPLIED, Call
from onehop.protocol.liveness import Liveness
from onehop.protocol.peers import Peer
from onehop.testing.clock import Task
from onehop.testing.network import Link

if TYPE_CHECKING:
    from onehop.testing.engine import VirtualEngine
    from onehop.testing.invariants import Entry

STUCK, SLOW_TICK = 0.02, 0.5
"""Seconds, as in the real engine."""


class EngineLink:
    """One connection to one peer; see ``transport.link.Link``."""

    __slots__ = (
        "bad_frames",
        "began",
        "calls",
        "ended",
        "engine",
        "error",
        "hello",
        "liveness",
        "out",
        "peer",
        "socket",
        "waiters",
    )

    def __init__(self, engine: VirtualEngine, peer: Peer, socket: Link, began: float) -> None:
        self.engine = engine
        self.peer = peer
        self.socket = socket
        self.calls = peer.calls
        self.began = began
        self.ended: str | None = None
        self.error: Exception | None = None
        self.bad_frames = 0
        self.liveness = Liveness(engine.clock.random.random)
        self.hello = Call(wire.HELLO)
        self.out: deque[tuple[Call | None, wire.Frame]] = deque()
        self.waiters: list[Task] = []
        self.calls.pending[0] = self.hello
        socket.reader = self.receive
        socket.on_ended = self._on_ended

    def post(self, call: Call | None, frame: wire.Frame) -> None:
        """Send ``frame``, now or when there is room."""
        self.out.append((call, frame))
        if len(self.out) == 1:
            self.send()

    def send(self, _: None = None) -> None:
        """Send what is queued."""
        out = self.out
        while out:
            call, frame = out[0]
            if self.ended is None and (call is None or (call.outcome is None and not call.given_up)):
                if not self.socket.send(frame):
                    self.engine.clock.after(STUCK, self.send)
                    return
                if call is not None:
                    call.sent = True
            out.popleft()

    def receive(self, frame: bytes, body: bytes | None) -> None:
        """A message arrived."""
        engine = self.engine
        if engine.dead or self.ended is not None:
            return
        engine.trace.step(frame[0], engine.index, -1 - self.socket.opened_to, int.from_bytes(frame[8:16], "little"))
        try:
            moved: list[Call] = []
            if self.calls.receive(frame, body, moved):
                for call in moved:
                    if call.waiter is not None:
                        call.waiter.resume()
                if self.hello.outcome is not None and self.waiters:
                    self.wake()
            else:
                engine.control(self, frame)
        except WireError:
            self.bad_frames += 1

    def answered(self) -> None:
        """The hello was answered as it should."""
        self.calls.pending.pop(0, None)
        self.hello.outcome = REPLIED
        self.wake()

    def wake(self) -> None:
        """Let those who wait for the hello look."""
        waiters, self.waiters = self.waiters, []
        for task in waiters:
            task.resume()

    def note_timeout(self, entry: Entry) -> None:
        """A call of ``entry`` was not answered in time."""
        call, now = Call(wire.REQUEST), self.engine.clock.now
        call.route = entry.route
        if self.ready and self.liveness.timed_out(self.calls, call, now - entry.started, now):
            self._judge(False)

    def see_whether_it_answers(self) -> None:
        """Ask a peer that owes answers for a while, and judge it by what comes."""
        calls, now = self.calls, self.engine.clock.now
        ask, answers, overdue = self.liveness.look(calls, now)
        if answers is not None:
            self._judge(answers)
        for id, call in list(calls.pending.items()) if overdue else ():
            if id <= overdue and call.kind in (wire.REQUEST, wire.CAST) and calls.give_up(call):
                self.post(None, wire.pack(wire.CANCEL, id=id))
                call.body, call.outcome = "it does not answer", LOST
                if call.waiter is not None:
                    call.waiter.resume()
        if ask is not None:
            ping, echo = Call(wire.PING), None
            self.post(ping, wire.pack(wire.PING, id=calls.begin(ping)))
            if ask.route is not None:
                echo = Call(wire.PING)
                self.post(echo, wire.echo(calls.begin(echo), wire.names(ask.route.service, ask.route.server, "")))
            self.liveness.asked(ask, ping, echo, now)
            self.engine.probes += 2

    def _judge(self, answers: bool) -> None:
        engine, before = self.engine, self.engine.protocol.routes
        engine.protocol.judged(self.peer, answers, engine.clock.now)
        engine.plan(engine.clock.now + SLOW_TICK)
        engine.routes_may_have_changed(before)

    @property
    def ready(self) -> bool:
        """Whether requests may go."""
        return self.hello.outcome == REPLIED and self.ended is None

    def _on_ended(self, why: str) -> None:
        if not self.engine.dead:
            self.engine.lost(self, why)
