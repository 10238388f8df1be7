"""Which faults there are, and a plan of them drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

KILL, PAUSE, HANG, ROLL = "kill", "pause", "hang", "roll"
CUT, ONE_WAY, DEAF, LOSSY, POWER = "cut", "one-way", "deaf", "lossy", "power"
REGISTRY = "registry"
ON_ONE_HOST = {
    KILL: "kill -9; started again",
    PAUSE: "SIGSTOP; SIGCONT",
    HANG: "every worker waits for a lock; it is given back",
    ROLL: "SIGTERM, so that it drains; started again",
}
BETWEEN_HOSTS = {
    CUT: "its host and the others do not hear each other",
    ONE_WAY: "nothing that its host sends arrives",
    DEAF: "nothing that is sent to its host arrives",
    LOSSY: "a fifth of what its host sends and hears is lost, the rest is 200 ms late",
    POWER: "its host loses its power; started again with it",
}
OF_THE_REGISTRY = {REGISTRY: "kill -9; started again without what it knew"}
FAULTS = {**ON_ONE_HOST, **BETWEEN_HOSTS, **OF_THE_REGISTRY}
RESTARTS = (KILL, ROLL, POWER)
"""What ends a server: the next one is not known before it stands in the registry."""
NO_SERVER = -1
CALM = 1.5
"""Seconds without a fault at the beginning, between two at one server, and at the end."""
BETWEEN = (0.5, 2.0)
"""Seconds between the beginnings of two faults."""
LASTING = {KILL: (0.2, 1.0), PAUSE: (0.5, 8.0), HANG: (0.5, 8.0), ROLL: (0.0, 0.5), REGISTRY: (1.0, 6.0)}
LASTING_BETWEEN_HOSTS = (1.0, 9.0)


class Fault(NamedTuple):
    """One fault.

    Attributes:
        at: seconds after the load began.
        kind: of :data:`FAULTS`.
        server: whom it strikes, counted from 0; NO_SERVER where it strikes the registry.
        seconds: how long it lasts.
    """

    at: float
    kind: str
    server: int
    seconds: float

    def told(self) -> str:
        """For people."""
        whom = "registry" if self.server == NO_SERVER else f"server-{self.server + 1}"
        return f"{self.at:7.2f} s  {whom}: {FAULTS[self.kind]}, for {self.seconds:.2f} s"


def draw(seed: int, seconds: float, servers: int, kinds: Sequence[str]) -> list[Fault]:
    """A plan. The same arguments give the same one; never is every server struck at once.

    Args:
        seed: of all that is drawn.
        seconds: how long the load lasts; all faults are over before.
        servers: how many there are.
        kinds: those of :data:`FAULTS` that may occur.
    """
    drawn = random.Random(seed)
    free = [CALM] * servers
    registry_free = CALM
    plan: list[Fault] = []
    at = CALM
    while True:
        kind = drawn.choice(list(kinds))
        lasts = drawn.uniform(*LASTING.get(kind, LASTING_BETWEEN_HOSTS))
        lasts = min(lasts, max(0.5, seconds / 4))
        server = drawn.randrange(servers)
        if at + lasts + CALM > seconds:
            return plan
        over = at + lasts + CALM
        others = [until for place, until in enumerate(free) if place != server]
        if kind == REGISTRY:
            if registry_free <= at:
                plan.append(Fault(round(at, 3), kind, NO_SERVER, round(lasts, 3)))
                registry_free = over
                free = [until if until <= at else max(until, over) for until in free]
        elif free[server] <= at and (servers == 1 or min(others) <= at):
            plan.append(Fault(round(at, 3), kind, server, round(lasts, 3)))
            free[server] = max(over, registry_free) if kind in RESTARTS else over
        at += drawn.uniform(*BETWEEN)


def in_a_loop(seed: int, callers: int, number: int) -> list[int]:
    """Which of the callers, counted from 0, use the asyncio face: ``number`` of them. The same seed gives the same."""
    return sorted(random.Random(seed).sample(range(callers), number))
