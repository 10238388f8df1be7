"""The processes of a chaos run: started, disturbed, ended, and their ledger read."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Self

import msgspec

from onehop.errors import OnehopError
from onehop.testing.chaos import plan
from onehop.testing.chaos.plan import Fault
from onehop.testing.chaos.programs import LEDGER, NAME, NOT_DRAINED, SERVICE, Job
from onehop.testing.hosts import Host, Hosts, without_settings
from onehop.testing.ledger import Ledger, Outage, read

START_LIMIT, END_LIMIT = 60.0, 30.0
LOSS, DELAY = 0.2, 0.2
PROGRAM = (sys.executable, "-m", "onehop.testing.chaos.programs")
HOSTS_IN_THE_URL = 5
IN_LOOP = "onehop.testing.chaos.programs:OnehopInLoop"
REGISTRY_PORTS = range(15_000, 32_000)
"""Outside the ephemeral range: no connection takes the port while the registry is down."""


class Program:
    """One process.

    Args:
        name: the process's, in the ledger.
        argv: what is run.
        host: on which test host; None for this one.
        log: where its standard error goes.
        env: variables besides those of this process but for its settings, and of the test host.
    """

    def __init__(
        self, name: str, argv: Sequence[str], *, host: Host | None = None, log: Path, env: dict[str, str]
    ) -> None:
        self.name = name
        self.host = host
        self.ready = threading.Event()
        self._log = log
        start: Callable[..., subprocess.Popen[str]] = subprocess.Popen if host is None else host.start
        with open(log, "ab") as errors:
            self.process = start(
                list(argv),
                env={**without_settings(os.environ), **env} if host is None else env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        self.pid = self.process.pid
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            if lines.readline():
                self.ready.set()
            for _ in lines:
                pass

    def wait_ready(self) -> None:
        """Return when it has said that it is ready.

        Raises:
            OnehopError: it ended, or took too long; with its last words.
        """
        until = monotonic() + START_LIMIT
        while not self.ready.wait(0.02):
            if self.process.poll() is not None or monotonic() > until:
                raise OnehopError(f"{self.name} did not start: {self.last_words()}")

    def tell(self, word: str) -> None:
        """A word on its standard input.

        Raises:
            OnehopError: it has ended; with its last words.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{word}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise OnehopError(f"{self.name} (pid {self.pid}) has ended by itself: {self.last_words()}") from None

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, unless it has ended."""
        if self.process.poll() is None:
            os.kill(self.pid, number)

    def end(self) -> None:
        """Kill it, if it runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stdin is not None:
            try:
                self.process.stdin.close()
            except BrokenPipeError:
                pass

    def last_words(self) -> str:
        """The last line of its log."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


_given: set[int] = set()


def free_port() -> int:
    """A port of this host at which nobody listens.

    Never the same one twice in a process; nor one that a process beside is given, unless the numbers of the two differ
    by a multiple of 16: a server that is away for a while has its port still when it comes back.
    """
    while True:
        port = random.choice(REGISTRY_PORTS[os.getpid() % 16 :: 16])
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            if port not in _given:
                _given.add(port)
                return port


class Cluster:
    """Servers ``server-1`` and so on, and callers ``caller-1`` and so on; gone when the block ends, however it ends.

    Args:
        servers, callers: how many.
        hosts: test hosts: one for each server, then one or more for the callers. None for this host alone.
        directory: where the ledger is left; a temporary one by default.
        serve: a command that serves :class:`onehop.testing.chaos.programs.Handlers` instead of our own program.
        in_loop: which callers, counted from 0, use onehop's asyncio face.
        registry: whether a Redis server of its own is the registry, which :data:`plan.REGISTRY` needs.
        env: variables of every process of this host, besides those of this one.
        job: fields of each process's :class:`onehop.testing.chaos.programs.Job`.
    """

    def __init__(
        self,
        servers: int = 3,
        callers: int = 1,
        *,
        hosts: Hosts | None = None,
        directory: Path | None = None,
        serve: Sequence[str] = (),
        in_loop: Collection[int] = (),
        registry: bool = False,
        env: Mapping[str, str] | None = None,
        **job: Any,
    ) -> None:
        self._temporary = Path(tempfile.mkdtemp(prefix="oh-chaos-", dir="/tmp"))  # sockets need short paths
        self.directory = directory or self._temporary / "ledger"
        self.directory.mkdir(parents=True, exist_ok=True)
        self.hosts = hosts
        self.servers: list[Program] = []
        self.callers: list[Program] = []
        self.outages: list[Outage] = []
        self.events: list[tuple[float, str]] = []
        self.began = 0.0
        self._counts = (servers, callers)
        self._serve = tuple(serve)
        self._job = {"servers": servers, **job}
        if hosts is not None:
            listed = ",".join(each.address for each in hosts[:HOSTS_IN_THE_URL])
            self._job.setdefault("url", f"hosts://{listed}/")
        self._ended: list[Program] = []
        self._in_loop = in_loop
        self._env = dict(env or {})
        self._registry: Program | None = None
        self._registry_port = 0
        if registry:
            self._registry_port = free_port()
            self._job |= {
                "url": f"redis://127.0.0.1:{self._registry_port}/",
                "settings": {
                    "insecure": True,
                    "address": "127.0.0.1",
                    "cache_directory": str(self._temporary / "cache"),
                    **self._job.get("settings", {}),
                },
            }

    def __enter__(self) -> Self:
        try:
            if self._registry_port:
                self._begin_registry()
            self.servers = [self._server(place) for place in range(self._counts[0])]
            for each in self.servers:
                each.wait_ready()
            self.callers = [self._caller(place) for place in range(self._counts[1])]
            for each in self.callers:
                each.wait_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for each in [*self.callers, *self.servers, *self._ended, *filter(None, [self._registry])]:
            each.end()
        shutil.rmtree(self._temporary, ignore_errors=True)

    # Processes ----------------------------------------------------------------------------------------

    def _start(self, role: str, name: str, host: Host | None, **more: Any) -> Program:
        job = Job(name=name, directory=str(self.directory), **{**self._job, **more})
        env = {} if host else {**self._env, "ONEHOP_RUN_DIRECTORY": str(self._temporary / "run")}
        argv = [*PROGRAM, role, msgspec.json.encode(job).decode()]
        if role == "server" and self._serve:
            argv = [*self._serve, "--name", SERVICE, "--server", name, "--workers", str(job.workers)]
            env |= {LEDGER: str(self.directory), NAME: name}
        return Program(name, argv, host=host, log=self._temporary / f"{name}.log", env=env)

    def _server(self, place: int) -> Program:
        return self._start("server", f"server-{place + 1}", None if self.hosts is None else self.hosts[place])

    def _caller(self, place: int) -> Program:
        host = None if self.hosts is None else self.hosts[self._counts[0] + place % (len(self.hosts) - self._counts[0])]
        rate = self._job.get("rate", 100.0) / self._counts[1]
        face = {"over": IN_LOOP} if place in self._in_loop else {}
        seed = self._job.get("seed", 0) + place
        return self._start("caller", f"caller-{place + 1}", host, rate=rate, seed=seed, **face)

    def _begin_registry(self) -> None:
        """Start it; returns when it listens."""
        self._registry = self._start("registry", "registry", None)
        until = monotonic() + START_LIMIT
        while self._registry.process.poll() is None and monotonic() < until:
            with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", self._registry_port), 1.0):
                return
            sleep(0.01)
        raise OnehopError(f"the registry did not start: {self._registry.last_words()}")

    def start_server(self, place: int) -> Program:
        """Start the server again, in the place of one that has ended; does not wait until it is ready."""
        self._ended.append(self.servers[place])
        self.servers[place] = self._server(place)
        return self.servers[place]

    # The load -----------------------------------------------------------------------------------------

    def go(self) -> float:
        """The callers begin; returns when."""
        self.began = monotonic()
        for each in self.callers:
            each.tell("go")
        return self.began

    def rate(self, rate: float) -> None:
        """So many requests a second, the callers of the beginning together."""
        callers = self.callers[: self._counts[1]]
        for each in callers:
            each.tell(f"rate {rate / len(callers):g}")

    def add_caller(self, role: str = "caller", **job: Any) -> Program:
        """Another caller, which begins at once, with some fields of its job changed; on this host.

        Args:
            role: ``"caller"``, or ``"churn"`` for peers that come and go.
        """
        self.callers.append(self._start(role, f"{role}-{len(self.callers) + 1}", None, **job))
        self.callers[-1].wait_ready()
        self.callers[-1].tell("go")
        return self.callers[-1]

    def quiet(self) -> None:
        """The callers begin nothing more; returns when all they began has ended, and they have."""
        for each in self.callers:
            each.tell("quiet")
        self._wait(self.callers, self._job.get("timeout", 5.0) + END_LIMIT)

    def stop(self) -> Ledger:
        """:meth:`quiet`, then the servers end in order; returns the ledger.

        Raises:
            OnehopError: a process that nobody struck did not end well.
        """
        self.quiet()
        for each in self.servers:
            if each.process.poll() is None:
                each.wait_ready()  # it may have been started just now, and not know yet what to do at SIGTERM
                each.signal(signal.SIGTERM)
        self._wait(self.servers, END_LIMIT)
        struck = {each.pid for each in self.outages if each.lethal}
        for each in [*self.callers, *self.servers]:
            if each.process.returncode != 0 and each.pid not in struck:
                raise self._ended_badly(each)
        return read(self.directory)

    def _wait(self, programs: Iterable[Program], limit: float) -> None:
        until = monotonic() + limit
        for each in programs:
            try:
                each.process.wait(max(0.0, until - monotonic()))
            except subprocess.TimeoutExpired:
                raise OnehopError(
                    f"{each.name} (pid {each.pid}) has not ended after {limit:g} s: {each.last_words()}"
                ) from None

    def counts(self, name: str) -> list[dict[str, Any]]:
        """What the processes of that name (its beginning) counted; those that were killed left nothing."""
        return [json.loads(each.read_text()) for each in sorted(self.directory.glob(f"{name}*.counts.json"))]

    # Faults -------------------------------------------------------------------------------------------

    def note(self, what: str) -> None:
        """Write down that something happens now."""
        self.events.append((monotonic() - self.began, what))

    def out(self, place: int, what: str, *, lethal: bool = True) -> int:
        """An outage of that server begins; returns its number, for :meth:`over`."""
        server = self.servers[place]
        self.note(f"{server.name} (pid {server.pid}): {what}")
        self.outages.append(Outage(server.name, server.pid, monotonic(), lethal=lethal, what=what))
        return len(self.outages) - 1

    def over(self, number: int, *, noticed: float = 0.0) -> None:
        """That outage is over, or is noticed by everybody so many seconds from now."""
        outage = self.outages[number]
        self.note(f"{outage.name} (pid {outage.pid}): over ({outage.what})")
        self.outages[number] = outage._replace(ended=monotonic() + noticed)

    def kill(self, place: int) -> Outage:
        """``kill -9``.

        Raises:
            OnehopError: it had ended by itself.
        """
        self._see_alive(place)
        number = self.out(place, plan.KILL)
        self.servers[place].end()
        self.over(number)
        return self.outages[number]

    def terminate(self, place: int) -> float:
        """SIGTERM; returns when it has ended: after how many seconds.

        Raises:
            OnehopError: it had ended by itself, or ended badly.
        """
        self._see_alive(place)
        self.servers[place].wait_ready()  # before, it would not know what to do
        server, began = self.servers[place], monotonic()
        self.note(f"{server.name} (pid {server.pid}): SIGTERM")
        server.signal(signal.SIGTERM)
        self._wait([server], END_LIMIT)
        took = monotonic() - began
        self.note(f"{server.name} (pid {server.pid}): ended {server.process.returncode} after {took:.2f} s")
        if server.process.returncode != 0:
            raise self._ended_badly(server)
        return took

    def _see_alive(self, place: int) -> None:
        if self.servers[place].process.poll() is not None:
            raise self._ended_badly(self.servers[place])

    def _ended_badly(self, program: Program) -> OnehopError:
        code = program.process.returncode
        how = "without having answered everything" if code == NOT_DRAINED else f"with {code}, and nobody struck it"
        return OnehopError(f"{program.name} (pid {program.pid}) ended {how}: {program.last_words()}")

    def begin(self, kind: str, place: int) -> Callable[[], None]:
        """A fault of that kind begins; returns what ends it."""
        if kind == plan.REGISTRY:
            return self._begin_outage_of_registry()
        self._see_alive(place)
        server = self.servers[place]
        if kind in (plan.KILL, plan.ROLL):
            if kind == plan.KILL:
                self.kill(place)
            else:
                self.terminate(place)

            def restart() -> None:
                self.start_server(place)

            return restart
        number = self.out(place, kind, lethal=kind == plan.POWER)
        if kind in plan.BETWEEN_HOSTS:
            return self._begin_between_hosts(kind, place, number)
        if kind == plan.PAUSE:
            server.signal(signal.SIGSTOP)
        else:
            server.tell("hang")

        def release() -> None:
            if kind == plan.PAUSE:
                server.signal(signal.SIGCONT)
            else:
                server.tell("go on")
            self.over(number)

        return release

    def _begin_outage_of_registry(self) -> Callable[[], None]:
        if self._registry is None:
            raise OnehopError(f"the fault {plan.REGISTRY!r} needs a registry of the cluster's own")
        self.note(f"registry (pid {self._registry.pid}): {plan.KILL}")
        self._registry.end()

        def restart() -> None:
            self._begin_registry()
            assert self._registry is not None
            self.note(f"registry (pid {self._registry.pid}): started again")

        return restart

    def _begin_between_hosts(self, kind: str, place: int, number: int) -> Callable[[], None]:
        hosts = self.hosts
        if hosts is None:
            raise OnehopError(f"the fault {kind!r} needs test hosts")
        host = hosts[place]

        def impair(loss: float, delay: float) -> None:
            for source, to in ((host, None), (None, host)):
                hosts.loss(loss, source=source, to=to)
                hosts.delay(delay, source=source, to=to)

        def heal() -> None:
            if kind == plan.POWER:
                hosts.power_on(host)
                self.start_server(place)
            elif kind == plan.LOSSY:
                impair(0.0, 0.0)
            else:
                hosts.heal(host)
            self.over(number)

        if kind == plan.POWER:
            hosts.power_off(host)
        elif kind == plan.LOSSY:
            impair(LOSS, DELAY)
        elif kind == plan.DEAF:
            for other in hosts:
                if other is not host:
                    hosts.cut(other, host, one_way=True)
        else:
            hosts.cut(host, one_way=kind == plan.ONE_WAY)
        return heal

    def follow(self, faults: Iterable[Fault], seconds: float, tick: Callable[[], None] = lambda: None) -> None:
        """Let the faults of a plan happen, and return ``seconds`` after the load began.

        Args:
            tick: called now and then.
        """

        def begin(fault: Fault) -> None:
            end = self.begin(fault.kind, fault.server)
            steps.append((max(fault.at + fault.seconds, monotonic() - self.began), end))

        steps: list[tuple[float, Callable[[], None]]] = [(each.at, partial(begin, each)) for each in faults]
        while steps:
            steps.sort(key=lambda step: step[0])
            at, act = steps[0]
            self._sleep_until(at, tick)
            del steps[0]
            act()
        self._sleep_until(seconds, tick)

    def _sleep_until(self, at: float, tick: Callable[[], None]) -> None:
        while (left := self.began + at - monotonic()) > 0:
            sleep(min(left, 0.25))
            tick()
