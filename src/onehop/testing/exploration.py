"""Whole worlds drawn from a seed: who is there, who asks whom and when, and what befalls them.

A :class:`Plan` is drawn before anything runs and says everything that a run depends on, so a part of it can be left
out and the rest happens as before (``onehop.testing.shrinking`` looks for the shortest that still breaks something)::

    plan = draw(seed=7, nodes=50, seconds=10.0)
    assert play(plan).broken == []

Every node is an agent with a name; some also conduct, and a few schedule. Everybody calls conductors, conductors call
agents by name, schedulers fan out and gather.
"""

from __future__ import annotations

import gc
import traceback
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

from onehop.testing.engine import VirtualEngine
from onehop.testing.invariants import KEPT_STEPS, InvariantBroken
from onehop.testing.network import LATENCY
from onehop.testing.offer import Offer
from onehop.testing.simulation import CONVERGENCE, VirtualNode, World

NOTICE = (0.02, 0.3)
AFTER = 1.0
"""Seconds from the last thing that happens to the repair of everything."""


class Site(NamedTuple):
    """A node of a plan.

    Args:
        serves: besides its agent: ``"conductor"`` or ``"scheduler"``, or neither.
        offset, rate: of its clock; see :class:`onehop.testing.clock.LocalClock`.
        others: see :class:`onehop.testing.engine.VirtualEngine` and :class:`onehop.testing.engine.Offer`.
    """

    node: int
    serves: str = ""
    workers: int = 8
    room: int = 10_000
    window: int = 4_096
    fanout_direct: int = 2_000
    relay: bool = True
    keeps_address: bool = False
    offset: float = 0.0
    rate: float = 1.0

    @property
    def offers(self) -> tuple[Offer, ...]:
        """What it offers."""
        own = Offer("agent", f"agent-{self.node}", workers=self.workers)
        return (own, Offer(self.serves, own.server, workers=self.workers)) if self.serves else (own,)


class Ask(NamedTuple):
    """A request of a plan: the arguments of :meth:`onehop.testing.simulation.World.call`."""

    at: float
    kind: str
    caller: int
    service: str
    server: str = ""
    timeout: float = 2.0
    work: float = 0.01
    ready_timeout: float = 1.0
    monitor: float | None = None
    idempotent: bool = False
    fails: bool = False
    size: int = 0


class Fault(NamedTuple):
    """Something that befalls the ``nodes`` of a plan, from ``at`` to ``until``.

    Args:
        kind: one of :data:`FAULTS`.
        others: the other side of what has two.
        amount: how much of it, where there is more and less.
    """

    kind: str
    at: float
    until: float
    nodes: tuple[int, ...] = ()
    others: tuple[int, ...] = ()
    amount: float = 0.0


class Plan(NamedTuple):
    """All that a run depends on. Its :meth:`program` brings the run back."""

    seed: int
    seconds: float
    sites: tuple[Site, ...]
    asks: tuple[Ask, ...] = ()
    faults: tuple[Fault, ...] = ()
    latency: tuple[float, float] = LATENCY
    notice: tuple[float, float] = NOTICE

    def program(self) -> str:
        """A few lines of Python that play it; to be pasted into a test."""
        lines = ["from onehop.testing.exploration import Ask, Fault, Plan, Site, play", "", "plan = Plan("]
        for name, value in _said(self).items():
            if isinstance(value, tuple) and value and hasattr(value[0], "_fields"):
                lines += [f"    {name}=(", *(f"        {_source(each)}," for each in value), "    ),"]
            else:
                lines.append(f"    {name}={value!r},")
        return "\n".join([*lines, ")", "assert play(plan).broken == []"])


def _said(of: Any) -> dict[str, Any]:
    """The fields of a named tuple that are not what they are by default."""
    return {
        name: value
        for name, value in zip(of._fields, of, strict=True)
        if name not in of._field_defaults or of._field_defaults[name] != value
    }


def _source(of: Any) -> str:
    return f"{type(of).__name__}({', '.join(f'{name}={value!r}' for name, value in _said(of).items())})"


class Result(NamedTuple):
    """What a run came to.

    Attributes:
        summary: figures by name.
        broken: each breach of an invariant, with the steps before it.
        digest: SHA-256 of all that happened; the same for the same plan, on any machine.
    """

    summary: dict[str, Any]
    broken: list[str]
    digest: str


