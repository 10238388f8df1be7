"""A small Nova without a broker, some of it killed on the way, and a ledger that has to add up."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, Self

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from onehop import OnehopError, SettingsError
from onehop.cli.console import FAILED, AsJson, complain, out, print_json, print_table, terminated_as_interrupted
from onehop.cli.demo_ledger import AFTER_A_POWER_CUT, SERVERS, Ledger, Outage, percentile
from onehop.settings import redacted
from onehop.testing.hosts import Host, Hosts, HostsUnavailable

URL = "zmq:///demo"
URL_OF_HOSTS = "zmq+hosts://{}/demo"
HOSTS_IN_THE_URL = 3
VICTIMS = ("conductor-2", "compute-3")
KILL_CONDUCTOR, KILL_COMPUTE, POWER_OFF, RESTART_COMPUTE, POWER_ON = 0.25, 0.4, 0.45, 0.6, 0.7
"""When, as parts of the time of the load."""
START_LIMIT, SETTLE_LIMIT, STOP_LIMIT = 30.0, 8.0, 5.0
LOOK = 0.25
PLAIN_LOOK = 2.0
"""Seconds between two looks at the ledger, and between two lines where there is no terminal."""
CALM = 8
"""Looks without anything new after which nothing more is expected of what is open and explained."""
PROBLEMS_SHOWN = 10


def demo(
    seconds: Annotated[float, typer.Option(min=2.0, help="How long the load lasts.")] = 12.0,
    rate: Annotated[float, typer.Option(min=1.0, help="What the API begins each second.")] = 80.0,
    url: Annotated[
        str,
        typer.Option(
            metavar="URL", help=f"The transport URL to run over [default: {URL}; with --hosts zmq+hosts://...]."
        ),
    ] = "",
    hosts: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="NUMBER",
            help="Run on so many test hosts, at least 3; needs root [default: this host alone].",
        ),
    ] = 0,
    compare: Annotated[
        str, typer.Option(metavar="URL", help="Run over this transport too, such as rabbit://guest:guest@127.0.0.1/.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Run a small Nova on this host: an API, 3 conductors, a scheduler and 5 computes, each a process of its own.

    They are unchanged oslo.messaging programs without a broker. A conductor and a compute are killed (SIGKILL), the
    compute is started again. Every message stands in a ledger, which has to add up: exit code 1 if it does not.
    With --hosts, the processes are spread over hosts with addresses of their own, and one of these is without power
    for a while. A broker that is compared with keeps the demo's queues (onehop-demo-...), empty.
    """
    reports = []
    with terminated_as_interrupted(), ExitStack() as end:
        machines = end.enter_context(open_hosts(hosts, compare)) if hosts else None
        urls = [checked(each) for each in (url or default_url(machines), compare) if each]
        for each in urls:
            with Cluster(each, rate, machines) as cluster:
                show = Quiet() if as_json else (Screen(cluster) if sys.stdout.isatty() else Lines(cluster))
                with show:
                    reports.append(run(cluster, seconds, show))
    if as_json:
        print_json(reports if compare else reports[0])
    elif compare:
        side_by_side(reports)
    else:
        present(reports[0])
    if reports[0]["problems"]:
        complain(f"the ledger does not add up: {reports[0]['problems'][0]}")
        raise typer.Exit(FAILED)


@contextmanager
def open_hosts(number: int, compare: str) -> Iterator[Hosts]:
    """So many test hosts.

    Raises:
        SettingsError: there cannot be, or not so many, or not with what else was asked for.
    """
    if number < HOSTS_IN_THE_URL:
        raise SettingsError(f"--hosts is {number}; it must be {HOSTS_IN_THE_URL} or more: one of them loses its power")
    if compare:
        raise SettingsError("--hosts and --compare cannot be had together: no broker is reached from a test host")
    with ExitStack() as end:
        try:
            machines = end.enter_context(Hosts(number))
        except (HostsUnavailable, ValueError) as error:
            raise SettingsError(f"--hosts {number} cannot be had: {error}") from error
        yield machines


def default_url(machines: Hosts | None) -> str:
    """What the demo runs over where nothing else is asked for."""
    if machines is None:
        return URL
    return URL_OF_HOSTS.format(",".join(each.address for each in machines[:HOSTS_IN_THE_URL]))


