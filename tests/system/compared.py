"""The same load and the same kills over ``rabbit://`` and over ``zmq://``, side by side, as a table.

::

    make compare                # or: python -m tests.system.compared --write docs/reliability/index.md
    python -m tests.system.compared --seconds 20 --rounds 2

Three servers and their callers are oslo.messaging's programs, each a process; only the transport URL differs. Each part
of a round has processes of its own, and a broker or registry of its own: first nothing happens, then a server is killed
(kill -9) and started again, then the broker, or the registry, is. The parts of all sides alternate.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple, Protocol

from benchmarks.rabbitmq import RabbitMQ
from tests.registry.servers import Redis
from tests.system.over_oslo import NAMED
from tests.system.rows import NOISY, ONLY_CALLS, WORK

from onehop.cli.console import terminated_as_interrupted
from onehop.testing.chaos import figures, plan
from onehop.testing.chaos.cluster import Cluster
from onehop.testing.ledger import FAILED, REPLIED, Ledger

OVER = "tests.system.over_oslo:Oslo"
SERVERS = 3
WORKERS, THREADS = 64, 64
AWAY = 1.0
"""Seconds from a kill until what was killed is started again; it then takes its own time to be there."""
AS_LONG = 8.0
"""The same for a registry, which is there at once: about what a broker takes altogether, and more than a lease."""
WARM = 1.0
"""Seconds at the beginning of the load that no figure is made of."""
STEP, SPAN, BACK = 0.1, 2.0, 0.9
"""The rate is that of ``SPAN`` seconds, looked at every ``STEP``; it is back at this part of what it was in calm."""
SILENT = "MessagingTimeout"
"""What oslo.messaging raises at the deadline, and says nothing else by."""
CALM, SERVER, MIDDLE = "calm", "server", "middle"
FAULTS = (CALM, SERVER, MIDDLE)
OPENING, CLOSING = "<!-- compared: from here on written by `make compare` -->", "<!-- compared: to here -->"


# The sides ------------------------------------------------------------------------------------------


class Middle(Protocol):
    """What stands between the programs, or beside them: running, until it is killed."""

    url: str

    def kill(self) -> None:
        """``kill -9``."""

    def restart(self) -> None:
        """Start it again; returns when it answers."""


class Registry:
    """A Redis server, in which nodes are found. Each process has a run directory of its own, as on hosts of their own:
    so they meet over TCP, as they meet RabbitMQ.

    Args:
        directory: for the run directories.
    """

    def __init__(self, server: Redis, directory: str) -> None:
        self._server = server
        options = f"insecure=true&address=127.0.0.1&cache_directory=none&run_directory={directory}/{NAMED}"
        self.url = f"zmq+redis://127.0.0.1:{server.port}/?{options}"

    def kill(self) -> None:
        self._server.stop()

    def restart(self) -> None:
        self._server.start()


class Broker:
    """RabbitMQ.

    Args:
        options: of oslo.messaging, for the query of the URL.
    """

    def __init__(self, server: RabbitMQ, options: str) -> None:
        self.url = server.url + options
        self.kill, self.restart = server.kill, server.restart


@contextmanager
def redis() -> Iterator[Middle]:
    directory = tempfile.mkdtemp(prefix="oh-", dir="/tmp")
    server = Redis()
    try:
        yield Registry(server.start(), directory)
    finally:
        server.close()
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def rabbitmq(options: str = "") -> Iterator[Middle]:
    with RabbitMQ() as server:
        yield Broker(server, options)


class Side(NamedTuple):
    """One transport.

    Attributes:
        name: for people.
        middle: what stands in the middle of it, for people.
        pause: seconds from a kill of that until it is started again.
        ours: whether it has to keep what we promise.
        open: starts what stands in the middle, for a ``with`` block.
    """

    name: str
    middle: str
    pause: float
    ours: bool
    open: Callable[[], Any]

    def told(self, fault: str) -> str:
        """The fault, for people."""
        return {CALM: "nothing", SERVER: "one of three servers", MIDDLE: f"the {self.middle}"}[fault]


ZMQ = Side("`zmq+redis://`", "registry", AS_LONG, True, redis)
RABBIT = Side("`rabbit://`", "broker", AWAY, False, rabbitmq)
QUORUM = Side(
    "`rabbit://`, quorum queues",
    "broker",
    AWAY,
    False,
    lambda: rabbitmq("?rabbit_quorum_queue=true&rabbit_transient_quorum_queue=true"),
)
SIDES = (ZMQ, RABBIT, QUORUM)


# One part -------------------------------------------------------------------------------------------


class Load(NamedTuple):
    """What all sides have to carry.

    Attributes:
        seconds: how long each part lasts.
        timeout: seconds for each call.
        rate: calls a second, of all callers together.
        callers: processes.
    """

    seconds: float
    timeout: float
    rate: float = 100.0
    callers: int = 2

    @property
    def calm(self) -> float:
        """Seconds until the fault."""
        return WARM + min(10.0, self.seconds / 6)


class Part(NamedTuple):
    """What one fault came to on one side, in one round. Times in seconds.

    Attributes:
        lost: calls of which nothing was heard until the deadline.
        ran: how many of those a server ran all the same.
        told: calls that failed before, with an error that says why.
        twice: calls that ran more than once.
        kept_back: calls that were not made, as all threads of a caller were waiting.
        worst: the longest that a caller waited for the end of a call.
        away: until what was killed answered again; None for a server, which nobody waits for.
        back: from the fault until calls are answered at the rate of before, and that stays so; None for never.
        p99: of the calls before the fault.
        stall: the longest that the machine held a process up.
        wrong: where the account of calls does not balance.
        breaches: in what our promises were not kept.
    """

    calls: int
    answered: int
    lost: int
    ran: int
    told: int
    twice: int
    kept_back: int
    worst: float
    away: float | None
    back: float | None
    p99: float
    stall: float
    wrong: list[str]
    breaches: list[str]


def run(side: Side, fault: str, load: Load) -> Part:
    """One part: the load, and the fault when it has been calm for a while."""
    with (
        side.open() as middle,
        Cluster(
            SERVERS, load.callers, over=OVER, url=middle.url, rate=load.rate, timeout=load.timeout,
            mix=ONLY_CALLS, seconds=WORK, workers=WORKERS, threads=THREADS,
        ) as cluster,
    ):  # fmt: skip
        cluster.go()
        cluster.follow([], load.calm)
        struck, away = monotonic(), None
        if fault == SERVER:
            start_again = cluster.begin(plan.KILL, 0)
            cluster.follow([], load.calm + AWAY)
            start_again()
        elif fault == MIDDLE:
            middle.kill()
            cluster.follow([], load.calm + side.pause)
            middle.restart()
            away = monotonic() - struck
        cluster.follow([], load.seconds)
        until = monotonic()
        ledger = cluster.stop()
        kept_back = sum(each["behind"] for each in cluster.counts("caller"))
    calls = ledger.in_order
    failed = [each for each in calls if each.outcome == FAILED]
    lost = [each for each in failed if each.error == SILENT]
    return Part(
        calls=len(calls),
        answered=sum(each.outcome == REPLIED for each in calls),
        lost=len(lost),
        ran=sum(bool(each.runs) for each in lost),
        told=len(failed) - len(lost),
        twice=sum(len(each.runs) > 1 for each in calls),
        kept_back=kept_back,
        worst=max((each.seconds for each in calls), default=0.0),
        away=away,
        back=back(ledger, cluster.began + WARM, struck, until),
        p99=figures.p99(each for each in figures.begun(ledger, cluster.began + WARM, struck) if each.ended < struck),
        stall=ledger.worst_stall(cluster.outages),
        wrong=unbalanced(ledger),
        breaches=ledger.breaches(cluster.outages),
    )


def unbalanced(ledger: Ledger) -> list[str]:
    """Of which calls there is not exactly one outcome, and what else is wrong with the account: a sentence each."""
    calls = [each for each in ledger.entries.values() if each.began < 0 or each.ends != 1]
    return [*ledger.wrong, *(f"not one call with one outcome: {each.told()}" for each in calls)]


def back(ledger: Ledger, calm: float, struck: float, until: float) -> float | None:
    """How long after ``struck`` calls are answered at the rate of before again, and that stays so until the load ends.

    Where the machine held a process up for long, the rate is not judged: then a caller makes fewer calls.

    Args:
        calm: since when the rate is that of before.
        until: when the load ends.

    Returns:
        Seconds; None where it is not so at the end.
    """
    answered = sorted(each.ended for each in ledger.requests if each.outcome == REPLIED)
    stalls = [(time - late, time) for part in ledger.parts for time, late in part.lates if late > NOISY]

    def per_second(since: float, end: float) -> float:
        return (bisect_left(answered, end) - bisect_left(answered, since)) / (end - since)

    def held_up(since: float, end: float) -> bool:
        return any(began < end and ended > since - NOISY for began, ended in stalls)

    wanted = BACK * per_second(calm, struck)
    looks = int((until - SPAN - struck) / STEP)
    times = [(look, struck + look * STEP) for look in range(looks)]
    bad = [look for look, at in times if per_second(at, at + SPAN) < wanted and not held_up(at, at + SPAN)]
    if not bad:
        return 0.0
    since = struck + (bad[-1] + 1) * STEP
    # Not when these seconds begin: a burst of late answers makes up for some without any.
    first = bisect_left(answered, since)
    return answered[first] - struck if bad[-1] + 1 < looks and first < len(answered) else None


# The table ------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A figure of a row: what stands above it, and below, from all rounds."""

    head: str
    value: Callable[[list[Part]], str]