# Drawing ------------------------------------------------------------------------------------------

LASTS = {
    "crash": (0.3, 6.0),  # until a new process starts there
    "drain": (0.5, 6.0),
    "power": (0.5, 9.0),
    "partition": (0.2, 9.0),
    "one way": (0.2, 9.0),
    "hold": (0.1, 4.0),
    "stop": (0.1, 12.0),
    "hang": (0.1, 10.0),
    "slow": (0.5, 6.0),
    "late": (0.5, 8.0),
    "delay": (0.3, 6.0),
    "reset": (0.0, 0.0),
    "twice": (0.5, 6.0),
    "registry": (0.5, 8.0),
    "deaf": (0.5, 8.0),
    "lapse": (0.1, 5.0),
    "recall": (0.2, 5.0),
}
"""Seconds that each kind of fault lasts, from and to."""
FAULTS = tuple(LASTS)
AMOUNTS = {"slow": (5.0, 100.0), "late": (0.3, 5.0), "delay": (0.05, 0.4), "twice": (0.05, 1.0)}


def draw(seed: int, nodes: int = 100, seconds: float = 60.0) -> Plan:
    """A plan for a cloud of ``nodes`` under load for ``seconds``, all of it from ``seed``.

    Args:
        nodes: at least 2.

    Raises:
        ValueError: fewer than two nodes.
    """
    if nodes < 2:
        raise ValueError(f"nodes is {nodes}; a world worth exploring has 2 or more")
    random = Random(seed)
    conductors, schedulers = random.randint(1, max(1, nodes // 10)), max(1, nodes // 50)
    tight, drifting = random.random() < 0.3, random.random() < 0.3
    direct = random.choice((2_000, 2_000, 5, 20))
    sites = []
    for index in range(nodes):
        serves = "conductor" if index < conductors else "scheduler" if index < conductors + schedulers else ""
        site = Site(index, serves, workers=random.choice((1, 2, 8, 8)), fanout_direct=direct)
        if tight and random.random() < 0.3:
            site = site._replace(room=random.choice((1, 2, 5, 20)), window=random.choice((1, 2, 8, 64)))
        if drifting:
            site = site._replace(offset=random.uniform(0.0, 1e5), rate=random.uniform(0.998, 1.002))
        sites.append(site._replace(relay=random.random() < 0.9, keeps_address=random.random() < 0.5))
    latency = random.choice((LATENCY, LATENCY, (0.0001, 0.0002), (0.001, 0.05)))
    notice = random.choice((NOTICE, NOTICE, (0.0, 0.02), (0.5, 3.0)))
    asks = _asks(random, nodes, conductors, seconds)
    return Plan(seed, seconds, tuple(sites), asks, _faults(random, nodes, seconds), latency, notice)


def _asks(random: Random, nodes: int, conductors: int, seconds: float) -> tuple[Ask, ...]:
    rate = nodes * random.choice((0.5, 1.0, 1.0, 1.5))
    mean = random.choice((0.002, 0.01, 0.01, 0.05))
    asks, at = [], 0.0
    while (at := at + random.expovariate(rate)) < seconds:
        asks.append(_ask(random, at, nodes, conductors, mean))
    for _ in range(random.choice((0, 0, 1, 2))):
        # Somebody floods a server, or everybody.
        pattern = _ask(random, random.uniform(0.0, seconds), nodes, conductors, mean)
        many, lasts = random.randint(50, 300), random.choice((0.01, 0.1, 1.0))
        if pattern.kind in ("call", "cast"):
            asks += [pattern._replace(at=pattern.at + lasts * random.random()) for _ in range(many)]
    return tuple(sorted(asks))


def _ask(random: Random, at: float, nodes: int, conductors: int, mean: float) -> Ask:
    what = random.random()
    caller = random.randrange(nodes)
    work = random.uniform(0.1, 3.0) if random.random() < 0.02 else random.expovariate(1 / mean)
    ask = Ask(round(at, 4), "call", caller, "conductor", work=round(work, 4))
    if random.random() < 0.3:
        ask = ask._replace(
            timeout=random.choice((0.2, 0.5, 1.0, 5.0, 15.0)), ready_timeout=random.choice((0.0, 1.0, 3.0))
        )
    if what < 0.3:
        ask = ask._replace(
            caller=random.randrange(conductors), service="agent", server=f"agent-{random.randrange(nodes)}"
        )
    elif what < 0.33:
        ask = ask._replace(service="scheduler", idempotent=True)
    elif what < 0.345:
        service = random.choice(("scheduler", "conductor", "conductor", "agent"))
        ask = ask._replace(kind=random.choice(("fanout", "gather")), service=service)
    elif what < 0.36:
        ask = ask._replace(monitor=0.5, timeout=10.0)
    elif what < 0.37:
        ask = ask._replace(fails=True)
    elif what < 0.375:
        ask = ask._replace(size=70_000)
    elif what < 0.38:
        ask = ask._replace(service="nobody")
    if ask.kind == "call" and what > 0.38 and random.random() < 0.2:
        ask = ask._replace(kind="cast")
    elif ask.kind == "call" and random.random() < 0.15:
        ask = ask._replace(idempotent=True)
    return ask


def _faults(random: Random, nodes: int, seconds: float) -> tuple[Fault, ...]:
    faults, at = [], 0.0
    rate = random.choice((0.0, 0.2, 0.5, 1.0)) + nodes / 1000  # they come with the number of nodes, as in life
    kinds = random.sample(FAULTS, random.randint(1, len(FAULTS)))
    while (at := at + random.expovariate(rate)) < seconds * 0.9:
        kind = random.choice(kinds)
        some = random.sample(range(nodes), random.randint(1, max(1, nodes // 10)))
        others: tuple[int, ...] = ()
        if kind in ("partition", "one way", "delay"):
            others = tuple(each for each in range(nodes) if each not in some)
        elif kind == "hold":
            others = tuple(sorted(random.sample(range(nodes), len(some))))
        elif kind in ("registry", "twice", "recall"):
            some = []
        elif random.random() < 0.5:
            some = some[:1]
        if some and random.random() < 0.3:
            some[0] = random.randrange(max(1, nodes // 10))  # who has the most to do
        until = at + random.uniform(*LASTS[kind])
        amount = random.uniform(*AMOUNTS[kind]) if kind in AMOUNTS else 0.0
        faults.append(
            Fault(kind, round(at, 3), round(until, 3), tuple(sorted({*some})), others, round(amount, 3))
        )  # fmt: skip
    return tuple(faults)


# Playing ------------------------------------------------------------------------------------------


def run(seed: int = 0, nodes: int = 100, seconds: float = 60.0) -> Result:
    """Draw a plan and play it.

    Args:
        nodes: at least 2.
        seconds: of virtual time, under load; some more pass until all is repaired and at rest.

    Raises:
        ValueError: fewer than two nodes.
    """
    return play(draw(seed, nodes, seconds))


def play(
    plan: Plan, *, engine: type[VirtualEngine] = VirtualEngine, is_hasty: bool = False, kept: int = KEPT_STEPS
) -> Result:
    """Play a plan to its end: load and faults, then the repair of everything, then rest.

    Args:
        engine: another engine, to see what the checks say of it.
        is_hasty: end at the first breach.
        kept: how many of the last steps a breach tells.
    """
    enabled = gc.isenabled()
    gc.disable()  # millions of objects that live as long as the world: looking through them costs more than the world
    try:
        return _Play(plan, engine, is_hasty, kept).result()
    finally:
        if enabled:
            gc.enable()


class _Play:
    def __init__(self, plan: Plan, engine: type[VirtualEngine], is_hasty: bool, kept: int) -> None:
        self._plan = plan
        self._world = world = World(
            plan.seed, latency=plan.latency, notice=plan.notice, is_strict=is_hasty, kept=kept
        )  # fmt: skip
        made = []
        for site in plan.sites:
            options = {"room": site.room, "window": site.window, "fanout_direct": site.fanout_direct}
            made.append(
                world.place(
                    site.node, site.offers, offset=site.offset, rate=site.rate, engine=engine,
                    relay=site.relay, keeps_address=site.keeps_address, **options,
                )
            )  # fmt: skip
        self._nodes = {node.index: node for node in world.start(made)}
        for ask in plan.asks:
            if ask.caller in self._nodes:
                self._ask(ask)
        self._end = plan.seconds
        for fault in plan.faults:
            self._end = max(self._end, fault.until)
            self._strike(fault, self._there(fault.nodes), self._there(fault.others))

    def _there(self, indexes: tuple[int, ...]) -> list[VirtualNode]:
        return [self._nodes[index] for index in indexes if index in self._nodes]

    def _ask(self, ask: Ask) -> None:
        request: Callable[..., Any] = getattr(self._world, ask.kind)
        options = ask._asdict()
        for name in ("kind", "caller", "service"):
            del options[name]
        request(self._nodes[ask.caller], ask.service, **options)

    def _strike(self, fault: Fault, nodes: list[VirtualNode], others: list[VirtualNode]) -> None:
        world, kind, at, until = self._world, fault.kind, fault.at, fault.until
        if kind in ("partition", "one way"):
            world.partition(nodes, others, at=at, repair_at=until, one_way=kind == "one way")
        elif kind == "hold":
            world.hold(nodes, others, at=at, release_at=until)
        elif kind == "delay":
            world.delay(nodes, others, fault.amount, at=at, until=until)
        elif kind == "registry":
            world.registry_away(at, until)
        elif kind == "recall":
            world.recall(at, until=until)
        elif kind == "reset":
            world.reset(nodes, at)
        elif kind == "twice":
            world.clock.at(at, self._repeat, fault.amount)
            world.clock.at(until, self._repeat, 0.0)
        for node in nodes:
            if kind in ("crash", "power"):
                world.crash(node, at, power_lost=kind == "power")
                world.restart(node, until)
            elif kind == "drain":
                world.drain(node, at)
                world.restart(node, until)
            elif kind == "stop":
                world.stop(node, at, resume_at=until)
            elif kind == "hang":
                world.hang(node, at, until=until)
            elif kind == "slow":
                world.slow_down(node, fault.amount, at, until=until)
            elif kind == "late":
                world.delay_housekeeping(node, fault.amount, at, until=until)
            elif kind == "deaf":
                world.deafen(node, at, until=until)
            elif kind == "lapse":
                world.lapse(node, at, back_at=until)

    def _repeat(self, share: float) -> None:
        self._world.network.duplicates = share

    def result(self) -> Result:
        world, plan, agree = self._world, self._plan, False
        try:
            world.run(self._end + AFTER)
            world.repair()
            agree = world.views_agree()
            if not agree:
                world.invariants.fail(f"the views of the nodes do not agree {CONVERGENCE:g} s after the last repair")
            world.settle()
            beats = sum(int(20 / entry.monitor) for entry in world.ledger if entry.monitor)
            probes = sum(engine.probes for engine in world.invariants.engines)
            world.invariants.messages(sum(world.network.sent.values()), world.network.opened_links, beats, probes)
        except InvariantBroken:
            pass  # it is in the list
        except Exception as error:  # the core failed, or the simulation: a find like any other
            steps = traceback.format_exc().splitlines()
            what = f"{type(error).__name__}: {error} (seed {plan.seed}, at {world.now:.6f} s); raised by:"
            world.invariants.broken.append("\n".join((what, *steps, *world.trace.last())))
        return Result(self._summary(agree), world.invariants.broken, world.digest())

    def _summary(self, agree: bool) -> dict[str, Any]:
        world, plan = self._world, self._plan
        sent = sum(world.network.sent.values())
        return {
            "seed": plan.seed,
            "nodes": len(plan.sites),
            "virtual seconds": plan.seconds,
            "ended at": round(world.now, 3),
            "requests": len(world.ledger),
            "outcomes": world.outcomes(),
            "faults": dict(sorted(Counter(fault.kind for fault in plan.faults).items())),
            "messages": sent,
            "messages per node and second": round(sent / len(plan.sites) / plan.seconds, 2),
            "connections opened": world.network.opened_links,
            "connections standing": len(world.links()),
            "handlers run": sum(len(entry.executions) for entry in world.ledger),
            "retried": sum(node.engine.retried for node in self._nodes.values()),
            "views told": world.registry.told,
            "steps": world.trace.steps,
            "views agree": agree,
        }