def checked(url: str) -> str:
    """``url``, if oslo.messaging knows what to do with it.

    Raises:
        SettingsError: it does not, or is not installed.
    """
    if find_spec("oslo_messaging") is None:
        raise SettingsError("the demo needs oslo.messaging; pip install 'onehop[cli,oslo]'")
    with without_warnings():
        import oslo_messaging
        from oslo_config import cfg

    conf = cfg.ConfigOpts()
    conf([], project="onehop-demo")
    try:
        oslo_messaging.get_rpc_transport(conf, url=url)
    except Exception as error:  # each driver has its own
        raise SettingsError(
            f"{redacted(url)!r} is no transport URL to run over: {error}; an example is {URL}"
        ) from error
    return url


@contextmanager
def without_warnings() -> Iterator[None]:
    """For imports: what libraries of OpenStack say of each other's future is nothing for who runs a demo."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Child:
    """One process of the demo."""

    def __init__(self, cluster: Cluster, role: str, host: str) -> None:
        self.role, self.host = role, host
        self.machine = cluster.machine_of(host)
        self.state = "starting"
        self.cpu = 0.0
        self._log = cluster.directory / f"{host}.log"
        zmq = cluster.url.startswith("zmq")
        prefix = "" if zmq else f"onehop-demo-{cluster.name}-"
        arguments = [role, host, cluster.url, prefix, str(cluster.directory), str(cluster.rate)]
        start: Callable[..., subprocess.Popen[str]] = subprocess.Popen if self.machine is None else self.machine.start
        here = {**os.environ, "ONEHOP_RUN_DIRECTORY": str(cluster.directory / "run")}
        with open(self._log, "ab") as log:
            self.process = start(
                # Not with -m: an exception's module must have its own name, for the caller to make it anew.
                [sys.executable, "-c", "from onehop.cli.demo_roles import main; main()", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=here if self.machine is None else None,  # a test host has its own
                start_new_session=True,
            )
        self.pid = self.process.pid
        threading.Thread(target=self._wait_ready, daemon=True).start()

    def _wait_ready(self) -> None:
        assert self.process.stdout is not None
        if self.process.stdout.readline().strip() == "ready" and self.state == "starting":
            self.state = "up"

    @property
    def where(self) -> str:
        """Its name, and the test host's on which it runs."""
        return f"{self.host} on {self.machine.name}" if self.machine else self.host

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.state = "killed"
        self.process.kill()
        self.process.wait()

    def look(self) -> None:
        """Take down the processor time that it has used, in seconds."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return  # it has ended; what was seen last stays
        self.cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def last_words(self) -> str:
        """The last line of its log."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def close_input(self) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass

    def end(self, limit: float) -> None:
        """Wait until it has ended, at most ``limit`` seconds, then end it."""
        try:
            self.process.wait(max(0.0, limit))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


