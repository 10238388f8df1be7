"""Fan-outs through relays that run in other processes, which are killed, stopped and drained meanwhile."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

import pytest

import onehop

PROCESSES, NODES = 6, 10
RECEIVERS = PROCESSES * NODES

CROWD = """
ledger = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)
name, nodes = sys.argv[2], [onehop.Node() for _ in range(int(sys.argv[3]))]

def noting(server):
    return lambda number: os.write(ledger, b"%s:%d\\n" % (server.encode(), number))

for index, node in enumerate(nodes):
    server = f"{name}-{index}"
    node.serve("clock", {"note": noting(server)}, server=server, workers=1)
print("serving", flush=True)
sys.stdin.readline()
for node in nodes:
    node.close(drain=True)
"""


@pytest.fixture
def crowd(start: Callable[..., Any], ledger: Any) -> list[Any]:
    """Processes with ten nodes each, all of which serve."""
    programs = [start(CROWD, str(ledger.path), f"process-{number}", str(NODES)) for number in range(PROCESSES)]
    for each in programs:
        assert each.line() == "serving"
    return programs


@pytest.fixture
def calling() -> Iterator[onehop.Node]:
    with onehop.Node(fanout_direct=10) as node:
        assert node.wait_for("clock", count=RECEIVERS, timeout=30.0)
        yield node


def ran(ledger: Any) -> Counter[tuple[str, int]]:
    pairs = (line.split(":") for line in ledger.lines())
    return Counter((server, int(number)) for server, number in pairs)


def outcomes(receipts: list[onehop.Receipt]) -> Counter[str]:
    return Counter(each.outcome for each in receipts)


def check(ledger: Any, receipts: list[onehop.Receipt], number: int, eventually: Callable[..., None]) -> None:
    """Each copy that was taken has run once; and none twice, or where its receipt says that it did not."""
    assert len({(each.server, each.node) for each in receipts}) == len(receipts)
    taken = {each.server for each in receipts if each.outcome == "taken"}
    eventually(lambda: taken <= {server for server, what in ran(ledger) if what == number}, within=20.0)
    runs = ran(ledger)
    assert set(runs.values()) == {1}
    for each in receipts:
        if each.outcome == "refused" or "it was not sent" in each.reason:
            assert (each.server, number) not in runs, each


def all_ran(ledger: Any, told: dict[int, list[onehop.Receipt]], eventually: Callable[..., None]) -> None:
    """Wait until each copy that was taken has run: its receipt leaves when it was taken in, and not when it has run."""
    taken = {(each.server, number) for number, receipts in told.items() for each in receipts if each.outcome == "taken"}
    eventually(lambda: taken <= ran(ledger).keys(), within=20.0)


def test_all_receive_it_and_the_origin_has_few_links(crowd, ledger, eventually, make_node) -> None:
    # A relay that does not answer within a second is passed by: who finds the machine busy begins again.
    numbers = count()
    for _ in range(3):
        calling = make_node(fanout_direct=10)
        assert calling.wait_for("clock", count=RECEIVERS, timeout=20.0)
        for number in islice(numbers, 5):
            receipts = calling.fanout("clock", "note", number)
            assert outcomes(receipts) == {"taken": RECEIVERS}
            check(ledger, receipts, number, eventually)
        links = sum(peer.state == "ready" for peer in calling.statistics().peers)
        if links < RECEIVERS / 2:
            break
    assert len(ran(ledger)) == next(numbers) * RECEIVERS
    assert links < RECEIVERS / 2


def test_relays_that_are_killed_meanwhile_leave_no_copy_that_runs_twice(
    crowd, calling, ledger, eventually, background
) -> None:
    client = calling.client("clock", timeout=15.0)
    client.fanout("note", 0)
    told: dict[int, list[onehop.Receipt]] = {}

    def fan_out() -> None:
        for number in range(1, 200):
            told[number] = client.fanout("note", number)

    under_way = background(fan_out)
    for victim, moment in ((crowd[0], 20), (crowd[1], 60)):
        eventually(lambda moment=moment: len(told) >= moment, within=60.0)
        victim.signal(signal.SIGKILL)
        victim.wait()
    under_way.result(120.0)
    killed = ("process-0-", "process-1-")  # which may have taken what they never ran
    living = {n: [each for each in receipts if not each.server.startswith(killed)] for n, receipts in told.items()}
    all_ran(ledger, living, eventually)
    check(ledger, told[199], 199, eventually)
    assert outcomes(told[199]) == {"taken": RECEIVERS - 2 * NODES}
    runs = ran(ledger)
    for number, alive in living.items():
        assert len(alive) == RECEIVERS - 2 * NODES
        lost = {each.server for each in alive if each.outcome != "taken"}
        assert all("relay" in each.reason and "unknown" in each.reason for each in alive if each.server in lost)
        assert all(runs[each.server, number] == 1 for each in alive if each.server not in lost)


def test_of_what_a_relay_took_that_hangs_nothing_is_known_and_nothing_sent_again(
    crowd, calling, ledger, eventually
) -> None:
    client = calling.client("clock", timeout=2.0)
    for number in range(2):
        client.fanout("note", number)
    crowd[0].signal(signal.SIGSTOP)
    receipts = client.fanout("note", 2)
    assert max(each.seconds for each in receipts) < 4.0  # a deadline of 2; its silence would be known after 5
    told = outcomes(receipts)
    assert told["taken"] + told["unreachable"] == RECEIVERS
    assert told["unreachable"] >= NODES
    crowd[0].signal(signal.SIGCONT)
    check(ledger, receipts, 2, eventually)
    late = client.fanout("note", 3)
    assert outcomes(late) == {"taken": RECEIVERS}
    check(ledger, late, 3, eventually)
    assert set(ran(ledger).values()) == {1}


def test_relays_that_drain_meanwhile_lose_nothing(crowd, calling, ledger, eventually, background) -> None:
    client = calling.client("clock", timeout=20.0)
    client.fanout("note", 0)
    told: dict[int, list[onehop.Receipt]] = {}

    def fan_out() -> None:
        for number in range(1, 120):
            told[number] = client.fanout("note", number)

    under_way = background(fan_out)
    eventually(lambda: len(told) >= 20, within=60.0)
    crowd[0].process.stdin.write("\n")
    crowd[0].process.stdin.flush()
    under_way.result(120.0)
    assert crowd[0].wait() == 0
    all_ran(ledger, told, eventually)
    runs = ran(ledger)
    for number, receipts in told.items():
        for each in receipts:
            if not each.server.startswith("process-0-"):
                assert (each.outcome, runs[each.server, number]) == ("taken", 1), each
    assert set(runs.values()) == {1}
