"""Thousands of nodes at one registry, as in a cloud: few controllers follow all agents, agents follow controllers.

    python tests/system/crowd.py --registry etcd --nodes 2000 --processes 8

Each node is a registry instance of its own, with its own lease and connection, which announces a record as a node that
serves does, and follows one service. (Whole nodes would measure the threads and sockets of 2,000 processes in eight.)
Everything runs in a network namespace of its own, whose traffic is that of the registry.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # its directory is in the path then, and not the repository
    sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.system.beyond import Registry, rank

from onehop.interfaces import Record
from onehop.testing.hosts import Host, Hosts

CONTROLLERS = 250  # one node of so many is one
JOIN_WITHIN = 120.0


def record(number: int, service: str) -> Record:
    return Record(
        node=f"{number:032x}", host=f"host-{number}", pid=number, version="0.1.0",
        endpoints=(f"ipc:///run/onehop/default/{number:016x}.sock", f"tcp://10.0.{number // 250}.{number % 250}:9502"),
        services={service: (f"host-{number}",)},
    )  # fmt: skip


def member(url: str, first: int, count: int, total: int) -> None:
    """One process of the crowd: its nodes join when a line is read; it says when each knows whom it wants."""
    import threading
    from collections.abc import Sequence
    from concurrent.futures import ThreadPoolExecutor

    from onehop.registry import open_registry
    from onehop.settings import Settings

    # Hundreds of threads that wait for one interpreter would spend the time on switching; as processes they do not.
    sys.setswitchinterval(0.05)
    controllers = total // CONTROLLERS
    settings = Settings(registry=url, cache_directory="none")
    registries = [open_registry(url, settings) for _ in range(count)]
    complete = threading.Semaphore(0)

    def join(index: int) -> None:
        number = first + index
        is_controller = number % CONTROLLERS == 0
        wanted = total - controllers if is_controller else controllers
        known = False

        def deliver(records: Sequence[Record]) -> None:
            nonlocal known
            if not known and len(records) == wanted:
                known = True
                complete.release()

        registries[index].announce(record(number, "conductor" if is_controller else "agent"))
        registries[index].watch(deliver)
        registries[index].want("agent" if is_controller else "conductor", JOIN_WITHIN)

    def say(**words: Any) -> None:
        print(json.dumps(words), flush=True)

    say(ready=True)
    sys.stdin.readline()
    with ThreadPoolExecutor(16) as pool:
        for _ in pool.map(join, range(count)):
            pass
    say(announced=time.monotonic())
    for _ in range(count):
        complete.acquire(timeout=JOIN_WITHIN)
    say(complete=time.monotonic())
    for _ in sys.stdin:
        usage = Path("/proc/self/status").read_text()
        resident = int(usage.split("VmRSS:")[1].split()[0])
        say(cpu=time.process_time(), resident=resident, threads=threading.active_count())
    for each in registries:
        each.close()


def memory(url: str, wanted: int) -> None:
    """Says how many bytes a node takes for each record that it knows."""
    import onehop

    node = onehop.Node(registry=url, cache_directory="none")
    node.wait_for("conductor", timeout=10.0)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    node.wait_for("agent", count=wanted, timeout=60.0)
    time.sleep(1.0)
    print(json.dumps({"bytes": (tracemalloc.get_traced_memory()[0] - before) / wanted}), flush=True)


class Member:
    def __init__(self, host: Host, *words: object) -> None:
        self.process = host.start(
            [sys.executable, __file__, *map(str, words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"a process of the crowd ended with {self.process.wait(10)}"
        words: dict[str, Any] = json.loads(line)
        return words

    def tell(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()


def processor(pid: int) -> float:
    """Seconds of processor's time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def traffic(pid: int) -> int:
    """Bytes that have passed the loopback of a process's network."""
    lines = Path(f"/proc/{pid}/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[0]) for line in lines if line.strip().startswith("lo:"))


def gather(kind: str, nodes: int, processes: int, steady: float) -> dict[str, Any]:
    """Let the crowd join a registry of that kind, and rest."""
    with Hosts(1) as hosts, Registry(kind, hosts) as registry:
        share = nodes // processes
        members = [Member(hosts[0], "member", registry.url, share * each, share, nodes) for each in range(processes)]
        for each in members:
            each.hear()
        began, cpu_before = time.monotonic(), processor(registry.pid)
        for each in members:
            each.tell()
        announced = [each.hear()["announced"] - began for each in members]
        complete = [each.hear()["complete"] - began for each in members]
        joined_cpu = processor(registry.pid) - cpu_before
        time.sleep(3.0)  # until what is put off is done too

        def look() -> tuple[float, int, float, list[dict[str, Any]]]:
            for each in members:
                each.tell()
            said = [each.hear() for each in members]
            return processor(registry.pid), traffic(registry.pid), sum(each["cpu"] for each in said), said

        at, first = time.monotonic(), look()
        time.sleep(steady)
        last = look()
        seconds = time.monotonic() - at
        probe = Member(hosts[0], "memory", registry.url, nodes - nodes // CONTROLLERS)
        found = {
            "registry": kind,
            "nodes": nodes,
            "all announced, s": max(announced),
            "all know whom they want, s": max(complete),
            "p50 of the processes, s": rank(complete, 0.5),
            "registry's CPU of the join, s": joined_cpu,
            "registry's CPU at rest, us a node and second": (last[0] - first[0]) / seconds / nodes * 1e6,
            "registry's CPU at rest, % of a processor": (last[0] - first[0]) / seconds * 100,
            "traffic at rest, bytes a node and second": (last[1] - first[1]) / seconds / nodes,
            "nodes' CPU at rest, us a node and second": (last[2] - first[2]) / seconds / nodes * 1e6,
            "nodes' memory, KiB a node": sum(each["resident"] for each in last[3]) / nodes,
            "threads a node": sum(each["threads"] for each in last[3]) / nodes,
            "bytes a known record": probe.hear()["bytes"],
        }
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in found.items()}


def main() -> None:
    if sys.argv[1:2] == ["member"]:
        url, first, count, total = sys.argv[2:]
        member(url, int(first), int(count), int(total))
        return
    if sys.argv[1:2] == ["memory"]:
        memory(sys.argv[2], int(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--registry", choices=("etcd", "zookeeper", "redis"), nargs="+", required=True)
    parser.add_argument("--nodes", type=int, default=2_000)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--steady", type=float, default=20.0, help="seconds of rest that are measured")
    given = parser.parse_args()
    for kind in given.registry:
        print(json.dumps(gather(kind, given.nodes, given.processes, given.steady), indent=1), flush=True)


if __name__ == "__main__":
    main()
