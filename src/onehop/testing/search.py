"""Plays the plans of many seeds, in several processes, and shrinks what breaks."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable
from itertools import islice
from multiprocessing import get_context, resource_tracker
from multiprocessing.pool import Pool
from queue import SimpleQueue
from typing import Any, NamedTuple

from onehop.testing.engine import VirtualEngine
from onehop.testing.exploration import draw, play
from onehop.testing.shrinking import Shortest, rule, shrink

FEW = 4
"""Seeds given to each process ahead."""


class Found(NamedTuple):
    """An invariant that was broken.

    Attributes:
        rule: which; see :func:`onehop.testing.shrinking.rule`.
        seeds: all whose plan broke it.
        breach: what was said with the first.
        shortest: the shortest plan, where one was found.
    """

    rule: str
    seeds: list[int]
    breach: str
    shortest: Shortest | None = None


class Progress(NamedTuple):
    """How far a search is: seeds done and to be done, seeds that broke something, seconds since it began."""

    done: int
    all: int
    broken: int
    seconds: float

    def __str__(self) -> str:
        rate = self.done / self.seconds if self.seconds else 0.0
        left = f"{(self.all - self.done) / rate:.0f} s left" if rate else "no end known yet"
        return f"{self.done} of {self.all} seeds, {self.broken} broken, {rate:.1f} seeds/s, {left}"


class Search:
    """Plays the plans of ``seeds``.

    Args:
        nodes, seconds: of each plan; see :func:`onehop.testing.exploration.draw`.
        processes: how many play at once.
        engine: see :func:`onehop.testing.exploration.play`.
        shrink_for: seconds that shrinking a plan may take, once for each invariant that breaks.

    Attributes:
        found: what broke, so far.
        done: seeds played.
        is_interrupted: whether Ctrl-C ended it.
    """

    def __init__(
        self,
        seeds: range,
        nodes: int,
        seconds: float,
        processes: int = 1,
        shrink_for: float = 60.0,
        engine: type[VirtualEngine] = VirtualEngine,
    ) -> None:
        self.seeds = seeds
        self.found: dict[str, Found] = {}
        self.done = 0
        self.is_interrupted = False
        self._broken: dict[int, None] = {}
        self._what = nodes, seconds, engine
        self._processes = processes
        self._shrink_for = shrink_for
        self._shrinking = 0
        self._results: SimpleQueue[tuple[Callable[..., Any], Any]] = SimpleQueue()

    def run(self, tell: Callable[[Progress], None] = lambda progress: None) -> list[Found]:
        """Search until all seeds are done, or until Ctrl-C.

        Args:
            tell: called after each seed.
        """
        # Held back while processes begin, and from what they inherit: Ctrl-C goes to all of them, and one that has not
        # come to _leave_interrupts would die of it. The tracker is begun before, since that lets interrupts through.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._run(tell, before)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return list(self.found.values())

    def _run(self, tell: Callable[[Progress], None], mask: Iterable[int]) -> None:
        begun = time.monotonic()
        # A process of its own for each, not a fork: this one may have threads.
        with get_context("spawn").Pool(self._processes, _leave_interrupts) as pool:  # whose end terminates them
            seeds, under_way = iter(self.seeds), 0
            try:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                while True:
                    for seed in islice(seeds, FEW * self._processes - under_way):
                        self._submit(pool, _played, seed, *self._what)
                        under_way += 1
                    if not under_way and not self._shrinking:
                        break
                    which, result = self._results.get()
                    if isinstance(result, BaseException):
                        raise result
                    if which is _played:
                        under_way -= 1
                        self._note(pool, *result)
                        tell(Progress(self.done, len(self.seeds), len(self._broken), time.monotonic() - begun))
                    else:
                        self._shrinking -= 1
                        self.found[result[0]] = self.found[result[0]]._replace(shortest=result[1])
            except KeyboardInterrupt:
                self.is_interrupted = True

    def _submit(self, pool: Pool, what: Callable[..., Any], *arguments: Any) -> None:
        put = self._results.put
        pool.apply_async(what, arguments, {}, lambda result: put((what, result)), lambda error: put((what, error)))

    def _note(self, pool: Pool, seed: int, breaches: Iterable[str]) -> None:
        self.done += 1
        for breach in breaches:
            self._broken[seed] = None
            which = rule(breach)
            if which in self.found:
                seeds = self.found[which].seeds
                seeds += [seed] if seed not in seeds else []
            else:
                self.found[which] = Found(which, [seed], breach)
                if self._shrink_for > 0:
                    self._submit(pool, _shrunk, seed, *self._what, which, self._shrink_for)
                    self._shrinking += 1


def _leave_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # they are for who began us


def _played(seed: int, nodes: int, seconds: float, engine: type[VirtualEngine]) -> tuple[int, list[str]]:
    return seed, play(draw(seed, nodes, seconds), engine=engine).broken


def _shrunk(
    seed: int, nodes: int, seconds: float, engine: type[VirtualEngine], which: str, limit: float
) -> tuple[str, Shortest | None]:
    return which, shrink(draw(seed, nodes, seconds), which, seconds=limit, engine=engine)
