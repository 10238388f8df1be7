"""What onehop is to reach, as data, and the judgement of it: ratios of medians inside one interleaved run."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

NOTHING = ""
"""In the place of another system: the bound is absolute."""
RELATIONS = {">=": operator.ge, "<=": operator.le, "<": operator.lt}
UNITS = {"cpu": "CPU", "rate": "rate", "p50": "p50", "lost": "messages lost"}


class Goal(NamedTuple):
    """One system's figure against others'."""

    scenario: str
    case: str
    ours: str
    metric: str
    relation: str
    bounds: dict[str, float]
    """By the system that it is compared with: the ratio, or the figure itself of NOTHING."""
    minus: str = ""
    """A system whose figure is subtracted from ours first."""
    other_case: str = ""
    """The case of the others, where it is another."""
    metric_name: str = ""
    """What the figure is called, with its unit, where that is not plain."""


EACH_PAIRS = ("1", "2", "4", "8", "16")

GOALS = (
    Goal("one-caller", "real", "onehop inline", "rate", ">=",
         {"rpyc": 1.2, "nng": 1.6, "zenoh": 2, "grpc": 4, "nats": 4, "zerorpc": 8, "oslo rabbit": 15}),
    Goal("one-caller", "real", "onehop inline", "cpu", "<=", {"dealer/router ipc": 1.25}),
    Goal("one-caller", "real", "onehop pool", "rate", ">=", {"grpc": 3.5, "nats": 3.5}),
    Goal("one-caller", "real", "onehop pool", "cpu", "<=", {"dealer/router ipc": 1.8}),
    Goal("one-caller-free", "small", "onehop inline", "p50", "<=",
         {"rpyc": 1.1, "nats": 0.35, "grpc": 0.35, "multipart ipc": 1.15}),
    Goal("asyncio-32", "real", "onehop asyncio", "rate", ">=",
         {"nats": 2.3, "grpc.aio": 8, "dealer/router ipc": 0.6, "asyncio ipc": 1}),
    Goal("asyncio-32", "real", "onehop asyncio", "cpu", "<=", {"nats": 0.6}),
    Goal("threads-32", "real", "onehop pool pure", "rate", ">=", {"nats": 1}),
    Goal("threads-32", "real", "onehop pool", "rate", ">=",
         {"nats": 1.3, "zenoh": 1.3, "nng": 2.5, "grpc": 5, "oslo rabbit": 35, "dealer/router ipc": 0.3}),
    Goal("quad", "real", "onehop inline", "rate", ">=",
         {"nats": 1.8, "rpyc": 1.8, "oslo rabbit": 25, "multipart ipc": 0.7}),
    *(Goal("pairs", pairs, "onehop inline", "rate", ">=", {"nats": 1, "rpyc": 1, "oslo rabbit": 25})
      for pairs in EACH_PAIRS),
    Goal("pairs", "16", "onehop inline", "cpu", "<=", {"onehop inline": 1.6}, other_case="1"),
    Goal("cast", "real", "onehop inline", "rate", ">=", {"nats": 2.5, "zenoh": 1.5, "oslo rabbit": 100}),
    Goal("cast", "real", "onehop inline", "lost", "<=", {NOTHING: 0}),
    Goal("fanout-50", "real", "onehop inline", "rate", ">=", {"nats": 1.3, "oslo rabbit": 40}),
    Goal("fanout-50", "real", "onehop inline", "lost", "<=", {NOTHING: 0}),
    Goal("fanout-1000", "", "onehop", "seconds", "<", {NOTHING: 0.5}, metric_name="s until all receipts"),
    Goal("fanout-1000", "", "onehop", "sender_cpu", "<", {NOTHING: 0.05}, metric_name="s of the sender's CPU"),
    Goal("fanout-1000", "", "onehop relays", "seconds", "<", {NOTHING: 1.0}, metric_name="s until all receipts"),
    Goal("oslo", "one caller", "oslo zmq", "rate", ">=", {"oslo rabbit": 8, "oslo zero-cost": 0.55}),
    Goal("oslo", "32 callers", "oslo zmq", "rate", ">=", {"oslo rabbit": 9}),
    Goal("oslo", "one caller", "oslo zmq", "cpu", "<=", {"oslo rabbit": 1 / 8}),
    Goal("oslo", "32 callers", "oslo zmq", "cpu", "<=", {"oslo rabbit": 1 / 10}),
    Goal("oslo", "one caller", "oslo zmq", "cpu", "<=", {"dealer/router ipc": 1.5}, minus="oslo zero-cost"),
    Goal("memory", "", "onehop pool", "rss_client", "<=", {NOTHING: 26}, metric_name="MiB of a client"),
    Goal("memory", "", "onehop pool", "rss_server", "<=", {NOTHING: 26}, metric_name="MiB of a server"),
    Goal("links", "", "onehop", "kib", "<", {NOTHING: 45}, metric_name="KiB a link"),
    Goal("links", "", "onehop", "cpu_ms", "<", {NOTHING: 0.15}, metric_name="ms of CPU to open a link"),
    Goal("links", "", "onehop", "idle_share", "<", {NOTHING: 0.005}, metric_name="of a CPU, idle"),
    *(Goal("scale", hosts, ours, "linear", ">=", {NOTHING: 0.9}, metric_name="of hosts x the rate of one host")
      for ours in ("onehop inline", "oslo zmq") for hosts in ("2", "4", "8", "16")),
)  # fmt: skip


class Judgement(NamedTuple):
    """One goal against one system."""

    scenario: str
    text: str
    bound: str
    measured: float | None
    """The ratio, or the figure; None where something was not measured."""
    met: bool | None


def judge(results: Mapping[str, Any]) -> Iterator[Judgement]:
    """All goals whose scenario is in ``results`` (what results.json holds); of one that is not, nothing."""
    for goal in GOALS:
        scenario = results["scenarios"].get(goal.scenario)
        if scenario is None:
            continue
        for other, bound in goal.bounds.items():
            measured = ratio(scenario["rows"], goal, other)
            met = None if measured is None else RELATIONS[goal.relation](measured, bound)
            yield Judgement(goal.scenario, text(goal, other), f"{goal.relation} {bound:.4g}", measured, met)


def ratio(rows: list[dict[str, Any]], goal: Goal, other: str) -> float | None:
    """Our figure, or its ratio to that of another system."""
    ours = figure(rows, goal.ours, goal.case, goal.metric)
    if ours is not None and goal.minus:
        less = figure(rows, goal.minus, goal.case, goal.metric)
        ours = None if less is None else ours - less
    if ours is None or other == NOTHING:
        return ours
    theirs = figure(rows, other, goal.other_case or goal.case, goal.metric)
    return ours / theirs if theirs else None


def figure(rows: list[dict[str, Any]], system: str, case: str, metric: str) -> float | None:
    """What a row says; None where there is no such row, or it failed."""
    for row in rows:
        if row.get("system") == system and row.get("case", "") == case:
            return row.get(metric)
    return None


def text(goal: Goal, other: str) -> str:
    """A goal in words."""
    subject = f"{goal.ours} minus {goal.minus}" if goal.minus else goal.ours
    case = f" ({goal.case})" if goal.case else ""
    metric = goal.metric_name or UNITS[goal.metric]
    against = "" if other == NOTHING else f" / {other}" + (f" ({goal.other_case})" if goal.other_case else "")
    return f"{subject}{case}{against}: {metric}"
