"""From results.json to what is read: Markdown, with tables, plots and the goals."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.goals import judge

Row = dict[str, Any]

COLOURS = {"onehop": "#c2410c", "peer": "#3b6ea5", "limit": "#9aa0a6"}
MISSING = "-"
HEADINGS = {
    "rss_client": "client MiB",
    "rss_server": "server MiB",
    "rss_broker": "broker MiB",
    "kib": "KiB each",
    "cpu_ms": "CPU ms each",
    "idle_share": "CPU share idle",
    "records_kib": "of it records, KiB",
    "records_cpu_ms": "of it records, CPU ms",
    "sender_cpu": "sender's CPU s",
    "rate": "calls/s",
    "cpu": "CPU µs",
}
HIDDEN = {"kind", "rounds", "case", "message", "clients", "callers", "note"}

READING = Path(__file__).with_name("reading.md")
"""What is said of the figures in general."""

# --- numbers --------------------------------------------------------------------------------------------------------


def number(value: float | None) -> str:
    """Three digits that mean something, thousands separated."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 100:
        digits = len(f"{size:.0f}")
        return f"{round(value, 3 - digits):,.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:#.2g}" if size < 1 else f"{value:.2f}"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A Markdown table; the first columns to the left, which are text, figures to the right."""
    lines = [headings, ["---"] * texts + ["--:"] * (len(headings) - texts), *rows]
    return "\n".join(f"| {' | '.join(each)} |" for each in lines)


# --- tables ---------------------------------------------------------------------------------------------------------


def measured(rows: Sequence[Row], unit: str) -> str:
    """The table of one case of an interleaved scenario, the fastest first."""
    columns: dict[str, Callable[[Row], str]] = {
        f"{unit}/s": lambda row: number(row["rate"]),
        "spread": lambda row: f"{spread(row):.0%}",
        "p50 µs": lambda row: number(row["p50"] or None),
        "p99 µs": lambda row: number(row["p99"] or None),
        "CPU µs": lambda row: number(row["cpu"]),
        "client / server / broker": lambda row: ends(row, "cpu"),
        "MiB client / server / broker": lambda row: ends(row, "rss"),
    }
    if any(each.get("lost") for each in rows):
        columns["lost"] = lambda row: number(row["lost"])
    if rows[0]["message"].isdecimal():
        columns["MB/s each way"] = lambda row: number(row["rate"] * int(row["message"]) / 1e6)
    lines = []
    for row in sorted(rows, key=lambda each: -each.get("rate", 0.0)):
        name = f"**{row['system']}**" if row["kind"] == "onehop" else row["system"]
        failed = ["failed", *[MISSING] * (len(columns) - 1)]
        lines.append([name, *(failed if "error" in row else [show(row) for show in columns.values()])])
    return table(["system", *columns], lines)


def ends(row: Row, what: str) -> str:
    """A figure of client, server and broker."""
    return " / ".join(number(row[f"{what}_{end}"] or None) for end in ("client", "server", "broker"))


def spread(row: Row) -> float:
    """Between the fastest and the slowest round, as a share of the median rate."""
    rates = [each["rate"] for each in row["rounds"]]
    return (max(rates) - min(rates)) / row["rate"] if row["rate"] else 0.0


def plain(rows: Sequence[Row]) -> str:
    """The table of a scenario that was measured in a way of its own: a column for each figure."""
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in HIDDEN]
    return table(
        [HEADINGS.get(each, each.replace("_", " ")) for each in columns],
        [[cell(row.get(each)) for each in columns] for row in rows],
    )


def cell(value: Any) -> str:
    """A figure, or a text."""
    if isinstance(value, str):
        return value.splitlines()[-1] if value else ""
    return f"{value:,}" if isinstance(value, int) else number(value)


# --- plots ----------------------------------------------------------------------------------------------------------


def drawing(path: Path, size: tuple[float, float], draw: Callable[[Any], None]) -> str:
    """Have ``draw`` draw on axes, keep that as SVG, and return its Markdown; empty where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        return ""
    import matplotlib

    matplotlib.use("svg")
    # The same figures give the same file, and letters stay letters.
    matplotlib.rcParams.update({"svg.hashsalt": "onehop", "svg.fonttype": "none"})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return f"![{path.stem}]({path.name})"


def bars(path: Path, rows: Sequence[Row], unit: str) -> str:
    """Rates of one case, as ratios to onehop's best."""
    shown = sorted((each for each in rows if each.get("rate")), key=lambda each: each["rate"])
    best = max((each["rate"] for each in shown if each["kind"] == "onehop"), default=0.0)
    if not best or len(shown) < 2:
        return ""

    def draw(axes: Any) -> None:
        drawn = axes.barh(
            [each["system"] for each in shown],
            [each["rate"] for each in shown],
            color=[COLOURS[each["kind"]] for each in shown],
        )
        axes.bar_label(
            drawn, [f" {number(each['rate'])}  ({number(each['rate'] / best)}x)" for each in shown], fontsize=8
        )
        axes.set_xlabel(
            f"{unit} per second, and as a multiple of onehop's best (orange: onehop, blue: peers, grey: limits)"
        )
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.margins(x=0.25, y=0.01)

    return drawing(path, (9, 0.9 + 0.27 * len(shown)), draw)


