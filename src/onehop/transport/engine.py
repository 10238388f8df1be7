"""The engine of one node in one process: it asks (``caller.py``), and it serves, keeps house and ends here.

Made at first use, dropped (not closed) in a forked child.

Locks, in the order in which they may be taken: ``_announcing``, ``lock`` (this node's table of peers, links and
routes), a link's or the inbound socket's own. Nobody waits for the network while holding ``lock``.
"""

from __future__ import annotations

import logging
import os
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from time import monotonic
from typing import NamedTuple

from onehop import errors
from onehop.addresses import advertised
from onehop.interfaces import Record, Registry
from onehop.protocol import wire
from onehop.protocol.inbox import Inbox
from onehop.protocol.peers import IDLE
from onehop.settings import Settings
from onehop.statistics import Statistics, of_peer
from onehop.transport.caller import Caller
from onehop.transport.carrier import Carrier
from onehop.transport.connector import HANDSHAKE
from onehop.transport.inbound import Inbound
from onehop.transport.link import Link
from onehop.transport.queue import Queue

log = logging.getLogger("onehop")

GOODBYE_LINGER = 0.1
"""Seconds that a goodbye may take to leave when the node is closed."""
UNUSED = "it was not used for a while"
GRACE = 1.0
"""Seconds after its deadline for which a call is its owner's to end."""
LATE = 1.5
"""Seconds after which a round of the housekeeping is late: its process did not run."""
TICK = 0.1
SLOW_TICK = 0.5
"""Seconds between the housekeeping's rounds: where it also receives when nobody else does, and otherwise."""


class Offer(NamedTuple):
    """One instance of one service that this node serves."""

    service: str
    server: str
    queue: Queue
    idempotent: tuple[str, ...]