def _sum(name: str) -> Callable[[list[Part]], str]:
    return lambda parts: f"{sum(getattr(each, name) for each in parts):,}"


def _worst(name: str, digits: int) -> Callable[[list[Part]], str]:
    def shown(parts: list[Part]) -> str:
        values = [getattr(each, name) for each in parts]
        return "not within the run" if None in values else f"{max(values):.{digits}f}"

    return shown


COLUMNS = (
    Column("calls", _sum("calls")),
    Column("answered", _sum("answered")),
    Column("lost", _sum("lost")),
    Column("lost and run", _sum("ran")),
    Column("failed, told", _sum("told")),
    Column("run twice", _sum("twice")),
    Column("not made", _sum("kept_back")),
    Column("worst wait, s", _worst("worst", 2)),
    Column("away, s", lambda parts: "-" if parts[0].away is None else _worst("away", 1)(parts)),
    Column("recovered after, s", _worst("back", 1)),
    Column("p99 before, ms", lambda parts: f"{statistics.median(each.p99 for each in parts) * 1000:.0f}"),
)
Found = dict[tuple[Side, str], list[Part]]


def table(found: Found) -> str:
    """All of it, as Markdown: a row for each fault and side."""
    lines = [
        f"| killed | over | {' | '.join(each.head for each in COLUMNS)} |",
        f"| --- | --- |{' --: |' * len(COLUMNS)}",
    ]
    for (side, fault), parts in sorted(found.items(), key=lambda row: FAULTS.index(row[0][1])):
        what = side.told(fault)
        # Where nothing was killed, there is nothing to recover from.
        values = ["-" if fault == CALM and "recovered" in each.head else each.value(parts) for each in COLUMNS]
        lines.append(f"| {what} | {side.name} | {' | '.join(values)} |")
    return "\n".join(lines)


