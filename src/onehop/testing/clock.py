"""Virtual time, chance from a seed, and tasks that wait."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator
from random import Random
from typing import Any, TypeAlias

ROUNDING = 1e-9
"""Seconds by which what is planned on a clock with a beginning or a rate of its own is done later: never too early."""
_MASK = (1 << 64) - 1


class Clock:
    """Virtual time: a heap of (time, sequence, action), and the one source of chance.

    Args:
        seed: the same seed gives the same run.

    Attributes:
        now: seconds since the beginning.
        steps: actions run so far.
    """

    __slots__ = ("_heap", "_sequence", "now", "random", "seed", "steps")

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.random = Random(seed)
        self.now = 0.0
        self.steps = 0
        self._heap: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._sequence = 0

    def at(self, time: float, action: Callable[[Any], None], argument: Any = None) -> None:
        """Run ``action(argument)`` at ``time`` (now, where that has passed), after what was planned for it before."""
        self._sequence += 1
        heapq.heappush(self._heap, (time if time > self.now else self.now, self._sequence, action, argument))

    def after(self, seconds: float, action: Callable[[Any], None], argument: Any = None) -> None:
        """Run ``action(argument)`` when ``seconds`` have passed."""
        self.at(self.now + seconds, action, argument)

    def run(self, until: float, enough: Callable[[], bool] | None = None) -> bool:
        """Run all that is planned up to ``until``, and stand there; stop early once ``enough()`` holds.

        Returns:
            Whether ``enough`` stopped it.
        """
        heap, pop = self._heap, heapq.heappop
        if enough is not None and enough():
            return True
        while heap and heap[0][0] <= until:
            self.now, _, action, argument = pop(heap)
            self.steps += 1
            action(argument)
            if enough is not None and enough():
                return True
        self.now = max(self.now, until)
        return False

    def chance(self, *of: int) -> float:
        """A number in [0, 1) that follows from the seed and from ``of`` alone.

        Unlike one drawn from ``random`` it does not depend on what else has happened: who leaves something out of a run
        leaves the rest as it was.
        """
        mixed = self.seed & _MASK
        for each in of:
            mixed = ((mixed ^ (each & _MASK)) + 0x9E3779B97F4A7C15) & _MASK
            mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
            mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
            mixed ^= mixed >> 31
        return (mixed >> 11) / (1 << 53)


class LocalClock:
    """The clock of one process: runs at its own rate, from its own beginning, and stands while the process is stopped.

    Nothing that was planned here is done while it stands; all of it is done, late, when it goes on.

    Args:
        world: the time of all.
        random: this process's own chance.
        offset: what it shows when the world begins, in seconds.
        rate: its seconds in a second of the world.

    Attributes:
        is_stopped: whether the process is stopped.
        resumed_at: what it showed when the process last went on.
    """

    __slots__ = ("_late", "_offset", "_rate", "_world", "is_stopped", "random", "resumed_at")

    def __init__(self, world: Clock, random: Random, offset: float = 0.0, rate: float = 1.0) -> None:
        self.random = random
        self.is_stopped = False
        self.resumed_at = float("-inf")
        self._world = world
        self._offset = offset
        self._rate = rate
        self._late: list[tuple[Callable[[Any], None], Any]] = []

    @property
    def now(self) -> float:
        """What it shows. It goes on while the process is stopped."""
        return self._world.now * self._rate + self._offset

    def at(self, time: float, action: Callable[[Any], None], argument: Any = None) -> None:
        """Run ``action(argument)`` when it shows ``time``; see :meth:`Clock.at`."""
        if self._offset or self._rate != 1.0:
            time = (time - self._offset) / self._rate + ROUNDING
        self._world.at(time, self._run, (action, argument))

    def after(self, seconds: float, action: Callable[[Any], None], argument: Any = None) -> None:
        """Run ``action(argument)`` when ``seconds`` have passed here."""
        self._world.at(self._world.now + seconds / self._rate, self._run, (action, argument))

    def _run(self, of: tuple[Callable[[Any], None], Any]) -> None:
        if self.is_stopped:
            self._late.append(of)
        else:
            of[0](of[1])

    def stop(self) -> None:
        """Stand still."""
        self.is_stopped = True

    def resume(self) -> None:
        """Go on; what should have been done meanwhile is done now."""
        self.is_stopped = False
        self.resumed_at = self.now
        late, self._late = self._late, []
        for action, argument in late:
            self._world.at(self._world.now, self._run, (action, argument))


Waiting: TypeAlias = Generator[float, None, None]


class Task:
    """Something that waits now and then: a generator that yields the time until which it waits."""

    __slots__ = ("clock", "epoch", "is_running", "steps")

    def __init__(self, clock: LocalClock) -> None:
        self.clock = clock
        self.epoch = 0
        self.is_running = False

    def start(self, steps: Waiting) -> None:
        """Begin, and go on until it waits."""
        self.steps = steps
        self.resume()

    def resume(self) -> None:
        """Go on: there may be news. Who waits looks for itself whether they are for it."""
        if self.is_running:
            return  # it made the news itself
        self.epoch += 1
        self.is_running = True
        try:
            until = self.steps.send(None)
        except StopIteration:
            return
        finally:
            self.is_running = False
        self.clock.at(until, self._due, self.epoch)

    def _due(self, epoch: int) -> None:
        if self.epoch == epoch:
            self.resume()
