"""The ledger of a run: what each process asked, ran and heard, written where a killed process cannot lose it.

Each process appends to a file of its own, a line an event, at once and unbuffered; a server writes that it runs a
request before the handler does anything else. When all have ended, :func:`read` puts the files together, and
:meth:`Ledger.breaches` says what does not add up::

    P  name  pid  time                            a process begins its part
    B  number  verb  server  timeout  time        about to be sent (server: the one that was named, or -)
    E  number  outcome  executed  error  server  time    how that ended; server: who replied, or -
    R  request  time                              a handler begins to run it (request: caller's name, colon, number)
    L  seconds  time                              a timer of this process fired so late: the machine's doing

Times are of the monotonic clock, which the processes of one machine share, those of test hosts too.
"""

from __future__ import annotations

import bisect
import os
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from time import monotonic
from typing import NamedTuple, Self

CALL, AGAIN, CAST = "call", "again", "cast"
VERBS = (CALL, AGAIN, CAST)
"""A call, a call of an idempotent method, a cast."""
REPLIED, TAKEN, FAILED = "replied", "taken", "failed"
OUTCOMES = (REPLIED, TAKEN, FAILED)
"""A reply, a cast's acknowledgement, an error (whose ``executed`` stands beside it)."""

LATE = 0.1
"""Seconds after its deadline in which a request may end."""
AROUND = 1.0
"""Seconds before and after an outage in which a request may have been with who was out: what it had taken in and not
begun, and the time until its callers know."""
HELD_UP = 0.1
"""The part of its time that a process must have stood still in for a request to run out of it without an outage."""
STOOD_STILL = 0.1
"""Seconds in one piece. A thread that is late by less may have waited for others of its process, who are to blame."""
TICK, WORTH_TELLING = 0.02, 0.005
"""Seconds between two looks of a :class:`Pendulum`, and how late it must be to be written down."""


class Writer:
    """One process's part of the ledger. May be used from any thread.

    Args:
        directory: where all parts are.
        name: of the process; one that takes another's place may have its name.
    """

    def __init__(self, directory: Path | str, name: str) -> None:
        path = Path(directory) / f"{name}.{os.getpid()}.ledger"
        self.name = name
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._write(f"P {name} {os.getpid()}")

    def _write(self, line: str) -> float:
        now = monotonic()
        os.write(self._file, f"{line} {now:.6f}\n".encode())
        return now

    def began(self, number: int, verb: str, server: str, timeout: float) -> None:
        """A request is about to be sent, with so many seconds for everything."""
        self._write(f"B {number} {verb} {server or '-'} {timeout:g}")

    def ended(self, number: int, outcome: str, executed: str, error: str = "", server: str = "") -> None:
        """It ended. ``executed`` is what the caller was told: ``"yes"``, ``"no"`` or ``"unknown"``."""
        self._write(f"E {number} {outcome} {executed} {error or '-'} {server or '-'}")

    def ran(self, request: str) -> None:
        """A handler begins to run ``request``."""
        self._write(f"R {request}")

    def late(self, seconds: float) -> None:
        """A timer of this process fired so late."""
        self._write(f"L {seconds:.6f}")

    def close(self) -> None:
        """No more is written."""
        os.close(self._file)


