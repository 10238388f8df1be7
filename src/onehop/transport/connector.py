"""The peers that the registry tells of, the links to them, and whether they answer.

What is decided here is asked of ``protocol/``; what is not decided here is how to wait: ``blocking.py`` waits in the
caller's thread, ``loop.py`` in an asyncio loop.
"""

from __future__ import annotations

import logging
import os
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from time import monotonic
from typing import Any

from onehop import errors
from onehop.interfaces import Record, Registry
from onehop.protocol import wire
from onehop.protocol.calls import LOST, REJECTED, REPLIED, Call, CallTable
from onehop.protocol.liveness import Liveness
from onehop.protocol.node import NodeProtocol
from onehop.protocol.peers import LOST as LOST_PEER
from onehop.protocol.peers import REPLACED, Peer
from onehop.protocol.routes import Routes
from onehop.settings import Settings
from onehop.transport.carrier import Carrier, LinkSocket
from onehop.transport.link import Link
from onehop.transport.requests import name_of
from onehop.transport.waiting import Wake

log = logging.getLogger("onehop")

HANDSHAKE = 5.0
"""Seconds a peer has to answer a hello."""
SHORTEST_PATIENCE, PATIENCE = 0.02, 1.0
"""Seconds that a registry may take to say who offers a service, at the first request for it."""


