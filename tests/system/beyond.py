"""What is promised beyond one host, measured between test hosts, with the real server of each registry.

In the tests in a short form; the long one::

    python tests/system/beyond.py --registry etcd --joins 100 --outage 600

The first host has the registry's server, the others run the programs below. All read one clock: the hosts are
namespaces of one machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from onehop.testing.hosts import Host, Hosts

KINDS = ("hosts", "etcd", "zookeeper", "redis")
START_WITHIN = 60.0
JOINS_A_SECOND = 100.0
MOST_ATTEMPTS = 300.0
"""To connect to a server that is started again, in any second."""
JVM = ("java", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Dzookeeper.jmx.log4j.disable=true")

PRELUDE = """
import json, os, signal, sys, threading, time
import onehop

def say(**words):
    print(json.dumps(words), flush=True)
"""

SERVER = """
# server's name, service
name, service = sys.argv[1:3]
ran = []
class Echo:
    def name(self):
        return name
    def node(self, wanted=""):
        ran.append(wanted)
        return node.id
    def ran(self):
        return ran
    def connections(self):
        return len(node._core().protocol.inbox.senders)
node = onehop.Node()
before = time.monotonic()
node.serve(service, Echo(), server=name)
say(before=before, after=time.monotonic(), node=node.id)
node.run()
"""

JOINS = """
# a node joins under each name that is read, and leaves at the next line
for line in sys.stdin:
    node = onehop.Node()
    before = time.monotonic()
    node.serve("join", {"name": lambda: 1}, server=line.strip())
    say(before=before, after=time.monotonic())
    sys.stdin.readline()
    node.close()
    say(left=time.monotonic())
"""

REACHES = """
# for each server named: when a call that begins before it is there reaches it
node = onehop.Node(ready_timeout=20.0)
node.wait_for("join", timeout=0.01)
say(ready=True)
for line in sys.stdin:
    name = line.strip()
    node.client("join", server=name, timeout=25.0).call("name")
    say(reached=time.monotonic())
"""

LOAD = """
# calls at a rate (a second), by some threads, until a line is read; service, rate, timeout of each
service, rate, timeout = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
threads = max(4, int(rate / 50))
node = onehop.Node(timeout=timeout)
node.wait_for(service, timeout=30.0)
client = node.client(service)
results, stop, lock = [], threading.Event(), threading.Lock()

def work(number):
    due = time.monotonic() + number / rate
    mine = []
    while not stop.is_set():
        left = due - time.monotonic()
        if left > 0:
            time.sleep(left)
        began = time.monotonic()
        try:
            answer = client.call("name")
            mine.append((began, time.monotonic(), "ok", answer))
        except onehop.CallError as error:
            mine.append((began, time.monotonic(), type(error).__name__ + " " + error.executed, str(error)[:200]))
        due += threads / rate
    with lock:
        results.extend(mine)

working = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
for each in working:
    each.start()
say(ready=True)
sys.stdin.readline()
stop.set()
for each in working:
    each.join()
cpu = time.process_time()
say(results=sorted(results), cpu=cpu)
"""

IDLE = """
# a node that has used a service and rests; the processor's time that its process takes between two lines
service = sys.argv[1]
node = onehop.Node(ready_timeout=10.0)
node.call(service, "name")
say(ready=True)
for line in sys.stdin:
    say(at=time.monotonic(), cpu=time.process_time(), servers=len(node.servers(service)))
"""

CALLERS = """
# so many nodes in one loop, which call a service now and then; says how many were answered, and by a second server
service, count, sessions = sys.argv[1], int(sys.argv[2]), sys.argv[3]
period, pace = map(float, sys.argv[4:6])
import asyncio, random
from collections import Counter
from onehop.asyncio import Node
from onehop.faces import parts_of
from onehop.settings import from_environment

