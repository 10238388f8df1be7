"""Counts the connections of clouds of several sizes in the simulation, and prints them as a table:

    python docs/sizing.py 100 1000 10000

The nodes are onehop's own core. Each host has three service processes (agents) that call ``conductor`` every ten
seconds and name no server; three controllers with 32 worker processes each (workers) serve that, call agents by name,
and fan out. Three agents on each of 10,000 hosts take some minutes and less than 4 GB.
"""

from __future__ import annotations

import argparse
import gc
import random
from collections.abc import Sequence
from hashlib import blake2b
from heapq import nsmallest
from statistics import mean

from onehop.interfaces import Record
from onehop.settings import Settings
from onehop.testing.engine import VirtualEngine
from onehop.testing.simulation import VirtualNode, World

CONTROLLERS, WORKERS_EACH, AGENTS_EACH = 3, 32, 3
WORKERS = CONTROLLERS * WORKERS_EACH
SUBSET, IDLE = Settings().subset, Settings().idle_timeout
SPARE = 4  # workers that an agent knows beside its subset; one is lost in the world
CALL_PERIOD = 10.0  # seconds between two calls of an agent
NAMED_PERIOD = 60.0  # seconds between two calls of all workers together to one agent, by its name
AFTERMATH = 60.0  # seconds for which the restart of a worker is watched


class Agent(VirtualEngine):
    """One that keeps, of the workers that were there from the beginning, those that are nearest to it.

    Which are in its subset follows from the ids alone, and only the next nearest can take the place of one that goes.
    Whoever comes later is known to all: who lost a server goes back to the one that is started in its place, near or
    not. So links and connections are those that there are with all 96 (``--whole``), and with 3,000 agents so was all
    that is counted after the restart.
    """

    first: frozenset[str] = frozenset()
    """Node ids of the workers that were there from the beginning."""

    def learn(self, records: tuple[Record, ...]) -> None:
        own = self.protocol.id
        near = nsmallest(
            SUBSET + SPARE,
            (each for each in records if each.node in self.first),
            key=lambda each: blake2b(own + bytes.fromhex(each.node), digest_size=8).digest(),
        )
        late = [each for each in records if each.node not in self.first]
        super().learn(tuple(sorted([*near, *late], key=lambda each: each.node)))


def towards_workers(hosts: int, engine: type[VirtualEngine] = Agent) -> dict[str, float]:
    """Agents call; a worker is killed and starts anew at once."""
    world = World(seed=1)
    workers = [
        worker
        for number in range(CONTROLLERS)
        for worker in world.nodes(WORKERS_EACH, "conductor", server=f"ctl{number + 1}", watches=False)
    ]
    Agent.first = frozenset(each.id.hex() for each in workers)
    agents = world.nodes(AGENTS_EACH * hosts, engine=engine)
    for _ in range(SUBSET):
        _call_each(world, agents)
    found: dict[str, float] = {
        "links of an agent": mean(len(each.engine.links) for each in agents),
        "connections at a worker": mean(map(_connections, workers)),
        "connections at a worker, most": max(map(_connections, workers)),
        "connections at a controller": mean(
            sum(map(_connections, workers[first : first + WORKERS_EACH])) for first in range(0, WORKERS, WORKERS_EACH)
        ),
    }
    sent = _sent(world)
    _call_each(world, agents)
    found["messages of a call"] = (_sent(world) - sent) / len(agents)

    victim, rates = workers[0], []
    lost = _connections(victim)
    opened, seen, sent = world.network.opened_links, len(world.ledger), _sent(world)
    world.restart(victim)
    end = world.now + AFTERMATH
    while world.now < end:
        before = world.network.opened_links
        _call_each(world, agents, within=1.0, share=1 / CALL_PERIOD)
        rates.append(world.network.opened_links - before)
    failed = sum(entry.outcome != "replied" for entry in world.ledger[seen:])
    found |= {
        "connections that were lost": lost,
        "attempts to connect in the minute after it": world.network.opened_links - opened,
        "attempts in the busiest second": max(rates),
        "connections at the worker that is new, after the minute": _connections(victim),
        "calls in the minute": len(world.ledger) - seen,
        "calls that failed in the minute": failed,
        "messages in the minute": _sent(world) - sent,
    }
    return found


def towards_agents(hosts: int) -> dict[str, float]:
    """One worker calls agents by name for as long as an unused connection is kept, then fans out to all of a service.

    The workers have nothing to do with each other here: what one does is counted, and 96 do the same.
    """
    world = World(seed=1)
    services = [f"service-{number + 1}" for number in range(AGENTS_EACH)]
    agents = {each: world.nodes(hosts, each, watches=False) for each in services}
    (worker,) = world.nodes(1, "conductor")
    draw = random.Random(1)
    rate = AGENTS_EACH * hosts / NAMED_PERIOD / WORKERS
    at = draw.expovariate(rate)
    while at < IDLE:
        service = draw.choice(services)
        server = draw.choice(agents[service]).engine.targets[0].offer.server
        world.call(worker, service, server=server, at=at, work=0.005)
        at += draw.expovariate(rate)
    world.run(IDLE)
    found: dict[str, float] = {"links of a worker that calls by name": len(worker.engine.links)}
    before = len(worker.engine.links)
    _fan_out(world, worker, services[0])
    found["links that a fan-out to one service adds to it"] = len(worker.engine.links) - before
    sent = _sent(world)
    _fan_out(world, worker, services[0])
    sent = _sent(world) - sent
    relays = [len(each.engine.links) for each in agents[services[0]] if each.engine.links]
    return found | {
        "messages of the next fan-out, for each receiver": sent / hosts,
        "relays it goes through": len(relays),
        "links of a relay, most": max(relays, default=0),
    }


def _call_each(world: World, agents: Sequence[VirtualNode], within: float = CALL_PERIOD, share: float = 1.0) -> None:
    """Let a share of the agents call, at moments of their own, and let that time pass."""
    some = agents if share == 1.0 else world.random.sample(list(agents), round(share * len(agents)))
    for each in some:
        world.call(each, "conductor", at=world.now + within * world.random.random(), work=0.005)
    world.run(world.now + within)


def _fan_out(world: World, node: VirtualNode, service: str) -> None:
    """Send to all servers of a service, each of which takes it."""
    fanout = world.fanout(node, service, timeout=20.0, work=0.005)
    world.run(world.now + 5.0)
    assert {part.outcome for part in fanout.parts} == {"taken"}


def _sent(world: World) -> int:
    return sum(world.network.sent.values())


def _connections(node: VirtualNode) -> int:
    return len(node.engine.inbound.connections)


def counted(hosts: int, engine: type[VirtualEngine]) -> dict[str, float]:
    """All figures of a cloud of so many hosts."""
    found = towards_workers(hosts, engine)
    gc.collect()
    return {"agents": AGENTS_EACH * hosts, "workers": WORKERS} | found | towards_agents(hosts)


def shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}".removesuffix(".0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hosts", type=int, nargs="+")
    parser.add_argument("--whole", action="store_true", help="let each agent keep all workers, which takes more memory")
    given = parser.parse_args()
    gc.disable()  # the objects of a world live as long as it does
    columns = [counted(each, VirtualEngine if given.whole else Agent) for each in given.hosts]
    print("| hosts | " + " | ".join(f"{each:,}" for each in given.hosts) + " |")
    print("| --- |" + " --: |" * len(columns))
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(shown(each[name]) for each in columns) + " |")


if __name__ == "__main__":
    main()
