"""Virtual time, chance from a seed, and tasks that wait."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator
from random import Random
from typing import Any, TypeAlias


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


Waiting: TypeAlias = Generator[float, None, None]


class Task:
    """Something that waits now and then: a generator that yields the time until which it waits."""

    __slots__ = ("clock", "epoch", "is_running", "steps")

    def __init__(self, clock: Clock) -> None:
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
