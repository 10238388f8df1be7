"""Many threads on one client, and a loop, against two server processes; every reply is checked against its request.

::

    python tests/system/stress.py --calls 1000000 --threads 64

Beside the threads, which share one node, a loop of the same process has a node of its own, on which as many tasks call
as there are threads; some more of its tasks call on the threads' node, by way of ``asyncio.to_thread``. Calls have
random deadlines from half a millisecond to 30 s; some handlers are slow; some requests are casts; threads end and
others start. At the end stands a ledger in which everything must be accounted for: a request without an outcome, a
reply to another's request, a request that ran twice, a stall, or a table that is not empty is a failure.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # its directory is in the path then, and not the repository
    sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.system.progress import Progress, end_with

import onehop
import onehop.asyncio

SERVER = """
import sys, threading, time
import onehop

lock = threading.Lock()
seen, casts = {}, {}  # by thread: what ran, a byte each, since ten million may
twice = []

def mark(table, thread, number):
    with lock:
        ran = table.setdefault(thread, bytearray(500))
        if ran[number]:
            twice.append((thread, number))
        ran[number] = 1

def echo(thread, number, seconds):
    mark(seen, thread, number)
    if seconds:
        time.sleep(seconds)
    return [thread, number]

def note(thread, number):
    mark(casts, thread, number)

def report():
    now = node.statistics()
    with lock:
        return {"ran": sum(map(sum, seen.values())), "casts": sum(map(sum, casts.values())),
                "twice": twice[:10], "waiting": now.waiting,
                "refused": now.refused, "received": now.received, "dropped": now.dropped}

node = onehop.Node()
node.serve("stress", {"echo": echo, "note": note, "report": onehop.method(inline=True)(report)}, server=sys.argv[1])
print("serving", flush=True)
sys.stdin.read()
"""

DEADLINES = (0.0005, 0.001, 0.002, 0.005, *[30.0] * 60)
STALL = 1.0
GUESTS = 4
"""Tasks of the loop that call on the threads' node."""


