"""Many at once: a fan-out to 1,000 nodes, 1,200 open links, and the memory of each system's processes.

The nodes of the first two run in eight processes on this machine, each node with its own sockets and threads. They
announce themselves and do not watch the registry (see :mod:`benchmarks.systems.onehop_crowd`): what is measured is the
one process that calls them.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

from benchmarks.measure import START_LIMIT, Case, Failed, Options, Row, Running, Say, Worker, interleave, resident
from benchmarks.system import Setup, System
from benchmarks.systems import SYSTEMS

CROWD = SYSTEMS["onehop crowd"]
RELAYED = SYSTEMS["onehop relays"]
PROCESSES = 8
PATIENCE = 5.0
"""Seconds without a further arrival after which a copy counts as lost."""
ONCE = 1e-6
"""Seconds of a window in which there is time for one fan-out."""


def row(system: str, found: Row) -> Row:
    """A line of a table without cases."""
    return {"system": system, "kind": "onehop", **found}


# --- a fan-out to 1,000 ---------------------------------------------------------------------------------------------


def fanout_1000(systems: Sequence[System], options: Options, say: Say) -> list[Row]:
    """Time until all receipts are there, and what it costs the sender, over links that are open."""
    nodes = 200 if options.quick else 1_000
    return [fan_outs(name, of, nodes, options, say) for name, of in (("onehop", CROWD), ("onehop relays", RELAYED))]


def fan_outs(name: str, system: System, nodes: int, options: Options, say: Say) -> Row:
    """A line of the table: to each directly, or through relays."""
    case = Case("", "2048", servers=PROCESSES, receivers=nodes // PROCESSES)
    say(f"fanout-1000: starting {nodes} nodes for {name}")
    try:
        with Running(system, case, "fanout", pinned=False, broker=None) as running:
            found = [fan_out(running, nodes) for _ in range(max(5, options.rounds))]
    except Failed as error:
        return row(name, {"error": str(error)})
    return row(
        name,
        {
            "receivers": nodes,
            "processes": PROCESSES,
            "seconds": statistics.median(each.seconds for each in found),
            "slowest": max(each.seconds for each in found),
            "sender_cpu": statistics.median(each.sender_cpu for each in found),
            "lost": sum(each.lost for each in found),
        },
    )


class FanOut(NamedTuple):
    """One of them. Times in seconds."""

    seconds: float
    sender_cpu: float
    lost: int


def fan_out(running: Running, nodes: int) -> FanOut:
    """One fan-out. Its client fails if a receipt is not "taken"; the receivers count, too."""
    (client,) = running.clients
    before = [each.ask("received") for each in running.servers]
    cpu = client.cpu()
    client.ask("fanout", seconds=ONCE)
    cpu = client.cpu() - cpu
    sample = client.ask("sample")
    for each, count in zip(running.servers, before, strict=True):
        each.send("settle", count=count + nodes // PROCESSES, patience=PATIENCE)
    arrived = sum(each.answer()[0] for each in running.servers) - sum(before)
    if sample["calls"] != 1:
        raise Failed(f"{client.title} fanned out {sample['calls']} times in {ONCE} s; once was meant")
    return FanOut(sample["latencies"][0], cpu, nodes - arrived)


# --- 1,200 links ----------------------------------------------------------------------------------------------------


def links(systems: Sequence[System], options: Options, say: Say) -> list[Row]:
    """What 1,200 open links cost the process that opens them, beyond what it has imported.

    A link is open when its peer has answered over it: so one fan-out opens all. What the process needs to learn of its
    peers is counted, and told apart.
    """
    count, idle = (200, 3.0) if options.quick else (1_200, 30.0)  # two rounds of heartbeats
    say(f"links: starting {count} nodes")
    with ExitStack() as stack:
        directory = tempfile.mkdtemp(prefix="oh-bench-")
        stack.callback(shutil.rmtree, directory, ignore_errors=True)

        def start(role: str, name: str) -> Worker:
            setup = Setup("small", 1, "bench", name, directory, receivers=count // PROCESSES)
            worker = Worker(role, CROWD, setup)
            stack.callback(worker.end)
            return worker

        try:
            servers = [start("server", f"server-{number}") for number in range(PROCESSES)]
            addresses = [each.answer(START_LIMIT) for each in servers]
            opener = start("client", "client")
            opener.answer(START_LIMIT)
            return [row("onehop", {"links": count, **opened(opener, addresses, count, idle)})]
        except Failed as error:
            return [row("onehop", {"error": str(error)})]


def opened(opener: Worker, addresses: list[str], count: int, idle: float) -> Row:
    """The figures of one process that learns of its peers, opens links to all, and is left alone for ``idle`` s."""

    def stage() -> tuple[float, float]:
        return resident(opener.pid) * 1024 / count, opener.cpu() * 1e3 / count

    started = stage()
    opener.ask("connect", addresses=addresses)
    known = stage()
    opener.ask("fanout", seconds=ONCE)
    open_ = stage()
    opener.ask("fanout", seconds=ONCE)  # none is opened any more: those of a second time are the same
    time.sleep(1.0)
    cpu = opener.cpu()
    time.sleep(idle)
    return {
        "kib": open_[0] - started[0],
        "cpu_ms": open_[1] - started[1],
        "records_kib": known[0] - started[0],
        "records_cpu_ms": known[1] - started[1],
        "idle_share": (opener.cpu() - cpu) / idle,
    }


# --- memory ---------------------------------------------------------------------------------------------------------


def memory(systems: Sequence[System], options: Options, say: Say) -> list[Row]:
    """Resident memory of a client that called with 32 callers, of its server, and of the broker, in MiB."""
    case = Case("", callers=32)
    shown = ("system", "kind", "rss_client", "rss_server", "rss_broker", "error")
    rows = []
    for system in systems:
        say(f"memory: {system.name}")
        # One after another, so that each has a broker that has done nothing before.
        rows += interleave([system], case, "run", False, options._replace(rounds=1), say)
    return [{key: each[key] for key in shown if key in each} for each in rows]
