"""``onehop bench`` and ``onehop simulate``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from onehop.cli.bench import in_threads


def test_bench_measures_both_ways_of_running_and_both_loads(run: Callable[..., Any]) -> None:
    ended = run("bench", "--seconds", "0.1", "--threads", "4", "--json")
    assert ended.code == 0
    assert [each["run"] for each in ended.json] == [
        "inline, 1 thread", "pool, 1 thread", "inline, 4 threads", "pool, 4 threads",
    ]  # fmt: skip
    for each in ended.json:
        assert each.keys() == {"run", "calls_per_second", "p50", "p99", "client_cpu", "server_cpu"}
        assert each["calls_per_second"] > 100
        assert 0 < each["p50"] <= each["p99"]
        assert each["client_cpu"] > 0
        assert each["server_cpu"] >= 0


def test_bench_prints_a_table_and_its_progress(run: Callable[..., Any]) -> None:
    ended = run("bench", "--seconds", "0.1", "--threads", "2")
    assert "calls/s" in ended.out
    assert len(ended.err.splitlines()) == 4


def test_error_in_a_thread_is_raised() -> None:
    def work(place: int) -> None:
        if place:
            raise ValueError(place)

    with pytest.raises(ValueError, match="1"):
        in_threads(work, 2)


def test_same_seed_gives_the_same_world(run: Callable[..., Any]) -> None:
    first, again = (run("simulate", "--seed", "7", "--nodes", "10", "--seconds", "3", "--json") for _ in range(2))
    assert first.code == 0
    assert first.json.keys() == {"seed", "nodes", "seconds", "took", "digest", "broken", "summary"}
    assert (first.json["digest"], first.json["broken"]) == (again.json["digest"], [])
    assert (
        run("simulate", "--seed", "8", "--nodes", "10", "--seconds", "3", "--json").json["digest"]
        != (first.json["digest"])
    )


def test_simulation_says_that_no_promise_was_broken(run: Callable[..., Any]) -> None:
    ended = run("simulate", "--nodes", "5", "--seconds", "1")
    assert ended.code == 0
    assert "no promise was broken" in ended.out


def test_exploration_plays_many_worlds(run: Callable[..., Any]) -> None:
    options = ("--explore", "4", "--nodes", "5", "--seconds", "1", "--processes", "2")
    told, listed = run("simulate", *options), run("simulate", *options, "--json")
    assert (told.code, listed.code) == (0, 0)
    assert "4 worlds of 5 nodes" in told.out
    assert "no promise was broken" in told.out
    assert (listed.json["done"], listed.json["first"], listed.json["last"], listed.json["broken"]) == (4, 1, 4, [])