class Cluster:
    """The processes and the directory of one run; gone when the block ends, however it ends."""

    def __init__(self, url: str, rate: float, machines: Hosts | None) -> None:
        self.url, self.rate, self.machines = url, rate, machines
        self.shown_url = redacted(url)
        self.name = secrets.token_hex(3)
        self.directory = Path(tempfile.mkdtemp(prefix="oh-demo-", dir="/tmp"))  # sockets need short paths
        self.children: list[Child] = []
        self.ledger = Ledger(self.directory)
        self.outages: list[Outage] = []
        self._hosts = [(role, host) for role, hosts in SERVERS.items() for host in hosts]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(0.5)  # they have ended, unless this is an error or Ctrl-C
        shutil.rmtree(self.directory, ignore_errors=True)

    def start(self) -> None:
        """Start all, and return when all are ready."""
        self.children += [Child(self, role, host) for role, host in [*self._hosts, ("api", "api-1")]]
        until = time.monotonic() + START_LIMIT
        while not all(child.state == "up" for child in self.children):
            self.check_starting(until)
            time.sleep(0.02)

    def check_starting(self, until: float) -> None:
        """Raise if a process that is starting has ended, or has not become ready by ``until``."""
        for child in self.children:
            if child.state == "starting" and (child.process.poll() is not None or time.monotonic() > until):
                how = "ended" if child.process.returncode is not None else f"was not ready after {START_LIMIT:.0f} s"
                raise OnehopError(f"{child.host} {how} when it was started over {self.shown_url}: {child.last_words()}")

    def child(self, host: str) -> Child:
        """The latest process of ``host``."""
        return next(child for child in reversed(self.children) if child.host == host)

    def machine_of(self, host: str) -> Host | None:
        """The test host on which ``host`` runs: servers by their number, all others on the last ones."""
        if self.machines is None:
            return None
        role, _, number = host.partition("-")
        last = {"api": 1, "scheduler": 2}.get(role)
        return self.machines[-last if last else (int(number) - 1) % len(self.machines)]

    def kill(self, host: str) -> None:
        child = self.child(host)
        child.look()
        self.outages.append(Outage(host, child.pid, time.monotonic()))
        child.kill()

    def restart(self, host: str) -> None:
        self.children.append(Child(self, host.partition("-")[0], host))

    def power_off(self, machines: Hosts) -> None:
        """The first test host loses its power, and with it all that runs there."""
        for child in self._on(machines[0]):
            child.look()
            self.outages.append(Outage(child.host, child.pid, time.monotonic(), unnoticed=AFTER_A_POWER_CUT))
            child.state = "killed"
        machines.power_off(machines[0])

    def power_on(self, machines: Hosts) -> None:
        """It has power again, and starts what ran there."""
        machines.power_on(machines[0])
        for child in self._on(machines[0]):
            self.restart(child.host)

    def _on(self, machine: Host) -> list[Child]:
        return [self.child(host) for _, host in self._hosts if self.machine_of(host) is machine]

    def look(self) -> None:
        """Read the ledger on, and see who is back."""
        self.ledger.read()
        for child in self.children:
            if child.state != "killed":
                child.look()
        for place, outage in enumerate(self.outages):
            if outage.ended == float("inf") and self.child(outage.host).state == "up":
                self.outages[place] = outage._replace(ended=time.monotonic())

    def stop(self, limit: float = STOP_LIMIT) -> None:
        """End every process that runs, in order if it does so within ``limit`` seconds."""
        for child in self.children:
            child.close_input()
        until = time.monotonic() + limit
        for child in self.children:
            child.end(until - time.monotonic())


def run(cluster: Cluster, seconds: float, show: Show) -> dict[str, Any]:
    """One run: start, load, kill, restart, settle, stop; returns its report."""
    conductor, compute = VICTIMS
    begun = time.monotonic()
    show.event(f"starting {len(cluster._hosts) + 1} processes over {cluster.shown_url}")
    cluster.start()
    started = time.monotonic()
    show.event(f"all are ready after {started - begun:.1f} s; {cluster.rate:g} actions a second for {seconds:g} s")
    cluster.look()
    cpu_before = {child.pid: child.cpu for child in cluster.children}
    api = cluster.child("api-1")
    steps: list[tuple[float, str, Callable[[], None]]] = [
        (0.0, "", lambda: api.tell("go")),
        (KILL_CONDUCTOR, f"kill -9 {conductor}", lambda: cluster.kill(conductor)),
        (KILL_COMPUTE, f"kill -9 {compute}", lambda: cluster.kill(compute)),
        (RESTART_COMPUTE, f"{compute} is started again", lambda: cluster.restart(compute)),
        (1.0, "the API begins nothing more; what is under way ends", lambda: api.tell("quiet")),
    ]
    if (machines := cluster.machines) is not None:
        steps += [
            (POWER_OFF, f"{machines[0].name} is without power", lambda: cluster.power_off(machines)),
            (POWER_ON, f"{machines[0].name} has power again", lambda: cluster.power_on(machines)),
        ]
    for part, what, act in sorted(steps, key=itemgetter(0)):
        while time.monotonic() < started + part * seconds:
            time.sleep(max(0.0, min(LOOK, started + part * seconds - time.monotonic())))
            cluster.look()
            show.tick()
        if what.startswith("kill"):
            wait_until_it_works(cluster, what.split()[-1])
        act()
        if what:
            show.event(what)
    quiet = time.monotonic()
    settle(cluster, quiet + SETTLE_LIMIT, show)
    took = time.monotonic() - started
    cpu = sum(child.cpu - cpu_before.get(child.pid, 0.0) for child in cluster.children)
    show.event("nothing is under way any more; stopping")
    cluster.stop()
    cluster.look()
    show.tick()
    return report(cluster, took, cpu, time.monotonic() - begun)


