"""Requests taken in: who sent them, whether they are new, whether there is room, and what is owed for each.

Everything here is called under one lock of the engine (the inbound socket's), so nothing is atomic by itself.

A request runs at most once: it carries its sender's node id (said in the hello) and a number, and a
:class:`Window` per sender knows which numbers came. What is refused is answered with the reason and counted.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, TypeVar

from onehop.errors import WireError
from onehop.protocol import wire
from onehop.protocol.wire import Body, Frame, Hello

Key = TypeVar("Key")

Message = tuple[bytes, bytes, Body | None]
"""What came: the connection's identity, a frame, and the body that rode as a second frame."""

SILENT_AFTER = 60.0
"""Seconds without a frame after which a connection is probed: is it still there?"""
SHORTEST_BEAT = 0.05
"""Seconds between two heartbeats of a request, at least: a caller must not keep the server busy with them."""
WINDOW_KEPT = 600.0
"""Seconds for which a window outlives the last connection of its sender."""
GIVEN_UP = 2.0
"""Seconds after its deadline within which a caller has given a call up."""
ADDRESSES_KEPT = 4096
WINDOWS_KEPT = 65_536
"""At most; beyond them the oldest go."""
SHARE = 8
"""One of several callers may have so many times the requests taken in for which there is room left."""


NEW = "new"
AGAIN = "again"
UNKNOWN = "unknown"
"""What a window says of a number: never seen; seen before; so old that it cannot tell."""


class Window:
    """Which request numbers of one sender have come.

    Numbers grow; over several threads they may come a little out of order. So what is kept is the number to come
    and the ones missing below it: nothing at all for a sender in order.

    Args:
        reach: how far below the highest a number may still be new.
        first: the lowest number to come.

    Attributes:
        next: the number that comes if nothing is missing or late.
        connections: on which they come; those that ended too, while something that came on them is not finished.
        refused: the last numbers that came and were not run, and why.
    """

    __slots__ = ("_first", "_missing", "_reach", "connections", "next", "refused", "seen")

    def __init__(self, reach: int, first: int = 1) -> None:
        self._first = first
        self.next = first
        self._missing: set[int] = set()
        self._reach = reach
        self.refused: dict[int, str] = {}
        self.seen = 0.0
        self.connections: list[Sender] = []

    def take(self, number: int) -> str:
        """Take ``number`` in; NEW at most once for each."""
        floor = max(self._first, max(number, self.next - 1) - self._reach)
        if number >= self.next:
            self._missing.update(range(max(self.next, floor), number))
            self.next = number + 1
            if len(self._missing) > 2 * self._reach:
                self._missing = {each for each in self._missing if each >= floor}
            return NEW
        if number < floor:
            return UNKNOWN
        if number in self._missing:
            self._missing.discard(number)
            return NEW
        return AGAIN

    def refuse(self, number: int, reason: str) -> None:
        """Remember that ``number`` was not run: its sender was told so, and a copy must not run either."""
        if len(self.refused) >= self._reach:
            del self.refused[next(iter(self.refused))]
        self.refused[number] = reason


class Sender:
    """One connection that has said hello.

    Args:
        window: of the node's requests; its connections share it.
        heard: when it last sent something.

    Attributes:
        calls: the requests (not casts) taken in from it and not answered, by number.
        taken, taken_bytes: requests taken in from it and not finished, and their bytes.
        echo: whether a worker owes it an answer to an echo.
        over: whether it has ended.
        left_until: when no call waits any more that was left without an answer.
    """

    __slots__ = ("calls", "echo", "heard", "host", "left_until", "node", "over", "taken", "taken_bytes", "window")

    def __init__(self, node: bytes, host: str, window: Window, heard: float) -> None:
        self.node = node
        self.host = host
        self.window = window
        self.heard = heard
        self.taken = self.taken_bytes = 0
        self.echo = self.over = False
        self.left_until = 0.0
        self.calls: dict[int, Request] = {}