class Pendulum:
    """Writes down how late a timer of this process fires: so long may anything else here be late, and not to blame.

    A thread, from the beginning of the block to its end.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._swing, name="pendulum", daemon=True)

    def _swing(self) -> None:
        due = monotonic() + TICK
        while not self._end.wait(max(0.0, due - monotonic())):
            self._tell(monotonic() - due)
            due = monotonic() + TICK
        self._tell(monotonic() - due)  # where the end came while the process did not run

    def _tell(self, late: float) -> None:
        if late > WORTH_TELLING:
            self._writer.late(late)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


class Run(NamedTuple):
    """One execution."""

    server: str
    pid: int
    time: float


class Outage(NamedTuple):
    """A time in which a process (or all) may not have done what it is trusted with.

    Attributes:
        name, pid: of the process; ``""`` and 0 for every server.
        began: when.
        ended: when it was over: the process had ended, or was as before.
        lethal: what the process had in memory is gone.
        what: in a word or two.
    """

    name: str
    pid: int
    began: float
    ended: float = float("inf")
    lethal: bool = True
    what: str = "killed"

    def touches(self, since: float, until: float) -> bool:
        """Whether a request under way from ``since`` to ``until`` may have been with it."""
        return since <= self.ended + AROUND and until >= self.began - AROUND

    def concerns(self, server: str, pid: int = 0) -> bool:
        """Whether it was an outage of that server (of that process, where known)."""
        return not self.name or (pid == self.pid if pid else server in ("", self.name))


class Entry:
    """One request, and all that is known of it."""

    __slots__ = (
        "began", "by", "ended", "ends", "error", "executed", "number", "outcome", "part", "runs", "server", "timeout",
        "verb",
    )  # fmt: skip

    def __init__(self, part: Part, number: int) -> None:
        self.part = part
        self.number = number
        self.verb = ""
        self.server = ""
        self.by = ""
        self.timeout = 0.0
        self.began = self.ended = -1.0
        self.ends = 0
        self.outcome = self.executed = self.error = ""
        self.runs: Sequence[Run] = ()

    @property
    def id(self) -> str:
        """Its name in the ledger."""
        return f"{self.part.name}:{self.number}"

    @property
    def well(self) -> bool:
        """Whether it came to what was wanted."""
        return self.outcome in (REPLIED, TAKEN)

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended - self.began

    def told(self) -> str:
        """All of it, in one line."""
        where = f" at {self.server}" if self.server else ""
        text = f"{self.verb} {self.id}{where}, sent at {self.began:.3f} with {self.timeout:g} s"
        if self.ends:
            how = f"{self.error}, executed {self.executed!r}" if self.outcome == FAILED else self.outcome
            text += f", ended after {self.seconds:.3f} s: {how}{f' by {self.by}' if self.by else ''}"
        for run in self.runs:
            text += f"; run by {run.server} (pid {run.pid}) after {run.time - self.began:.3f} s"
        return text


class Part:
    """What one process wrote."""

    def __init__(self, name: str, pid: int) -> None:
        self.name = name
        self.pid = pid
        self.began = self.ended = 0.0
        self.torn = 0
        self.lates: list[tuple[float, float]] = []
        """When a timer fired late, and how late."""

    def stalled(self, since: float, until: float, least: float = 0.0) -> float:
        """Seconds in which this process did not come to run, of those between ``since`` and ``until``; of pieces that
        are no shorter than ``least``."""
        first = bisect.bisect_left(self.lates, (since, 0.0))
        found = 0.0
        for time, late in self.lates[first:]:
            if time - late > until:
                break
            found += late if late >= least else 0.0
        return found


class Ledger:
    """All parts together; made by :func:`read`."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.entries: dict[str, Entry] = {}
        self.wrong: list[str] = []
        """Lines that have no sense."""

    @property
    def requests(self) -> Iterator[Entry]:
        """Those that were sent, in the order of each caller."""
        return (each for each in self.entries.values() if each.began >= 0)

    @cached_property
    def in_order(self) -> list[Entry]:
        """Those that were sent, in the order of time."""
        return sorted(self.requests, key=lambda each: each.began)

    def undisturbed(self, outages: Iterable[Outage]) -> list[Part]:
        """The parts of processes that nobody struck."""
        struck = {each.pid for each in outages}
        return [each for each in self.parts if each.pid not in struck]

    def worst_stall(self, outages: Iterable[Outage] = ()) -> float:
        """The longest time, in seconds, for which a process that nobody struck did not come to run."""
        return max((late for part in self.undisturbed(outages) for _, late in part.lates), default=0.0)

    @property
    def torn(self) -> int:
        """Lines cut short, as by a process killed while it wrote."""
        return sum(part.torn for part in self.parts)

    def entry(self, request: str, part: Part | None = None) -> Entry:
        """The entry of that name."""
        found = self.entries.get(request)
        if found is None:
            name, _, number = request.rpartition(":")
            found = self.entries[request] = Entry(part or Part(name, 0), int(number))
        return found

    def breaches(self, outages: Iterable[Outage] = ()) -> list[str]:
        """What does not add up: a sentence each, with all that is known of the request. None where it balances.

        Args:
            outages: of servers and of callers; what they explain is none.
        """
        outages = list(outages)
        of_callers = {(each.name, each.pid) for each in outages if each.lethal}
        found = list(self.wrong)
        undisturbed = self.undisturbed(outages)

        def held_up(entry: Entry) -> float:
            return max((part.stalled(entry.began, entry.ended, STOOD_STILL) for part in undisturbed), default=0.0)

        def delayed(entry: Entry, run: Run) -> float:
            return max((part.stalled(entry.began, run.time) for part in undisturbed), default=0.0)

        for entry in self.entries.values():
            if entry.began < 0:
                found.append(f"it was run and nobody sent it: {entry.told()}")
                continue
            found += [f"{each}: {entry.told()}" for each in _of_outcome(entry, outages, of_callers, held_up)]
            found += [f"{each}: {entry.told()}" for each in _of_execution(entry, outages, delayed)]
        return found

    def explained(self, outages: Iterable[Outage]) -> Counter[str]:
        """What is not as it should be and an outage explains, by kind."""
        outages = [each for each in outages if each.name not in {part.name for part in self.callers}]
        return Counter(
            "unknown" if each.executed == "unknown" and each.outcome == FAILED else "taken, not run"
            for each in self.requests
            if (each.outcome == FAILED and each.executed == "unknown" and _explained(each, outages))
            or (each.outcome == TAKEN and not each.runs and _explained(each, outages))
        )

    @property
    def callers(self) -> list[Part]:
        """The parts of those who sent something."""
        return list({id(each.part): each.part for each in self.requests}.values())


