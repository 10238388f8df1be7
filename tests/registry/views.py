"""What a registry has delivered, and how the tests of all registries look at it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

from onehop.interfaces import Record


def eventually(condition: Callable[[], object], within: float = 10.0) -> bool:
    """Whether ``condition`` becomes true within so many seconds."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def numbers(records: Sequence[Record]) -> list[int]:
    """The nodes of these, each of which is named by a number."""
    return [int(each.node, 16) for each in records]


class Views:
    """A deliver that keeps what it is given."""

    def __init__(self) -> None:
        self.all: list[Sequence[Record]] = []

    def __call__(self, records: Sequence[Record]) -> None:
        self.all.append(records)

    @property
    def last(self) -> Sequence[Record]:
        return self.all[-1]

    @property
    def nodes(self) -> list[int]:
        return numbers(self.last)

    def become(self, *wanted: int, within: float = 10.0) -> bool:
        """Whether these, in order, are in the last view within so many seconds."""
        return eventually(lambda: self.nodes == sorted(wanted), within)

    def remain(self, *wanted: int, seconds: float) -> bool:
        """Whether nothing changes for a time."""
        return not eventually(lambda: self.nodes != sorted(wanted), seconds)

    def always_had(self, number: int, since: int = 0) -> bool:
        return all(number in numbers(each) for each in self.all[since:])

    def fewest_since(self, mark: int) -> int:
        """The smallest number of records delivered since there were ``mark`` views."""
        return min(map(len, self.all[max(0, mark - 1) :]))


def in_child(work: Callable[[], object], *, user: int | None = None, groups: Sequence[int] = ()) -> str:
    """What ``work`` returns in a forked process of that user, or the error it raises, as text."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if user is not None:
                os.setgroups(groups)
                os.setgid(groups[0] if groups else user)
                os.setuid(user)
            result = str(work())
        except BaseException as error:
            result = f"{type(error).__name__}: {error}"
        os.write(writing, result.encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as file:
        result = file.read()
    os.waitpid(pid, 0)
    return result