def lines(path: Path, rows: Sequence[Row], unit: str) -> str:
    """Rates over the cases, which are numbers; a line for each system."""
    shown = sorted((each for each in rows if each.get("rate")), key=lambda each: -each["rate"])
    if not shown:
        return ""

    def draw(axes: Any) -> None:
        for name in dict.fromkeys(each["system"] for each in shown):
            points = sorted((int(each["case"]), each["rate"], each["kind"]) for each in shown if each["system"] == name)
            cases, rates, (kind, *_) = zip(*points, strict=True)
            style = {"onehop": "o-", "peer": "s--", "limit": "x:"}[kind]
            axes.plot(cases, rates, style, label=name, linewidth=2 if kind == "onehop" else 1.2)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sorted({int(each["case"]) for each in shown}))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("pairs")
        axes.set_ylabel(f"{unit} per second")
        axes.grid(alpha=0.3)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)

    return drawing(path, (9, 4.5), draw)


# --- the page -------------------------------------------------------------------------------------------------------


def write_report(results: dict[str, Any], out: Path) -> None:
    """Write index.md and its plots beside results.json. Renders what there is."""
    sections = [head(results, out), machine(results["machine"]), READING.read_text().strip(), goals(results)]
    sections += [section(name, each, out) for name, each in results["scenarios"].items() if name != "scale"]
    sections.append(
        "## Again\n\n    make bench\n\nmeasures it all anew and writes this page; `make bench-quick` is a short form."
    )
    (out / "index.md").write_text("\n\n".join(filter(None, sections)) + "\n")


def head(results: dict[str, Any], out: Path) -> str:
    """The title, and how far one pays for more hosts."""
    text = "# Performance\n\nonehop beside its peers, and beside the limits of what it is made of."
    scale = results["scenarios"].get("scale")
    if scale is None:
        return text
    from benchmarks import scale as by_cost

    rows = scale["rows"]
    plot = drawing(out / "scale.svg", (9, 4.5), lambda axes: by_cost.draw(axes, rows))
    return "\n\n".join(
        filter(None, [text, f"## {scale['title']}", plot, by_cost.READING, plain(rows), conditions(scale)])
    )


def machine(told: dict[str, Any]) -> str:
    """What it was measured on."""
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    kind = "virtual machine" if told["virtual"] else "machine"
    return (
        f"## Machine\n\nOne {kind}: {told['cpu']}, {told['cores']} processors, {told['memory']}, "
        f"Linux {told['kernel']}, Python {told['python']}.\n\n{versions}."
    )


def goals(results: dict[str, Any]) -> str:
    """The goals, and whether they are met."""
    judged = list(judge(results))
    if not judged:
        return ""
    met = sum(each.met is True for each in judged)
    verdicts = {True: "met", False: "**missed**", None: "not measured"}
    rows = [[each.text, each.scenario, each.bound, number(each.measured), verdicts[each.met]] for each in judged]
    count = sum(each.met is not None for each in judged)
    return f"## Goals\n\nRatios of medians inside one table. {met} of {count} that were measured are met.\n\n" + table(
        ["goal", "table", "bound", "measured", ""], rows
    )


def section(name: str, scenario: dict[str, Any], out: Path) -> str:
    """One scenario: its tables and plots."""
    parts = [f"## {scenario['title']}"]
    rows = scenario["rows"]
    if not any("rounds" in each for each in rows):
        parts.append(plain(rows))
    else:
        if name == "pairs":
            parts.append(lines(out / "pairs.svg", rows, scenario["unit"]))
        for case, of_case in groupby(rows, key=lambda each: each["case"]):
            shown = list(of_case)
            parts += [f"### {case}", measured(shown, scenario["unit"])]
            if name != "pairs":
                parts.append(bars(out / f"{name}-{case.replace(' ', '-')}.svg", shown, scenario["unit"]))
    failed = [f"* {each['system']}: {each['error'].splitlines()[-1]}" for each in rows if "error" in each]
    if failed:
        parts.append("Failed:\n\n" + "\n".join(dict.fromkeys(failed)))
    return "\n\n".join(filter(None, [*parts, conditions(scenario)]))


def conditions(scenario: dict[str, Any]) -> str:
    """When and how long."""
    short = ", the short form" if scenario["quick"] else ""
    return f"*{scenario['date']}; rounds: {scenario['rounds']}, each system {scenario['seconds']:g} s in each{short}.*"


if __name__ == "__main__":
    for each in map(Path, sys.argv[1:]):  # rendered again, without measuring
        write_report(msgspec.json.decode((each / "results.json").read_bytes()), each)