def wait_until_it_works(cluster: Cluster, host: str) -> None:
    """Wait for a moment, a second at most, when killing ``host`` leaves somebody without an answer."""
    until = time.monotonic() + 1.0
    cluster.look()
    while not cluster.ledger.works_at(host) and time.monotonic() < until:
        time.sleep(0.01)
        cluster.look()


def settle(cluster: Cluster, until: float, show: Show) -> None:
    """Wait until nothing is under way: nothing new in the ledger, and no message open that can still end."""
    killed = [outage.pid for outage in cluster.outages]
    before, still = -1, 0
    while time.monotonic() < until:
        cluster.check_starting(until)
        cluster.look()
        show.tick()
        now = len(cluster.ledger.entries) + sum(cluster.ledger.ran_at.values())
        still = still + 1 if now == before else 0
        before = now
        unexplained = cluster.ledger.problems(cluster.outages)
        back = all(child.state != "starting" for child in cluster.children)
        # What a host took with it when it lost its power stays open, unless it was still with its sender.
        calm = CALM if cluster.ledger.open_calls(killed) else 2
        if back and still >= calm and not unexplained:
            return
        time.sleep(LOOK)


def report(cluster: Cluster, load_seconds: float, cpu: float, seconds: float) -> dict[str, Any]:
    """What a run came to, as JSON has it. Latencies in milliseconds."""
    ledger = cluster.ledger
    lines = ledger.lines(cluster.outages)
    sent = sum(line.sent for line in lines)
    latencies = {}
    for line in lines:
        values = ledger.latencies(line.verb)
        latencies[line.verb] = {
            name: round(percentile(values, part) * 1000, 2)
            for name, part in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99), ("max", 1.0))
        }
    killed = []
    for outage in cluster.outages:
        callers, slowest = ledger.heard(outage)
        machine = cluster.machine_of(outage.host) if outage.unnoticed == AFTER_A_POWER_CUT else None
        killed.append({
            "host": outage.host, "pid": outage.pid, "without_power": machine and machine.name,
            "callers_told": callers, "slowest_ms": round(slowest * 1000, 1),
            "back_after_seconds": None if outage.ended == float("inf") else round(outage.ended - outage.began, 2),
        })  # fmt: skip
    return {
        "url": cluster.shown_url,
        "seconds": round(seconds, 1),
        "processes": len(cluster.children),
        "ledger": {line.verb: dict(list(line._asdict().items())[1:]) for line in lines},
        "latency_ms": latencies,
        "messages_per_second": round(sent / load_seconds),
        "cpu_ms_per_message": round(cpu / max(1, sent) * 1000, 3),
        "killed": killed,
        "problems": ledger.problems(cluster.outages),
    }  # fmt: skip


# What is seen -------------------------------------------------------------------------------------


class Show:
    """Tells the person in front what happens."""

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, *_: object) -> None:
        """End."""

    def event(self, text: str) -> None:
        """Something happened."""

    def tick(self) -> None:
        """Time went on."""


class Quiet(Show):
    """Nothing, where the report is all that is wanted."""


class Lines(Show):
    """A line every two seconds and at each event, where there is no terminal."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._begun = self._last = time.monotonic()

    def event(self, text: str) -> None:
        print(f"{time.monotonic() - self._begun:5.1f} s  {text}", flush=True)

    def tick(self) -> None:
        if time.monotonic() - self._last >= PLAIN_LOOK:
            self._last = time.monotonic()
            self.event("; ".join(
                f"{NAMES[line.verb]} {line.sent} sent, {line.answered} answered"
                for line in self._cluster.ledger.lines(self._cluster.outages)
            ))  # fmt: skip


class Screen(Show):
    """A live table."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._begun = time.monotonic()
        self._events: list[str] = []
        self._live = Live(console=out(), auto_refresh=False)

    def __enter__(self) -> None:
        self._live.start()

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def event(self, text: str) -> None:
        self._events.append(f"{time.monotonic() - self._begun:5.1f} s  {text}")
        self.tick()

    def tick(self) -> None:
        ledger = self._cluster.ledger
        processes = Table("process", "pid", "state", "sent", "ran", "CPU s", title_justify="left")
        for child in self._cluster.children:
            style = {"killed": "red", "starting": "yellow"}.get(child.state, "")
            processes.add_row(
                child.where, str(child.pid), child.state, str(ledger.sent_by[child.pid]),
                str(ledger.ran_at[child.host]), f"{child.cpu:.2f}", style=style,
            )  # fmt: skip
        self._live.update(Group(processes, ledger_table(self._cluster), *map(Text, self._events)), refresh=True)


