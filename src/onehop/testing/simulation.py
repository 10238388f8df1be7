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
and the last 50 steps. :func:`run` explores: many nodes under load, with all kinds of faults drawn from the seed.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from onehop.testing.clock import Clock
from onehop.testing.engine import Offer, Surroundings, VirtualEngine
from onehop.testing.invariants import CUT, HELD, MENDED, RELEASED, Entry, Invariants, Trace
from onehop.testing.link import EngineLink
from onehop.testing.network import LATENCY, Cut, Network, VirtualRegistry

DRAIN_TIMEOUT = 10.0
CONVERGENCE = 12.0
"""Seconds after the last repair within which all nodes are routes for each other again: the longest pause, and some."""


class VirtualNode:
    """One node of a world: a place that keeps its name while processes come and go there.

    Attributes:
        engine: the process that runs there, or the last one that did.
    """

    def __init__(self, index: int, engine: VirtualEngine) -> None:
        self.index = index
        self.engine = engine

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
    ) -> None:
        self.seed = seed
        self.clock = Clock(seed)
        self.random = self.clock.random
        self.network = Network(self.clock, latency)
        self.registry = VirtualRegistry(self.clock, notice)
        self.trace = Trace(self.clock)
        self.ledger: list[Entry] = []
        self.invariants = Invariants(self.clock, self.trace, self.ledger, is_strict=is_strict)
        self._surroundings = Surroundings(self.clock, self.network, self.registry, self.invariants, self.trace)
        self.engines: list[VirtualEngine] = []
        self._nodes: list[VirtualNode] = []
        self._cuts: list[tuple[Cut, tuple[int, int]]] = []
        self._dark: dict[int, Cut] = {}
        self._loads: list[_Load] = []
        self._planned = 0
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
            options = {"room": room, "window": window, "fanout_direct": fanout_direct}
            made.append(engine(self._surroundings, index, own, relay=relay, **options))
        return self._start(made, watch=watches)

    def _start(self, engines: Sequence[VirtualEngine], *, watch: bool = True) -> list[VirtualNode]:
        for engine in engines:
            engine.start()
        for engine in engines:
            if watch:
                self.registry.watch(engine)
        nodes = [VirtualNode(engine.index, engine) for engine in engines]
        self._nodes += nodes
        self.engines += engines
        return nodes

    def crash(self, node: VirtualNode, at: float | None = None, *, power_lost: bool = False) -> None:
        """Kill the process of ``node``, now or at a time; what it had under way is lost.

        Args:
            power_lost: the whole host goes, so that nobody closes its connections: they end by missing heartbeats.
        """
        self._at(at, self._crash, (node, power_lost))

    def _crash(self, of: tuple[VirtualNode, bool]) -> None:
        node, power_lost = of
        if power_lost:
            self._dark[node.index] = self.network.cut([node.index], None)
        node.engine.crash()

    def restart(self, node: VirtualNode, at: float | None = None) -> None:
        """Start a new process (with a new node id) at the place of ``node``; the old one is killed if it runs."""
        self._at(at, self._restart, node)

    def _restart(self, node: VirtualNode) -> None:
        old = node.engine
        if not old.closed:
            old.crash()
        if node.index in self._dark:
            self.network.mend(self._dark.pop(node.index))
        offers = tuple(target.offer for target in old.targets)
        options = {"room": old.room, "window": old.window, "fanout_direct": old.fanout_direct}
        node.engine = type(old)(self._surroundings, node.index, offers, relay=old.relay, **options)
        self.engines.append(node.engine)
        node.engine.start()
        self.registry.watch(node.engine)

    def drain(self, node: VirtualNode, at: float | None = None, *, timeout: float = DRAIN_TIMEOUT) -> None:
        """Let the process of ``node`` end in order: it finishes what it took, for up to ``timeout`` seconds."""
        self._at(at, lambda _: None if node.engine.dead else node.engine.drain(timeout))

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
        self._at(at, self._cut, (a, b, one_way, False, repair_at))

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
        self._at(at, self._cut, (a, b, one_way, True, release_at))

    def _cut(self, of: tuple[Sequence[VirtualNode], Sequence[VirtualNode], bool, bool, float | None]) -> None:
        a, b, one_way, is_hold, end = of
        sizes = (len(a), len(b))
        self.trace.step(HELD if is_hold else CUT, *sizes)
        sites = [node.index for node in a], [node.index for node in b]
        cut = self.network.cut(*sites, one_way=one_way, is_hold=is_hold), sizes
        self._cuts.append(cut)
        if end is not None:
            self.clock.at(end, self._mend, cut)

    def _mend(self, cut: tuple[Cut, tuple[int, int]]) -> None:
        if cut in self._cuts:
            self._cuts.remove(cut)
            self.trace.step(RELEASED if cut[0].is_hold else MENDED, *cut[1])
            self.network.mend(cut[0])

    def repair(self, at: float | None = None) -> None:
        """End all partitions and holds, and let the registry come back."""
        self._at(at, self._repair)

    def _repair(self, _: None) -> None:
        for cut in list(self._cuts):
            self._mend(cut)
        if self.registry.is_away:
            self.registry.come_back()

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
        entry = self.invariants.enter(kind, node.index, service, server, timeout)
        entry.ready_timeout, entry.monitor, entry.idempotent = ready_timeout, monitor, idempotent
        entry.work, entry.fails, entry.size = work, fails, size
        if at is None:
            node.engine.begin(entry)
        else:
            entry.started, entry.deadline = at, at + timeout
            self._planned += 1
            self.clock.at(at, self._begin, (node, entry))
        return entry

    def _begin(self, of: tuple[VirtualNode, Entry]) -> None:
        node, entry = of
        self._planned -= 1
        if node.engine.dead or node.engine.closed:
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
        self.clock.run(until)

    def settle(self, within: float = 120.0) -> None:
        """Make no more random requests, let those under way end, and check what must hold at rest."""
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