class Session:
    # Nodes that hear the news from one session at the registry. With one each, the threads of 2,000 hear them at once,
    # and the machine does nothing else for seconds. What a node makes of the news, and when, is its own affair.
    addresses = ()
    def __init__(self):
        self.carrier, self.registry_of_all, _ = parts_of(settings, None)
        self.delivering, self.delivers, self.records = threading.Lock(), [], None
    def registry(self):
        return self
    def endpoint(self, node):
        raise NotImplementedError("none of these nodes serves")
    def watch(self, deliver):
        with self.delivering:
            self.delivers.append(deliver)
            if self.records is not None:
                deliver(self.records)
                return
        self.registry_of_all.watch(self.deliver)
    def deliver(self, records):
        with self.delivering:
            self.records = records
            for deliver in self.delivers:
                deliver(records)
    def want(self, service, timeout):
        return self.registry_of_all.want(service, timeout)
    def refresh(self):
        self.registry_of_all.refresh()
    def is_fresh(self):
        return self.registry_of_all.is_fresh()

async def work(number):
    await asyncio.sleep(number / pace)
    client = Node(settings, network=session if sessions == "one" else None).client(service)
    while True:
        try:
            by = await client.call("node")
            if answered.setdefault(number, by) != by:
                again.setdefault(number, time.monotonic())
        except onehop.CallError as error:
            failed[type(error).__name__ + " " + error.executed] += 1
        await asyncio.sleep(period * random.uniform(0.5, 1.5))

def listen():
    for line in sys.stdin:
        say(answered=len(answered), again=len(again), last=max(again.copy().values(), default=0.0), failed=failed)
    os._exit(0)

async def main():
    threading.Thread(target=listen, daemon=True).start()
    await asyncio.gather(*map(work, range(count)))

sys.setswitchinterval(0.05)  # as a process each, they would not wait for one interpreter
settings = from_environment(ready_timeout=5.0, timeout=60.0)
session, answered, again, failed = Session(), {}, {}, Counter()
asyncio.run(main())
"""


class Program:
    """A program on a host, which says one JSON object a line."""

    def __init__(self, host: Host, url: str, source: str, *arguments: str, **settings: str) -> None:
        self.name = f"{source.strip().splitlines()[0]} on {host.name}"
        variables = {"ONEHOP_REGISTRY": url} | {f"ONEHOP_{name.upper()}": value for name, value in settings.items()}
        self.process = host.start(
            [sys.executable, "-c", PRELUDE + source, *arguments],
            env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def hear(self) -> dict[str, Any]:
        """The next thing it says."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the program ended with {self.process.wait(10)}: {self.name}"
        words: dict[str, Any] = json.loads(line)
        return words

    def tell(self, line: str = "") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def ask(self, line: str = "") -> dict[str, Any]:
        self.tell(line)
        return self.hear()

    def kill(self) -> float:
        """Kill it; when."""
        self.process.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        self.process.wait(10.0)
        return killed


