"""When a rate and a percentile are back after an outage, by ledgers made by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from onehop.testing.chaos import figures
from onehop.testing.ledger import CALL, REPLIED, Ledger, read

OUT, RATE = 10.0, 100
QUICK, SLOW = 0.002, 0.2
Took = Callable[[float], float]


def ledger(directory: Path, took: Took, servers: Callable[[float], str] = lambda _: "server-1") -> Ledger:
    """A hundred calls a second from OUT on, each of which takes as long, and runs where, as its time says."""
    lines, runs = [], {}
    for number in range(600):
        at = OUT + number / RATE
        end, server = at + took(at - OUT), servers(at - OUT)
        lines += [f"B {number} {CALL} - 5 {at:.6f}", f"E {number} {REPLIED} yes - {server} {end:.6f}"]
        runs.setdefault(server, []).append(f"R caller:{number} {end:.6f}")
    for name, written in (("caller", lines), *runs.items()):
        (directory / f"{name}.1.ledger").write_text("".join(f"{each}\n" for each in written))
    return read(directory)


@pytest.mark.parametrize(
    ("slow", "after"),
    [
        ([], 0.0),
        ([(0.0, 0.4)], 0.5),
        ([(0.3, 0.4)], 0.5),  # at first nothing is to be seen of it
        ([(0.0, 0.2), (0.8, 0.9)], 1.0),
        ([(0.0, 1.5)], None),
        ([(1.3, 1.5)], None),
    ],
)
def test_percentile_is_back_when_it_stays_so(
    tmp_path: Path, slow: list[tuple[float, float]], after: float | None
) -> None:
    found = ledger(tmp_path, lambda at: SLOW if any(since <= at < until for since, until in slow) else QUICK)
    assert figures.settled(found, OUT, OUT + 1.5, 2 * QUICK) == after


@pytest.mark.parametrize(
    ("away", "after"),
    [
        ([], 0.5),
        ([(0.0, 1.0)], 1.25),  # from the first half second in which it takes part
        ([(0.0, 0.6), (2.0, 3.0)], 3.25),
        ([(0.0, 6.0)], None),
        ([(4.0, 6.0)], None),
    ],
)
def test_rate_is_full_when_the_server_takes_part_and_that_stays_so(
    tmp_path: Path, away: list[tuple[float, float]], after: float | None
) -> None:
    def server(at: float) -> str:
        return "other" if any(since <= at < until for since, until in away) else "server-1"

    found = ledger(tmp_path, lambda _: QUICK, server)
    assert figures.at_full_rate(found, "server-1", OUT, OUT + 5.5, RATE) == after


def test_rate_is_not_full_while_calls_are_missing(tmp_path: Path) -> None:
    found = ledger(tmp_path, lambda _: QUICK)
    assert figures.at_full_rate(found, "server-1", OUT, OUT + 5.5, 2 * RATE) is None