class Connector(ABC):
    """The part of an engine that knows the peers and connects to them. See the module.

    Args:
        settings: of the node.
        carrier: makes the sockets.
        registry: says where other nodes are. The engine owns it.
        release: the version of onehop.
    """

    def __init__(self, settings: Settings, carrier: Carrier, registry: Registry, release: str) -> None:
        self.settings = settings
        self.carrier = carrier
        self.registry = registry
        self.closed = False
        self.lock = threading.RLock()
        self.protocol = NodeProtocol(
            os.urandom(16),
            random=lambda: int.from_bytes(os.urandom(4), "big") / 2**32,
            host=settings.host_name,
            realm=settings.realm,
            release=release,
            messages=settings.inbox_messages,
            size=settings.inbox_bytes,
            window_messages=settings.window_messages,
            window_bytes=settings.window_bytes,
            reach=settings.duplicate_window,
            subset=settings.subset,
        )
        self.records: tuple[Record, ...] = ()
        self.outcomes: Counter[str] = Counter()
        self._links: dict[bytes, Link] = {}
        self._ended_links: list[Link] = []
        self._listeners: list[Callable[[], None]] = []
        self._wake = Wake()
        self._keeping = False
        self._wanted: set[str] = set()

    def start(self) -> None:
        """Watch the registry. Called once, before anything else.

        Raises:
            RegistryError: the registry cannot be used.
        """
        self.registry.watch(self._learn)

    # What the registry says -----------------------------------------------------------------------

    def _learn(self, records: Sequence[Record]) -> None:
        with self.lock:
            if self.closed:
                return
            self.records = tuple(records)
            self.protocol.learn(records, monotonic())
            self._tell_change()
            listeners = list(self._listeners)
        for listener in listeners:
            listener()

    async def want(self, service: str, until: float) -> None:
        """See that the view has all who offer ``service`` (``""``: any), as far as the registry knows them.

        Args:
            until: when not to wait any longer, which may be past already; a registry is given a moment all the same.
        """
        if service not in self._wanted:
            patience = min(max(until - monotonic(), SHORTEST_PATIENCE), PATIENCE)
            await self._cold(self.registry.want, service, patience)
            self._wanted.add(service)

    async def known(self, service: str) -> tuple[Record, ...]:
        """The records of those who offer ``service``, and perhaps of others; ``""``: of all."""
        await self.want(service, monotonic() + PATIENCE)
        await self._cold(self.registry.refresh)
        return self.records

    def on_change(self, listener: Callable[[], None]) -> None:
        """Have ``listener`` called after each change of the view."""
        with self.lock:
            self._listeners.append(listener)

    # How to wait ----------------------------------------------------------------------------------

    @abstractmethod
    def _new_link(self, socket: LinkSocket, calls: CallTable, control: Callable[[Link, bytes], None]) -> Link:
        """A link whose calls are waited for in this engine's way."""

    @abstractmethod
    def _unwatch(self, socket: LinkSocket) -> None:
        """Wait for nothing of ``socket``, of which no link came to be: its descriptors are another's soon."""

    @abstractmethod
    async def wait(self, link: Link, call: Call, seen: int, until: float) -> bool:
        """Wait until ``call`` has an outcome or a sign beyond ``seen``; False when ``until`` came first."""

    @abstractmethod
    async def wait_for(self, condition: Callable[[], bool], until: float) -> bool:
        """Wait until ``condition`` (asked after each change of the view) holds; False when ``until`` came first."""

    @abstractmethod
    async def _sleep(self, seconds: float) -> None:
        """Let a moment pass."""

    @abstractmethod
    def spawn(self, steps: Coroutine[Any, Any, None]) -> None:
        """Have ``steps`` done beside everything else.

        Raises:
            RuntimeError: the machine gives no more threads.
        """

    @abstractmethod
    async def _cold(self, action: Callable[..., object], *arguments: Any) -> None:
        """Do something that may take its time: with files, or with the registry."""

    @abstractmethod
    def _tell_change(self) -> None:
        """Have those who :meth:`wait_for` something ask again. Called by any thread, which holds ``lock``."""

    @abstractmethod
    def _keep(self) -> None:
        """See that somebody keeps house, and does it now."""

    async def _wait_for_change(self, routes: Routes, until: float) -> None:
        """Wait until ``routes`` is not the picture any more."""
        await self.wait_for(lambda: self.protocol.routes is not routes, until)

    # Links ----------------------------------------------------------------------------------------

    def _begin_link(self, peer: Peer) -> Link:
        """The link to ``peer``, begun if there is none; does not wait for it to be ready.

        Raises:
            PeerLost: it cannot be begun; nothing was sent.
            ResourceLimit: the machine has no room for it, or no thread for the housekeeping.
        """
        if not self._keeping:
            self._keep()
        with self.lock:
            if self.closed:
                raise errors.NodeClosed("this node is closed; make a new one")
            link: Link | None = peer.link
            if link is not None and link.ended is None:
                return link
            record = peer.record
            hello = self.protocol.connect(peer, monotonic()) if record is not None else None
            if hello is None or record is None:
                raise errors.PeerLost(f"node {peer.id.hex()} is {peer.state}: not connected to", executed="no")
            socket = link = None
            try:
                socket = self.carrier.connect(self.carrier.nearest(record.endpoints))
                why = socket.ended()  # the monitor's descriptor tells nothing before a first look
                link = self._new_link(socket, peer.calls, self._control)
                link.peer, link.liveness = peer, Liveness(self.protocol.peers.random)
                peer.link = self._links[peer.id] = link
            except BaseException as error:  # an interrupt, too; or an endpoint that no system could have
                if link is not None:
                    link.end("it was interrupted")
                    self._ended_links.append(link)
                elif socket is not None:
                    self._unwatch(socket)
                    socket.close(0.0)
                self.protocol.lost(peer, "no connection could be begun", monotonic())
                if isinstance(error, OSError):
                    raise errors.ResourceLimit(f"no connection to {name_of(peer)} could be begun: {error}") from error
                if isinstance(error, errors.OnehopError) and not isinstance(error, errors.ResourceLimit):
                    raise errors.PeerLost(f"{name_of(peer)}: {error}", executed="no") from error
                raise
        if why is not None:
            self._lost(peer, link, why)
        link.post(link.hello, hello)
        return link

    async def _connect(self, peer: Peer, until: float, patience: float) -> Link:
        """The ready link to ``peer``.

        Args:
            patience: seconds after which another is to be asked, while this one may still answer its hello.

        Raises:
            PeerLost, CallTimeout: it did not become ready; nothing was sent.
        """
        link = self._begin_link(peer)
        await self._await_hello(link, min(until, monotonic() + patience))
        if link.hello.outcome == REPLIED:
            return link
        if link.hello.outcome is None and monotonic() < min(until, link.began + HANDSHAKE):
            raise errors.PeerLost(f"{name_of(peer)} has not answered the hello for {patience:g} s", executed="no")
        if link.hello.outcome is None and monotonic() >= until:
            raise errors.CallTimeout(f"{name_of(peer)} did not answer the hello before the deadline", executed="no")
        why = self._not_ready(link)
        raise errors.PeerLost(f"no connection to {name_of(peer)}: {link.error or why}", executed="no") from link.error

    def _not_ready(self, link: Link) -> str:
        """The hello of ``link`` was refused, or not answered in time: it is over; returns why."""
        why, event = link.ended or "it did not answer the hello", LOST_PEER
        if link.hello.outcome == REJECTED:
            why = "{}: {}".format(*link.hello.body)
            if link.hello.body[0] == "wrong node":
                event = REPLACED
        self._lost(link.peer, link, why, event)
        return why

    async def _await_hello(self, link: Link, until: float) -> bool:
        """Wait until the hello has an outcome, for as long as a peer has to answer it; whether it has."""
        if link.hello.outcome is None:
            await self.wait(link, link.hello, 0, min(until, link.began + HANDSHAKE))
        return link.hello.outcome is not None

    def _control(self, link: Link, frame: bytes) -> None:
        """A frame that is for no call."""
        peer: Peer = link.peer
        ended: list[Call] = []
        try:
            with self.lock:
                ready = self.protocol.control(peer, frame, monotonic(), ended)
                self._tell_change()
        except errors.WireError:
            raise
        except errors.ProtocolError as error:
            link.error = error
            self._lost(peer, link, str(error), REPLACED)
            return
        link.tell(ended)
        if ready:
            link.answered()

    def _lost(self, peer: Peer, link: Link, why: str, event: str = LOST_PEER) -> None:
        """The connection is over. Its calls end; the socket is closed by the housekeeping."""
        if not link.end(why):
            return
        with self.lock:
            if peer.link is link:
                peer.link = None
                self.protocol.lost(peer, why, monotonic(), event)
            self._links.pop(peer.id, None)
            self._ended_links.append(link)
            self._tell_change()
        self._wake.set()

    def see_whether_it_answers(self, link: Link, now: float) -> None:
        """Ask a peer that owes answers for a while, and judge it by what comes; a part of the housekeeping."""
        calls, liveness = link.calls, link.liveness
        with self.lock:
            ask, answers, overdue = liveness.look(calls, now)
        if answers is not None:
            self.judge(link, answers, "it has not answered, or none of its workers has, for some seconds")
        for id, call in list(calls.pending.items()) if overdue else ():
            if id <= overdue and call.kind in (wire.REQUEST, wire.CAST) and calls.give_up(call):
                link.post(None, wire.pack(wire.CANCEL, id=id))
                call.body, call.outcome = "it does not answer", LOST
                link.tell([call])
        if ask is not None:
            ping, echo = Call(wire.PING), None
            link.post(ping, wire.pack(wire.PING, id=calls.begin(ping)))
            if link.peer.features & wire.ECHO and ask.route is not None:
                echo = Call(wire.PING)
                section = wire.names(ask.route.service, ask.route.server, "")
                link.post(echo, wire.echo(calls.begin(echo), section))
            with self.lock:
                liveness.asked(ask, ping, echo, now)

    def judge(self, link: Link, answers: bool, why: str) -> None:
        """The peer of ``link`` answers again, or does not."""
        peer = link.peer
        with self.lock:
            is_news = peer.link is link and self.protocol.judged(peer, answers, monotonic())
            if is_news:
                self._tell_change()
        if is_news and answers:
            log.info("%s answers again", name_of(peer))
        elif is_news:
            log.warning("%s is stalled: %s; others are asked, where there are some", name_of(peer), why)