class Registry:
    """A registry of some kind on the first hosts: the URL that leads there, and its server, where it has one."""

    def __init__(self, kind: str, hosts: Sequence[Host]) -> None:
        self.kind, self._host = kind, hosts[0]
        self._directory = Path(tempfile.mkdtemp(prefix="oh-", dir="/tmp"))
        self._process: subprocess.Popen[bytes] | None = None
        ports = {"etcd": 2379, "zookeeper": 2181, "redis": 6379}
        self._port = ports.get(kind, 0)
        self.url = f"{kind}://{hosts[0].address}:{self._port}/"
        if kind == "hosts":
            self.url = "hosts://" + ",".join(each.address for each in hosts[:3]) + "/"

    def _command(self) -> list[str]:
        data, address = self._directory / "data", self._host.address
        data.mkdir(exist_ok=True)
        if self.kind == "redis":
            keep = ["--save", "", "--appendonly", "yes", "--dir", str(data)]
            return ["redis-server", "--port", str(self._port), "--bind", address, "--protected-mode", "no", *keep]
        if self.kind == "etcd":
            client = f"http://{address}:{self._port}"
            return ["etcd", "--data-dir", str(data), "--listen-client-urls", client, "--advertise-client-urls", client]
        (self._directory / "zoo.cfg").write_text(
            f"tickTime=200\nminSessionTimeout=500\nmaxSessionTimeout=60000\ndataDir={data}\nclientPort={self._port}\n"
            f"clientPortAddress={address}\nmaxClientCnxns=0\nadmin.enableServer=false\n4lw.commands.whitelist=*\n"
        )
        main = "org.apache.zookeeper.server.quorum.QuorumPeerMain"
        return [*JVM, "-cp", "/usr/share/java/zookeeper.jar", main, str(self._directory / "zoo.cfg")]

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> Self:
        if self.kind != "hosts":
            with open(self._directory / "log", "ab") as log:
                self._process = self._host.start(self._command(), stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            probe = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 1).close()"
            words = [sys.executable, "-c", probe, self._host.address, str(self._port)]
            until = time.monotonic() + START_WITHIN
            while self._host.run(words, stderr=subprocess.DEVNULL).returncode:
                assert self._process.poll() is None, (self._directory / "log").read_text()[-2000:]
                assert time.monotonic() < until, "the registry's server does not listen"
        return self

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def wipe(self) -> None:
        """Lose all data, and be there again."""
        self.stop()
        shutil.rmtree(self._directory / "data", ignore_errors=True)
        self.start()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self._directory, ignore_errors=True)


@contextmanager
def beyond(kind: str, count: int = 4) -> Iterator[tuple[Hosts, Registry]]:
    """So many test hosts, and a registry of that kind on the first of them."""
    with Hosts(count) as hosts, Registry(kind, hosts) as registry:
        yield hosts, registry


def wait_until(condition: Callable[[], object], within: float) -> float:
    """When ``condition`` came true."""
    until = time.monotonic() + within
    while not condition():
        assert time.monotonic() < until, f"not within {within} s"
        time.sleep(0.01)
    return time.monotonic()


def rank(values: Sequence[float], share: float) -> float:
    """The value below which that share of them lies."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


# The measurements ---------------------------------------------------------------------------------


def joins(hosts: Hosts, registry: Registry, count: int) -> dict[str, float]:
    """Seconds from the moment a server begins to announce itself until a call from another host has come back."""
    joining = Program(hosts[1], registry.url, JOINS)
    calling = Program(hosts[2], registry.url, REACHES)
    calling.hear()
    seconds = []
    for number in range(count):
        name = f"server-{number}"
        calling.tell(name)
        began = joining.ask(name)["before"]
        seconds.append(calling.hear()["reached"] - began)
        joining.ask("leave")
    return {"p50": rank(seconds, 0.5), "p99": rank(seconds, 0.99), "worst": max(seconds), "joins": count}


def death(hosts: Hosts, registry: Registry, *, power: bool) -> dict[str, Any]:
    """One of two servers is killed (or its host loses power): when the last call suffered from it, in seconds after.

    Also: the host comes back under a new address with a server of the same name, which is called for by that name.
    """
    first, second = (Program(host, registry.url, SERVER, host.name, "echo") for host in hosts[1:3])
    old = first.hear()["node"]
    second.hear()
    load = Program(hosts[3], registry.url, LOAD, "echo", "200", "20")
    load.hear()
    time.sleep(2.0)  # of load, before
    died = time.monotonic()
    if power:
        hosts.power_off(hosts[1])
    else:
        died = first.kill()
    time.sleep(9.0 if power else 3.0)
    results = load.ask()["results"]
    after = [each for each in results if each[1] > died]
    suffered = [each for each in after if each[2] != "ok" or each[1] - each[0] > 0.5]
    found: dict[str, Any] = {
        "calls": len(results),
        "outcomes": dict(Counter(each[2] for each in results)),
        "errors": sorted({each[3] for each in results if each[2] != "ok"})[:3],
        "last one that suffered began after": max((each[0] - died for each in suffered), default=0.0),
        "last one that suffered ended after": max((each[1] - died for each in suffered), default=0.0),
        "by the other": sum(each[3] == hosts[2].name for each in after),
    }
    if power:
        calling = Program(hosts[3], registry.url, REACHES_NODE, hosts[1].name, old)
        calling.hear()
        hosts.power_on(hosts[1], address="10.1.0.77")
        again = Program(hosts[1], registry.url, SERVER, hosts[1].name, "echo")
        announced = again.hear()
        reached = calling.ask()
        found["new address reached after"] = reached["reached"] - announced["after"]
        found["meant for the old one ran at the new one"] = reached["wrong"]
    return found


REACHES_NODE = """
# calls a server by name, over and over, until another node than the old one answers
name, old = sys.argv[1:3]
node = onehop.Node(ready_timeout=0.2)
say(ready=True)
sys.stdin.readline()
client = node.client("echo", server=name, timeout=2.0)
answer = old
while answer == old:
    try:
        answer = client.call("node", "new")
    except onehop.CallError:
        pass
