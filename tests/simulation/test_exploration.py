"""Whole clouds under load and faults drawn from seeds: nothing breaks, and the same seed gives the same run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

from onehop.testing.exploration import draw, play, run
from onehop.testing.simulation import World

SEEDS = 40


def test_nothing_breaks_whatever_the_seeds_bring() -> None:
    outcomes: Counter[str] = Counter()
    for seed in range(SEEDS):
        plan = draw(seed, nodes=20, seconds=8.0)
        result = play(plan)
        assert result.broken == [], f"onehop simulate --seed {seed} --nodes 20 --seconds 8"
        assert result.summary["views agree"]
        outcomes.update(result.summary["outcomes"])
    print(dict(outcomes))
    assert outcomes["replied"] > 2_000
    assert {"taken", "failed", "done", "NoRoute", "PeerLost", "CallTimeout", "Rejected"} <= outcomes.keys()
    assert outcomes.keys().isdisjoint({"under way", "other", "error"})


def test_three_hundred_nodes_under_churn_and_partitions() -> None:
    result = run(seed=1, nodes=300, seconds=10.0)
    assert result.broken == []
    assert sum(result.summary["faults"].values()) >= 4
    assert result.summary["outcomes"]["replied"] > 2_000


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
    program = f"from onehop.testing.exploration import run; print(run({seed}, 60, 15.0).digest)"
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
