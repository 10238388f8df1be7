"""What a long run says meanwhile, and how it ends."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from time import monotonic
from types import TracebackType
from typing import NoReturn, Self

from onehop.cli.console import FAILED, INTERRUPTED, OK

EVERY = 10.0
interrupted = threading.Event()
"""Set when :func:`end_with` was told to end: to be asked where an exception may be swallowed, as in what is done at a
fork."""


class Progress:
    """A block in which standard error is told from time to time how far it is.

    Args:
        total: how many there are to be; 0 where that is not known.
        what: they are.
        done: how many of them are done; need not be exact.
        every: seconds between two lines.
    """

    def __init__(self, total: int, what: str, done: Callable[[], int], every: float = EVERY) -> None:
        self._total, self._what, self._done, self._every = total, what, done, every
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
        while not self._over.wait(self._every):
            done, seconds = self._done(), monotonic() - began
            of = f" of {self._total:,}" if self._total else ""
            left = f", {seconds / done * (self._total - done):.0f} s left" if of and done else ""
            # At once, and not by a buffer, whose lock a fork could leave with nobody.
            os.write(2, f"{done:,}{of} {self._what}{left}\n".encode())


def end_with(run: Callable[[], bool]) -> NoReturn:
    """Run it, and end this process: with 0 if all was well, 1 if not, 130 if it was interrupted.

    Its own threads are not waited for: after an interrupt they would go on to the end.
    """

    def interrupt(_number: int, _frame: object) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        code = OK if run() else FAILED
    except KeyboardInterrupt:
        print("interrupted; what it had started has been ended", file=sys.stderr)
        code = INTERRUPTED
    sys.stdout.flush()
    os._exit(code)