def circumstances(load: Load, rounds: int, found: Found) -> str:
    """What was measured, of what, on which machine: a paragraph."""
    stall = max(each.stall for parts in found.values() for each in parts)
    versions = (
        f"Linux {platform.release()}, Python {platform.python_version()}, "
        f"oslo.messaging {importlib.metadata.version('oslo.messaging')}, "
        f"Debian's RabbitMQ {packaged('rabbitmq-server')} and Redis {packaged('redis-server')}"
    )
    return (
        f"{os.cpu_count()} processors for everything; {versions}; default options. {SERVERS} servers, {load.callers} "
        f"callers of {THREADS} threads, {load.rate:g} calls a second together; a call is {WORK * 1000:g} ms of work "
        f"and has {load.timeout:g} s. {load.seconds:g} s of load for each row, {rounds} x, the kill after "
        f"{load.calm:.0f} s; started again {AWAY:g} s later, the registry {AS_LONG:g} s later. The machine held a "
        f"process up for {stall * 1000:.0f} ms at most."
    )


def packaged(name: str) -> str:
    """The version of a Debian package; a question mark where it is none."""
    try:
        done = subprocess.run(["dpkg-query", "-W", "-f=${Version}", name], capture_output=True, text=True)
    except FileNotFoundError:
        return "?"
    return done.stdout.strip().partition(":")[2] or done.stdout.strip() or "?"


