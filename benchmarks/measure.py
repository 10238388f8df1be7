"""Measuring: processes and their clocks, brokers, and rounds in which the systems take turns."""

from __future__ import annotations

import os
import re
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import msgspec

from benchmarks.nats_server import NatsServer
from benchmarks.rabbitmq import RabbitMQ
from benchmarks.system import Sample, Setup, System

ROOT = Path(__file__).parent.parent
WARM_UP = 0.3
START_LIMIT = 60.0
ANSWER_LIMIT = 120.0
"""Seconds, beyond those of its window, after which a process is taken for stuck."""
PATIENCE = 1.0
"""Seconds without a new arrival after which what has not arrived is counted as lost."""

Figures = dict[str, float]
Row = dict[str, Any]
Say = Callable[[str], None]


class Failed(RuntimeError):
    """A process under measurement failed, or there is none where one is needed. The message says why."""


class Case(NamedTuple):
    """What is started of each system, and how it is used."""

    name: str
    message: str = "real"
    clients: int = 1
    servers: int = 1
    callers: int = 1
    """Calls in flight, of each client."""
    receivers: int = 1
    """Of each server's process (fan-out)."""
    paired: bool = False
    """Whether each client has a server of its own; otherwise all servers offer one service."""


class Options(NamedTuple):
    """What the command line says."""

    seconds: float = 1.0
    """Of each window."""
    rounds: int = 5
    quick: bool = False
    systems: tuple[str, ...] = ()
    """Only these; all where empty."""


# --- clocks and memory ----------------------------------------------------------------------------------------------


def cpu_seconds(pid: int) -> float:
    """Processor time of all threads of a process, in seconds (from its CPU clock: nanoseconds)."""
    return time.clock_gettime((~pid << 3) | 2)


def family(pid: int) -> list[int]:
    """The process and its children, theirs too."""
    found = [pid]
    for each in found:
        for path in Path(f"/proc/{each}/task").glob("*/children"):
            try:
                found += map(int, path.read_text().split())
            except OSError:
                continue
    return found


