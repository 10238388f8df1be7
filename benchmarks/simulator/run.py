"""oslo.messaging's simulator over ``zmq://`` and over a RabbitMQ of our own, interleaved, as ratios.

    python benchmarks/simulator/run.py [--seconds 5] [--rounds 3] [--threads 8] [--mode call|cast|fanout|notify]

Reproduces what the simulator of oslo.messaging's tools does: a client process with some threads sends messages of the
lengths that Nova sends to a server process, which answers a call with the message and its own time. Both are unchanged
oslo.messaging programs on native threads (``--green`` for eventlet); only the transport URL differs. The processor
time is that of client, server and broker together. Rates are those of what the server received.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from rabbitmq import RabbitMQ, RabbitMQMissing

# Of 1,000 messages of Nova's booting and deleting servers so many have a length from here to 499 bytes more.
LENGTHS = {
    500: 14, 1000: 26, 1500: 196, 2000: 286, 2500: 151, 3000: 37, 3500: 25, 4000: 9, 4500: 43, 5000: 61, 5500: 24,
    6000: 38, 6500: 52, 7000: 13, 7500: 13, 11000: 12,
}  # fmt: skip
TOPIC, SERVER = "simulator", "server-1"
WARM_UP = 0.5
FANOUT_SERVERS = 3


# --- the client and the server, each a process ----------------------------------------------------------------------


def connect(url: str, green: bool) -> tuple[Any, Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if green:
            import eventlet

            eventlet.monkey_patch()
        import oslo_messaging
        from oslo_config import cfg

    cfg.CONF([], project="simulator")
    return (
        oslo_messaging,
        oslo_messaging.get_rpc_transport(cfg.CONF, url),
        oslo_messaging.get_notification_transport(cfg.CONF, url),
    )


def say(value: Any) -> None:
    print(json.dumps(value), flush=True)


def serve(options: argparse.Namespace) -> None:
    messaging, rpc, notifications = connect(options.url, options.green)
    received = 0
    lock = threading.Lock()

    class Endpoint:
        def info(self, ctxt: Any, *arguments: Any, **named: Any) -> Any:
            nonlocal received
            with lock:
                received += 1
            return named["message"] | {"server_ts": time.time()} if named else None

        def received(self, ctxt: Any) -> int:
            return received

    class Listening:
        info = Endpoint.info

    endpoint = Endpoint()
    servers = [
        messaging.get_rpc_server(rpc, messaging.Target(topic=TOPIC, server=options.server), [endpoint]),
        messaging.get_notification_listener(notifications, [messaging.Target(topic=TOPIC + "-notes")], [Listening()]),
    ]
    for server in servers:
        server.start()
    say("ready")
    threading.Event().wait()  # until killed


def send(options: argparse.Namespace) -> None:
    messaging, rpc, notifications = connect(options.url, options.green)
    fanout = options.mode == "fanout"
    target = messaging.Target(topic=TOPIC, server=None if fanout else SERVER, fanout=fanout)
    shared = messaging.get_rpc_client(rpc, target, timeout=10)
    notifier = messaging.Notifier(notifications, "client", driver="messaging", topics=[TOPIC + "-notes"])
    starts = random.choices(list(LENGTHS), list(LENGTHS.values()), k=1000)
    cargo = ["".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=random.randint(s, s + 499))) for s in starts]
    ways: dict[str, Callable[[Any], Any]] = {
        "call": lambda message: shared.call({}, "info", message=message),
        "cast": lambda message: shared.cast({}, "info", message=message),
        "fanout": lambda message: shared.cast({}, "info", message=message),
        "notify": lambda message: notifier.info({}, "simulated", message),
    }
    way = ways[options.mode]
    errors: list[str] = []

    def work(until: float, seconds: list[float]) -> None:
        position = random.randrange(1000)
        for sequence in range(10**9):
            began = time.perf_counter()
            if began >= until:
                return
            position = (position + 1) % 1000
            message = {"seq": sequence, "cargo": cargo[position], "client_ts": time.time()}
            try:
                reply = way(message)
                if options.mode == "call" and (reply["seq"], reply["cargo"]) != (sequence, cargo[position]):
                    errors.append(f"the reply to {sequence} is of {reply['seq']}")
            except Exception as error:
                errors.append(repr(error)[:200])
            seconds.append(time.perf_counter() - began)

    def run(duration: float) -> list[float]:
        each: list[list[float]] = [[] for _ in range(options.threads)]
        until = time.perf_counter() + duration
        threads = [threading.Thread(target=work, args=(until, seconds)) for seconds in each]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sorted(value for seconds in each for value in seconds)

    servers = [f"server-{number + 1}" for number in range(FANOUT_SERVERS if fanout else 1)]
    direct = [messaging.get_rpc_client(rpc, messaging.Target(topic=TOPIC, server=name), timeout=30) for name in servers]

    def received() -> int:
        return sum(client.call({}, "received") for client in direct)

    def settled(wanted: int) -> int:
        """What the servers have, as soon as they have all or get no more for two seconds."""
        have, since = received(), time.monotonic()
        while have < wanted and time.monotonic() - since < 2:
            time.sleep(0.02)
            now = received()
            if now != have:
                have, since = now, time.monotonic()
        return have

    settled(len(run(WARM_UP)) * len(servers))
    before = received()
    say("begin")
    sys.stdin.readline()
    began = time.perf_counter()
    seconds = run(options.seconds)
    have = settled(before + len(seconds) * len(servers)) - before
    took = time.perf_counter() - began
    say({
        "sent": len(seconds), "received": have, "expected": len(seconds) * len(servers), "rate": have / took,
        "p50": seconds[len(seconds) // 2], "p99": seconds[len(seconds) * 99 // 100], "errors": errors[:3],
        "failed": len(errors),
    })  # fmt: skip
    sys.stdin.readline()
    os._exit(0)


# --- the comparison -------------------------------------------------------------------------------------------------


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used, in seconds."""
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Role:
    """The process of one role; says and is told lines."""

    def __init__(self, role: str, options: argparse.Namespace, url: str, server: str = SERVER) -> None:
        command = [sys.executable, "-W", "ignore", __file__, "--role", role, "--url", url, "--server", server]
        command += [f"--{name}={getattr(options, name)}" for name in ("mode", "seconds", "threads")]
        command += ["--green"] if options.green else []
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def line(self) -> Any:
        assert self.process.stdout is not None
        text = self.process.stdout.readline()
        if not text:
            raise SystemExit("a process of the simulator ended before its time; see above")
        return json.loads(text)

    def tell(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def measure(options: argparse.Namespace, url: str, broker: RabbitMQ | None) -> dict[str, Any]:
    """One run of client against server over ``url``."""
    count = FANOUT_SERVERS if options.mode == "fanout" else 1
    roles = [Role("server", options, url, f"server-{number + 1}") for number in range(count)]
    try:
        for server in roles:
            server.line()
        client = Role("client", options, url)
        roles.append(client)
        client.line()
        pids = [each.process.pid for each in roles] + ([broker.pid] if broker else [])
        before = [cpu_seconds(pid) for pid in pids]
        client.tell()
        result: dict[str, Any] = client.line()
        used = [now - then for now, then in zip(map(cpu_seconds, pids), before, strict=True)]
        result["cpu"] = sum(used) / max(1, result["received"])
        result["broker_cpu"] = used[-1] / max(1, result["received"]) if broker else 0.0
        return result
    finally:
        for each in roles:
            each.end()


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Interleaved rounds over both transports; prints each, and the medians as ratios."""
    directory = tempfile.mkdtemp(prefix="oh-", dir="/tmp")
    os.environ["ONEHOP_RUN_DIRECTORY"] = directory
    results: dict[str, list[dict[str, Any]]] = {"zmq": [], "rabbit": []}
    head = f"{'':10}{'messages/s':>12}{'p50 ms':>9}{'p99 ms':>9}{'CPU us/message':>16}{'broker':>9}{'failed':>8}"
    print(f"{options.mode}, {options.threads} threads, {options.seconds:g} s a round\n{head}", flush=True)
    try:
        with RabbitMQ() as broker:
            for _ in range(options.rounds):
                for name, url in (("zmq", "zmq://"), ("rabbit", broker.url)):
                    result = measure(options, url, broker if name == "rabbit" else None)
                    results[name].append(result)
                    show(name, result)
                    for error in result["errors"]:
                        print("   ", error)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    medians = {name: median_of(rounds) for name, rounds in results.items()}
    print("medians")
    for name, result in medians.items():
        show(name, result)
    zmq, rabbit = medians["zmq"], medians["rabbit"]
    print(
        f"zmq has {zmq['rate'] / rabbit['rate']:.1f} times RabbitMQ's rate, with 1/{rabbit['cpu'] / zmq['cpu']:.1f} of "
        f"its CPU for each message and 1/{rabbit['p50'] / zmq['p50']:.1f} of its median time"
    )
    return medians


def median_of(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: statistics.median(each[key] for each in rounds) for key in rounds[0] if key != "errors"}


def show(name: str, result: dict[str, Any]) -> None:
    print(
        f"{name:10}{result['rate']:12,.0f}{result['p50'] * 1e3:9.2f}{result['p99'] * 1e3:9.2f}"
        f"{result['cpu'] * 1e6:16,.0f}{result['broker_cpu'] * 1e6:9,.0f}{result['failed']:8.0f}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="oslo.messaging's simulator over zmq:// and RabbitMQ, interleaved")
    parser.add_argument("--mode", choices=["call", "cast", "fanout", "notify"], default="call")
    parser.add_argument("--seconds", type=float, default=5.0, help="of one round")
    parser.add_argument("--rounds", type=int, default=3, help="over each transport")
    parser.add_argument("--threads", type=int, default=8, help="of the client")
    parser.add_argument("--green", action="store_true", help="under eventlet instead of native threads")
    parser.add_argument("--json", help="write the medians to this file")
    parser.add_argument("--role", choices=["client", "server"], help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--server", default=SERVER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        {"client": send, "server": serve}[options.role](options)
        return 0
    try:
        medians = compare(options)
    except RabbitMQMissing as missing:
        print(missing, file=sys.stderr)
        return 2
    if options.json:
        Path(options.json).write_text(json.dumps(medians, indent=2))
    return 0 if not any(each["failed"] for each in medians.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
