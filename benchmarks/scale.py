"""Scale in cost: does the work done grow in proportion to the hosts that are paid for?

Each of N simulated hosts is a control group with a small fixed share of a processor. In it run one server and one
client, which calls the server of the next host in a ring. A broker is a host more, with the share of one host or of
four. All shares together leave the machine unsaturated, so what limits a rate is a share, as it would be a host.

    python -m benchmarks.scale [--quick]
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

from benchmarks.measure import BROKERS, WARM_UP, Broker, Failed, Options, Row, Say, Worker, cpu_seconds, family
from benchmarks.system import Setup, System
from benchmarks.systems import SYSTEMS

NEIGHBOUR = SYSTEMS["neighbour"]
HOSTS = (1, 2, 4, 8, 16)
QUICK = (1, 4, 8)
SHARE = 0.05
"""Of one processor, for each host."""
HOSTS_PER_CPU = 8
"""Hosts on one processor, of which they have 40 %: more would often be awake at once, and get into each other's way."""
BROKER_SHARES = (1, 4)
"""What the broker's host has, in shares. It is on the last processor, of which 20 % are a part that hosts leave."""
PERIOD = 30_000
"""Microseconds in which a host may use its share: short, lest calls wait long for a host that has used it up. At every
window each host gets a period some percent off, so that no two keep step."""
CALLERS = 16
"""Threads of each client: enough that a host always has something to do."""
SECONDS = 3.0
"""Length of a window, in those of other scenarios: hosts with a small share answer some dozen calls a second."""
START_LIMIT = 180.0
"""Seconds in which all processes must have started: 51 of them, on the processors of their hosts."""

READING = """\
A *host* is a control group with {share:g} of a processor, in which a server and a client with {callers} callers run;
the client calls the server of the next host, in rings of up to {ring}. A broker's host has the same share, or four. The
dashed lines are N times the rate of one host, and *linear* is the rate as a part of that, round by round. *share used*
is what the hosts used of their shares, and *broker used* the broker of its own; *cpu used* is the whole machine's, in
processors.

A simulation on one machine: there is no network; {ring} hosts share a processor and its caches (those that have no part
at some N are busy with something else, so that as many share them at every N); and shares come in slices of
{quota:.1f} ms every {period:.0f} ms, which makes a call dearer than on a processor of one's own. All of that is the
same for every system and every N. Windows are {longer:g} times as long as said below."""
READING = READING.format(
    share=SHARE, callers=CALLERS, ring=HOSTS_PER_CPU, quota=SHARE * PERIOD / 1e3, period=PERIOD / 1e3, longer=SECONDS
)


# --- shares ---------------------------------------------------------------------------------------------------------


class Limits(Protocol):
    """What holds hosts to their shares. Leaving it removes all traces; the hosts' processes must have ended."""

    name: str

    def put(self, host: str, pids: Iterable[int]) -> None:
        """Make these processes a host."""

    def give(self, host: str, share: float) -> None:
        """Let the host use that much of a processor from now on."""


class Interface(NamedTuple):
    """How one version of control groups is told things: texts to write, by file."""

    name: str
    family: dict[str, str]
    """For the group of all hosts: go before whatever else the machine does, as a host of one's own would."""
    share: Callable[[int, int], dict[str, str]]
    """For one host: its quota in each period, both in microseconds."""


V1 = Interface(
    "cgroup v1",
    {"cpu.shares": "262144"},
    lambda quota, period: {"cpu.cfs_period_us": str(period), "cpu.cfs_quota_us": str(quota)},
)
V2 = Interface(
    "cgroup v2",
    {"cgroup.subtree_control": "+cpu", "cpu.weight": "10000"},
    lambda quota, period: {"cpu.max": f"{quota} {period}"},
)


class ControlGroups:
    """Control groups of our own, below ``root``.

    Raises:
        OSError: they cannot be made here, or not by this user.
    """

    def __init__(self, interface: Interface, root: Path) -> None:
        self.name = interface.name
        self._interface = interface
        self._root = root
        self._top = root / f"onehop-scale-{os.getpid()}"

    def __enter__(self) -> Self:
        if self._interface is V2:
            (self._root / "cgroup.subtree_control").write_text("+cpu")
        self._top.mkdir()
        try:
            self._write(self._top, self._interface.family)
        except OSError:
            self._top.rmdir()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for group in (*filter(Path.is_dir, self._top.iterdir()), self._top):
            until = time.monotonic() + 5
            while True:
                try:
                    group.rmdir()
                    break
                except OSError:  # a process that has been ended leaves a little later
                    if time.monotonic() > until:
                        raise
                time.sleep(0.01)

    def _write(self, group: Path, texts: dict[str, str]) -> None:
        for name, text in texts.items():
            (group / name).write_text(text)

    def put(self, host: str, pids: Iterable[int]) -> None:
        group = self._top / host
        group.mkdir(exist_ok=True)
        for pid in pids:
            (group / "cgroup.procs").write_text(str(pid))

    def give(self, host: str, share: float) -> None:
        period = round(PERIOD * random.uniform(0.9, 1.1))
        self._write(self._top / host, self._interface.share(round(share * period), period))