class Result(NamedTuple):
    """What a run of :func:`run` came to.

    Attributes:
        summary: figures by name.
        broken: each breach of an invariant, with the steps before it.
        digest: SHA-256 of all that happened; the same for the same arguments, on any machine.
    """

    summary: dict[str, Any]
    broken: list[str]
    digest: str


def run(seed: int = 0, nodes: int = 100, seconds: float = 60.0) -> Result:
    """Explore: a cloud of ``nodes`` under load for ``seconds``, with faults drawn from ``seed``; then at rest.

    Every node is an agent with a name; some also conduct, and a few schedule. Everybody calls conductors, conductors
    call agents by name, schedulers fan out and gather. Nodes crash and come back, drain, lose power, are cut off and
    held up; messages arrive twice; the registry goes away and returns.

    Args:
        nodes: at least 2.
        seconds: of virtual time.

    Raises:
        ValueError: fewer than two nodes.
    """
    if nodes < 2:
        raise ValueError(f"nodes is {nodes}; a world worth exploring has 2 or more")
    enabled = gc.isenabled()
    gc.disable()  # millions of objects that live as long as the world: looking through them costs more than the world
    try:
        return _Exploration(seed, nodes, seconds).result()
    finally:
        if enabled:
            gc.enable()


class _Exploration:
    def __init__(self, seed: int, number: int, seconds: float) -> None:
        self._seconds = seconds
        self._number = number
        self._faults: Counter[str] = Counter()
        self._world = world = World(seed, is_strict=False)
        agents = [Offer("agent", f"agent-{index}", 0.02) for index in range(number)]
        conductors, schedulers = max(1, number // 20), max(1, number // 100)
        engines = []
        for index, agent in enumerate(agents):
            offers = [agent]
            if index < conductors:
                offers.append(Offer("conductor", agent.server, 0.005))
            elif index < conductors + schedulers:
                offers.append(Offer("scheduler", agent.server, 0.005))
            engines.append(VirtualEngine(world._surroundings, index, tuple(offers)))
        self._nodes = world._start(engines)
        world.call_randomly(0.6 * number, 2.0, service="conductor")
        world.call_randomly(0.3 * number, 2.0, service="agent", named=True, callers=self._nodes[:conductors])
        world.call_randomly(0.1 * number, 5.0, service="conductor", kind="cast")
        world.call_randomly(0.02 * number, 1.0, service="scheduler", idempotent=True)
        world.call_randomly(0.002 * number, 3.0, service="scheduler", kind="fanout")
        world.call_randomly(0.002 * number, 3.0, service="scheduler", kind="gather")
        world.call_randomly(0.01 * number, 10.0, service="conductor", monitor=0.5)
        self._plan()

    def _plan(self) -> None:
        # Faults come with the number of nodes, as in life.
        self._world.clock.after(self._world.random.expovariate(0.2 + self._number / 1000), self._fault)

    def _fault(self, _: None) -> None:
        world, random, now = self._world, self._world.random, self._world.now
        if now > self._seconds * 0.9:
            return
        self._plan()
        kind = random.choice(("crash", "crash", "drain", "power", "partition", "one way", "hold", "registry", "twice"))
        some = random.sample(self._nodes, random.randint(1, max(1, self._number // 10)))
        node = some[0]
        later = now + random.uniform(0.5, 10.0)
        self._faults[kind] += 1
        if kind in ("crash", "power"):
            if node.is_up:
                world.crash(node)
                world.restart(node, later)
        elif kind == "drain":
            if node.is_up:
                world.drain(node)
                world.restart(node, max(later, now + 1.0))
        elif kind in ("partition", "one way"):
            others = [each for each in self._nodes if each not in some]
            world.partition(some, others, repair_at=later, one_way=kind == "one way")
        elif kind == "hold":
            world.hold(some, random.sample(self._nodes, len(some)), release_at=now + random.uniform(0.1, 3.0))
        elif kind == "twice":
            world.network.duplicates = 0.2
            world.clock.at(later, self._once)
        elif not world.registry.is_away:
            world.registry_away(back_at=later)

    def _once(self, _: None) -> None:
        self._world.network.duplicates = 0.0

    def result(self) -> Result:
        world = self._world
        world.run(self._seconds)
        world._is_quiet = True
        world.run(max(world.now + 11.0, self._seconds + 11.0))  # every restart and repair that was planned has come
        world.repair()
        agree = world.views_agree()
        if not agree:
            world.invariants.fail(f"the views of the nodes do not agree {CONVERGENCE:g} s after the last repair")
        world.settle()
        sent = sum(world.network.sent.values())
        beats = sum(int(20 / entry.monitor) for entry in world.ledger if entry.monitor)
        probes = sum(engine.probes for engine in world.engines)
        world.invariants.messages(sent, world.network.opened_links, beats, probes)
        servers = Counter(run.node for entry in world.ledger for run in entry.executions)
        summary = {
            "seed": world.seed,
            "nodes": self._number,
            "virtual seconds": self._seconds,
            "requests": len(world.ledger),
            "outcomes": world.outcomes(),
            "faults": dict(sorted(self._faults.items())),
            "messages": sent,
            "messages per node and second": round(sent / self._number / self._seconds, 2),
            "connections opened": world.network.opened_links,
            "connections standing": len(world.links()),
            "handlers run": sum(servers.values()),
            "retried": sum(node.engine.retried for node in self._nodes),
            "views told": world.registry.told,
            "steps": world.trace.steps,
            "views agree": agree,
        }
        return Result(summary, world.invariants.broken, world.digest())
