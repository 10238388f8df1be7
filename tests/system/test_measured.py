"""The page of what was measured is made of whatever the measuring programs have printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.system.measured import page


def joins(registry: str, p99: float) -> dict[str, Any]:
    return {"registry": registry, "joins": {"joins": 100, "p50": 0.01, "p99": p99, "worst": 2 * p99}}


def outage(registry: str, outcomes: dict[str, int]) -> dict[str, Any]:
    figures = {
        "calls": sum(outcomes.values()), "outcomes": outcomes, "slowest call": 0.2, "idle CPU, % of a processor": 0.1,
        "servers known while it was away": 2, "all listed again after": 3.0,
    }  # fmt: skip
    return {"registry": registry, "outage": figures}


def page_of(directory: Path, *found: dict[str, Any]) -> str:
    for number, each in enumerate(found):
        (directory / f"{number}.json").write_text(json.dumps(each, indent=1) + "\n")
    return page(sorted(directory.iterdir()), "A note.")


def test_each_registry_has_a_row_in_the_tables_of_which_it_has_figures(tmp_path: Path) -> None:
    made = page_of(tmp_path, joins("etcd", 0.25), joins("redis", 0.5), outage("etcd", {"ok": 2_000}))
    assert made.count("## ") == 2
    assert "| etcd | 100 | 0.010 s | 0.250 s | 0.500 s |" in made
    assert "| redis | 100 | 0.010 s | 0.500 s | 1.000 s |" in made
    assert "A note." in made


def test_of_two_objects_for_one_registry_the_later_counts(tmp_path: Path) -> None:
    (tmp_path / "all.json").write_text(json.dumps(joins("etcd", 0.1)) + "\n" + json.dumps(joins("etcd", 0.2), indent=1))
    made = page([tmp_path / "all.json"], "")
    assert "0.200 s" in made
    assert "0.100 s" not in made


def test_what_did_not_end_well_is_counted_by_its_kind(tmp_path: Path) -> None:
    assert "2,000: all well" in page_of(tmp_path, outage("etcd", {"ok": 2_000}))
    failed = {"ok": 1_998, "PeerLost unknown": 2}
    assert "2,000: all but 2 PeerLost (unknown)" in page_of(tmp_path, outage("etcd", failed))