UNLIMITED = (
    "THERE ARE NO SHARES: hosts are pinned and nice, and take what a processor gives. The rates say nothing of scale; "
    "what a call costs at each N does"
)


class Unlimited:
    """Where there are no control groups: hosts are nice to the rest of the machine, and nothing holds them."""

    name = "none: nice only"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """There is nothing to remove."""

    def put(self, host: str, pids: Iterable[int]) -> None:
        for pid in pids:
            os.setpriority(os.PRIO_PROCESS, pid, 10)

    def give(self, host: str, share: float) -> None:
        """Not possible."""


def hierarchies() -> Iterator[tuple[Interface, Path]]:
    """Where the kernel's control groups with a cpu controller are mounted."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, kind, options, *_ = line.split()
        if kind == "cgroup" and "cpu" in options.split(","):
            yield V1, Path(mount)
        elif kind == "cgroup2" and "cpu" in Path(mount, "cgroup.controllers").read_text().split():
            yield V2, Path(mount)


@contextmanager
def limits(say: Say) -> Iterator[Limits]:
    """Control groups if there are any, else the next best."""
    with ExitStack() as stack:
        held: Limits | None = None
        problem = "none with a cpu controller are mounted"
        for interface, root in hierarchies():
            try:
                held = stack.enter_context(ControlGroups(interface, root))
                break
            except OSError as error:
                problem = str(error)
        if held is None:
            say(f"scale: control groups cannot be used: {problem}. {UNLIMITED}")
        yield held or stack.enter_context(Unlimited())


# --- hosts ----------------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """What one window showed."""

    rate: float
    cpu: float
    """Microseconds for each call, of hosts and broker."""
    share_used: float
    broker_used: float
    cpu_used: float


def processors() -> list[int]:
    """Those that this program may use, at least two.

    Raises:
        Failed: there is one only.
    """
    found = sorted(os.sched_getaffinity(0))
    if len(found) < 2:
        raise Failed("scale needs two processors; this program may use one only")
    return found


@contextmanager
def bound_to(cpu: int) -> Iterator[None]:
    """What is started inside is bound to that processor."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def ring(size: int) -> list[tuple[int, int]]:
    """Who calls whom where there are so many hosts: each the next one on its processor, the last one the first."""
    length = min(size, HOSTS_PER_CPU)
    return [(host, host - host % length + (host + 1) % length) for host in range(size)]


