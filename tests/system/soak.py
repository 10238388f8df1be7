"""Load for half an hour with peers that come and go, and the long forms of the rows of ``rows.py``; a report of it all.

::

    make soak                   # or: python -m tests.system.soak --seconds 1800 --out build/soak
    make soak SECONDS=60        # all of it shorter

The report: ``index.md`` with a table, plots where matplotlib is installed, and ``results.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from tests.system.progress import Progress
from tests.system.rows import LONG, PARTITIONS, Judge, Row, partition

from onehop.cli.console import terminated_as_interrupted
from onehop.testing.chaos import figures
from onehop.testing.chaos.cluster import Cluster
from onehop.testing.hosts import Hosts, HostsUnavailable

FULL = 1800.0
RATE, CHURN = 300.0, 1.0
WARM_UP = 1 / 3
"""The part of the time after which memory must not grow any more."""
ALLOCATOR = {"MALLOC_ARENA_MAX": "2"}
"""As docs/reliability/limits.md advises for processes of many threads: in the sixteen arenas that glibc has on two
processors the room between what is in use comes to rest after thousands of peers only, and hides what is looked for."""
JUDGED_FROM = 600.0
"""Seconds from which on a slope is one; in less, a single page of memory is many MiB an hour."""
SLOPE, GROWTH = 1.0, 1.5
"""MiB an hour; and by how much the 99th percentile at the end may exceed that at the beginning."""
MIB = 1 << 20


class Sample(NamedTuple):
    """What one process had at one time."""

    at: float
    name: str
    mib: float
    descriptors: int
    threads: int


def samples(cluster: Cluster) -> Iterator[Sample]:
    """One of each process that runs."""
    page = os.sysconf("SC_PAGE_SIZE")
    for each in [*cluster.servers, *cluster.callers]:
        place = Path(f"/proc/{each.pid}")
        try:
            resident = int((place / "statm").read_text().split()[1]) * page
            count = len(list((place / "fd").iterdir()))
            threads = len(list((place / "task").iterdir()))
        except OSError:
            continue  # it has ended
        yield Sample(time.monotonic() - cluster.began, each.name, resident / MIB, count, threads)


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the line through the points: the median of those between any two of them (Theil and Sen).

    What is held grows all the time. Python's allocator, which takes a mebibyte at once, and its collector, whose oldest
    generation is looked at seldom, go by steps: one of them late in a run would be a slope by least squares.
    """
    between = [(then - y) / (later - x) for (x, y), (later, then) in combinations(points, 2) if later != x]
    return median(between) if between else 0.0


