"""Frames that are not what they should be, and bytes that are no frames, at a server, a caller and a directory.

::

    python tests/fuzz/flood.py --frames 1000000 --seconds 60

The server and the caller are processes of their own, over a file and over TCP. While the flood lasts, a well-behaved
client calls the server, and the caller under fire another: they must not notice. At the end both must live, with as
much memory as before, and must have counted what they refused.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # its directory is in the path then, and not the repository
    sys.path.insert(0, str(Path(__file__).parents[2]))

import zmq
from tests.fuzz.conftest import Fuzz
from tests.system.progress import Progress, end_with

import onehop
from onehop.protocol import wire
from onehop.registry.local import LocalRegistry
from onehop.settings import Settings
from onehop.testing.chaos.cluster import free_port

MEMORY = 16 << 20
RATE = 10_000_000
SLOW = 1_000
STALL = 5.0
STRANGER = b"a-stranger-node-"
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + b"\0" + bytes(31)  # of ZMTP 3.0, whole: 64 bytes
TO_SERVER, TO_CALLER = "frames to the server", "frames to the caller"
ENDS_A_LINK = (wire.HELLO, wire.GOODBYE)

REPORT = """
def report():
    now = node.statistics()
    return {"resident": int(open("/proc/self/statm").read().split()[1]) * 4096, "received": dict(now.received),
            "dropped": dict(now.dropped), "refused": dict(now.refused),
            "bad": bad[0], "calls": calls[0], "failed": failed[:5],
            "threads": sorted(t.name for t in threading.enumerate() if not t.name.startswith("onehop-worker"))}
"""
SERVER = (
    """
import json, logging, sys, threading
import onehop
logging.disable()  # each cast that fails is told
calls, failed, bad = [0], [], [0]
"""
    + REPORT
    + """
node = onehop.Node(**json.loads(sys.argv[1]))
node.serve("echo", {"echo": lambda *arguments, **keywords: arguments, "report": report}, server="a")
print("serving", flush=True)
sys.stdin.read()
"""
)
VICTIM = (
    """
import json, sys, threading, time
import onehop
calls, failed, bad = [0], [], [0]
"""
    + REPORT
    + """
def well():
    client = node.client("control", timeout=20.0)
    while True:
        try:
            assert client.call("add", calls[0]) == calls[0]
            calls[0] += 1
        except BaseException as error:
            failed.append(repr(error))
        time.sleep(0.01)

def ill():
    client, seen = node.client("false", timeout=0.1, ready_timeout=0.1), {}
    while True:
        try:
            client.call("read")
        except Exception:
            pass
        for peer in node.statistics().peers:
            bad[0] += max(peer.bad_frames - seen.get(peer.node, 0), 0)
            seen[peer.node] = peer.bad_frames
        time.sleep(0.001)

node = onehop.Node(**json.loads(sys.argv[1]))
node.serve("victim", {"report": report}, server="v")
for each in (well, ill):
    threading.Thread(target=each, daemon=True).start()