reached = time.monotonic()
say(reached=reached, wrong=[each for each in client.call("ran") if each != "new"])
"""


def outage(hosts: Hosts, registry: Registry, seconds: float, after: float = 20.0) -> dict[str, Any]:
    """The registry is stopped under 500 calls a second between known peers, and comes back without its data.

    Args:
        seconds: how long it is away.
        after: how long the load goes on when it is back.
    """
    servers = [Program(host, registry.url, SERVER, host.name, "echo") for host in hosts[1:3]]
    for each in servers:
        each.hear()
    load = Program(hosts[3], registry.url, LOAD, "echo", "500", "20")
    idle = Program(hosts[3], registry.url, IDLE, "echo")
    load.hear()
    idle.hear()
    time.sleep(3.0)
    registry.stop()
    first = idle.ask()
    time.sleep(seconds)
    last = idle.ask()
    registry.wipe()
    back = time.monotonic()
    fresh = Program(hosts[3], registry.url, IDLE, "echo", cache_directory="none", ready_timeout="60")
    fresh.hear()
    listed = wait_until(lambda: fresh.ask()["servers"] == 2, 30.0) - back
    time.sleep(max(0.0, after - (time.monotonic() - back)))
    kept = idle.ask()["servers"]
    results = load.ask()["results"]
    return {
        "calls": len(results),
        "outcomes": dict(Counter(each[2] for each in results)),
        "errors": sorted({each[3] for each in results if each[2] != "ok"})[:3],
        "slowest call": max(each[1] - each[0] for each in results),
        "idle CPU, % of a processor": 100 * (last["cpu"] - first["cpu"]) / (last["at"] - first["at"]),
        "servers known while it was away": last["servers"],
        "all listed again after": listed,
        "servers known after that": kept,
    }


def returning(
    hosts: Hosts, registry: Registry, callers: int, processes: int, *, period: float = 5.0, sessions: str = "one"
) -> dict[str, Any]:
    """A server with so many links is killed and started again: how its callers come back.

    Args:
        callers: nodes, each of which has one link, to the only server there is.
        processes: among which they are divided.
        period: seconds between two calls of one, give or take a half.
        sessions: at the registry: "one" of each process, or one of "each" node, of which this machine bears 1,000.

    Returns:
        Seconds from its death until each was answered again, how many TCP connections to its host were tried in any
        second, and how long somebody who calls another server had to wait meanwhile.
    """
    server = Program(hosts[1], registry.url, SERVER, hosts[1].name, "echo")
    server.hear()
    Program(hosts[0], registry.url, SERVER, hosts[0].name, "calm").hear()
    others = Program(hosts[3], registry.url, LOAD, "calm", "20", "10")
    others.hear()
    share = callers // processes
    words = [str(share), sessions, str(period), str(JOINS_A_SECOND / processes)]
    crowd = [Program(hosts[2], registry.url, CALLERS, "echo", *words) for _ in range(processes)]
    callers = share * processes
    wait_until(lambda: sum(each.ask()["answered"] for each in crowd) == callers, 60.0 + callers / JOINS_A_SECOND)
    time.sleep(2.0)
    died = server.kill()
    again = Program(hosts[1], registry.url, SERVER, hosts[1].name, "echo")
    samples = []
    answered, last, failed = 0, 0.0, Counter[str]()
    while answered < callers:
        samples.append((time.monotonic(), hosts.attempts(source=hosts[2], to=hosts[1])))
        assert time.monotonic() < died + 60.0, f"{answered} of {callers} came back within a minute"
        time.sleep(0.1)
        said = [each.ask() for each in crowd]
        answered, last = sum(each["again"] for each in said), max(each["last"] for each in said)
        failed = sum((Counter(each["failed"]) for each in said), Counter())
    for _ in range(50):  # and no second storm behind it
        samples.append((time.monotonic(), hosts.attempts(source=hosts[2], to=hosts[1])))
        time.sleep(0.1)
    restarted = again.hear()["after"] - died
    rates = [
        (later[1] - first[1]) / (later[0] - first[0])
        for index, first in enumerate(samples)
        for later in [next((each for each in samples[index:] if each[0] >= first[0] + 1.0), None)]
        if later is not None
    ]
    meanwhile = [each for each in others.ask()["results"] if each[1] >= died]
    return {
        "callers": callers,
        "server was there again after": restarted,
        "all answered again after": last - died,
        "most attempts in a second": max(rates),
        "attempts": samples[-1][1] - samples[0][1],
        "calls that failed": dict(failed),
        "calls of others": len(meanwhile),
        "outcomes of others": dict(Counter(each[2] for each in meanwhile)),
        "slowest call of others": max(each[1] - each[0] for each in meanwhile),
    }


def broken(returned: dict[str, Any], within: float = 30.0, most: float = MOST_ATTEMPTS) -> list[str]:
    """What of :func:`returning`'s figures is not as promised.

    Args:
        within: seconds for all to come back.
        most: attempts in a second, fewer than which there must be.
    """
    back, attempts = returned["all answered again after"], returned["most attempts in a second"]
    wrong = [] if back < within else [f"the last one was back after {back:.1f} s only"]
    if not attempts < most:
        wrong.append(f"{attempts:.0f} attempts in a second")
    if returned["outcomes of others"].keys() != {"ok"}:
        wrong.append(f"calls of others: {returned['outcomes of others']}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--registry", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--joins", type=int, default=100, help="how many servers join, one after the other")
    parser.add_argument("--callers", type=int, default=2_000, help="links of a server that is started again")
    parser.add_argument("--sessions", choices=("one", "each"), default="one", help="one a process, or one each")
    parser.add_argument("--outage", type=float, default=20.0, help="seconds for which the registry is stopped")
    parser.add_argument("--only-restart", action="store_true", help="measure nothing but that")
    given = parser.parse_args()
    wrong: list[str] = []
    for kind in given.registry:
        found: dict[str, Any] = {"registry": kind}
        if not given.only_restart:
            with beyond(kind) as (hosts, registry):
                found["joins"] = joins(hosts, registry, given.joins)
        for power in (False, True) if not given.only_restart else ():
            with beyond(kind) as (hosts, registry):
                found["power lost" if power else "killed"] = death(hosts, registry, power=power)
        if given.callers:
            with beyond(kind) as (hosts, registry):
                found["restart"] = returning(hosts, registry, given.callers, 4, sessions=given.sessions)
                if given.sessions == "one":  # what is promised holds for that
                    wrong += [f"{kind}: {each}" for each in broken(found["restart"])]
        if kind != "hosts" and given.outage and not given.only_restart:
            with beyond(kind) as (hosts, registry):
                found["outage"] = outage(hosts, registry, given.outage)
        print(json.dumps(found, indent=1), flush=True)
    sys.exit("\n".join(wrong) or None)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