NAMES = {"call": "calls", "long": "long calls", "cast": "casts", "fanout": "fan-out copies"}


def ledger_table(cluster: Cluster) -> Table:
    """The ledger as it is now."""
    table = Table("", "sent", "answered", "refused", "unknown or open", "ran twice")
    for line in cluster.ledger.lines(cluster.outages):
        numbers = (line.sent, line.answered, line.refused, line.unknown, line.twice)
        table.add_row(NAMES[line.verb], *map(str, numbers))
    return table


def present(found: dict[str, Any]) -> None:
    """The report of one run."""
    print()
    columns = ("sent", "answered", "refused", "unknown", "executed", "twice")
    print_table(
        ("ledger", *columns, "p50 ms", "p95 ms", "p99 ms", "max ms"),
        [
            (NAMES[verb], *(line[name] for name in columns), *found["latency_ms"][verb].values())
            for verb, line in found["ledger"].items()
        ],
    )
    raised = sum(line["raised"] for line in found["ledger"].values())
    print("sent = answered + refused + unknown. Casts and fan-outs count as answered where a receiver ran them;")
    print("refused surely did not run, its server was away; unknown were with a process when it was killed.")
    print(f"{raised} of the answers were exceptions, which the callers got as what they are.")
    for each in found["killed"]:
        back = each["back_after_seconds"]
        print(
            f"{each['host']} (pid {each['pid']}) "
            + (f"was on {each['without_power']}, which lost its power" if each["without_power"] else "was killed")
            + f"; callers told that their outcome is unknown: "
            f"{each['callers_told']}, the last after {each['slowest_ms']:g} ms"
            + (f"; it was back after {back:g} s" if back else "")
        )
    print(
        f"{found['messages_per_second']} messages/s, {found['cpu_ms_per_message']:g} ms of processor time each, all "
        f"processes together; {found['seconds']:g} s in all"
    )
    print_problems(found)
    if not found["problems"]:
        print("The ledger adds up: nothing silent, nothing lost unexplained, nothing executed twice.")


def side_by_side(reports: list[dict[str, Any]]) -> None:
    """Two runs, a column each."""
    rows: list[list[object]] = []

    def row(name: str, value: Callable[[dict[str, Any]], object]) -> None:
        rows.append([name, *(value(each) for each in reports)])

    for verb, name in NAMES.items():
        for part in ("sent", "answered", "refused", "unknown", "twice"):
            row(f"{name} {part}", lambda each, verb=verb, part=part: each["ledger"][verb][part])  # type: ignore[misc]
        for part in ("p50", "p99", "max"):
            row(f"{name} {part} ms", lambda each, verb=verb, part=part: each["latency_ms"][verb][part])  # type: ignore[misc]
    for place, host in enumerate(VICTIMS):
        row(f"{host} killed: callers told", lambda each, place=place: each["killed"][place]["callers_told"])  # type: ignore[misc]
        row(f"{host} killed: the last heard after ms", lambda each, place=place: each["killed"][place]["slowest_ms"])  # type: ignore[misc]
    row("messages/s", lambda each: each["messages_per_second"])
    row("CPU ms per message, without the broker", lambda each: each["cpu_ms_per_message"])
    row("ledger adds up", lambda each: "no" if each["problems"] else "yes")
    print_table(("", *(each["url"] for each in reports)), rows)
    for each in reports:
        print_problems(each)


def print_problems(found: dict[str, Any]) -> None:
    """The first ways in which a ledger does not add up."""
    problems = found["problems"]
    if problems:
        print(f"The ledger of {found['url']} does not add up, in {len(problems)} ways:")
    for problem in problems[:PROBLEMS_SHOWN]:
        print(f"  {problem}")