class Stress:
    """One run.

    Args:
        calls: how many calls, all threads together.
        threads: how many at a time; each ends after some calls, and another takes its place.
        seed: of the choice of deadlines, casts and slow handlers.
    """

    def __init__(self, calls: int, threads: int, seed: int) -> None:
        self.calls = calls
        self.threads = threads
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[Any] = []
        self.longest_stalls = [0.0, 0.0, 0.0]
        self.longest_gap = 0.0
        self.worst_overrun = 0.0
        self._seed = seed
        self._lock = threading.Lock()
        self._begun = 0
        self._ended = 0
        self._numbers = 0
        self._ended_in_loop = [0, 0]
        self.loop_in_flight = -1

    def run(self) -> bool:
        """Run it and print the ledger; whether all adds up."""
        servers = [
            subprocess.Popen([sys.executable, "-c", SERVER, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            for name in ("a", "b")
        ]
        try:
            for each in servers:
                assert each.stdout is not None
                assert each.stdout.readline() == b"serving\n"
            with onehop.Node() as node:
                assert node.wait_for("stress", count=2, timeout=10.0)
                return self._measure(node)
        finally:
            for each in servers:
                each.kill()
                each.wait()
                for end in (each.stdin, each.stdout):
                    assert end is not None
                    end.close()

    async def _loop(self, shared: onehop.Client) -> None:
        async with onehop.asyncio.Node() as node:
            assert await node.wait_for("stress", count=2, timeout=10.0)
            client = node.client("stress", timeout=30.0)
            tasks = [self._task(client.call, 0) for _ in range(self.threads)]
            guests = [self._task(partial(asyncio.to_thread, shared.call), 1) for _ in range(GUESTS)]
            await asyncio.gather(*tasks, *guests)
            self.loop_in_flight = sum(peer.in_flight for peer in node.statistics().peers)

    async def _task(self, call: Callable[..., Awaitable[Any]], which: int) -> None:
        while (taken := self._take()) is not None:
            thread, share = taken
            outcomes: Counter[str] = Counter()
            for number in range(share):
                try:
                    reply = await call("echo", thread, number, 0)
                    outcomes["replied"] += 1
                    if reply != [thread, number]:
                        self.wrong.append((thread, number, reply))
                except BaseException as error:
                    self.wrong.append((thread, number, repr(error)))
                self._ended += 1
                self._ended_in_loop[which] += 1
            with self._lock:
                self.outcomes += outcomes

    def _take(self) -> tuple[int, int] | None:
        """The next share of the calls: whose it is, and how many; None when all have begun."""
        with self._lock:
            if self._begun >= self.calls:
                return None
            self._numbers += 1
            share = random.Random(self._seed + self._numbers).randint(50, 500)
            share = min(share, self.calls - self._begun)
            self._begun += share
            return self._numbers, share

    def _measure(self, node: onehop.Node) -> bool:
        client = node.client("stress", timeout=30.0)
        client.call("echo", -1, 0, 0), client.call("echo", -1, 1, 0)
        began = time.monotonic()
        slots = [threading.Thread(target=self._slot, args=(client,)) for _ in range(self.threads)]
        slots.append(threading.Thread(target=lambda: asyncio.run(self._loop(client))))
        watcher = threading.Thread(target=self._watch, args=(slots,))
        with Progress(self.calls, "calls", lambda: self._ended):
            for each in slots:
                each.start()
            watcher.start()
            for each in slots:
                each.join()
            watcher.join()
        seconds = time.monotonic() - began
        return self._judge(node, client, seconds)

    def _slot(self, client: onehop.Client) -> None:
        """One thread after another, until enough calls were made."""
        while (taken := self._take()) is not None:
            worker = threading.Thread(target=self._work, args=(client, *taken))
            worker.start()
            worker.join()

    def _work(self, client: onehop.Client, thread: int, share: int) -> None:
        dice = random.Random(self._seed * 1_000_003 + thread)
        outcomes: Counter[str] = Counter()
        by_deadline = {deadline: client.options(timeout=deadline) for deadline in set(DEADLINES)}
        worst = 0.0
        for number in range(share):
            deadline = dice.choice(DEADLINES)
            seconds = dice.choice((0.001, 0.003)) if dice.random() < 0.01 else 0
            began = time.monotonic()
            try:
                reply = by_deadline[deadline].call("echo", thread, number, seconds)
                outcomes["replied"] += 1
                if reply != [thread, number]:
                    self.wrong.append((thread, number, reply))
            except onehop.CallError as error:
                outcomes[f"{type(error).__name__}, executed {error.executed}"] += 1
                if deadline == 30.0:
                    self.wrong.append((thread, number, repr(error)))
            except BaseException as error:
                self.wrong.append((thread, number, repr(error)))
            worst = max(worst, time.monotonic() - began - deadline)
            self._ended += 1  # not exact under threads, and need not be: it is watched for standing still
            if dice.random() < 0.1:
                try:
                    client.cast("note", thread, number)
                    outcomes["cast"] += 1
                except onehop.OnehopError as error:
                    self.wrong.append((thread, number, repr(error)))
        with self._lock:
            self.outcomes += outcomes
            self.worst_overrun = max(self.worst_overrun, worst)

    def _watch(self, slots: list[threading.Thread]) -> None:
        """The longest times in which no call ended: of all, of the loop, and of the loop on the threads' node."""
        began = time.monotonic()
        last, changed, looked = [-1, 0, 0], [began] * 3, began
        pause = threading.Event()
        while any(each.is_alive() for each in slots):
            pause.wait(0.02)
            now, ended = time.monotonic(), [self._ended, *self._ended_in_loop]
            self.longest_gap, looked = max(self.longest_gap, now - looked), now
            for which in range(3):
                if which == 0 or (ended[which] > 0 and self._begun < self.calls):
                    self.longest_stalls[which] = max(self.longest_stalls[which], now - changed[which])
                if ended[which] != last[which] or ended[which] == 0:
                    last[which], changed[which] = ended[which], now

    def _judge(self, node: onehop.Node, client: onehop.Client, seconds: float) -> bool:
        reports = [client.at(name).call("report") for name in ("a", "b")]
        now, until = node.statistics(), time.monotonic() + 5.0
        # A cast that was taken in may wait for its worker, a call that was cancelled for its turn to be passed by, and
        # an echo for its answer.
        while time.monotonic() < until and (
            sum(each["casts"] for each in reports) < self.outcomes["cast"]
            or any(each["waiting"] for each in reports)
            or any(peer.in_flight for peer in now.peers)
        ):
            reports = [client.at(name).call("report") for name in ("a", "b")]
            now = node.statistics()
        ended = sum(count for outcome, count in self.outcomes.items() if outcome != "cast")
        ran = sum(each["ran"] for each in reports) - 2
        unknown = sum(count for outcome, count in self.outcomes.items() if outcome.endswith("unknown"))
        casts = sum(each["casts"] for each in reports)
        print(f"{ended} calls by {self._numbers} threads, {self.threads} at a time, in {seconds:.1f} s: "
              f"{ended / seconds:.0f} calls/s")  # fmt: skip
        for outcome, count in sorted(self.outcomes.items()):
            print(f"  {outcome}: {count}")
        print(f"  ran: {ran} calls, {casts} casts | late replies dropped: {sum(peer.late for peer in now.peers)}")
        print(
            f"  longest stall {self.longest_stalls[0]:.3f} s, of the loop's {self._ended_in_loop[0]} calls "
            f"{self.longest_stalls[1]:.3f} s, of its {self._ended_in_loop[1]} on the threads' node "
            f"{self.longest_stalls[2]:.3f} s; worst overrun of a deadline {self.worst_overrun:.3f} s"
        )
        print(f"  longest time in which who watches was not run itself: {self.longest_gap:.3f} s")
        for each in reports:
            print(f"  server: {each}")
        checks = {
            "every call has an outcome": ended == self.calls,
            "every reply belongs to its request, no 30 s call failed": self.wrong == [],
            "nothing ran twice": all(each["twice"] == [] for each in reports),
            "replied <= ran <= replied + unknown": self.outcomes["replied"]
            <= ran
            <= self.outcomes["replied"] + unknown,
            "every cast ran": casts == self.outcomes["cast"],
            "no stall above 1 s": max(self.longest_stalls) < STALL + self.longest_gap,
            "tables are empty": all(peer.in_flight == 0 for peer in now.peers) and self.loop_in_flight == 0,
            "the servers' queues are empty": all(each["waiting"] == 0 for each in reports),
        }
        for check, holds in checks.items():
            print(f"  {'ok  ' if holds else 'FAIL'} {check}")
        for each in self.wrong[:10]:
            print(f"  wrong: {each}")
        return all(checks.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()

    def run() -> bool:
        directory = tempfile.mkdtemp(prefix="oh-", dir="/tmp")
        os.environ["ONEHOP_RUN_DIRECTORY"] = directory
        try:
            return Stress(options.calls, options.threads, options.seed).run()
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    end_with(run)


if __name__ == "__main__":
    main()
