"""A world of simulated nodes: virtual time, chance from a seed, ZeroMQ-shaped connections, and faults on demand.

The nodes are the real core; what happens in the world follows from its seed alone, so a failure comes back when the
same seed is given again::

    world = World(seed=7)
    nodes = world.nodes(50, service="echo")
    calls = world.call_randomly(rate=200, timeout=2.0)
    world.partition(nodes[:20], nodes[20:], at=3.0, repair_at=9.0)
    world.run(until=20.0)
    assert all(call.finished_once for call in calls)
    assert world.views_agree(within=5.0)

``onehop.testing.invariants`` is checked all the while; a breach raises InvariantBroken with the seed, the virtual time
and the last 50 steps. ``onehop.testing.exploration`` draws whole worlds, their load and their faults from a seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any

from onehop.testing.clock import Clock, LocalClock
from onehop.testing.engine import Surroundings, VirtualEngine
from onehop.testing.invariants import (
    CUT,
    HEARD_WITHIN,
    HELD,
    KEPT_STEPS,
    MENDED,
    PASSED,
    RELEASED,
    STRIKES,
    STRUCK,
    Entry,
    Invariants,
    Trace,
)
from onehop.testing.link import EngineLink
from onehop.testing.network import LATENCY, Cut, Network, VirtualRegistry
from onehop.testing.offer import Offer

DRAIN_TIMEOUT = 10.0
DARK = -1
STOPPED, HUNG, SLOW, LATE, DEAF = range(len(STRIKES))
NEWS_TAKES = 1.0
"""Seconds in which the end of a process is heard of where the network carries it."""
BOUNDS_EVERY, LOOKED_AT = 0.5, 8
"""Seconds after which the tables of so many nodes are looked through."""
CONVERGENCE = 12.0
"""Seconds after the last repair within which all nodes are routes for each other again: the longest pause, and some."""


class VirtualNode:
    """One node of a world: a place that keeps its name while processes come and go there.

    Attributes:
        engine: the process that runs there, or the last one that did.
        offset, rate: of the clock there; see :class:`onehop.testing.clock.LocalClock`.
        cuts: what stops its connections because it is without power or stopped.
        processes: how many have run there.
    """

    def __init__(self, index: int, engine: VirtualEngine, offset: float = 0.0, rate: float = 1.0) -> None:
        self.index = index
        self.engine = engine
        self.offset = offset
        self.rate = rate
        self.cuts: dict[int, Cut] = {}
        self.processes = 1

    @property
    def is_up(self) -> bool:
        """Whether a process runs here, and is not about to end."""
        return not (self.engine.dead or self.engine.closed or self.engine.draining)

    @property
    def id(self) -> bytes:
        """The node id of the process."""
        return self.engine.protocol.id

    def __repr__(self) -> str:
        return f"<VirtualNode {self.index} {'up' if self.is_up else 'down'}>"


class World:
    """See the module.

    Args:
        seed: everything that happens follows from it.
        latency: seconds a message takes, from and to.
        notice: seconds until a node notices a change in the registry, from and to.
        is_strict: whether a breach of an invariant raises at once; otherwise it is collected in ``invariants.broken``.
        kept: how many of the last steps a breach tells.

    Attributes:
        ledger: every request made, with all that became of it.
        clock, network, registry, invariants, trace: what the nodes share.
        engines: every process that ever ran, in the order in which they began.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        latency: tuple[float, float] = LATENCY,
        notice: tuple[float, float] = (0.02, 0.3),
        is_strict: bool = True,
        kept: int = KEPT_STEPS,
    ) -> None:
        self.seed = seed
        self.clock = Clock(seed)
        self.random = self.clock.random
        self.network = Network(self.clock, latency)
        self.registry = VirtualRegistry(self.clock, notice)
        self.trace = Trace(self.clock, kept)
        self.ledger: list[Entry] = []
        self.invariants = Invariants(self.clock, self.trace, self.ledger, is_strict=is_strict)
        self._nodes: list[VirtualNode] = []
        self._cuts: dict[Cut, tuple[tuple[int, int], list[int]]] = {}
        self._struck_now: dict[tuple[VirtualEngine, int], VirtualNode] = {}
        self._loads: list[_Load] = []
        self._planned = 0
        self._looked = float("-inf")
        self._turn = 0
        self._is_quiet = False

    @property
    def now(self) -> float:
        """Virtual seconds since the world began."""
        return self.clock.now

    # Nodes ----------------------------------------------------------------------------------------

    def nodes(
        self,
        number: int,
        service: str = "",
        *,
        offers: Sequence[Offer] = (),
        server: str = "",
        work: float = 0.01,
        workers: int = 8,
        room: int = 10_000,
        window: int = 4_096,
        fanout_direct: int = 2_000,
        relay: bool = True,
        watches: bool = True,
        engine: type[VirtualEngine] = VirtualEngine,
    ) -> list[VirtualNode]:
        """Add nodes, which start now.

        Args:
            service: offered by each of them; none where empty. ``server`` is the name of the instance; by default each
                node has one of its own.
            work: seconds a handler takes, on average; ``workers`` run at once.
            offers: instead of ``service``: several.
            room: requests an inbox takes; ``window``: requests under way to one peer.
            fanout_direct, relay: see :class:`onehop.settings.Settings`.
            watches: whether they learn of others. Ten thousand who all know each other would take all memory there is.
            engine: another engine, to see what the checks say of it.
        """
        made = []
        for index in range(len(self._nodes), len(self._nodes) + number):
            own = tuple(offers) or ((Offer(service, server or f"server-{index}", work, workers),) if service else ())
            options: dict[str, Any] = {"room": room, "window": window, "fanout_direct": fanout_direct}
            made.append(VirtualNode(index, engine(self._around(index), index, own, relay=relay, **options)))
        return self.start(made, watch=watches)

    def _around(self, index: int, offset: float = 0.0, rate: float = 1.0, process: int = 0) -> Surroundings:
        """What a process finds; its chance is its own, so that what is left out elsewhere changes nothing for it."""
        clock = LocalClock(self.clock, Random(f"{self.seed}/{index}/{process}"), offset, rate)
        return Surroundings(clock, self.network, self.registry, self.invariants, self.trace)

    def place(
        self,
        index: int,
        offers: Sequence[Offer],
        *,
        offset: float = 0.0,
        rate: float = 1.0,
        engine: type[VirtualEngine] = VirtualEngine,
        **options: Any,
    ) -> VirtualNode:
        """A node of that index that does not run yet; for :meth:`start`.

        Args:
            offset, rate: of its clock.
            options: of the engine.
        """
        made = engine(self._around(index, offset, rate), index, tuple(offers), **options)
        return VirtualNode(index, made, offset, rate)

    def start(self, nodes: Sequence[VirtualNode], *, watch: bool = True) -> list[VirtualNode]:
        """Start the processes of nodes made by :meth:`place`."""
        for node in nodes:
            node.engine.start()
        for node in nodes:
            self.invariants.engines.append(node.engine)
            if watch:
                self.registry.watch(node.engine)
        self._nodes += nodes
        return list(nodes)

    def crash(self, node: VirtualNode, at: float | None = None, *, power_lost: bool = False) -> None:
        """Kill the process of ``node``, now or at a time; what it had under way is lost.

        Args:
            power_lost: the whole host goes, so that nobody closes its connections: they end by missing heartbeats.
        """
        self._at(at, self._crash, (node, power_lost))

    def _crash(self, of: tuple[VirtualNode, bool]) -> None:
        node, power_lost = of
        engine = node.engine
        if engine.is_over:
            return
        self.invariants.befell(node.index)
        if engine.clock.is_stopped:
            self._resume(node)
        if power_lost:
            node.cuts[DARK] = self.network.cut([node.index], None)
        elif not self._cuts:  # else the news may be held up
            self.invariants.expect_news(engine, NEWS_TAKES)
        if power_lost and not self._cuts:
            self.invariants.expect_news(engine, HEARD_WITHIN)
        engine.crash()

    def restart(self, node: VirtualNode, at: float | None = None) -> None:
        """Start a new process (with a new node id) at the place of ``node``; the old one is killed if it runs."""
        self._at(at, self._restart, node)

    def _restart(self, node: VirtualNode) -> None:
        old = node.engine
        if not old.closed:
            self._crash((node, False))
        if DARK in node.cuts:
            self.network.mend(node.cuts.pop(DARK))
        offers = tuple(target.offer for target in old.targets)
        options: dict[str, Any] = {"room": old.room, "window": old.window, "fanout_direct": old.fanout_direct}
        around = self._around(node.index, node.offset, node.rate, node.processes)
        node.processes += 1
        node.engine = type(old)(around, node.index, offers, relay=old.relay, keeps_address=old.keeps_address, **options)
        self.invariants.engines.append(node.engine)
        node.engine.start()
        self.registry.watch(node.engine)
        self.invariants.passed(node.index)

    # One node ---------------------------------------------------------------------------------------

    def stop(self, node: VirtualNode, at: float | None = None, *, resume_at: float | None = None) -> None:
        """Stop the process of ``node`` (SIGSTOP): it does nothing, and its kernel keeps its connections.

        Its peers notice by missing heartbeats; it does not. ``resume_at`` ends it; otherwise :meth:`repair` does.
        """
        self._strike(node, STOPPED, at, resume_at)

    def hang(self, node: VirtualNode, at: float | None = None, *, until: float | None = None) -> None:
        """Let no handler of ``node`` come to an end, while its input and output live."""
        self._strike(node, HUNG, at, until)

    def slow_down(
        self, node: VirtualNode, factor: float, at: float | None = None, *, until: float | None = None
    ) -> None:
        """Let the handlers of ``node`` take ``factor`` times as long."""
        self._strike(node, SLOW, at, until, factor)

    def delay_housekeeping(
        self, node: VirtualNode, seconds: float, at: float | None = None, *, until: float | None = None
    ) -> None:
        """Let the housekeeping of ``node`` come ``seconds`` late."""
        self._strike(node, LATE, at, until, seconds)

    def deafen(self, node: VirtualNode, at: float | None = None, *, until: float | None = None) -> None:
        """Let the registry tell ``node`` nothing."""
        self._strike(node, DEAF, at, until)

    def _strike(self, node: VirtualNode, what: int, at: float | None, until: float | None, amount: float = 0.0) -> None:
        self._at(at, self._struck, (node, what, until, amount))

    def _struck(self, of: tuple[VirtualNode, int, float | None, float]) -> None:
        node, what, until, amount = of
        engine = node.engine
        if engine.is_over or (engine, what) in self._struck_now:
            return
        self._struck_now[engine, what] = node
        self.trace.step(STRUCK, node.index, what)
        self.invariants.befell(node.index)
        if what == STOPPED:
            engine.clock.stop()
            self.network.stopped.add(node.index)
            node.cuts[STOPPED] = self.network.cut([node.index], [each.index for each in self._nodes])  # itself, too
            self.registry.leave(engine)
        elif what == HUNG:
            engine.hung = True
        elif what == SLOW:
            engine.slowness = amount
        elif what == LATE:
            engine.lateness = amount
        else:
            self.registry.deafen(node.index)
        if until is not None:
            self.clock.at(until, self._recover, (node, engine, what))

    def _recover(self, of: tuple[VirtualNode, VirtualEngine, int]) -> None:
        node, engine, what = of
        if self._struck_now.pop((engine, what), None) is None:
            return
        self.trace.step(PASSED, node.index, what)
        self.invariants.passed(node.index)
        if what == STOPPED:
            self._go_on(node, engine)
        elif what == HUNG:
            engine.clock.at(engine.clock.now, engine.come_to)  # which waits while the process is stopped
        elif what == SLOW:
            engine.slowness = 1.0
        elif what == LATE:
            engine.lateness = 0.0
        else:
            self.registry.hear(node.index)

    def _resume(self, node: VirtualNode) -> None:
        self._recover((node, node.engine, STOPPED))

    def _go_on(self, node: VirtualNode, engine: VirtualEngine) -> None:
        self.network.stopped.discard(node.index)
        self.network.mend(node.cuts.pop(STOPPED))
        engine.clock.resume()
        if not engine.is_over:
            self.registry.watch(engine)

    def drain(self, node: VirtualNode, at: float | None = None, *, timeout: float = DRAIN_TIMEOUT) -> None:
        """Let the process of ``node`` end in order: it finishes what it took, for up to ``timeout`` seconds."""
        self._at(at, self._drain, (node, timeout))

    def _drain(self, of: tuple[VirtualNode, float]) -> None:
        node, timeout = of
        if node.engine.clock.is_stopped:
            node.engine.clock.at(node.engine.clock.now, self._drain, of)  # a signal waits for the process
        elif not node.engine.dead and not node.engine.draining:
            self.invariants.befell(node.index)  # until it starts anew
            node.engine.drain(timeout)

    # The network ----------------------------------------------------------------------------------

    def partition(
        self,
        a: Sequence[VirtualNode],
        b: Sequence[VirtualNode],
        *,
        at: float | None = None,
        repair_at: float | None = None,
        one_way: bool = False,
    ) -> None:
        """Let nothing through between ``a`` and ``b`` (only from ``a`` to ``b`` with ``one_way``).

        Connections are noticed to be dead by missing heartbeats. ``repair_at`` ends it; otherwise :meth:`repair` does.
        """
        self._at(at, self._cut, (a, b, one_way, False, repair_at, 0.0))

    def hold(
        self,
        a: Sequence[VirtualNode],
        b: Sequence[VirtualNode],
        *,
        at: float | None = None,
        release_at: float | None = None,
        one_way: bool = False,
    ) -> None:
        """Let all that goes between ``a`` and ``b`` stand still; the connections live on.

        As when a process is stopped whose I/O thread goes on. ``release_at`` ends it; otherwise :meth:`repair` does.
        """
        self._at(at, self._cut, (a, b, one_way, True, release_at, 0.0))

    def delay(
        self,
        a: Sequence[VirtualNode],
        b: Sequence[VirtualNode],
        seconds: float,
        *,
        at: float | None = None,
        until: float | None = None,
    ) -> None:
        """Let all that goes between ``a`` and ``b`` take about so many seconds more, as where packets are lost."""
        self._at(at, self._cut, (a, b, False, False, until, seconds))

    def reset(self, nodes: Sequence[VirtualNode], at: float | None = None) -> None:
        """End every connection of ``nodes`` from outside; their processes live on."""
        self._at(at, self._reset, nodes)

    def _reset(self, nodes: Sequence[VirtualNode]) -> None:
        for node in nodes:
            self.invariants.befell(node.index)
        self.network.reset(node.index for node in nodes)
        for node in nodes:
            self.invariants.passed(node.index)

    def _cut(self, of: tuple[Sequence[VirtualNode], Sequence[VirtualNode], bool, bool, float | None, float]) -> None:
        a, b, one_way, is_hold, end, slowness = of
        sizes = (len(a), len(b))
        self.trace.step(HELD if is_hold or slowness else CUT, *sizes)
        sites = [node.index for node in a], [node.index for node in b]
        cut = self.network.cut(*sites, one_way=one_way, is_hold=is_hold, slowness=slowness)
        befallen = min(sites, key=len)  # who are both in the larger part have each other still
        for index in befallen:
            self.invariants.befell(index)
        self._cuts[cut] = sizes, befallen
        if end is not None:
            self.clock.at(end, self._mend, cut)

    def _mend(self, cut: Cut) -> None:
        if cut in self._cuts:
            sizes, befallen = self._cuts.pop(cut)
            self.trace.step(RELEASED if cut.is_hold or cut.slowness else MENDED, *sizes)
            self.network.mend(cut)
            for index in befallen:
                self.invariants.passed(index)

    def repair(self, at: float | None = None) -> None:
        """End all partitions and holds, let what befell single nodes pass, and let the registry come back."""
        self._at(at, self._repair)

    def _repair(self, _: None) -> None:
        for cut in list(self._cuts):
            self._mend(cut)
        for (engine, what), node in list(self._struck_now.items()):
            self._recover((node, engine, what))
        if self.registry.is_away:
            self.registry.come_back()

    def lapse(self, node: VirtualNode, at: float | None = None, *, back_at: float) -> None:
        """Let the registry lose the record of ``node``, which lives, until ``back_at``."""
        self._at(at, self._lapse, (node, back_at))

    def _lapse(self, of: tuple[VirtualNode, float]) -> None:
        node, back_at = of
        engine = node.engine
        if not node.is_up or self.registry.lapse(engine.protocol.id.hex()) is None:
            return
        self.invariants.befell(node.index)
        self.clock.at(back_at, self._renew, (node, engine))

    def _renew(self, of: tuple[VirtualNode, VirtualEngine]) -> None:
        node, engine = of
        if node.engine is engine and node.is_up:
            engine.announce()
        self.invariants.passed(node.index)

    def recall(self, at: float | None = None, *, until: float) -> None:
        """Let the registry show records of processes that have ended, until ``until``."""
        self._at(at, self._recall, until)

    def _recall(self, until: float) -> None:
        for record in self.registry.recall():
            self.clock.at(until, self._withdraw, record.node)

    def _withdraw(self, node: str) -> None:
        living = (engine.protocol.id.hex() for engine in self._running() if engine.targets)
        if node not in living:
            self.registry.withdraw(node)

    def registry_away(self, at: float | None = None, back_at: float | None = None) -> None:
        """Let the registry tell nobody anything, until :meth:`repair` or ``back_at``."""

        def away(_: None) -> None:
            self.registry.is_away = True

        self._at(at, away)
        if back_at is not None:
            self._at(back_at, lambda _: self.registry.come_back())

    # Requests -------------------------------------------------------------------------------------

    def call(self, node: VirtualNode, service: str, **options: Any) -> Entry:
        """Let ``node`` call one server of ``service``; returns the ledger's entry, in which the outcome will stand.

        Args:
            at: when; now by default.
            server: only the server of that name.
            timeout: seconds; 2 by default. ``ready_timeout``: seconds to wait for somebody to offer the service.
            monitor: seconds without a sign of life after which the call ends.
            idempotent: whether it may be sent again after an unknown outcome.
            work: seconds its handler takes, instead of a time drawn; ``fails``: the handler raises.
            size: bytes of the body.
        """
        return self._request("call", node, service, **options)

    def cast(self, node: VirtualNode, service: str, **options: Any) -> Entry:
        """As :meth:`call`, a cast."""
        return self._request("cast", node, service, **options)

    def fanout(self, node: VirtualNode, service: str, **options: Any) -> Entry:
        """As :meth:`call`, a cast to every server; the entry's ``parts`` tell what became of each."""
        return self._request("fanout", node, service, **options)

    def gather(self, node: VirtualNode, service: str, **options: Any) -> Entry:
        """As :meth:`call`, a call to every server; the entry's ``parts`` tell what became of each."""
        return self._request("gather", node, service, **options)

    def _request(
        self,
        kind: str,
        node: VirtualNode,
        service: str,
        *,
        at: float | None = None,
        server: str = "",
        timeout: float = 2.0,
        ready_timeout: float = 1.0,
        monitor: float | None = None,
        idempotent: bool = False,
        work: float | None = None,
        fails: bool = False,
        size: int = 0,
    ) -> Entry:
        entry = self.invariants.enter(kind, node.index, service, server, timeout, node.engine.clock)
        entry.ready_timeout, entry.monitor, entry.idempotent = ready_timeout, monitor, idempotent
        entry.work, entry.fails, entry.size = work, fails, size
        if at is None:
            node.engine.begin(entry)
        else:
            self._planned += 1
            self.clock.at(at, self._begin, (node, entry, timeout))
        return entry

    def _begin(self, of: tuple[VirtualNode, Entry, float]) -> None:
        node, entry, timeout = of
        clock = entry.clock = node.engine.clock
        if clock.is_stopped:
            clock.at(clock.now, self._begin, of)  # its threads make no requests now
            return
        self._planned -= 1
        entry.started, entry.deadline = clock.now, clock.now + timeout
        if node.engine.is_over:
            entry.outcome = "caller crashed"
        else:
            node.engine.begin(entry)

    def call_randomly(
        self,
        rate: float,
        timeout: float = 2.0,
        *,
        service: str = "",
        callers: Sequence[VirtualNode] = (),
        kind: str = "call",
        named: bool = False,
        until: float | None = None,
        **options: Any,
    ) -> list[Entry]:
        """Make requests at moments drawn from the seed, from now on.

        Args:
            rate: requests a second, of all callers together.
            service: what is asked for; by default that of the first node which offers one.
            callers: who calls; by default every node that is there at the time.
            named: ask for the server of a name, drawn among all that offer the service.
            until: when to stop; by default at :meth:`settle`.

        Returns:
            The entries of the ledger, a list that grows.
        """
        load = _Load(self, rate, timeout, service, list(callers), kind, named, until, options)
        self._loads.append(load)
        load.plan()
        return load.entries

    # Time -----------------------------------------------------------------------------------------

    def run(self, until: float) -> None:
        """Let time pass, to ``until``."""
        self._look()
        self.clock.run(until)

    def _look(self, _: None = None) -> None:
        """Look through the tables of some nodes, now and then."""
        if self.now < self._looked + BOUNDS_EVERY:
            return
        self._looked = self.now
        for _each in range(min(LOOKED_AT, len(self._nodes))):
            self._turn = (self._turn + 1) % len(self._nodes)
            if self._nodes[self._turn].is_up:
                self.invariants.bounds(self._nodes[self._turn].engine)
        self.clock.after(BOUNDS_EVERY, self._look)

    def settle(self, within: float = 600.0) -> None:
        """Make no more random requests, let those under way end (behind sixty others a cast waits for minutes), and
        check what must hold at rest."""
        self._is_quiet = True
        self.clock.run(self.now + within, self._nothing_under_way)
        # Answers and cancellations are still on their way, and handlers whose callers gave up still run.
        self.clock.run(self.now + 1.0)
        self.invariants.at_rest(self._running())

    def _nothing_under_way(self) -> bool:
        if self._planned or self.clock.steps % 64:
            return False
        return not any(engine.under_way or engine.protocol.inbox.taken for engine in self._running())

    def views_agree(self, within: float = CONVERGENCE) -> bool:
        """Whether all nodes come to have each other, and nobody else, as routes in ``within`` seconds."""
        until = self.now + within
        while not self._agree():
            if self.now >= until:
                return False
            self.clock.run(min(until, self.now + 0.1))
        return True

    def _agree(self) -> bool:
        running = self._running()
        wanted: dict[str, list[tuple[bytes, str]]] = {}
        for engine in sorted(running, key=lambda engine: engine.protocol.id):
            for target in engine.targets:
                wanted.setdefault(target.offer.service, []).append((engine.protocol.id, target.offer.server))
        for engine in running:
            routes = engine.protocol.routes.by_service
            if {
                service: [(route.peer.id, route.server) for route in found] for service, found in routes.items()
            } != wanted:
                return False
        return True

    def _running(self) -> list[VirtualEngine]:
        return [node.engine for node in self._nodes if node.is_up]

    # What became of it ----------------------------------------------------------------------------

    def outcomes(self) -> dict[str, int]:
        """How many requests ended how."""
        return dict(sorted(Counter(entry.outcome or "under way" for entry in self.ledger).items()))

    def up(self) -> list[VirtualNode]:
        """The nodes whose process runs and is not about to end."""
        return [node for node in self._nodes if node.is_up]

    def links(self) -> list[EngineLink]:
        """All connections that stand, of all nodes."""
        return [link for engine in self._running() for link in engine.links.values()]

    def digest(self) -> str:
        """SHA-256 of everything that has happened, in hexadecimal."""
        return self.trace.digest()

    def _at(self, time: float | None, action: Any, argument: Any = None) -> None:
        if time is None:
            action(argument)
        else:
            self.clock.at(time, action, argument)


