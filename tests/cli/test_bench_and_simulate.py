"""``onehop bench`` and ``onehop simulate``."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
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
        assert each["calls_per_second"] > 0
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


def players(pid: int) -> int:
    """How many processes of that one have been begun to play."""
    found = 0
    for each in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((each / "stat").read_text().rpartition(")")[2].split()[1])
            found += parent == pid and b"spawn_main" in (each / "cmdline").read_bytes()
        except OSError:  # it has ended
            pass
    return found


@pytest.mark.parametrize("begun", [1, 6])
def test_interrupt_of_all_processes_ends_an_exploration_with_what_was_found(
    start: Callable[..., subprocess.Popen[str]], eventually: Callable[..., None], begun: int
) -> None:
    """As at a terminal, where Ctrl-C goes to all of them, be they ever so young."""
    options = ("--explore", 100_000, "--nodes", 5, "--seconds", 1, "--processes", 6)
    process = start("simulate", *options)
    eventually(lambda: players(process.pid) >= begun, within=60.0)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "worlds of 5 nodes" in out
    assert "no promise was broken" in out
