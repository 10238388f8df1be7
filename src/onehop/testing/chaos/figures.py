"""What a ledger comes to, in figures. Times in seconds, where the name does not say milliseconds."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from onehop.testing.ledger import CAST, FAILED, REPLIED, VERBS, Entry, Ledger, Outage

WINDOW = 0.25
LEAST_WELL = 0.5
"""The part of all requests that must come to what was wanted for a run to say anything."""
FEW = 8
"""Requests in a window of which no 99th percentile is taken."""


def percentile(values: Sequence[float], part: float) -> float:
    """Of ``values``; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))] if ordered else 0.0


def totals(ledger: Ledger) -> dict[str, dict[str, int]]:
    """By verb: how many were sent, how they ended, and how often they ran."""
    found = {}
    for verb in VERBS:
        of_verb = [each for each in ledger.requests if each.verb == verb]
        failed = Counter(each.executed for each in of_verb if each.outcome == FAILED)
        found[verb] = {
            "sent": len(of_verb),
            "well": sum(each.well for each in of_verb),
            "not executed": failed["no"],
            "unknown": failed["unknown"],
            "raised": failed["yes"],
            "executed": sum(bool(each.runs) for each in of_verb),
            "more than once": sum(len(each.runs) > 1 for each in of_verb),
            "silent": sum(not each.ends for each in of_verb),
        }
    return found


def errors(ledger: Ledger) -> dict[str, int]:
    """How many requests ended in which error, and what it said of execution."""
    return dict(
        Counter(f"{each.error} {each.executed}" for each in ledger.requests if each.outcome == FAILED).most_common()
    )


def latency(entries: Iterable[Entry]) -> dict[str, float]:
    """Milliseconds that those took which came to what was wanted."""
    taken = [each.seconds * 1000 for each in entries if each.well]
    parts = (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
    return {name: round(percentile(taken, part), 3) for name, part in parts}


def begun(ledger: Ledger, since: float, until: float) -> list[Entry]:
    """Those sent between two times."""
    in_order = ledger.in_order
    first, last = (bisect.bisect_left(in_order, at, key=lambda each: each.began) for at in (since, until))
    return in_order[first:last]


def timeline(ledger: Ledger, since: float, step: float = 1.0) -> list[dict[str, float]]:
    """For each ``step`` seconds from ``since`` on: requests sent and ended well in a second, milliseconds they took."""
    windows: dict[int, list[Entry]] = {}
    for each in ledger.requests:
        windows.setdefault(int((each.began - since) // step), []).append(each)
    return [
        {
            "at": round(place * step, 3),
            "sent": len(entries) / step,
            "well": sum(each.well for each in entries) / step,
            **latency(entries),
        }
        for place, entries in sorted(windows.items())
    ]


def p99(entries: Iterable[Entry]) -> float:
    """The 99th percentile of the seconds that requests took, however they ended."""
    return percentile([each.seconds for each in entries if each.ends], 0.99)


def settled(ledger: Ledger, since: float, until: float, bound: float) -> float | None:
    """How long after ``since`` the 99th percentile is at most ``bound``, of what is sent from then until ``until``;
    None where it never is."""
    at = since
    while at < until:
        rest = begun(ledger, at, until)
        if len(rest) >= FEW and p99(rest) <= bound:
            return at - since
        at += WINDOW
    return None


def suffered(ledger: Ledger, since: float, until: float, slow: float) -> list[Entry]:
    """Of the requests sent between two times, those that did not end well, or took more than ``slow`` seconds."""
    return [each for each in begun(ledger, since, until) if not each.well or each.seconds > slow]


def reached(ledger: Ledger, server: str, since: float) -> float | None:
    """How long after ``since`` the first request that was sent later runs at ``server``; None for never."""
    return min(
        (
            run.time - since
            for each in ledger.requests
            if each.began >= since
            for run in each.runs
            if run.server == server and run.time >= since
        ),
        default=None,
    )


def at_full_rate(ledger: Ledger, server: str, since: float, until: float, rate: float) -> float | None:
    """How long after ``since`` requests are answered at ``rate`` again, ``server`` taking part, and that stays so until
    ``until``; None where it does not."""
    back: float | None = None
    at = since
    while at + 2 * WINDOW <= until:
        window = begun(ledger, at, at + 2 * WINDOW)
        well = sum(each.well for each in window)
        if well < 0.9 * rate * 2 * WINDOW or not any(run.server == server for each in window for run in each.runs):
            back = None
        elif back is None:
            back = at + 2 * WINDOW - since
        at += WINDOW
    return back


def again(ledger: Ledger) -> tuple[int, int]:
    """How many requests ran, and how often they ran."""
    run = [len(each.runs) for each in ledger.requests if each.runs]
    return len(run), sum(run)


def lost(ledger: Ledger) -> list[Entry]:
    """Requests that a server had begun, or had acknowledged, and that were not answered, or did not run."""
    return list(_lost(ledger))


def _lost(ledger: Ledger) -> Iterator[Entry]:
    for each in ledger.requests:
        if each.verb == CAST:
            if each.well and not each.runs:
                yield each
        elif each.runs and each.outcome != REPLIED:
            yield each


def report(ledger: Ledger, outages: Sequence[Outage], began: float) -> dict[str, Any]:
    """All of it, as JSON has it. ``breaches`` are the ledger's, and that too few requests came to what was wanted."""
    requests = list(ledger.requests)
    well = sum(each.well for each in requests)
    too_few = f"{well} of {len(requests)} requests came to what was wanted"
    seconds = max((each.ended for each in requests), default=began) - began
    ran, times = again(ledger)
    return {
        "seconds": round(seconds, 1),
        "requests": len(requests),
        "per_second": round(len(requests) / seconds) if seconds else 0,
        "ledger": totals(ledger),
        "errors": errors(ledger),
        "latency_ms": latency(requests),
        "executions_beyond_the_first": times - ran,
        "explained_by_outages": dict(ledger.explained(outages)),
        "worst_stall_ms": round(ledger.worst_stall(outages) * 1000, 1),
        "breaches": [*([too_few] if well <= LEAST_WELL * len(requests) else []), *ledger.breaches(outages)],
    }
