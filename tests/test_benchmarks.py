"""The benchmark suite runs, and its report judges: in small, with what the tests' own environment has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

ROOT = Path(__file__).parent.parent
LIMIT = 120


def python(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


def row(system: str, rate: float, **more: Any) -> dict[str, Any]:
    kind = "onehop" if system.startswith(("onehop", "oslo zmq")) else "peer"
    figures = {
        "system": system,
        "kind": kind,
        "case": "real",
        "message": "real",
        "rate": rate,
        "p50": 50.0,
        "p99": 90.0,
        "lost": 0.0,
    }
    figures |= {"cpu": 1e6 / rate, "cpu_client": 5e5 / rate, "cpu_server": 5e5 / rate, "cpu_broker": 0.0}
    figures |= {"rss_client": 20.0, "rss_server": 21.0, "rss_broker": 0.0}
    return figures | {"rounds": [{"rate": rate * 0.9}, {"rate": rate * 1.1}]} | more


def page(directory: Path, scenarios: dict[str, list[dict[str, Any]]]) -> str:
    """The report of these rows."""
    machine = {"cpu": "A processor", "cores": 2, "memory": "4 GiB", "virtual": True, "kernel": "6.1", "python": "3.11"}
    told = {"title": "Title", "unit": "calls", "date": "2026-01-01 00:00", "quick": False, "rounds": 2, "seconds": 1.0}
    results = {
        "machine": machine | {"versions": {"pyzmq": "27.1"}},
        "scenarios": {name: told | {"rows": rows} for name, rows in scenarios.items()},
    }
    (directory / "results.json").write_bytes(msgspec.json.encode(results))
    done = python("benchmarks.report", str(directory))
    assert done.returncode == 0, done.stderr
    return (directory / "index.md").read_text()


def verdicts(text: str) -> dict[str, tuple[str, str]]:
    """What was measured, and the verdict, by goal."""
    section = text.partition("## Goals")[2].partition("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return {line[0]: (line[3], line[4].strip()) for line in lines[2:]}


@pytest.mark.timeout(LIMIT)
def test_quick_run_measures_calls_and_casts_and_writes_figures_and_a_page(tmp_path: Path) -> None:
    systems = ("dealer/router ipc", "push/pull ipc", "onehop inline", "onehop pool")
    done = python(
        "benchmarks", "--quick", "--rounds", "1", "--scenario", "one-caller", "cast", "--out", str(tmp_path),
        "--system", *systems,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    scenarios = msgspec.json.decode((tmp_path / "results.json").read_bytes())["scenarios"]
    assert {(each["system"], each["case"]) for each in scenarios["one-caller"]["rows"]} == {
        (system, case) for system in ("dealer/router ipc", "onehop inline", "onehop pool") for case in ("real", "small")
    }
    assert {each["system"] for each in scenarios["cast"]["rows"]} == {"push/pull ipc", "onehop inline", "onehop pool"}
    for each in scenarios["one-caller"]["rows"] + scenarios["cast"]["rows"]:
        assert each["rate"] > 0, each
        assert each["cpu_client"] > 0, each
        assert each["cpu_server"] > 0, each
        assert each["lost"] == 0, each
    text = (tmp_path / "index.md").read_text()
    assert "| **onehop inline** |" in text
    assert "onehop inline (real) / dealer/router ipc: CPU" in verdicts(text)


def test_goal_is_met_at_its_bound_and_missed_below_it(tmp_path: Path) -> None:
    rows = [row("onehop inline", 12_000), row("rpyc", 10_000), row("nng", 7_600)]
    found = verdicts(page(tmp_path, {"one-caller": rows}))
    assert found["onehop inline (real) / rpyc: rate"] == ("1.20", "met")
    assert found["onehop inline (real) / nng: rate"] == ("1.58", "**missed**")


def test_goal_that_is_an_upper_bound_is_missed_above_it(tmp_path: Path) -> None:
    rows = [row("dealer/router ipc", 1, cpu=40.0), row("onehop inline", 1, cpu=50.0), row("onehop pool", 1, cpu=72.1)]
    found = verdicts(page(tmp_path, {"one-caller": rows}))
    assert found["onehop inline (real) / dealer/router ipc: CPU"] == ("1.25", "met")
    assert found["onehop pool (real) / dealer/router ipc: CPU"] == ("1.80", "**missed**")


def test_goal_without_a_rival_judges_the_figure_itself(tmp_path: Path) -> None:
    for lost, verdict in ((0.0, ("0", "met")), (1.0, ("1.00", "**missed**"))):
        found = verdicts(page(tmp_path, {"cast": [row("onehop inline", 9_000, lost=lost)]}))
        lines = [each for name, each in found.items() if name == "onehop inline (real): messages lost"]
        assert lines == [verdict]


def test_driver_is_judged_by_what_it_costs_above_the_floor(tmp_path: Path) -> None:
    costs = {"oslo zmq": 130.0, "oslo zero-cost": 70.0, "dealer/router ipc": 40.0}
    rows = [row(system, 1, cpu=cpu, case="one caller") for system, cpu in costs.items()]
    found = verdicts(page(tmp_path, {"oslo": rows}))
    assert found["oslo zmq minus oslo zero-cost (one caller) / dealer/router ipc: CPU"] == ("1.50", "met")


def test_what_failed_is_told_and_its_goals_are_not_judged(tmp_path: Path) -> None:
    failed = {
        "system": "rpyc",
        "kind": "peer",
        "case": "real",
        "message": "real",
        "error": "Traceback:\nrpyc needs the module rpyc",
    }
    text = page(tmp_path, {"one-caller": [row("onehop inline", 12_000), failed]})
    assert "* rpyc: rpyc needs the module rpyc" in text
    assert verdicts(text)["onehop inline (real) / rpyc: rate"] == ("-", "not measured")


def test_page_shows_figures_of_scenarios_that_are_measured_in_a_way_of_their_own(tmp_path: Path) -> None:
    rows = [{"system": "onehop", "kind": "onehop", "links": 1200, "kib": 31.25, "cpu_ms": 0.11, "idle_share": 0.001}]
    text = page(tmp_path, {"links": rows})
    assert "| onehop | 1,200 | 31.2 | 0.11 | 0.0010 |" in text


def test_name_that_is_unknown_is_an_error_that_says_which_there_are() -> None:
    for option, known in (("--scenario", "one-caller"), ("--system", "onehop inline")):
        done = python("benchmarks", "--quick", option, "nonesuch")
        assert done.returncode == 1
        assert "'nonesuch'" in done.stderr
        assert known in done.stderr