class Engine(Caller):
    """See the module.

    Args:
        settings: of the node.
        carrier: makes the sockets.
        registry: says where other nodes are. The engine owns it.
        listen: where this node would listen, from its id; asked when it first serves.
        release: the version of onehop.
    """

    def __init__(
        self,
        settings: Settings,
        carrier: Carrier,
        registry: Registry,
        listen: Callable[[bytes], Sequence[str]],
        release: str,
    ) -> None:
        super().__init__(settings, carrier, registry, release)
        self.inbound: Inbound | None = None
        self._listen = listen
        self._announcing = threading.RLock()
        self._offers: list[Offer] = []
        self._draining = False
        self._looked = self._looked_for_idle = 0.0

    @abstractmethod
    def _receive(self, inbound: Inbound) -> None:
        """See that somebody leads at the inbound socket from now on."""

    @abstractmethod
    def _await_arrivals(self, inbound: Inbound) -> None:
        """See that somebody looks at them as soon as they come."""

    @abstractmethod
    def _stop_keeping(self) -> None:
        """Nobody keeps house any more."""

    # Serving --------------------------------------------------------------------------------------

    def offer(self, service: str, server: str, queue: Queue, idempotent: tuple[str, ...], *, receiver: bool) -> None:
        """Take requests for ``service`` at ``server`` into ``queue`` and announce it.

        Args:
            receiver: whether a thread of its own should receive; otherwise the queue's takers do.

        Raises:
            RegistryError, SettingsError, ResourceLimit: it cannot be announced, or the socket not be bound.
        """
        with self._announcing:
            if self.closed or self._draining:
                raise errors.NodeClosed("this node is closed or draining; make a new one to serve")
            if self.inbound is None:
                socket = self.carrier.bind(*self._listen(self.protocol.id))
                self.inbound = Inbound(socket, self.protocol.inbox, self._wake.set)
                self.tree.offer(self.inbound)
                if socket.arrivals_fd >= 0:
                    self._await_arrivals(self.inbound)
            queue.inbound = self.inbound
            self.inbound.change(Inbox.offer, service, server, queue)
            self._offers.append(Offer(service, server, queue, idempotent))
            try:
                if receiver:
                    self._receive(self.inbound)
                self._keep()
                self._announce()
            except errors.OnehopError:
                self.withdraw(queue, listed=False)
                raise

    def withdraw(self, queue: Queue, *, listed: bool = True) -> None:
        """Take nothing more for ``queue``. What it has taken stays owed; polls return what is left.

        Args:
            listed: whether the registry tells of it, and is to be blamed if it goes on to.
        """
        with self._announcing:
            mine = [offer for offer in self._offers if offer.queue is queue]
            self._offers = [offer for offer in self._offers if offer.queue is not queue]
            try:
                if mine and not self.closed:
                    self._announce()  # first, so that fewer ask in vain
            except errors.OnehopError as error:  # who withdraws means to finish what was taken, and must come to that
                if listed:
                    what = ", ".join(f"{offer.service!r} at {offer.server!r}" for offer in mine)
                    log.warning("the registry lists %s on, which is refused from now on: %s", what, error)
            finally:  # whatever the registry says, nothing more is taken
                for offer in mine:
                    if self.inbound is not None:
                        self.inbound.change(Inbox.withdraw, offer.service, offer.server, queue)
                queue.stop()
                if self.inbound is not None:
                    self.inbound.answer_echoes(queue)
                    self.inbound.interrupt()

    def _announce(self) -> None:
        if not self._offers or self.inbound is None:
            self.registry.withdraw()
            return
        services: dict[str, tuple[str, ...]] = {}
        idempotent: dict[str, tuple[str, ...]] = {}
        for service, server, _queue, methods in self._offers:
            services[service] = (*services.get(service, ()), server)
            if methods:
                idempotent[service] = tuple(sorted({*idempotent.get(service, ()), *methods}))
        self.registry.announce(
            Record(
                node=self.protocol.id.hex(),
                host=self.protocol.host,
                pid=os.getpid(),
                endpoints=advertised(self.inbound.socket.endpoints, self.settings.advertise),
                services=services,
                idempotent=idempotent,
                version=self.protocol.release,
                zone=self.settings.zone,
                relay=self.settings.relay,
            )
        )

    async def drain(self, timeout: float | None, queue: Queue | None = None) -> bool:
        """Take nothing more (at all, or for one queue) and wait until what was taken is answered.

        Returns:
            Whether all was answered within ``timeout`` seconds (``drain_timeout`` where None).
        """
        until = monotonic() + (self.settings.drain_timeout if timeout is None else timeout)
        if queue is not None:
            await self._cold(self.withdraw, queue)
        elif self.inbound is not None:
            await self._cold(self._begin_drain, self.inbound)
        inbox = self.protocol.inbox
        while any(queue is None or request.target is queue for request in list(inbox.taken)):
            if monotonic() >= until:
                return False
            await self._sleep(0.005)
        if queue is None and self.inbound is not None:
            # Replies went before it on each connection: what a caller has no answer to now did not run.
            self.inbound.change(lambda inbox: inbox.drain("drained", monotonic(), final=True))
        return True

    def _begin_drain(self, inbound: Inbound) -> None:
        with self._announcing:
            self._draining = True
            inbound.change(Inbox.drain, "draining")
            self.registry.withdraw()

    # Housekeeping ---------------------------------------------------------------------------------

    def tidy(self, woken: Iterable[Link] = ()) -> float:
        """A round of cold work: ended connections, timers, links on which nobody waits.

        Args:
            woken: links of which a descriptor became readable.

        Returns:
            Seconds until the next round.
        """
        try:
            self._look(woken, monotonic())
        except Exception as error:
            self._note_broken_round(error)
        with self.lock:
            ended, self._ended_links = self._ended_links, []
        stuck: list[Link] = []
        try:
            while ended:
                self._leave(ended[-1])
                if not ended[-1].close(GOODBYE_LINGER):
                    stuck.append(ended[-1])
                ended.pop()
        except Exception as error:
            self._note_broken_round(error)
        with self.lock:
            self._ended_links += stuck + ended
            again = len(self._ended_links) > len(stuck) + len(ended)
        due = self.protocol.inbox.timer()
        inbound = self.inbound
        pause = TICK if inbound is not None and (inbound.crowded or not inbound.has_receiver) else SLOW_TICK
        if due is not None:
            pause = min(pause, due - monotonic())
        return 0.0 if again else max(pause, 0.0)

    def _note_broken_round(self, error: Exception) -> None:
        """Of the housekeeping, which must go on, whatever breaks."""
        with suppress(Exception):
            node = self.protocol.id.hex()
            log.error("the housekeeping of node %s met an error; it goes on", node, exc_info=error)

    def _look(self, woken: Iterable[Link], now: float) -> None:
        for link in woken:
            self._hear(link)
            link.look()
        with self.lock:
            before = self.protocol.routes
            rested = self.protocol.handle_timer(now)
        for peer in rested:
            with suppress(errors.OnehopError):  # then it rests again
                link = self._begin_link(peer)
                self._rest(link, True)  # nobody waits for its hello: the descriptor tells of the answer
                link.look()
        if self.protocol.routes is not before:
            with self.lock:
                self._tell_change()
        if now - self._looked >= SLOW_TICK:
            late, self._looked = now - self._looked - LATE, now
            if late > 0.0:  # this process was stopped, or very busy
                with self.lock:
                    links = list(self._links.values())
                for link in links:
                    link.liveness.excuse(late)
            # In place: most of a thousand links rest, and a call for each would be most of the cost. At a young one
            # looks whoever began it.
            with self.lock:
                links = [
                    link for link in self._links.values()
                    if now - link.began >= SLOW_TICK and (
                        not link.resting or (calls := link.calls).pending or calls.last != link.numbered
                        or link.peer.record is None or link.liveness.stalled
                    )
                ]  # fmt: skip
            for link in links:
                self._look_after(link, now)
        if now - self._looked_for_idle >= self.settings.idle_timeout / 50:
            self._looked_for_idle = now
            with self.lock:
                links = [link for link in self._links.values() if link.resting and now >= link.idle_at]
            for link in links:
                if link.calls.last == link.numbered and link.retire(UNUSED):
                    self._lost(link.peer, link, UNUSED, IDLE)
        if self.inbound is not None:
            self.inbound.look(now)

    def _look_after(self, link: Link, now: float) -> None:
        """Receive what nobody waits for; after a round in which no call was under way, leave that to the descriptor.

        Not before: a caller that leaves may eat the edge of a message that it does not read.
        """
        if link.over:
            return
        calls = link.calls
        idle = not calls.pending and calls.last == link.numbered
        link.numbered = calls.last
        if idle != link.resting:
            link.idle_at = now + self.settings.idle_timeout * (0.8 + 0.4 * self.protocol.peers.random())
            self._rest(link, idle)  # before the look: nothing may come unseen between
        link.look()
        if not link.ready and (link.hello.outcome is not None or now - link.began > HANDSHAKE + GRACE):
            self._not_ready(link)  # nobody waited for its hello
            return
        for call in calls.expire(now - GRACE):  # begun, and its owner never came back for it
            self._give_up(link, call)
        if link.peer.record is None and not calls.pending:
            self._lost(link.peer, link, "its record was withdrawn")
        elif calls.pending or link.liveness.stalled:
            self.see_whether_it_answers(link, now)

    def _hear(self, link: Link) -> None:
        """The connection of ``link`` may have ended."""
        why = None if link.over else link.socket.ended()
        if why is not None:
            self._lost(link.peer, link, why)

    def _rest(self, link: Link, idle: bool) -> None:
        """Whether ``link`` is idle: then a message that comes wakes the housekeeping, which does not look by itself."""
        link.resting = idle

    def _leave(self, link: Link) -> None:
        """Nobody waits for the descriptors of ``link`` any more: it is about to be closed."""
        self._rest(link, False)

    # The rest -------------------------------------------------------------------------------------

    def statistics(self) -> Statistics:
        """A snapshot."""
        inbox: Inbox = self.protocol.inbox
        with self.lock:
            peers = tuple(map(of_peer, self.protocol.peers.peers.values()))
            outcomes = dict(self.outcomes)
        return Statistics(
            node=self.protocol.id.hex(),
            host=self.protocol.host,
            state=self._state(),
            peers=peers,
            retried=outcomes.pop("retried", 0),
            outcomes=outcomes,
            taken=len(inbox.taken),
            taken_bytes=inbox.taken_bytes,
            waiting=sum(map(len, {offer.queue for offer in self._offers})),
            refused=dict(inbox.refused),
            received=dict(inbox.counts),
            dropped=dict(self.inbound.counts) if self.inbound is not None else {},
            registry=self.settings.shown_registry,
            records=len(self.records),
        )

    def _state(self) -> str:
        if not self._offers or self.closed:
            return "not serving"
        if not self._draining:
            return "serving"
        return "draining" if self.protocol.inbox.taken else "not serving"

    def close(self, linger: float = 1.0) -> None:
        """End everything now. Calls under way end as lost; requests taken and not answered go unanswered."""
        if self.end():
            self.dispose(linger)

    def end(self) -> bool:
        """The first half of :meth:`close`: nothing begins any more, and every call has its outcome. False if done."""
        with self.lock:
            if self.closed:
                return False
            self.closed = True
            self._tell_change()
            links = list(self._links.values())
            self._links.clear()
        self._wake.set()
        for offer in self._offers:
            offer.queue.stop()
        self._stop_keeping()
        for link in links:
            link.post(None, wire.goodbye())
            link.look()
            link.end("this node was closed")
        self._ended_links += links
        return True

    def dispose(self, linger: float) -> None:
        """The second half, which may take its time: give back what is held. Used by one thread."""
        try:
            self.registry.close()
        except errors.RegistryError as error:
            log.warning("the registry did not let go of node %s: %s", self.protocol.id.hex(), error)
        closed = [link.close(GOODBYE_LINGER) for link in self._ended_links]
        if (self.inbound is None or self.inbound.close(linger)) and all(closed):
            self.carrier.close()  # else a thread is still in a socket, which only the end of the process may take away

    def forget(self) -> None:
        """In a forked child: nothing of the parent's is touched any more, by whoever still holds a part of this."""
        self.closed = True
        self.lock = threading.RLock()
        self.registry.forget()
        for link in list(self._links.values()):
            link.forget()
        if self.inbound is not None:
            self.inbound.forget()
