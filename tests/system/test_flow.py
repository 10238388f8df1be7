"""A consumer a hundred times slower than its caller: what it costs the caller's memory, and everybody else."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytestmark = pytest.mark.timeout(120)

MEBIBYTE = 1024 * 1024
BODIES = {"100 B": 100, "10 KiB": 10 * 1024, "100 KiB": 100 * 1024}
LARGE = 64 * 1024  # from so many bytes on a body waits for room in the window, where a smaller one is refused
ROOM = {"call": 10_000, "cast": 2_000}  # what the server's inbox takes: of calls, more than the caller's window
WHOSE = {"own": "the same caller at another server", "beside": "another caller at the same"}
A_FIFTH, TWICE = 1.2, 2.0
FEWEST, ENOUGH, MOST = 5, 25, 40  # turns
QUIET = 0.03  # the part of the machine's time that others may have in a turn that is judged
RATE = 1_000  # a second; the slow handler takes 100 ms, and there is one of it

SERVER = """
# A node with an unhurried service, and a slow one beside it where it is told so.
name, slow, room = sys.argv[1:4]
node = onehop.Node(inbox_messages=int(room), workers=2)
node.serve(f"quick-{name}", {"echo": lambda value: value, "sink": lambda body: None}, server=name)
if slow == "slow":
    node.serve("slow", {"take": lambda body: time.sleep(0.1)}, server=name, workers=1)
print("serving", flush=True)
sys.stdin.readline()
os._exit(0)
"""

FLOOD = f"""
# Sends RATE requests a second and takes no answer: to the slow service, or as many to an unhurried one of the same
# server, as lines say.
# Meanwhile it calls another server, as any part of the same program would.
import asyncio, json
import onehop.asyncio
verb, size = sys.argv[1], int(sys.argv[2])
RATE, BATCH = {RATE}, 10

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

async def main():
    node = onehop.asyncio.Node(timeout=60.0)
    for service in ("slow", "quick-same", "quick-other"):
        await node.wait_for(service, timeout=20.0)
    slow, quick, other = (node.client(each) for each in ("slow", "quick-same", "quick-other"))
    target, method = quick, "sink"
    sent = full = 0
    waits, delays, late = [], [], 0
    under_way = set()

    async def send_one():
        nonlocal sent, full
        body = os.urandom(16) + bytes(size - 16)
        began = time.perf_counter()
        flooding = target is slow
        try:
            if verb == "call":
                call = await target.start(method, body)
                sent += flooding
                if not flooding:
                    await call.result()
            else:
                await target.cast(method, body)
                sent += flooding
        except onehop.Rejected as error:
            assert error.reason == "full", error
            full += 1
            waits.append(time.perf_counter() - began)
        except onehop.CallError:
            pass

    async def flood():
        due = time.perf_counter()
        while True:
            due = max(due + BATCH / RATE, time.perf_counter() - 0.1)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            for _ in range(BATCH):
                # A program that is refused, or waits, does not begin more before it has heard so.
                if len(under_way) < (8 if size >= {LARGE} else 64):
                    task = asyncio.ensure_future(send_one())
                    under_way.add(task)
                    task.add_done_callback(under_way.discard)

    async def probe():
        while True:
            await asyncio.sleep(0.004)
            began = time.perf_counter()
            await other.call("echo", 1)
            delays.append(time.perf_counter() - began)

    peak = 0
    async def watch():
        nonlocal peak
        while True:
            peak = max(peak, resident())
            await asyncio.sleep(0.02)

    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    running = [asyncio.ensure_future(each()) for each in (flood, probe, watch)]
    print("ready", flush=True)
    while line := (await reader.readline()).decode().strip():
        for each in running:
            if each.done():
                each.result()
        if line == "flood":
            target, method = slow, "take"
        elif line == "rest":
            target, method = quick, "sink"
        elif line == "base":
            peak = resident()
        told = dict(resident=resident(), peak=peak, sent=sent, full=full, waits=waits, delays=delays)
        told["waiting"] = len(under_way)
        print(json.dumps(told), flush=True)
        waits, delays = [], []
    os._exit(0)

asyncio.run(main())
"""

BESIDE = """
# Calls the unhurried service at the server whose other service is flooded; the delays of each window at a line.
import json
node = onehop.Node()
client = node.client("quick-same")
delays, lock = [], threading.Lock()

def work():
    while True:
        time.sleep(0.004)
        began = time.perf_counter()
        client.call("echo", 1)
        with lock:
            delays.append(time.perf_counter() - began)

client.call("echo", 1)
threading.Thread(target=work, daemon=True).start()
print("ready", flush=True)
for line in sys.stdin:
    with lock:
        found, delays = delays, []
    print(json.dumps(found), flush=True)
