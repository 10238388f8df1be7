"""The shortest plan that still breaks what a plan broke: leave parts out, and see whether the same invariant breaks."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from onehop.testing.engine import VirtualEngine
from onehop.testing.exploration import NOTICE, Ask, Fault, Plan, Site, play
from onehop.testing.network import LATENCY

KEPT = 400
"""Steps of the shortest trace that are told, at most: the last ones."""
_PARTICULAR = re.compile(r"<[^>]*>|\b[0-9a-f]{32}\b|'[^']*'|\d[\d.]*")


def rule(breach: str) -> str:
    """Which invariant ``breach`` tells of: its sentence, without whom and when it met."""
    return _PARTICULAR.sub("_", breach.partition(" (seed ")[0])


class Shortest(NamedTuple):
    """What is left of a plan.

    Attributes:
        breach: what it breaks, and the whole trace of it where that is not too long.
        tried: plans played on the way.
        is_done: whether nothing more can be left out; False where the time ran out.
    """

    plan: Plan
    breach: str
    tried: int
    is_done: bool


def shrink(
    plan: Plan, broken: str = "", *, seconds: float = 60.0, engine: type[VirtualEngine] = VirtualEngine
) -> Shortest | None:
    """The shortest plan found in so many ``seconds`` (of real time) that breaks the same invariant, or None.

    Args:
        plan: breaks it.
        broken: the :func:`rule`; by default the first that ``plan`` breaks.
        engine: as in :func:`onehop.testing.exploration.play`.
    """
    return _Shrinking(plan, broken, time.monotonic() + seconds, engine).result()


class _Shrinking:
    def __init__(self, plan: Plan, broken: str, until: float, engine: type[VirtualEngine]) -> None:
        self._plan = plan
        self._rule = broken
        self._until = until
        self._engine = engine
        self._tried = 0
        self._ended = 0.0

    def _breach(self, plan: Plan, kept: int = 1) -> str | None:
        """What ``plan`` breaks, if it is the invariant in question."""
        self._tried += 1
        # At first only to the first breach, which mostly is the one; where it is another's, to the end.
        result = play(plan, engine=self._engine, is_hasty=True, kept=kept)
        if result.broken and self._rule and rule(result.broken[0]) != self._rule:
            result = play(plan, engine=self._engine, kept=kept)
        for breach in result.broken:
            if not self._rule or rule(breach) == self._rule:
                self._ended = float(result.summary["ended at"])
                return breach
        return None

    def _is_over(self) -> bool:
        return time.monotonic() >= self._until

    def _try(self, **changes: object) -> bool:
        """Change the plan, if it still breaks the same."""
        changed = self._plan._replace(**changes)  # type: ignore[arg-type]
        if changed == self._plan or self._is_over() or self._breach(changed) is None:
            return False
        self._plan = changed
        return True

    def result(self) -> Shortest | None:
        first = self._breach(self._plan)
        if first is None:
            return None
        self._rule = rule(first)
        self._end_early()
        before = None
        while before != self._plan and not self._is_over():
            before = self._plan
            self._leave_out("faults")
            self._leave_out("sites")  # early: every node less makes the next plans quicker to play
            self._leave_out("asks")
            self._simplify()
        breach = self._breach(self._plan, KEPT) or first
        return Shortest(self._plan, breach, self._tried, before == self._plan)

    def _end_early(self) -> None:
        """Leave out what comes after the breach."""
        end, plan = self._ended, self._plan
        asks = tuple(ask for ask in plan.asks if ask.at < end)
        faults = tuple(fault for fault in plan.faults if fault.at < end)
        self._try(seconds=min(plan.seconds, end), asks=asks, faults=faults)

    def _leave_out(self, field: str) -> None:
        """Leave out parts of a field, first large ones, then single ones (delta debugging)."""
        size = max(1, len(getattr(self._plan, field)) // 2)
        while not self._is_over():
            at, has_changed = 0, False
            while at < len(getattr(self._plan, field)) and not self._is_over():
                parts: Sequence[object] = getattr(self._plan, field)
                left = (*parts[:at], *parts[at + size :])
                if (left or field != "sites") and self._try(**{field: left}):
                    has_changed = True
                else:
                    at += size
            if size == 1 and not has_changed:
                return
            size = max(1, size // 2)

    def _simplify(self) -> None:
        plan = self._plan
        self._try(latency=LATENCY)
        self._try(notice=NOTICE)
        self._try(seconds=round(max([0.1, *(ask.at for ask in plan.asks), *(fault.at for fault in plan.faults)]), 1))
        for position in range(len(self._plan.sites)):
            self._each("sites", position, _plainer_sites)
        for position in range(len(self._plan.faults)):
            self._each("faults", position, _plainer_faults)
        for position in range(len(self._plan.asks)):
            self._each("asks", position, _plainer_asks)

    def _each(self, field: str, position: int, plainer: Callable[[Any], list[Any]]) -> None:
        """Put plainer ones in the place of one part."""
        tried: list[Any] = []
        while True:
            parts = getattr(self._plan, field)
            for each in plainer(parts[position]):
                if each not in tried:
                    tried.append(each)
                    if self._try(**{field: (*parts[:position], each, *parts[position + 1 :])}):
                        break
            else:
                return


def _plainer_sites(site: Site) -> list[Site]:
    plain = Site(site.node, site.serves)
    return [plain, *(site._replace(**{name: value}) for name, value in plain._asdict().items())]


def _plainer_faults(fault: Fault) -> list[Fault]:
    return [
        *(fault._replace(nodes=fewer) for fewer in _fewer(fault.nodes)),
        *(fault._replace(others=fewer) for fewer in _fewer(fault.others)),
    ]


def _fewer(nodes: tuple[int, ...]) -> list[tuple[int, ...]]:
    if len(nodes) < 2:
        return []
    half = len(nodes) // 2
    return [nodes[:half], nodes[half:], *(tuple(each for each in nodes if each != node) for node in nodes)]


def _plainer_asks(ask: Ask) -> list[Ask]:
    plain = Ask(ask.at, ask.kind, ask.caller, ask.service)
    return [plain, *(ask._replace(**{name: value}) for name, value in plain._asdict().items() if name != "server")]