class Request:
    """One request taken in, for one instance of a service.

    Attributes:
        identity: the connection it came on, and its answer returns on.
        names: service, server (as the caller named it, perhaps empty) and method.
        deadline: when its caller gives up, on this node's clock; None for never, once its handler is done with it, and
            of a cast, whose caller waits no longer than until it is taken in.
        due: the engine's; what the deadline was.
        monitor: seconds within which the caller wants a sign of life; None for none.
        granted: of a stream, how many items its reader has asked for so far.
        cancelled: the caller gave up, or is gone; it must not run. So it is with an echo from its beginning.
        answered: a reply was made; nothing is owed any more.
        queued: the engine's; it has been given to its target.
        target: the engine's; which instance it is for.
        waiter: the engine's; who waits for credit.
    """

    # Defaults that most requests never change stand in the class: one is made for every request.
    flags = 0
    monitor: float | None = None
    due: float | None = None
    granted = 0
    queued = False
    cancelled = False
    answered = False
    waiter: Any = None

    def __init__(
        self,
        identity: bytes,
        sender: Sender,
        kind: int,
        id: int,
        names: tuple[str, str, str],
        body: Body,
        deadline: float | None,
        size: int,
        target: Any,
    ) -> None:
        self.identity = identity
        self.sender = sender
        self.kind = kind
        self.id = id
        self.names = names
        self.body = body
        self.deadline = deadline
        self.size = size
        self.target = target

    @property
    def node(self) -> bytes:
        """The caller's node id."""
        return self.sender.node

    @property
    def service(self) -> str:
        return self.names[0]

    @property
    def server(self) -> str:
        return self.names[1]

    @property
    def method(self) -> str:
        return self.names[2]


Acks = dict[bytes, tuple[Any, list[int]]]
"""Casts to be acknowledged: by connection, a target whose length is told as the load, and the numbers."""