class _Load:
    """Requests at random moments."""

    def __init__(
        self,
        world: World,
        rate: float,
        timeout: float,
        service: str,
        callers: list[VirtualNode],
        kind: str,
        named: bool,
        until: float | None,
        options: dict[str, Any],
    ) -> None:
        self.entries: list[Entry] = []
        self._world = world
        self._rate = rate
        self._service = service
        self._callers = callers
        self._kind = kind
        self._until = until
        self._options = {"timeout": timeout, **options}
        self._servers: list[str] = []
        for node in world._nodes:
            for target in node.engine.targets:
                self._service = self._service or target.offer.service
                if named and target.offer.service == self._service:
                    self._servers.append(target.offer.server)

    def plan(self) -> None:
        self._world.clock.after(self._world.random.expovariate(self._rate), self._make)

    def _make(self, _: None) -> None:
        world = self._world
        if world._is_quiet or (self._until is not None and world.now >= self._until):
            return
        random = world.random
        callers = self._callers or world._nodes
        for _attempt in range(8):  # enough to meet one that is up, where most are
            caller = callers[random.randrange(len(callers))]
            if caller.is_up:
                server = self._servers[random.randrange(len(self._servers))] if self._servers else ""
                self.entries.append(world._request(self._kind, caller, self._service, server=server, **self._options))
                break
        self.plan()
