"""Whole clouds under load and faults drawn from seeds: nothing breaks, and the same seed gives the same run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from onehop.testing.simulation import World, run


@pytest.mark.parametrize("seed", range(12))
def test_nothing_breaks_whatever_the_seed_brings(seed: int) -> None:
    result = run(seed, nodes=40, seconds=20.0)
    assert result.broken == []
    assert result.summary["views agree"]
    assert result.summary["outcomes"]["replied"] > 300
    assert result.summary["outcomes"].keys().isdisjoint({"under way", "other", "error"})


def test_a_thousand_nodes_under_churn_and_partitions() -> None:
    result = run(seed=1, nodes=1_000, seconds=10.0)
    assert result.broken == []
    assert len(result.summary["faults"]) >= 4
    assert result.summary["outcomes"]["replied"] > 7_000


def messages_per_node_and_second(number: int) -> float:
    world = World(5)
    world.nodes(10, service="echo")
    clients = world.nodes(number)
    world.call_randomly(rate=number, callers=clients)
    world.run(until=5.0)
    before = sum(world.network.sent.values())
    world.run(until=15.0)
    return (sum(world.network.sent.values()) - before) / number / 10.0


def test_messages_per_node_do_not_grow_with_the_number_of_nodes() -> None:
    few, many = messages_per_node_and_second(30), messages_per_node_and_second(300)
    assert many < 1.1 * few


def test_idle_connections_cost_no_messages(world: World) -> None:
    nodes = world.nodes(30, service="echo")
    for node in nodes:
        world.gather(node, "echo", at=1.0)
    world.settle()
    assert len(world.links()) == 30 * 30
    sent = sum(world.network.sent.values())
    world.run(until=world.now + 50.0)
    assert sum(world.network.sent.values()) == sent


def digest(seed: int, hash_seed: str) -> str:
    program = f"from onehop.testing.simulation import run; print(run({seed}, 60, 15.0).digest)"
    path = os.pathsep.join(each for each in sys.path if each)
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_seed_gives_the_same_run_in_every_process() -> None:
    first, second = digest(7, "1"), digest(7, "2")
    assert first == second
    assert len(first) == 64


def test_another_seed_gives_another_run() -> None:
    assert run(7, 20, 5.0).digest != run(8, 20, 5.0).digest
    assert run(7, 20, 5.0).digest == run(7, 20, 5.0).digest