def soak(seconds: float, tell: Callable[[str], None]) -> tuple[Row, list[Sample], list[dict[str, float]]]:
    """Load, and a peer a second that comes and goes; the row, and what was seen over time."""
    taken: list[Sample] = []
    every, told = max(1.0, seconds / 600), 0.0
    with Cluster(3, 1, env=ALLOCATOR, rate=RATE, timeout=5.0) as cluster:
        cluster.go()
        cluster.add_caller("churn", rate=CHURN)

        def look() -> None:
            nonlocal told
            at = time.monotonic() - cluster.began
            if not taken or at - taken[-1].at >= every:
                taken.extend(samples(cluster))
            if at - told >= 60.0:
                told = at
                tell(f"soak: {seconds - at:.0f} s to go")

        cluster.follow([], seconds, look)
        ledger = cluster.stop()
        (churned,) = cluster.counts("churn")
    judge = Judge("Soak", f"{seconds:g} s, {CHURN:g} peer a second comes and goes", ledger, cluster.outages)
    judge.figure("peers that came and went", churned["came"])
    late = [each for each in taken if each.at > seconds * WARM_UP]
    judged = seconds * (1 - WARM_UP) >= JUDGED_FROM
    for name in dict.fromkeys(each.name for each in late):
        of_it = [each for each in late if each.name == name]
        growth = slope([(each.at / 3600, each.mib) for each in of_it])
        figure = f"{name}: MiB an hour"
        judge.below(figure, growth, SLOPE) if judged else judge.figure(figure, growth)
        third = len(of_it) // 3
        before, after = of_it[:third] or of_it, of_it[-third:] or of_it
        judge.figure(f"{name}: descriptors", f"{before[0].descriptors} to {after[-1].descriptors}")
        # A peer that comes has some while it is there: so the median.
        more = median(each.descriptors for each in after) - median(each.descriptors for each in before)
        figure = f"{name}: descriptors, more at the end"
        if judged or not name.startswith("churn"):  # in which peers still gather, in a short run
            judge.below(figure, more, 4 if judged else 16)
        else:
            judge.figure(figure, more)
    over_time = figures.timeline(ledger, cluster.began, max(1.0, seconds / 300))
    steady = [each["p99"] for each in over_time if each["at"] > seconds * WARM_UP and each["sent"] > RATE / 2]
    third = max(1, len(steady) // 3)
    before, after = (figures.percentile(each, 0.5) for each in (steady[:third], steady[-third:]))
    judge.figure("p99 at the beginning, ms", before)
    judge.figure("p99 at the end, ms", after)
    if judged:
        judge.at_most("p99 at the end, as the one at the beginning, ms", after, before * GROWTH)
    judge.none("failed", [each for each in ledger.in_order if not each.well])
    return judge.row(cluster), taken, over_time


def rows_of(part: float) -> Iterator[tuple[str, Callable[[], Row]]]:
    """The long forms."""
    for name, run in LONG.items():
        yield name, lambda run=run: run(part)  # type: ignore[misc]

    def between(kind: str) -> Row:
        with Hosts(4) as hosts:
            return partition(hosts, kind, rate=500, lasts=max(8.0, 60 * part))

    for kind in PARTITIONS:
        yield kind, lambda kind=kind: between(kind)  # type: ignore[misc]


# The report -----------------------------------------------------------------------------------------


def drawing(path: Path, title: str, unit: str, series: dict[str, list[tuple[float, float]]]) -> str:
    """Lines over minutes, kept as SVG; its Markdown. Empty where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        return ""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "onehop", "svg.fonttype": "none"})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 3.5), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    for name, points in series.items():
        axes.plot([at / 60 for at, _ in points], [value for _, value in points], label=name, linewidth=1)
    axes.set_xlabel("minutes")
    axes.set_ylabel(unit)
    axes.set_ylim(bottom=0)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return f"![{title}]({path.name})"


def write_report(out: Path, rows: list[Row], taken: list[Sample], over_time: list[dict[str, float]]) -> None:
    """index.md, its plots, and results.json."""
    out.mkdir(parents=True, exist_ok=True)
    plots = []
    if taken:
        names = list(dict.fromkeys(each.name for each in taken))
        for title, unit, value in (("memory", "MiB", "mib"), ("descriptors", "descriptors", "descriptors")):
            series = {name: [(each.at, getattr(each, value)) for each in taken if each.name == name] for name in names}
            plots.append(drawing(out / f"{title}.svg", title, unit, series))
        lines = {name: [(each["at"], each[name]) for each in over_time] for name in ("p50", "p99")}
        plots.append(drawing(out / "latency.svg", "latency", "ms", lines))
        answered = {name: [(each["at"], each[name]) for each in over_time[:-1]] for name in ("sent", "well")}
        plots.append(drawing(out / "rate.svg", "rate", "a second", answered))
    lines_of_rows = [
        f"| {row.name} | {row.what} | {'<br>'.join(f'{name}: {value}' for name, value in row.figures.items())} | "
        f"{'held' if not row.short else f'**broken, in {len(row.short)} ways**'} |"
        for row in rows
    ]
    broken = [f"* {row.name}: {each}" for row in rows for each in row.short[:20]]
    machine = f"{os.cpu_count()} processors, Linux {os.uname().release}, Python {sys.version.split()[0]}"
    parts = [
        "# Soak",
        f"{time.strftime('%Y-%m-%d')}; {machine}.",
        "\n".join(["| | what | figures | |", "| --- | --- | --- | --- |", *lines_of_rows]),
        *plots,
        "\n".join(["## Broken", "", *broken]) if broken else "",
    ]
    (out / "index.md").write_text("\n\n".join(filter(None, parts)) + "\n")
    results: dict[str, Any] = {
        "rows": [row._asdict() for row in rows],
        "samples": [each._asdict() for each in taken],
        "timeline": over_time,
    }
    (out / "results.json").write_text(json.dumps(results))


def main() -> None:
    """Run it all; ends with 1 where something is broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=FULL, help="how long the soak lasts; the rows in proportion")
    parser.add_argument("--out", type=Path, default=Path("build/soak"))
    parser.add_argument(
        "--only", nargs="+", choices=["soak", *LONG, *PARTITIONS], metavar="ROW",
        help=f"soak, {', '.join([*LONG, *PARTITIONS])}; all by default",
    )  # fmt: skip
    given = parser.parse_args()

    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    rows: list[Row] = []
    taken: list[Sample] = []
    over_time: list[dict[str, float]] = []

    def done(row: Row) -> None:
        rows.append(row)
        print(row.told(), flush=True)
        write_report(given.out, rows, taken, over_time)  # what there is, whatever comes

    def run_all() -> None:
        nonlocal taken, over_time
        if given.only is None or "soak" in given.only:
            tell(f"soak: {given.seconds:g} s")
            row, taken, over_time = soak(given.seconds, tell)
            done(row)
        for name, run in rows_of(min(1.0, given.seconds / FULL)):
            if given.only is None or name in given.only:
                tell(name)
                began = time.monotonic()
                try:
                    with Progress(0, f"s of {name}", lambda began=began: int(time.monotonic() - began), every=60.0):  # type: ignore[misc]
                        row = run()
                    done(row)
                except HostsUnavailable as error:
                    tell(f"{name}: NOT RUN: {error}")

    try:
        with terminated_as_interrupted():
            run_all()
    except KeyboardInterrupt:
        sys.exit("interrupted; everything that was started has been ended")
    print(f"the report is in {given.out}/index.md")
    sys.exit(any(row.short for row in rows))


if __name__ == "__main__":
    main()