def replaced(page: str, text: str) -> str:
    """The page with ``text`` between the two marks.

    Raises:
        ValueError: the marks are not there, or not once each and in order.
    """
    head, opening, rest = page.partition(OPENING)
    _, closing, tail = rest.partition(CLOSING)
    if not opening or not closing or OPENING in rest or CLOSING in tail:
        raise ValueError(f"the page must have one line {OPENING!r} and below it one line {CLOSING!r}")
    return f"{head}{OPENING}\n\n{text}\n\n{CLOSING}{tail}"


def compare(load: Load, rounds: int, sides: Sequence[Side], faults: Sequence[str], say: Callable[[str], None]) -> Found:
    """All parts, one after the other: by rounds, then by faults, then by sides."""
    found: Found = {}
    total, number = rounds * len(faults) * len(sides), 0
    for _ in range(rounds):
        for fault in faults:
            for side in sides:
                number += 1
                part = run(side, fault, load)
                found.setdefault((side, fault), []).append(part)
                recovered = "not within the run" if part.back is None else f"after {part.back:.1f} s"
                say(
                    f"{number}/{total}  {side.name}, killed: {side.told(fault)}: {part.calls} calls, {part.lost} lost, "
                    f"{part.told} told, worst wait {part.worst:.1f} s, recovered {recovered}"
                )
    return found


def faulty(found: Found) -> list[str]:
    """Where the account of calls does not balance, or our side does not keep what we promise: a sentence each."""
    wrong = []
    for (side, fault), parts in found.items():
        for each in parts:
            sentences = [*each.wrong, *(each.breaches if side.ours else [])]
            wrong += [f"{side.name}, killed: {side.told(fault)}: {sentence}" for sentence in sentences]
    return wrong


def main() -> None:
    """Run it, print the table; ends with 1 where something is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        prog="python -m tests.system.compared",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=90.0, help="how long the load of each row lasts (90)")
    parser.add_argument("--timeout", type=float, help="seconds for each call; 60, or two thirds of --seconds if less")
    parser.add_argument("--rate", type=float, default=100.0, help="calls a second, all callers together (100)")
    parser.add_argument("--rounds", type=int, default=1, help="how often all of it is done (1)")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page, between its marks")
    given = parser.parse_args()
    if given.seconds < 12 or given.rounds < 1 or given.rate <= 0:
        parser.error("--seconds must be 12 at least, --rounds 1, and --rate more than 0")
    if given.write:
        try:
            replaced(given.write.read_text(), "")
        except (OSError, ValueError) as error:
            parser.error(f"--write {given.write}: {error}")
    load = Load(given.seconds, given.timeout or min(60.0, given.seconds * 2 / 3), given.rate)
    began = monotonic()

    def say(text: str) -> None:
        print(f"{monotonic() - began:6.0f} s  {text}", file=sys.stderr, flush=True)

    say(f"{given.rounds * len(SIDES) * len(FAULTS)} parts of {given.seconds:g} s and some more")
    try:
        with terminated_as_interrupted():
            found = compare(load, given.rounds, SIDES, FAULTS, say)
    except KeyboardInterrupt:
        sys.exit("interrupted; everything that was started has been ended")
    text = f"{circumstances(load, given.rounds, found)}\n\n{table(found)}"
    print(text)
    if given.write:
        given.write.write_text(replaced(given.write.read_text(), text))
        say(f"the table is in {given.write}")
    wrong = faulty(found)
    for each in wrong[:20]:
        print(f"WRONG: {each}", file=sys.stderr)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