class Inbox:
    """All requests that one node has taken in and not finished.

    Args:
        node: this node's id.
        realm: hellos of another realm are refused.
        messages, size: requests (and their bytes) taken in and not finished, at most. Where several callers are
            connected, one has up to ``SHARE`` times of what the room is at that moment, so that there is always some
            left for the others.
        reach: of the duplicate windows.
        release: the version of onehop, said in the answer to a hello.
    """

    def __init__(
        self,
        node: bytes,
        *,
        realm: str = "",
        host: str = "",
        messages: int = 10_000,
        size: int = 1 << 28,
        reach: int = 4096,
        release: str = "",
    ) -> None:
        self.node = node
        self.answer = Hello(node, b"\0" * 16, features=wire.FEATURES, host=host, realm=realm, release=release)
        self.messages = messages
        self.size = size
        self.reach = reach
        # Below these nobody can have more than his share.
        self._roomy, self._roomy_bytes = messages * SHARE // (SHARE + 1), size * SHARE // (SHARE + 1)
        self.draining = False
        self.taken: dict[Request, None] = {}
        self.taken_bytes = 0
        self.outgoing: list[tuple[bytes, Frame]] = []
        self.echoes: list[Request] = []
        self.refused: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.senders: dict[bytes, Sender] = {}
        self._windows: dict[bytes, Window] = {}
        self._beats: dict[Request, float] = {}
        self._offers: dict[tuple[str, str], list[Any]] = {}
        self._services: dict[str, list[Any]] = {}
        self._addresses: dict[bytes, tuple[str, str, str]] = {}
        self._direct: dict[bytes, tuple[tuple[str, str, str], Any]] = {}

    # What is offered ------------------------------------------------------------------------------

    def offer(self, service: str, server: str, target: Any) -> None:
        """Requests for ``service`` at ``server`` go to ``target`` from now on (in turn, where there are several).

        Args:
            target: the engine's queue; its length is how many requests wait there.
        """
        self._offers.setdefault((service, server), []).append(target)
        self._services.setdefault(service, []).append(target)
        self._direct.clear()

    def withdraw(self, service: str, server: str, target: Any) -> None:
        """The reverse of :meth:`offer`. What ``target`` has taken stays owed."""
        _remove(self._offers, (service, server), target)
        _remove(self._services, service, target)
        self._direct.clear()

    # What comes in --------------------------------------------------------------------------------

    def receive(self, identity: bytes, frame: bytes, body: Body | None, now: float, moved: list[Request]) -> None:
        """Take in one message from the connection ``identity``; see :meth:`receive_all`."""
        self.receive_all([(identity, frame, body)], now, moved)

    def receive_all(self, messages: list[Message], now: float, moved: list[Request]) -> None:
        """Take in messages, in their order, and out of the list.

        Appends to ``moved`` each request to be run, and each that has news (credit, cancellation). Answers that
        need no handler are appended to ``outgoing``; the casts of one connection are acknowledged together. Never
        raises for what a peer sent.
        """
        acks: Acks = {}
        unpack, header_size, request_kind = wire.HEADER.unpack_from, wire.HEADER_SIZE, wire.REQUEST
        senders, taken, direct = self.senders, self.taken, self._direct
        done = 0
        try:
            for identity, frame, body in messages:
                done += 1
                try:
                    kind, flags, extent, remaining, id = unpack(frame)
                except wire.TOO_SHORT:
                    self.counts["bad frames"] += 1
                    continue
                start = header_size + extent
                sender = senders.get(identity)
                known = direct.get(frame[header_size:start])
                taken_bytes = self.taken_bytes + len(frame)
                # The express lane: a plain request, the next in order, from a known sender to a known address, with
                # room for it. Everything else takes the long way, which looks at one thing after the other.
                if (
                    known is None or sender is None or flags or body is not None or not remaining or len(frame) < start
                    or (kind != request_kind and kind != wire.CAST) or id != sender.window.next
                    or len(taken) >= self._roomy or taken_bytes > self._roomy_bytes
                ):  # fmt: skip
                    self._receive(identity, frame, body, now, moved, acks)
                    continue
                sender.heard = now
                sender.window.next = id + 1
                names, target = known
                deadline = None if remaining == wire.NO_DEADLINE or kind != request_kind else now + remaining / 1000
                request = Request(identity, sender, kind, id, names, frame[start:], deadline, len(frame), target)
                taken[request] = None
                self.taken_bytes = taken_bytes
                sender.taken += 1
                sender.taken_bytes += len(frame)
                moved.append(request)
                if kind == request_kind:
                    sender.calls[id] = request
                elif identity in acks:
                    acks[identity][1].append(id)
                else:
                    acks[identity] = target, [id]
        finally:
            del messages[:done]
            for identity, (target, ids) in acks.items():
                self.outgoing.append((identity, wire.ack(ids, len(target))))

    def _receive(
        self, identity: bytes, frame: bytes, body: Body | None, now: float, moved: list[Request], acks: Acks
    ) -> None:
        try:
            head = wire.header(frame)
            kind = head.kind
            if kind == wire.REQUEST or kind == wire.CAST:
                self._request(identity, frame, head, body, now, moved, acks)
            elif kind == wire.HELLO:
                self._hello(identity, wire.parse_hello(frame), now)
            elif kind == wire.PING:
                self._ping(identity, frame, head)
            elif kind == wire.CREDIT or kind == wire.CANCEL:
                self._control(identity, head, moved)
            elif kind == wire.GOODBYE:
                moved.extend(self.gone(identity))
            else:
                raise WireError(f"kind {kind} does not go from a caller to a server")
        except WireError:
            self.counts["bad frames"] += 1

    def _hello(self, identity: bytes, hello: Hello, now: float) -> None:
        if self.draining:
            self._refuse(identity, 0, "draining")
            return
        if hello.oldest > wire.VERSION or hello.version < wire.OLDEST:
            # Both sides must be able to say which versions they speak: answered, not taken in (wire 3.1).
            self.counts["version mismatches"] += 1
        elif hello.expected not in (self.node, b"\0" * 16) or hello.realm != self.answer.realm:
            # An address was used again by another node: nothing meant for the old one may run here.
            self._refuse(identity, 0, "wrong node", f"this is node {self.node.hex()} of realm {self.answer.realm!r}")
            return
        else:
            known = self.senders.get(identity)
            if known is not None and known.node != hello.node:
                raise WireError("a second hello on one connection, of another node")
            window = self._windows.get(hello.node)
            if window is None:
                if len(self._windows) >= WINDOWS_KEPT:
                    del self._windows[next(iter(self._windows))]
                window = self._windows[hello.node] = Window(self.reach, hello.first)
            if known is None:
                sender = self.senders[identity] = Sender(hello.node, hello.host, window, now)
                window.connections.append(sender)
        self.outgoing.append((identity, wire.hello(self.answer, is_answer=True, place=len(self.senders))))

    def _ping(self, identity: bytes, frame: bytes, head: wire.Header) -> None:
        """Answer a PING at once; one with an address is left to a worker there, so that a hung one is noticed."""
        sender = self.senders.get(identity)
        if sender is not None and head.extent:
            service, server, _ = wire.split_names(wire.address(frame, head)[1])
            targets = self._offers.get((service, server)) if server else self._services.get(service)
            if targets:
                if sender.echo:
                    self.counts["echoes beside another"] += 1
                    return
                sender.echo = True
                names, target = (service, server, ""), max(targets, key=len)
                request = Request(identity, sender, wire.PING, head.id, names, b"", None, 0, target)
                request.cancelled = True
                self.echoes.append(request)
                return
        self.outgoing.append((identity, wire.pack(wire.PONG, id=head.id)))

    def _request(
        self,
        identity: bytes,
        frame: bytes,
        head: wire.Header,
        body: Body | None,
        now: float,
        moved: list[Request],
        acks: Acks,
    ) -> None:
        sender = self.senders.get(identity)
        if sender is None:
            self._refuse(identity, head.id, "hello first")
            return
        sender.heard = now
        try:
            monitor, section, start = wire.address(frame, head)
            names = self._addresses.get(section)
            if names is None:
                if len(self._addresses) >= ADDRESSES_KEPT:
                    self._addresses.clear()
                    self._direct.clear()
                names = self._addresses[section] = wire.split_names(section)
        except WireError as error:
            self.counts["bad frames"] += 1
            self._refuse(identity, head.id, "malformed", str(error))
            return
        if (body is not None) != bool(head.flags & wire.BODY_FOLLOWS):
            self.counts["bad frames"] += 1
            self._refuse(identity, head.id, "malformed", "a body announced and missing, or there and not announced")
            return
        size = len(frame) + (0 if body is None else len(body))
        service, server, _method = names
        targets = self._offers.get((service, server)) if server else self._services.get(service)
        # Before everything else: a copy of what runs must not be refused as not run.
        if (news := sender.window.take(head.id)) is not NEW:
            self._duplicate(identity, sender, head.kind, head.id, news)
        elif head.number == 0:
            self._refuse_new(identity, sender, head.id, "expired")
        elif self.draining:
            self._refuse_new(identity, sender, head.id, "draining")
        elif not targets:
            known = service in self._services
            self._refuse_new(identity, sender, head.id, "no server" if known else "no service", server or service)
        elif (full := self._full(sender, len(targets), size)) is not None:
            self._refuse_new(identity, sender, head.id, "full", full)
        else:
            if body is None:
                body = frame[start:]
            forever = head.number == wire.NO_DEADLINE or head.kind != wire.REQUEST
            deadline = None if forever else now + head.number / 1000
            if len(targets) == 1:
                self._direct[section] = names, targets[0]
            elif not head.flags & wire.FANOUT:
                targets.append(targets.pop(0))  # in turn
                targets = targets[-1:]
            for target in targets:
                request = Request(identity, sender, head.kind, head.id, names, body, deadline, size, target)
                request.flags, request.monitor = head.flags, monitor
                self.taken[request] = None
                self.taken_bytes += size
                sender.taken += 1
                sender.taken_bytes += size
                moved.append(request)
            if head.kind == wire.CAST:
                acks.setdefault(identity, (targets[0], []))[1].append(head.id)
            else:
                sender.calls[head.id] = request
                if monitor is not None:
                    self._beats[request] = now + max(monitor / 2, SHORTEST_BEAT)

    def _full(self, sender: Sender, count: int, size: int) -> str | None:
        """Why there is no room for so many more requests of ``sender``; None where there is."""
        room, room_bytes = self.messages - len(self.taken), self.size - self.taken_bytes
        if count > room or size > room_bytes:
            return f"{len(self.taken)} requests are taken in and not answered"
        if len(self.senders) > 1 and (sender.taken >= SHARE * room or sender.taken_bytes >= SHARE * room_bytes):
            return f"{sender.taken} of {len(self.taken)} requests that are taken in and not answered are this caller's"
        return None

    def _duplicate(self, identity: bytes, sender: Sender, kind: int, id: int, news: str) -> None:
        self.counts["duplicates"] += 1
        window = sender.window
        reason = window.refused.get(id)
        if reason is not None:
            self._refuse(identity, id, reason)
            return
        if kind == wire.CAST and news is AGAIN:
            self.outgoing.append((identity, wire.ack([id])))  # it was taken; say so again
            return
        for other in window.connections:
            request = other.calls.get(id)
            if request is None:
                continue
            if other is not sender:
                # Its caller came back for it: the answer goes to where it waits now. What comes over an older one
                # after that is the original; nobody waits there.
                if window.connections.index(sender) < window.connections.index(other):
                    return
                del other.calls[id]
                other.taken, other.taken_bytes = other.taken - 1, other.taken_bytes - request.size
                sender.taken, sender.taken_bytes = sender.taken + 1, sender.taken_bytes + request.size
                sender.calls[id] = request
                request.identity, request.sender, request.cancelled = identity, sender, False
                if request.monitor is not None:
                    self._beats[request] = 0.0  # at once
                self.counts["resumed"] += 1
            return  # it runs, and its reply is on the way
        self._refuse(identity, id, "duplicate")

    def _control(self, identity: bytes, head: wire.Header, moved: list[Request]) -> None:
        sender = self.senders.get(identity)
        request = None if sender is None else sender.calls.get(head.id)
        if request is None:
            return  # legal (wire 3.8, 3.10): the reply and this frame met under way
        if head.kind == wire.CREDIT:
            request.granted += head.number
        elif not request.cancelled:
            request.cancelled = True
            self.counts["cancelled"] += 1
        moved.append(request)

    def _refuse_new(self, identity: bytes, sender: Sender, id: int, reason: str, text: str = "") -> None:
        sender.window.refuse(id, reason)
        self._refuse(identity, id, reason, text)

    def _refuse(self, identity: bytes, id: int, reason: str, text: str = "") -> None:
        self.refused[reason] += 1
        self.outgoing.append((identity, wire.reject(id, reason, text)))

    # What becomes of it ---------------------------------------------------------------------------

    def expired(self, request: Request, now: float) -> bool:
        """Whether ``request`` must not run any more: its caller gave up or went away."""
        return request.cancelled or (request.deadline is not None and request.deadline <= now)

    def finish(self, request: Request) -> bool:
        """``request`` has been dealt with: its room is free. False when that was said before."""
        if self.taken.pop(request, request) is not None:
            return False
        sender = request.sender
        self.taken_bytes -= request.size
        sender.taken -= 1
        sender.taken_bytes -= request.size
        sender.calls.pop(request.id, None)
        if request.monitor is not None:
            self._beats.pop(request, None)
        return True

    def leave(self, request: Request) -> None:
        """``request`` gets no answer, though its caller may wait for one."""
        if not request.cancelled:
            deadline = request.due if request.deadline is None else request.deadline
            until = float("inf") if deadline is None else deadline + GIVEN_UP
            request.sender.left_until = max(request.sender.left_until, until)

    def leave_unsaid(self, identity: bytes) -> None:
        """What was to be said to a connection was not: who waits for that must not be told that nothing of his ran."""
        if identity in self.senders:
            self.senders[identity].left_until = float("inf")

    def refuse_taken(self, request: Request, reason: str) -> None:
        """``request``, which was taken in, is answered as not run; a copy of it would be, too."""
        self.refused[reason] += 1
        if request.kind == wire.REQUEST:
            request.sender.window.refuse(request.id, reason)

    def gone(self, identity: bytes) -> list[Request]:
        """The connection ended: forget it, and cancel what it still waited for; returns those requests."""
        sender = self.senders.pop(identity, None)
        if sender is None:
            return []
        window, sender.over = sender.window, True
        window.seen = sender.heard
        # A window that outlives its connections does not keep them; nor the two each other, until a collector comes.
        window.connections = [each for each in window.connections if each.calls or not each.over]
        orphans = list(sender.calls.values())
        for request in orphans:
            self.counts["cancelled"] += not request.cancelled
            request.cancelled = True
            self._beats.pop(request, None)
        return orphans

    def drain(self, text: str = "", now: float = 0.0, *, final: bool = False) -> None:
        """Take in nothing more, and say so to every connection.

        Args:
            final: everything taken is answered, so that what a caller still waits for certainly did not run. It is not
                said to one that may still wait for what was left without an answer.
        """
        self.draining = True
        self._direct.clear()
        self.outgoing.extend(
            (identity, wire.goodbye(text, final=final and sender.left_until <= now))
            for identity, sender in self.senders.items()
        )

    def handle_timer(self, now: float) -> None:
        """Heartbeats that are due for monitored requests, and probes of silent connections."""
        for request, due in list(self._beats.items()):
            if self.expired(request, now):
                del self._beats[request]  # its handler may run on, but nobody waits for it
            elif due <= now and request.monitor is not None:
                self.outgoing.append((request.identity, wire.pack(wire.PROGRESS, id=request.id)))
                self._beats[request] = now + max(request.monitor / 2, SHORTEST_BEAT)
        for identity, sender in self.senders.items():
            if now - sender.heard >= SILENT_AFTER:
                sender.heard = now
                self.outgoing.append((identity, wire.pack(wire.PING)))
        in_use = {sender.node for sender in self.senders.values()}
        for node in [n for n, window in self._windows.items() if n not in in_use and now - window.seen > WINDOW_KEPT]:
            self._windows.pop(node).connections.clear()

    def timer(self) -> float | None:
        """When :meth:`handle_timer` should next be called for a heartbeat; None when none is owed."""
        return min(self._beats.values(), default=None)


def _remove(table: dict[Key, list[Any]], key: Key, target: Any) -> None:
    targets = table.get(key, [])
    if target in targets:
        targets.remove(target)
    if not targets:
        table.pop(key, None)
