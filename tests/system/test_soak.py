"""The soak in a short form: peers come and go under load, the ledger balances, and there is a report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.system.soak import slope

ROOT = Path(__file__).parent.parent.parent


def test_peers_come_and_go_under_load_and_the_ledger_balances(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "tests.system.soak", "--seconds", "20", "--only", "soak", "--out", str(tmp_path)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=110)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    (row,) = results["rows"]
    assert row["figures"]["peers that came and went"] >= 10
    assert {each["name"] for each in results["samples"]} == {"server-1", "server-2", "server-3", "caller-1", "churn-2"}
    page = (tmp_path / "index.md").read_text()
    assert "| Soak |" in page
    assert [plot.name for plot in sorted(tmp_path.glob("*.svg")) if f"({plot.name})" not in page] == []


def test_the_slope_is_that_of_the_line_and_one_step_is_none() -> None:
    assert slope([(0.0, 5.0), (1.0, 7.0), (2.0, 9.0)]) == 2.0
    assert slope([(1.0, 5.0)]) == 0.0
    assert slope([(float(at), 5.0 + (at > 90)) for at in range(100)]) == 0.0
    assert slope([(float(at), 5.0 + at // 10) for at in range(100)]) == pytest.approx(0.1, rel=0.05)
