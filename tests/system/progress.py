"""What a long run says meanwhile."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from time import monotonic
from types import TracebackType
from typing import Self

EVERY = 10.0
"""Seconds between two lines."""


class Progress:
    """A block in which standard error is told from time to time how far it is.

    Args:
        total: how many there are to be.
        what: they are.
        done: how many of them are done; need not be exact.
    """

    def __init__(self, total: int, what: str, done: Callable[[], int]) -> None:
        self._total, self._what, self._done = total, what, done
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tell, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _tell(self) -> None:
        began = monotonic()
        while not self._over.wait(EVERY):
            done, seconds = self._done(), monotonic() - began
            left = f", {seconds / done * (self._total - done):.0f} s left" if done else ""
            # At once, and not by a buffer, whose lock a fork could leave with nobody.
            os.write(2, f"{done:,} of {self._total:,} {self._what}{left}\n".encode())
