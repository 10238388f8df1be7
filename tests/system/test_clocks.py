"""Wall clocks that jump by a day: nothing of ours is measured with them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.registry.servers import Redis, free_port

FAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1"
DAY = 86_400
STALL = 5.0
"""Seconds that a busy machine may add to a deadline; a jump would add or take a day."""
LEASE = 3.0
"""Seconds; each jump is followed by more than this."""

SERVER = """
import json
node = onehop.Node(**json.loads(sys.argv[1]))
ran = []

def echo(number):
    ran.append(number)
    return number

node.serve("clock", {"echo": echo, "wall": time.time, "hang": lambda: threading.Event().wait(60), "report": lambda: [
    len(ran), len(set(ran)), dict(node.statistics().received), dict(node.statistics().refused)]}, server="a")
print("serving", flush=True)
sys.stdin.read()
"""

CALLER = """
import json
node = onehop.Node(timeout=20.0, **json.loads(sys.argv[1]))
lock, stop = threading.Lock(), threading.Event()
failed, away, numbers, slowest = [], [], iter(range(1 << 60)), [0.0]

def call():
    client = node.client("clock")
    while not stop.is_set():
        with lock:
            number = next(numbers)
        began = time.monotonic()
        try:
            assert client.call("echo", number) == number
        except BaseException as error:
            failed.append(repr(error))
        slowest[0] = max(slowest[0], time.monotonic() - began)
        if not node.servers("clock"):
            away.append(number)
        stop.wait(0.005)

def hang():
    began = time.monotonic()
    try:
        node.client("clock", timeout=1.5).call("hang")
    except onehop.CallTimeout:
        return time.monotonic() - began

assert node.wait_for("clock", timeout=10.0)
threads = [threading.Thread(target=call) for _ in range(4)]
[thread.start() for thread in threads]
print("calling", flush=True)
for line in sys.stdin:
    if line == "hang\\n":
        print(json.dumps(hang()), flush=True)
    elif line == "wall\\n":
        print(json.dumps([time.time(), node.call("clock", "wall")]), flush=True)
    else:
        stop.set()
        [thread.join() for thread in threads]
        now = node.statistics()
        print(json.dumps({"calls": next(numbers), "failed": failed[:5], "away": len(away), "slowest": slowest[0],
                          "retried": now.retried, "server": node.call("clock", "report")}), flush=True)
"""


@pytest.fixture(params=["local", "hosts", "redis"])
def registry(request: pytest.FixtureRequest, run_directory: str) -> Iterator[list[dict[str, Any]]]:
    """The settings of a server and of its caller."""
    if request.param == "local":
        yield [{}, {}]
        return
    beyond = {"insecure": True, "lease": LEASE, "ports": str(free_port())}
    hosts = [
        {"host": name, "address": f"127.0.0.{number}", "run_directory": f"{run_directory}/{name}"}
        for number, name in ((1, "a"), (2, "b"))
    ]
    if request.param == "hosts":
        port = free_port()
        yield [{"registry": f"hosts://127.0.0.1:{port},127.0.0.2:{port}/", **beyond, **each} for each in hosts]
        return
    with Redis() as server:
        yield [{"registry": server.url(), **beyond, **each} for each in hosts]


def test_a_day_forth_and_back_changes_no_deadline_lease_or_retry(
    registry: list[dict[str, Any]],
    start: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    eventually: Callable[..., None],
    request: pytest.FixtureRequest,
) -> None:
    clock = tmp_path / "clock"

    def set_clock(jump: int) -> None:
        new = clock.with_suffix(".new")
        new.write_text(f"{jump:+d}")
        new.rename(clock)  # in one step: nobody reads a file that is empty for a moment, and so another time

    set_clock(0)
    for name, value in {
        "LD_PRELOAD": FAKETIME, "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    server = start(SERVER, json.dumps(registry[0]))
    assert server.line() == "serving"
    caller = start(CALLER, json.dumps(registry[1]))
    assert caller.line() == "calling"

    def ask(what: str) -> Any:
        caller.process.stdin.write(f"{what}\n")
        caller.process.stdin.flush()
        return json.loads(caller.line())

    waits = []
    for jump in (DAY, -DAY, 0):
        set_clock(jump)
        eventually(lambda jump=jump: all(abs(each - time.time() - jump) < 60 for each in ask("wall")))
        until = time.monotonic() + LEASE + 1.0
        waits.append(ask("hang"))
        eventually(lambda until=until: time.monotonic() > until, within=LEASE + 2.0)
    told = ask("report")
    print(f"R12  {request.node.callspec.id}: {told}, deadlines of 1.5 s ended after {waits}")
    assert told["failed"] == []
    assert told["away"] == 0, "its lease was renewed"
    assert told["retried"] == 0
    ran, once, received, _ = told["server"]
    assert ran == once == told["calls"]
    assert received.get("duplicates", 0) == 0
    assert all(1.5 <= each < 1.5 + STALL for each in waits), waits
