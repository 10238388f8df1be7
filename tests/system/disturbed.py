"""A server behind a proxy that delivers every message one to three times, and in another order.

::

    python tests/system/disturbed.py --requests 1000000 --threads 32 --seed 1

Both directions are disturbed, and the choice comes from the seed. Threads call and cast; the server has little room, so
that it also refuses. At the end stands a ledger: a request that ran twice, ran though its caller was told that it did
not, got another's reply or has no outcome is a failure, and so is memory that grows.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # its directory is in the path then, and not the repository
    sys.path.insert(0, str(Path(__file__).parents[2]))

import msgspec
import zmq
from tests.system.progress import Progress, end_with

import onehop
from onehop.registry.local import LocalRegistry
from onehop.settings import Settings

SERVER = """
import json, sys, threading
import onehop

lock = threading.Lock()
ran, twice = bytearray(int(sys.argv[1]) + 1), []

def note(number):
    with lock:
        if ran[number]:
            twice.append(number)
        ran[number] = 1
    return number

def report():
    now = node.statistics()
    resident = int(open("/proc/self/statm").read().split()[1]) * 4096
    with lock:
        return {"ran": sum(ran), "twice": twice[:10], "resident": resident, "refused": now.refused,
                "received": now.received, "taken": now.taken}

node = onehop.Node(inbox_messages=16)
node.serve("ledger", {"note": note, "report": report, "ran": lambda number: bool(ran[number])}, server="a")
print("serving", flush=True)
sys.stdin.read()
"""
LONGEST_DELAY = 0.004
GROWTH = 16 << 20
OUTCOME_WITHIN = 20.0


class Proxy:
    """Stands between callers and one server, whose record it shows them with its own address.

    Args:
        record: the server's.
        seed: of what comes how often, and when.
    """

    def __init__(self, record: onehop.Record, seed: int) -> None:
        self.forwarded = self.copies = 0
        self._dice = random.Random(seed)
        self._context = zmq.Context()
        self._front = self._context.socket(zmq.ROUTER)
        self._front.linger = 0
        port = self._front.bind_to_random_port("tcp://127.0.0.1", 20_000, 32_000)
        self.record = msgspec.structs.replace(record, endpoints=(f"tcp://127.0.0.1:{port}",))
        self._behind = record.endpoints[0]
        self._waiting: list[tuple[float, int, Any, list[bytes]]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def holds(self) -> bool:
        """Whether it still has messages."""
        return bool(self._waiting)

    def _disturb(self, target: Any, message: list[bytes]) -> None:
        self.forwarded += 1
        for _ in range(self._dice.randint(1, 3)):
            self.copies += 1
            due = time.monotonic() + self._dice.random() * LONGEST_DELAY
            heapq.heappush(self._waiting, (due, self.copies, target, message))

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._front, zmq.POLLIN)
        backs: dict[bytes, Any] = {}
        names: dict[Any, bytes] = {}
        while not self._stop.is_set():
            wait = self._waiting[0][0] - time.monotonic() if self._waiting else 0.1
            for socket, _ in poller.poll(max(0, int(min(wait, 0.1) * 1000))):
                for _ in range(64):
                    try:
                        parts = socket.recv_multipart(zmq.NOBLOCK)
                    except zmq.Again:
                        break
                    if socket is not self._front:
                        self._disturb(self._front, [names[socket], *parts])
                        continue
                    identity, *rest = parts
                    if identity not in backs:
                        back = backs[identity] = self._context.socket(zmq.DEALER)
                        back.linger = 0
                        back.connect(self._behind)
                        names[back] = identity
                        poller.register(back, zmq.POLLIN)
                    self._disturb(backs[identity], rest)
            now = time.monotonic()
            while self._waiting and self._waiting[0][0] <= now:
                _, _, target, message = heapq.heappop(self._waiting)
                target.send_multipart(message)
        for each in (self._front, *backs.values()):
            each.close()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._context.term()


class Disturbed:
    """One run.

    Args:
        requests: how many calls and casts, all threads together.
        threads: how many at a time.
        seed: of the proxy, and of who casts.
    """

    def __init__(self, requests: int, threads: int, seed: int) -> None:
        self.requests, self.threads, self.seed = requests, threads, seed
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[Any] = []
        self.not_run: list[int] = []
        self._lock = threading.Lock()
        self._ended = 0

    def run(self) -> bool:
        """Run it and print the ledger; whether all adds up."""
        directory = tempfile.mkdtemp(prefix="oh-", dir="/tmp")
        here, there = f"{directory}/a", f"{directory}/b"
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(self.requests)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "ONEHOP_RUN_DIRECTORY": here},
        )  # fmt: skip
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"serving\n"
            with onehop.Node(run_directory=here, timeout=OUTCOME_WITHIN) as direct:
                assert direct.wait_for("ledger", timeout=10.0)
                [record] = [each for each in direct.nodes() if "ledger" in each.services]
                proxy = Proxy(record, self.seed)
                shown = LocalRegistry(Settings(run_directory=there))
                try:
                    shown.announce(proxy.record)
                    with onehop.Node(run_directory=there, timeout=OUTCOME_WITHIN) as node:
                        return self._measure(node, direct, proxy)
                finally:
                    shown.close()
                    proxy.close()
        finally:
            server.kill()
            server.wait()
            for end in (server.stdin, server.stdout):
                assert end is not None
                end.close()
            shutil.rmtree(directory, ignore_errors=True)

    def _measure(self, node: onehop.Node, direct: onehop.Node, proxy: Proxy) -> bool:
        began = time.monotonic()
        with Progress(self.requests, "requests", lambda: self._ended):
            self._all(node, range(1, self.requests // 5))
            before = [direct.call("ledger", "report")["resident"], own_memory()]
            self._all(node, range(self.requests // 5, self.requests + 1))
        seconds = time.monotonic() - began
        sure = self.outcomes["replied"] + self.outcomes["cast taken"]
        until = time.monotonic() + OUTCOME_WITHIN
        report = direct.call("ledger", "report")
        while (proxy.holds or report["taken"] or report["ran"] < sure) and time.monotonic() < until:
            report = direct.call("ledger", "report")
        after = [report["resident"], own_memory()]
        ran_in_vain = [number for number in self.not_run if direct.call("ledger", "ran", number)]
        late = sum(peer.late for peer in node.statistics().peers)
        unknown = sum(count for outcome, count in self.outcomes.items() if outcome.endswith("unknown"))
        grown = [(b - a) / (1 << 20) for a, b in zip(before, after, strict=True)]
        print(
            f"{sum(self.outcomes.values())} requests in {seconds:.1f} s, {proxy.forwarded} messages delivered as "
            f"{proxy.copies}; {report['received'].get('duplicates', 0)} duplicates known, {late} answers too many"
        )
        for outcome, count in sorted(self.outcomes.items()):
            print(f"  {outcome}: {count}")
        print(f"  ran: {report['ran']} | refused: {json.dumps(report['refused'])}")
        print(f"  memory: the server's grew by {grown[0]:.1f} MiB, the caller's and the proxy's by {grown[1]:.1f} MiB")
        checks = {
            "every request has one outcome": sum(self.outcomes.values()) == self.requests,
            "every reply belongs to its request": self.wrong == [],
            "nothing ran twice": report["twice"] == [],
            "nothing ran whose caller heard that it did not": ran_in_vain == [],
            "replied and taken <= ran <= those and unknown": sure <= report["ran"] <= sure + unknown,
            "memory is bounded": max(grown) * (1 << 20) < GROWTH,
        }
        for check, holds in checks.items():
            print(f"  {'ok  ' if holds else 'FAIL'} {check}")
        for each in (*self.wrong[:10], *ran_in_vain[:10]):
            print(f"  wrong: {each}")
        return all(checks.values())

    def _all(self, node: onehop.Node, numbers: range) -> None:
        workers = [
            threading.Thread(target=self._work, args=(node.client("ledger"), numbers[start :: self.threads]))
            for start in range(self.threads)
        ]
        for each in workers:
            each.start()
        for each in workers:
            each.join()

    def _work(self, client: onehop.Client, numbers: range) -> None:
        outcomes: Counter[str] = Counter()
        not_run = []
        for number in numbers:
            try:
                if (number + self.seed) % 4 == 0:
                    client.cast("note", number)
                    outcomes["cast taken"] += 1
                else:
                    reply = client.call("note", number)
                    outcomes["replied"] += 1
                    if reply != number:
                        self.wrong.append((number, reply))
            except onehop.CallError as error:
                reason = getattr(error, "reason", "")
                outcomes[f"{type(error).__name__} {reason}, executed {error.executed}"] += 1
                if error.executed == "no":
                    not_run.append(number)
                elif error.executed == "yes":
                    self.wrong.append((number, repr(error)))
            except BaseException as error:
                self.wrong.append((number, repr(error)))
            self._ended += 1  # not exact under threads, and need not be
        with self._lock:
            self.outcomes += outcomes
            self.not_run += not_run


def own_memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    end_with(Disturbed(options.requests, options.threads, options.seed).run)


if __name__ == "__main__":
    main()