def resident(pid: int) -> float:
    """Resident memory, in MiB."""
    found = re.search(r"^VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0


# --- processes ------------------------------------------------------------------------------------------------------


class Worker:
    """A process under measurement, and its ear. See :mod:`benchmarks.worker`.

    Args:
        role: ``"server"`` or ``"client"``.

    Raises:
        Failed: from every method, when the process fails, ends or is silent; with the end of what it wrote.
    """

    def __init__(self, role: str, system: System, setup: Setup) -> None:
        self.title = f"{system.name} ({role} {setup.name})"
        self._errors = Path(setup.directory, f"{role}-{setup.name}.log")
        with open(self._errors, "wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", role, system.name],
                cwd=ROOT,
                env=os.environ | system.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        self.pid = self._process.pid
        self._write(msgspec.json.encode(setup))

    def _write(self, line: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Failed(f"{self.title} has ended{self._told()}") from None

    def _told(self) -> str:
        text = self._errors.read_text(errors="replace").strip()
        return f"; it wrote:\n{text[-2000:]}" if text else ""

    def send(self, do: str, **arguments: Any) -> None:
        """Give a command."""
        self._write(msgspec.json.encode({"do": do, **arguments}))

    def answer(self, patience: float = ANSWER_LIMIT) -> Any:
        """Wait for the answer to it, or to the start."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], patience)[0]:
            raise Failed(f"{self.title} gave no answer within {patience:.0f} s{self._told()}")
        line = self._process.stdout.readline()
        if not line:
            raise Failed(f"{self.title} has ended{self._told()}")
        found = msgspec.json.decode(line)
        if "error" in found:
            raise Failed(f"{self.title} failed: {found['error'].strip()}")
        return found["value"]

    def ask(self, do: str, **arguments: Any) -> Any:
        """:meth:`send` and :meth:`answer`."""
        self.send(do, **arguments)
        return self.answer()

    def cpu(self) -> float:
        """Processor time so far, in seconds, of the process and its children."""
        try:
            return sum(map(cpu_seconds, family(self.pid)))
        except OSError:
            raise Failed(f"{self.title} has ended{self._told()}") from None

    def end(self) -> None:
        """End the process. May be called twice."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                pass
        try:
            self._process.wait(0.5)  # it ends with its input
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Broker(Protocol):
    """A server in the middle. Entering it starts it, or raises RuntimeError that says what is missing."""

    url: str
    pid: int

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


BROKERS: dict[str, Callable[[], Broker]] = {"nats": NatsServer, "rabbit": RabbitMQ}


class Running:
    """One system's processes in one case: started, connected, to be measured, and ended.

    Raises:
        Failed: it does not start.
    """

    def __init__(self, system: System, case: Case, verb: str, pinned: bool, broker: Broker | None) -> None:
        self.system, self.case, self._verb, self._broker = system, case, verb, broker
        self.servers: list[Worker] = []
        self.clients: list[Worker] = []
        self._cpu = max(os.sched_getaffinity(0)) if pinned else None
        self._directory = tempfile.mkdtemp(prefix="oh-bench-")
        try:
            self._start()
        except BaseException:
            self.end()
            raise

    def _setup(self, index: int, name: str) -> Setup:
        return Setup(
            message=self.case.message,
            callers=self.case.callers,
            service=f"bench-{index}" if self.case.paired else "bench",
            name=name,
            directory=self._directory,
            broker=self._broker.url if self._broker else "",
            receivers=self.case.receivers,
            cpu=self._cpu,
        )

    def _start(self) -> None:
        self.servers += [Worker("server", self.system, self._setup(i, f"server-{i}")) for i in range(self.case.servers)]
        addresses = [each.answer(START_LIMIT) for each in self.servers]
        self.clients += [Worker("client", self.system, self._setup(i, f"client-{i}")) for i in range(self.case.clients)]
        for index, client in enumerate(self.clients):
            client.answer(START_LIMIT)
            client.ask("connect", addresses=addresses[index : index + 1] if self.case.paired else addresses)
        self.window(WARM_UP)

    def _clocks(self) -> tuple[float, float, float]:
        broker = sum(map(cpu_seconds, family(self._broker.pid))) if self._broker else 0.0
        return sum(each.cpu() for each in self.clients), sum(each.cpu() for each in self.servers), broker

    def window(self, seconds: float) -> Figures:
        """Measure once. Rates are calls, or deliveries, per second; times are in microseconds, CPU per call."""
        arguments = {"callers": self.case.callers} if self._verb == "run" else {}
        received = [each.ask("received") for each in self.servers] if not arguments else []
        before, began = self._clocks(), time.monotonic()
        for each in self.clients:
            each.send(self._verb, seconds=seconds, **arguments)
        for each in self.clients:
            each.answer(seconds + ANSWER_LIMIT)
        if not arguments:
            return self._arrived(received, before, began)
        cpu = [after - then for after, then in zip(self._clocks(), before, strict=True)]
        samples = self._samples()
        return figures(samples, sum(each.calls / each.seconds for each in samples), cpu)

    def _samples(self) -> list[Sample]:
        return [msgspec.convert(each.ask("sample"), Sample) for each in self.clients]

    def _arrived(self, received: list[int], before: tuple[float, ...], began: float) -> Figures:
        samples = self._samples()
        # Each of the servers of a fan-out gets all, those of a stream share them: there is one.
        sent = sum(each.calls for each in samples) * self.case.receivers
        for each, count in zip(self.servers, received, strict=True):
            each.send("settle", count=count + sent, patience=PATIENCE)
        settled = [each.answer() for each in self.servers]
        cpu = [after - then for after, then in zip(self._clocks(), before, strict=True)]
        arrived = sum(count for count, _ in settled) - sum(received)
        rate = arrived / (max(last for _, last in settled) - began)
        return figures(samples, rate, cpu, arrived) | {"lost": float(sent * len(self.servers) - arrived)}

    def memory(self) -> Figures:
        """Resident memory of the largest client and server, and of the broker, in MiB."""
        return {
            "rss_client": max(resident(each.pid) for each in self.clients),
            "rss_server": max(resident(each.pid) for each in self.servers),
            "rss_broker": sum(map(resident, family(self._broker.pid))) if self._broker else 0.0,
        }

    def end(self) -> None:
        """End all its processes, and remove what they left. May be called twice."""
        for each in (*self.clients, *self.servers):
            each.end()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


def figures(samples: list[Sample], rate: float, cpu: list[float], count: int = 0) -> Figures:
    """What one window showed. ``cpu`` is that of clients, servers and broker, in seconds; ``count`` what it was for."""
    latencies = sorted(latency * 1e6 for each in samples for latency in each.latencies)
    count = count or sum(each.calls for each in samples) or 1
    client, server, broker = (seconds / count * 1e6 for seconds in cpu)
    return {
        "rate": rate,
        "p50": percentile(latencies, 0.5),
        "p99": percentile(latencies, 0.99),
        "cpu": client + server + broker,
        "cpu_client": client,
        "cpu_server": server,
        "cpu_broker": broker,
        "lost": float(sum(each.lost for each in samples)),
    }


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which ``share`` of them are; 0 of none."""
    return ordered[int((len(ordered) - 1) * share)] if ordered else 0.0


# --- rounds ---------------------------------------------------------------------------------------------------------


class Contender:
    """One system in one table. Once it has failed it is passed over, and the others go on."""

    def __init__(self, system: System, say: Say) -> None:
        self.system = system
        self.running: Running | None = None
        self.rounds: list[Figures] = []
        self.memory: Figures = {}
        self.error = ""
        self._say = say

    def attempt(self, action: Callable[[Contender], None]) -> None:
        """Do ``action`` with it, unless something has failed before."""
        if self.error:
            return
        try:
            action(self)
        except RuntimeError as error:
            self.error = str(error)
            self._say(f"  {self.system.name} failed: {self.error.splitlines()[-1]}")

    def measure(self, seconds: float) -> None:
        """One window."""
        assert self.running is not None
        self.rounds.append(self.running.window(seconds))
        self.memory = self.running.memory()

    def row(self) -> Row:
        """Medians over the rounds, the rounds themselves, or the error."""
        told: Row = {"system": self.system.name, "kind": self.system.kind}
        if self.error:
            return told | {"error": self.error}
        medians = {key: statistics.median(each[key] for each in self.rounds) for key in self.rounds[0]}
        lost = sum(each["lost"] for each in self.rounds)
        return told | medians | {"lost": lost} | self.memory | {"rounds": self.rounds}


def interleave(systems: Sequence[System], case: Case, verb: str, pinned: bool, options: Options, say: Say) -> list[Row]:
    """Start all the systems, then measure each in turn in every round; returns a row for each."""
    contenders = [Contender(each, say) for each in systems]
    with ExitStack() as stack:
        brokers: dict[str, Broker] = {}

        def start(one: Contender) -> None:
            name = one.system.broker
            if name and name not in brokers:
                brokers[name] = stack.enter_context(BROKERS[name]())
            one.running = stack.enter_context(Running(one.system, case, verb, pinned, brokers.get(name)))

        for each in contenders:
            each.attempt(start)
        for _ in range(options.rounds):
            for each in contenders:
                each.attempt(lambda one: one.measure(options.seconds))
    told = {"case": case.name, "message": case.message, "clients": case.clients, "callers": case.callers}
    return [told | each.row() for each in contenders]