class Cloud:
    """The hosts of one system, for every N: a server each, and a client for each server that it is to call.

    A ring is on one processor, so that a call costs the same wake-ups at every N. Its last host calls its first, so
    hosts that are last at some N have two clients, of which one is idle. Hosts that have no part work for themselves,
    so that at every N as many share a processor and its caches.
    """

    def __init__(self, system: System, sizes: Sequence[int], held: Limits, stack: ExitStack) -> None:
        self._system = system
        self._held = held
        self._directory = tempfile.mkdtemp(prefix="oh-bench-")
        stack.callback(shutil.rmtree, self._directory, ignore_errors=True)
        self._broker: Broker | None = None
        if system.broker:
            with bound_to(processors()[-1]):
                self._broker = stack.enter_context(BROKERS[system.broker]())

        def start(system: System, role: str, host: int, service: int) -> Worker:
            worker = Worker(role, system, self._setup(f"{system.name}-{host}-{service}", host, service))
            stack.callback(worker.end)
            return worker

        self._servers = [start(system, "server", host, host) for host in range(max(sizes))]
        self._others = [start(NEIGHBOUR, "client", host, host) for host in range(max(sizes))]
        addresses = [each.answer(START_LIMIT) for each in self._servers]
        ways = sorted({way for size in sizes for way in ring(size)})
        self._clients = {way: start(system, "client", *way) for way in ways}
        for each in (*self._others, *self._clients.values()):
            each.answer(START_LIMIT)
        for (_, service), each in self._clients.items():
            each.send("connect", addresses=[addresses[service]])
        for each in self._clients.values():
            each.answer()
        for size in sizes:
            self._run(size, WARM_UP)
        self._gather()

    def _setup(self, name: str, host: int, service: int) -> Setup:
        return Setup(
            "real",
            CALLERS,
            f"host-{service}",
            name,
            self._directory,
            broker=self._broker.url if self._broker else "",
            cpu=processors()[host // HOSTS_PER_CPU],
        )

    def _gather(self) -> None:
        """Put everything where it belongs. It may still use what it likes: starting took more than a share."""
        for host, always in enumerate(zip(self._servers, self._others, strict=True)):
            clients = [each for (at, _), each in self._clients.items() if at == host]
            self._held.put(f"host-{host}", [each.pid for each in (*always, *clients)])
        if self._broker:
            self._held.put("broker", family(self._broker.pid))

    def _calling(self, size: int) -> list[Worker]:
        return [self._clients[way] for way in ring(size)]

    def _run(self, size: int, seconds: float) -> None:
        working = [*self._calling(size), *self._others[size:]]
        for each in working:
            each.send("run", seconds=seconds, callers=CALLERS)
        for each in working:
            each.answer(seconds + START_LIMIT)

    def _clocks(self, size: int) -> tuple[float, float, float, float]:
        hosts = sum(each.cpu() for each in (*self._servers[:size], *self._calling(size)))
        broker = sum(map(cpu_seconds, family(self._broker.pid))) if self._broker else 0.0
        return hosts, broker, busy_seconds(), time.monotonic()

    def window(self, size: int, broker_shares: int, seconds: float) -> Point:
        """Measure with so many hosts, after a moment to get going."""
        for host in range(len(self._servers)):
            self._held.give(f"host-{host}", SHARE)
        if self._broker:
            self._held.give("broker", broker_shares * SHARE)
        self._run(size, WARM_UP)
        before = self._clocks(size)
        self._run(size, seconds)
        hosts, broker, busy, took = (now - then for now, then in zip(self._clocks(size), before, strict=True))
        samples = [each.ask("sample") for each in self._calling(size)]
        calls = sum(each["calls"] for each in samples)
        if not calls:
            raise Failed(f"{self._system.name}: {size} hosts had not one answer within {seconds:g} s")
        return Point(
            rate=sum(each["calls"] / each["seconds"] for each in samples),
            cpu=(hosts + broker) / calls * 1e6,
            share_used=hosts / (took * size * SHARE),
            broker_used=broker / (took * broker_shares * SHARE),
            cpu_used=busy / took,
        )


def busy_seconds() -> float:
    """Time that all processors have spent at work, in seconds; what a hypervisor took is not of it."""
    user, nice, system, _idle, _wait, interrupts, soft, *_ = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")


# --- the measurement ------------------------------------------------------------------------------------------------


def measure(systems: Sequence[System], options: Options, say: Say) -> list[Row]:
    """The rows of the table. One system after another; of each, all N take turns in every round."""
    rows: list[Row] = []
    for system in systems:
        say(f"scale: {system.name}")
        try:
            rows += measure_one(system, options, say)
        except RuntimeError as error:
            say(f"  {system.name} failed: {str(error).splitlines()[-1]}")
            rows.append({"system": system.name, "kind": system.kind, "error": str(error)})
    return rows


def measure_one(system: System, options: Options, say: Say) -> list[Row]:
    """The rows of one system; with a broker, those of each share that it is given."""
    sizes = QUICK if options.quick else HOSTS
    shares = BROKER_SHARES if system.broker else (1,)
    points: dict[tuple[int, int], list[Point]] = {(share, size): [] for share in shares for size in sizes}
    with limits(say) as held, ExitStack() as stack:
        cloud = Cloud(system, sizes, held, stack)
        for number in range(options.rounds):
            there = list(points.items())
            for (share, size), seen in there[:: (-1) ** number]:  # and back: what drifts, drifts for all alike
                seen.append(cloud.window(size, share, SECONDS * options.seconds))
            say(f"scale: {system.name}: round {number + 1} of {options.rounds}")
    return [
        row(system, held.name, share, size, seen, points[share, sizes[0]]) for (share, size), seen in points.items()
    ]


def row(system: System, held: str, broker_shares: int, size: int, seen: list[Point], alone: list[Point]) -> Row:
    """Medians over the rounds. ``alone`` is what one host showed in the same rounds."""
    medians = Point(*map(statistics.median, zip(*seen, strict=True)))
    broker = f", broker with {broker_shares} share{'s' * (broker_shares > 1)}" if system.broker else ""
    linear = statistics.median(many.rate / (size * one.rate) for many, one in zip(seen, alone, strict=True))
    return {
        "system": system.name + broker,
        "kind": system.kind,
        "case": str(size),
        "hosts": size,
        "share": SHARE,
        "rate": medians.rate,
        "per_host": medians.rate / size,
        "linear": None if held == Unlimited.name else linear,
        "cpu": medians.cpu,
        "share_used": medians.share_used,
        "broker_used": medians.broker_used if system.broker else None,
        "cpu_used": medians.cpu_used,
        "held_by": held,
        "rounds": [each._asdict() for each in seen],
    }


def draw(axes: Any, rows: Sequence[Row]) -> None:
    """Rates over hosts on logarithmic axes of matplotlib, with what proportion would give dashed."""
    shown = [each for each in rows if "error" not in each]
    for name, of_one in groupby(shown, key=lambda each: each["system"]):
        points = [(each["hosts"], each["rate"]) for each in of_one]
        (line,) = axes.plot(*zip(*points, strict=True), "o-", label=name)
        hosts = [count for count, _ in points]
        axes.plot(
            hosts, [points[0][1] * count for count in hosts], "--", color=line.get_color(), alpha=0.4, linewidth=1
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({each["hosts"] for each in shown})
    axes.set_xticks(ticks, [str(each) for each in ticks])
    axes.set_xlabel(f"hosts, each with {SHARE:g} of a processor")
    axes.set_ylabel("calls per second, all hosts")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)


if __name__ == "__main__":
    from benchmarks.__main__ import main

    try:
        sys.exit(main(["--scenario", "scale", *sys.argv[1:]]))
    except KeyboardInterrupt:
        sys.exit(130)