os._exit(0)
"""


def p99(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)]


def ask(program: Any, line: str = "look") -> Any:
    program.process.stdin.write(line + "\n")
    program.process.stdin.flush()
    return json.loads(program.line())


@pytest.fixture
def flooded(start: Callable[..., Any]) -> Callable[[str, int], tuple[Any, Any]]:
    """``flooded(verb, size)``: the program that floods, and one that calls the same server."""

    def begin(verb: str, size: int) -> tuple[Any, Any]:
        for name, kind in (("same", "slow"), ("other", "quick")):
            assert start(SERVER, name, kind, str(ROOM[verb])).line() == "serving"
        programs = start(FLOOD, verb, str(size)), start(BESIDE)
        for each in programs:
            assert each.line() == "ready"
        return programs

    return begin


def windows(flood: Any, beside: Any, eventually: Callable[..., None], phase: str, seconds: float) -> dict[str, Any]:
    """What was seen in a phase, after it has settled."""
    ask(flood, phase)
    before = ask(flood)
    eventually(_enough(flood, 100, settled := []), within=30.0)
    ask(beside)
    own: list[float] = []
    waits = [each for seen in settled for each in seen["waits"]] + before["waits"]
    eventually(_enough(flood, int(seconds / 0.006), seen := []), within=30.0)
    own = [each for one in seen for each in one["delays"]]
    waits += [each for one in seen for each in one["waits"]]
    return {"own": own, "beside": ask(beside), "waits": waits, "last": seen[-1]}


def _enough(flood: Any, samples: int, seen: list[Any]) -> Callable[[], bool]:
    def look() -> bool:
        seen.append(ask(flood))
        return sum(len(each["delays"]) for each in seen) >= samples

    return look


@pytest.mark.parametrize("size", BODIES.values(), ids=BODIES.keys())
@pytest.mark.parametrize("verb", ["call", "cast"])
def test_slow_consumer_costs_its_caller_eight_mebibytes_and_what_is_too_much_is_refused_at_once_or_waits(
    flooded, eventually, verb: str, size: int
) -> None:
    flood, _ = flooded(verb, size)
    eventually(_enough(flood, 200, []), within=30.0)  # the same load, to a consumer that keeps up
    base = ask(flood, "base")["resident"]
    ask(flood, "flood")
    refused: list[float] = []
    echoes: list[float] = []
    waits = verb == "call" and size >= LARGE

    def full() -> bool:
        seen = ask(flood)
        refused.extend(seen["waits"])
        echoes.extend(seen["delays"])
        return len(refused) > 1_000 or (waits and len(echoes) > 1_000 and seen["waiting"] == 8)

    eventually(full, within=30.0)
    found = ask(flood)
    grown = (found["peak"] - base) / MEBIBYTE
    quick, slowest = (statistics.median(refused) * 1e3, p99(refused) * 1e3) if refused else (0.0, 0.0)
    echo = statistics.median(echoes) * 1e3
    print(
        f"R6  {verb}s of {size} bytes to a consumer 100 times slower: the sender grew by {grown:.1f} MiB; "
        f"{found['sent']} taken, {found['full']} refused, in {quick:.2f} ms (p50), {slowest:.2f} ms (p99), where "
        f"an echo of another server takes {echo:.2f} ms"
    )
    assert grown < 8.0
    if waits:
        assert not refused
    elif verb == "call":
        assert statistics.median(refused) < 0.010
    else:  # by the server: what the way to and fro takes of itself on this machine now does not count
        assert statistics.median(refused) < 0.010 + statistics.median(echoes)


@pytest.mark.alone
@pytest.mark.timeout(300)
@pytest.mark.parametrize("verb", ["call", "cast"])
def test_slow_consumer_does_not_slow_the_calls_of_others_and_fails_none(flooded, eventually, verb: str) -> None:
    """Off and on by turns, with as many requests to the same server: off, its consumer keeps up.

    A call of the others that fails ends its program. A percentile is that of all turns together, of as many as it takes
    until it is longer by a fifth at most. A turn in which this machine did other things is not judged; where too few
    are left, twice as long is what is borne.
    """
    flood, beside = flooded(verb, BODIES["10 KiB"])
    turns: list[Turn] = []

    def both(whose: str, judged: list[Turn]) -> tuple[float, float]:
        off, on = ([each for turn in judged for each in turn[phase][whose]] for phase in (0, 1))
        return p99(off), p99(on)

    def ratio(whose: str, judged: list[Turn]) -> float:
        before, then = both(whose, judged)
        return then / before

    while True:
        others = Others()
        off = windows(flood, beside, eventually, "rest", 1.0)
        turns.append(Turn(off, windows(flood, beside, eventually, "flood", 1.0), others.share()))
        quiet = [turn for turn in turns if turn.others < QUIET]
        judged, bound = (quiet, A_FIFTH) if len(quiet) >= FEWEST else (turns, TWICE)
        if len(turns) >= FEWEST and all(ratio(whose, judged) <= A_FIFTH for whose in WHOSE):
            break
        if len(quiet) >= ENOUGH or len(turns) >= MOST:
            break
    for whose, words in WHOSE.items():
        before, then = (each * 1e3 for each in both(whose, judged))
        print(
            f"R6  {verb}s to a slow consumer; {words}: p99 {before:.2f} ms, then {then:.2f} ms: "
            f"{then / before:.2f} times that, in {len(judged)} of {len(turns)} turns"
        )  # fmt: skip
    assert all(len(phase[whose]) > 50 for turn in turns for phase in (turn.off, turn.on) for whose in WHOSE)
    assert all(ratio(whose, judged) <= bound for whose in WHOSE)


class Turn(NamedTuple):
    """Delays without and with the flood, and the part of the machine's time that others had meanwhile."""

    off: dict[str, Any]
    on: dict[str, Any]
    others: float


class Others:
    """The part of this machine's time, from now on, that went to other processes than this one and its children."""

    def __init__(self) -> None:
        self._before = self._look()

    def _look(self) -> tuple[float, float, float]:
        user, nice, system, idle, waiting, _, _, stolen = map(int, Path("/proc/stat").read_text().split()[1:9])
        mine = 0
        for each in [os.getpid(), *map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())]:
            mine += sum(map(int, Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()[11:13]))
        busy = user + nice + system + stolen
        return busy, mine, busy + idle + waiting

    def share(self) -> float:
        busy, mine, total = (now - before for now, before in zip(self._look(), self._before, strict=True))
        return (busy - mine) / total