print("serving", flush=True)
sys.stdin.read()
"""
)


class Program:
    def __init__(self, source: str, settings: dict[str, Any]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", source, json.dumps(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "MALLOC_ARENA_MAX": "2"},  # as docs/reliability/limits.md advises, and of less chance
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"serving\n"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for each in (self.process.stdin, self.process.stdout):
            assert each is not None
            each.close()


class Legitimate:
    """Calls the server all the time."""

    def __init__(self, node: onehop.Node) -> None:
        self.client = node.client("echo", timeout=20.0)
        self.done, self.slowest = 0, 0.0
        self.failed: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            began = time.monotonic()
            try:
                if self.client.call("echo", self.done) != [self.done]:
                    self.failed.append(f"another's reply to {self.done}")
                self.done += 1
            except BaseException as error:
                self.failed.append(repr(error))
            self.slowest = max(self.slowest, time.monotonic() - began)

    def end(self) -> None:
        self._stop.set()
        self._thread.join()


def fuzz_server(endpoints: list[str], frames: int, seed: int, count: Counter[str]) -> None:
    """Send fuzzed messages to each endpoint, over connections that end now and then, and count their frames."""
    fuzz = Fuzz(seed, STRANGER)
    with zmq.Context() as context:
        while (sent := count[TO_SERVER]) < frames:
            with context.socket(zmq.DEALER) as dealer:
                dealer.linger = 0
                dealer.sndtimeo = dealer.rcvtimeo = 20_000
                dealer.connect(endpoints[sent % len(endpoints)])
                dealer.send(wire.hello(wire.Hello(fuzz.random.randbytes(16), bytes(16))))
                for number in range(min(20_000, frames - sent)):
                    message = fuzz.message()
                    dealer.send_multipart(message)
                    count[TO_SERVER] += len(message)
                    if number % 500 == 499:
                        mark = wire.pack(wire.PING, id=(1 << 62) + number)
                        dealer.send(mark)
                        while dealer.recv_multipart() != [wire.pack(wire.PONG, id=(1 << 62) + number)]:
                            pass


def fuzz_caller(directory: str, frames: int, seed: int, count: Counter[str]) -> None:
    """Be a server that answers with fuzzed frames, to whoever is connected, and count them."""
    fuzz, ids = Fuzz(seed, STRANGER), iter(range(1, 1 << 62))
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        router.set(zmq.ROUTER_MANDATORY, 1)
        endpoint = f"ipc://{directory}/false"
        router.bind(endpoint)
        registry = LocalRegistry(Settings(run_directory=directory))
        try:
            node, identity, last, silent = b"", None, 1, 0
            while count[TO_CALLER] < frames:
                if identity is None:
                    if silent % 40 == 0:  # nobody comes to it any more: be another
                        node = next(ids).to_bytes(16, "big")
                        registry.announce(onehop.Record(
                            node=node.hex(), host="f", endpoints=(endpoint,), services={"false": ("f",)}
                        ))  # fmt: skip
                    silent += 1
                while router.poll(0 if identity is not None else 25):
                    source, frame, *_ = router.recv_multipart()
                    if wire.kind_of(frame) == wire.HELLO:
                        identity, silent = source, 0
                        router.send_multipart([source, wire.hello(wire.Hello(node, bytes(16)), is_answer=True)])
                    elif len(frame) >= wire.HEADER_SIZE:
                        last = wire.header(frame).id
                if identity is None:
                    continue
                try:
                    for _ in range(64):
                        message = fuzz.message()
                        frame = bytearray(message[0])
                        if len(frame) >= wire.HEADER_SIZE:
                            if fuzz.random.random() < 0.5:
                                frame[8:16] = last.to_bytes(8, "little")  # about a call that is under way
                            if frame[0] in ENDS_A_LINK and fuzz.random.random() < 0.995:
                                frame[0] = wire.REPLY
                        router.send_multipart([identity, bytes(frame), *message[1:]], zmq.NOBLOCK)
                        count[TO_CALLER] += len(message)
                except zmq.Again:
                    time.sleep(0.002)
                except zmq.ZMQError:  # it has hung up
                    identity = None
        finally:
            registry.close()


def garbage(place: tuple[int, Any], until: float, rate: float, seed: int) -> int:
    """Send bytes that are no conversation to ``place``, over ever new connections; returns how many it took."""
    dice, sent, began = random.Random(seed), 0, time.monotonic()
    noise = dice.randbytes(65_536)
    pieces = (
        [noise], [b"GET / HTTP/1.1\r\nHost: onehop\r\n\r\n", noise],
        [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", noise],
        [GREETING[:32]], [GREETING, noise], [GREETING, b"\x04\x26\x05READY", noise], [b"\xff" * 65_536],
        [GREETING, b"\x02" + b"\xff" * 8, noise], [b"{}\n" * 20_000], [b"\n" * 65_536],
        [b"\xff" + bytes(7) + b"\x01\x7f\x01\x05"],
    )  # fmt: skip
    family, address = place
    while (now := time.monotonic()) < until:
        ahead = sent / rate - (now - began)
        if ahead > 0:
            time.sleep(min(ahead, 0.05))
            continue
        with socket.socket(family) as sock, suppress(OSError):
            sock.settimeout(2.0)
            sock.connect(address)
            for piece in dice.choice(pieces):
                sock.sendall(piece)  # the rest is not sent where it has hung up
                sent += len(piece)
    return sent


def slow(places: list[tuple[int, Any]], count: int, until: float) -> int:
    """Hold connections, and say a byte now and then; returns how many there were."""
    with ExitStack() as stack:
        held: list[socket.socket] = []
        for number in range(count):
            family, address = places[number % len(places)]
            sock = stack.enter_context(socket.socket(family))
            sock.settimeout(2.0)
            with suppress(OSError):
                sock.connect(address)
                held.append(sock)
        at = 0
        while time.monotonic() < until:
            for each in held:
                with suppress(OSError):
                    each.sendall(GREETING[at % 64 : at % 64 + 1])
            at += 1
            time.sleep(0.5)
        return len(held)


class Flood:
    """One run.

    Args:
        frames: fuzzed frames, half of them to the server and half to the caller.
        seconds: how long bytes that are no frames come beside.
        seed: of all of it.
    """

    def __init__(self, frames: int, seconds: float, seed: int) -> None:
        self.frames, self.seconds, self.seed = frames, seconds, seed
        self.directory = tempfile.mkdtemp(prefix="oh-", dir="/tmp")

    def run(self) -> bool:
        """Run it and print what happened; whether all is well."""
        ports = [free_port(), free_port()]
        settings = {
            "registry": f"hosts://127.0.0.1:{ports[0]}/", "ports": f"{ports[1]}", "insecure": True, "host": "a",
            "address": "127.0.0.1", "run_directory": f"{self.directory}/a", "cache_directory": "none",
        }  # fmt: skip
        local = {"run_directory": f"{self.directory}/b"}
        programs: list[Program] = []
        try:
            programs += [Program(SERVER, settings), Program(VICTIM, local)]
            with onehop.Node(**settings) as node, onehop.Node(**local, timeout=20.0) as beside:  # type: ignore[arg-type]
                beside.serve("control", {"add": lambda number: number}, server="c")
                return self._measure(node, beside, programs, ports)
        finally:
            for each in programs:
                each.end()
            shutil.rmtree(self.directory, ignore_errors=True)

    def _measure(self, node: onehop.Node, beside: onehop.Node, programs: list[Program], ports: list[int]) -> bool:
        [record] = [each for each in node.nodes() if "echo" in each.services]
        [path] = [each.removeprefix("ipc://") for each in record.endpoints if each.startswith("ipc:")]
        raw = [
            (socket.AF_UNIX, path),
            (socket.AF_INET, ("127.0.0.1", ports[1])),
            (socket.AF_INET, ("127.0.0.1", ports[0])),
        ]
        legitimate = Legitimate(node)
        for _ in range(20):
            legitimate.client.call("echo", 0)
        # What a first of everything takes is taken once.
        fuzz_server(list(record.endpoints), 2_000, self.seed + 1, Counter())
        fuzz_caller(f"{self.directory}/b", 2_000, self.seed + 1, Counter())
        for place in raw:
            garbage(place, time.monotonic() + 0.3, RATE, self.seed)
        slow(raw, SLOW, 0.0)
        before = [legitimate.client.call("report"), beside.call("victim", "report")]
        results: dict[str, Any] = {}

        def begin(name: str, action: Callable[..., Any], *arguments: Any) -> threading.Thread:
            def act() -> None:
                results[name] = action(*arguments)

            thread = threading.Thread(target=act)
            thread.start()
            return thread

        began = time.monotonic()
        until = began + self.seconds
        half, sent = self.frames // 2, Counter[str]()
        threads = [
            begin(TO_SERVER, fuzz_server, list(record.endpoints), half, self.seed, sent),
            begin(TO_CALLER, fuzz_caller, f"{self.directory}/b", half, self.seed, sent),
            begin("slow connections", slow, raw, SLOW, until),
            *(begin(f"garbage {number}", garbage, place, until, RATE / 3, number) for number, place in enumerate(raw)),
        ]
        with Progress(self.frames, "frames", sent.total):
            for each in threads:
                each.join()
        seconds = time.monotonic() - began
        legitimate.end()
        after = [legitimate.client.call("report"), beside.call("victim", "report")]
        grown = [(b["resident"] - a["resident"]) / (1 << 20) for a, b in zip(before, after, strict=True)]
        volume = sum(each for name, each in results.items() if name.startswith("garbage"))
        server, victim = after
        print(
            f"{sent[TO_SERVER]} fuzzed frames at a server and {sent[TO_CALLER]} at a "
            f"caller in {seconds:.1f} s, {volume / 1e6 / self.seconds:.1f} MB/s of garbage for {self.seconds:.0f} s, "
            f"{results['slow connections']} slow connections"
        )
        print(f"  the server: {grown[0]:+.1f} MiB, {server['received']}, dropped {server['dropped']}")
        print(f"  the caller: {grown[1]:+.1f} MiB, {victim['bad']} bad frames, {victim['calls']} of its other calls")
        print(f"  a well-behaved client: {legitimate.done} calls, the slowest {legitimate.slowest * 1000:.0f} ms")
        checks = {
            "both processes live": all(each.process.poll() is None for each in programs),
            "no thread of theirs ended": all(
                set(a["threads"]) <= set(b["threads"]) for a, b in zip(before, after, strict=True)
            ),
            "memory is bounded": max(grown) * (1 << 20) <= MEMORY,
            "all frames were sent": sent.total() >= self.frames,
            "the client's calls went on": legitimate.failed == [] and legitimate.slowest < STALL,
            "the caller's other calls went on": victim["failed"] == [] and victim["calls"] > before[1]["calls"],
            "bad frames are counted": server["received"]["bad frames"] > half // 10 and victim["bad"] > 0,
            "so much garbage was taken": volume > 0.5 * RATE * self.seconds,
            "slow connections were held": results["slow connections"] > 0.9 * SLOW,
            "failed handshakes are counted": server["dropped"].get("handshakes that failed", 0) > 0,
        }  # fmt: skip
        for check, holds in checks.items():
            print(f"  {'ok  ' if holds else 'FAIL'} {check}")
        for text in (*legitimate.failed[:5], *victim["failed"]):
            print(f"  wrong: {text}")
        return all(checks.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--frames", type=int, default=40_000)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    end_with(Flood(options.frames, options.seconds, options.seed).run)


if __name__ == "__main__":
    main()