def _of_outcome(
    entry: Entry, outages: list[Outage], killed: set[tuple[str, int]], held_up: Callable[[Entry], float]
) -> Iterator[str]:
    """That each request ends, once, in time, and as what it should."""
    if entry.ends == 0:
        if (entry.part.name, entry.part.pid) not in killed:
            yield "silence: it never ended"
        return
    if entry.ends > 1:
        yield f"it ended {entry.ends} times"
    deadline = entry.began + entry.timeout
    late = entry.ended - deadline - LATE
    if late > 0:
        late -= entry.part.stalled(entry.began, entry.began + LATE) + entry.part.stalled(deadline, entry.ended)
    if late > 0:
        yield f"it ended {late:.3f} s too late"
    if entry.outcome not in OUTCOMES or entry.executed not in ("yes", "no", "unknown"):
        yield "its outcome is none of those that there are"
    elif (
        entry.outcome == FAILED
        and entry.executed == "unknown"
        and not _explained(entry, outages)
        and held_up(entry) < entry.timeout * HELD_UP
    ):
        yield "its outcome is unknown, and nobody who may have had it was out"


def _of_execution(entry: Entry, outages: list[Outage], delayed: Callable[[Entry, Run], float]) -> Iterator[str]:
    """That each ran as often as its outcome says, and none when its caller had given it up."""
    if len(entry.runs) > 1 and entry.verb != AGAIN:
        yield f"it was run {len(entry.runs)} times"
    if entry.outcome == FAILED and entry.executed == "no" and entry.runs:
        yield "its caller was told that it did not run, and it ran"
    ran = entry.outcome == REPLIED or (entry.outcome == FAILED and entry.executed == "yes")
    if ran and not entry.runs:
        yield "it was answered, and nobody ran it"
    if ran and entry.by and entry.by not in {run.server for run in entry.runs}:
        yield f"{entry.by} answered it and did not run it"
    for run in entry.runs if entry.verb != CAST else ():
        late = run.time - entry.began - entry.timeout - LATE
        if late > 0 and late > delayed(entry, run) and not _explained(entry, outages):
            yield f"it was run {late:.3f} s after its caller had given it up"
    if entry.outcome == TAKEN and not entry.runs and not _explained(entry, outages):
        yield "it was taken in and never ran, and nobody who may have had it was out"


def _explained(entry: Entry, outages: list[Outage]) -> bool:
    """Whether an outage explains that the fate of ``entry`` is unknown, or that it was taken in and not run."""
    until = entry.ended if entry.ends else entry.began + entry.timeout
    for each in outages:
        if not each.touches(entry.began, until):
            continue
        if not entry.runs:
            if each.concerns(entry.server):
                return True
        elif any(each.concerns(run.server, run.pid) for run in entry.runs):
            return True
    return False


def read(directory: Path | str) -> Ledger:
    """All parts in ``directory``, put together. To be called when their processes have ended."""
    ledger = Ledger()
    runs: defaultdict[str, list[Run]] = defaultdict(list)
    for path in sorted(Path(directory).glob("*.ledger")):
        name, _, pid = path.stem.rpartition(".")
        part = Part(name, int(pid))
        ledger.parts.append(part)
        with open(path, "rb") as file:
            for line in file:
                _take_in(ledger, part, line, runs)
    for request, of_request in runs.items():
        ledger.entry(request).runs = sorted(of_request, key=lambda run: run.time)
    return ledger


def _word(written: str) -> str:
    return "" if written == "-" else written


def _take_in(ledger: Ledger, part: Part, line: bytes, runs: dict[str, list[Run]]) -> None:
    if not line.endswith(b"\n"):
        part.torn += 1
        return
    words = line.decode(errors="replace").split()
    try:
        kind, time = words[0], float(words[-1])
        if kind == "B":
            entry = ledger.entry(f"{part.name}:{words[1]}", part)
            if entry.began >= 0:
                ledger.wrong.append(f"{part.name} sent two requests with the number {words[1]}: {entry.told()}")
            _, _, entry.verb, server, timeout, _ = words
            entry.server, entry.timeout, entry.began = _word(server), float(timeout), time
        elif kind == "E":
            entry = ledger.entry(f"{part.name}:{words[1]}", part)
            _, _, entry.outcome, entry.executed, error, by, _ = words
            entry.error, entry.by, entry.ended = _word(error), _word(by), time
            entry.ends += 1
        elif kind == "R":
            runs[words[1]].append(Run(part.name, part.pid, time))
        elif kind == "L":
            part.lates.append((time, float(words[1])))
        elif kind == "P":
            part.began = time
        else:
            raise ValueError(kind)
    except (ValueError, IndexError):
        ledger.wrong.append(f"{part.name}.{part.pid} wrote what is no line of a ledger: {line!r}")
        return
    part.ended = time
