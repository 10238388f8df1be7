"""How fast calls are on this machine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NamedTuple

import typer

import onehop
from onehop import Client, Node, OnehopError
from onehop.cli.console import AsJson, print_json, print_table

START_LIMIT = 20.0


class Echo:
    """What the bench calls."""

    @onehop.method(inline=True)
    def inline(self, value: Any) -> Any:
        """``value``, by the thread that receives."""
        return value

    def pool(self, value: Any) -> Any:
        """``value``, by a worker."""
        return value

    def cpu(self) -> float:
        """Processor time used by the server so far, in seconds."""
        return time.process_time()


class Measured(NamedTuple):
    """One line of the result. Times in microseconds."""

    run: str
    calls_per_second: int
    p50: float
    p99: float
    client_cpu: float
    server_cpu: float


def bench(
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds for each measurement.")] = 2.0,
    threads: Annotated[int, typer.Option(min=2, help="Threads that share one client.")] = 16,
    size: Annotated[int, typer.Option(min=0, help="Bytes of the argument, which comes back.")] = 1000,
    as_json: AsJson = False,
) -> None:
    """Measure calls between this process and a server of its own: rate, latency, processor time of both.

    Each method runs inline (by the server's receiving thread) and in the server's pool, called by one thread and by
    many.
    """
    found = []
    with own_server() as settings, Node(**settings) as node:
        client = node.client("bench")
        for count in (1, threads):
            for method in ("inline", "pool"):
                run = f"{method}, {count} thread{'s' if count > 1 else ''}"
                if not as_json:
                    print(f"{run}: {seconds:g} s ...", file=sys.stderr, flush=True)
                found.append(measure(client, run, method, "x" * size, count, seconds))
    if as_json:
        print_json([each._asdict() for each in found])
        return
    print_table(
        ("run", "calls/s", "p50 us", "p99 us", "client CPU us/call", "server CPU us/call"),
        found,
        f"{size} bytes to and fro, {os.cpu_count()} processors",
    )


@contextmanager
def own_server() -> Iterator[dict[str, Any]]:
    """A server process; yields the settings of a node that sees it and nothing else."""
    directory = tempfile.mkdtemp(prefix="oh-bench-", dir="/tmp")
    command = [sys.executable, "-m", "onehop", "--run-directory", directory, "--registry", "local", "--realm", "bench"]
    command += ["serve", f"{__name__}:Echo", "--name", "bench"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        settings: dict[str, Any] = {"run_directory": directory, "registry": "local", "realm": "bench"}
        with Node(**settings) as node:
            until = time.monotonic() + START_LIMIT
            while not node.wait_for("bench", timeout=0.2):
                if process.poll() is not None or time.monotonic() > until:
                    raise OnehopError("the server of the bench did not start; try: onehop serve onehop.cli.bench:Echo")
        yield settings
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(START_LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(directory, ignore_errors=True)


def measure(client: Client, run: str, method: str, value: str, threads: int, seconds: float) -> Measured:
    """Call for so many seconds from so many threads."""
    call = client.call
    for _ in range(100):  # connections and caches
        call(method, value)
    times: list[list[float]] = [[] for _ in range(threads)]
    server_before, client_before, begun = call("cpu"), time.process_time(), time.perf_counter()
    until = begun + seconds
    in_threads(lambda place: _call_until(call, method, value, until, times[place]), threads)
    took, client_cpu = time.perf_counter() - begun, time.process_time() - client_before
    server_cpu = call("cpu") - server_before
    taken = sorted(each for each_thread in times for each in each_thread)
    count = len(taken)
    return Measured(
        run,
        round(count / took),
        round(taken[count // 2] * 1e6, 1),
        round(taken[min(count - 1, count * 99 // 100)] * 1e6, 1),
        round(client_cpu / count * 1e6, 1),
        round(server_cpu / count * 1e6, 1),
    )


def _call_until(call: Callable[..., Any], method: str, value: str, until: float, times: list[float]) -> None:
    clock = time.perf_counter
    now = clock()
    while True:
        call(method, value)
        after = clock()
        times.append(after - now)
        now = after
        if now >= until:
            return


def in_threads(work: Callable[[int], None], count: int) -> None:
    """Run ``work(0)`` to ``work(count - 1)`` side by side; raises the first error of one of them."""
    errors: list[BaseException] = []

    def run(place: int) -> None:
        try:
            work(place)
        except BaseException as error:
            errors.append(error)

    if count == 1:
        return work(0)
    threads = [threading.Thread(target=run, args=(place,), daemon=True) for place in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return None
