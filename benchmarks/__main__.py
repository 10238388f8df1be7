"""``python -m benchmarks``: measure, and write results.json and the report."""

from __future__ import annotations

import argparse
import signal
import sys
import textwrap
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks.measure import Failed, Options
from benchmarks.report import write_report
from benchmarks.results import Results
from benchmarks.scenarios import SCENARIOS, Scenario
from benchmarks.system import System
from benchmarks.systems import SYSTEMS


def say(text: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "python -m benchmarks",
        description="Measures onehop beside its peers and its limits.",
        epilog="scenarios:\n"
        + "".join(f"  {each.name:17}{each.title}\n" for each in SCENARIOS.values())
        + "\nsystems:\n"
        + textwrap.fill(", ".join(SYSTEMS), 100, initial_indent="  ", subsequent_indent="  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--quick", action="store_true", help="short windows, two rounds, fewer cases")
    made.add_argument("--rounds", type=int, help="rounds in which all systems take turns (default 5; quick: 2)")
    made.add_argument("--seconds", type=float, help="length of each window (default 1; quick: 0.3)")
    made.add_argument("--scenario", nargs="+", default=list(SCENARIOS), metavar="NAME", help="only these")
    made.add_argument("--system", nargs="+", default=[], metavar="NAME", help="only these")
    made.add_argument("--out", type=Path, default=Path("build/benchmarks"), metavar="DIR", help="where to write")
    return made


def known(names: Iterable[str], table: Iterable[str], what: str) -> None:
    """Exit unless all names are in the table."""
    for name in names:
        if name not in table:
            sys.exit(f"no {what} is called {name!r}; there are: {', '.join(table)}")


def taking_part(scenario: Scenario, only: tuple[str, ...]) -> list[System]:
    """The systems that can do the scenario, of those that are wanted."""
    return [each for each in SYSTEMS.values() if scenario.name in each.scenarios and (not only or each.name in only)]


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit code: 1 if a system failed."""
    given = parser().parse_args(arguments)
    known(given.scenario, SCENARIOS, "scenario")
    known(given.system, SYSTEMS, "system")
    options = Options(
        given.seconds or (0.3 if given.quick else 1.0),
        given.rounds or (2 if given.quick else 5),
        given.quick,
        tuple(given.system),
    )
    given.out.mkdir(parents=True, exist_ok=True)
    results = Results(given.out / "results.json")
    failures = 0
    for name in given.scenario:
        systems = taking_part(SCENARIOS[name], options.systems)
        if not systems and (options.systems or not SCENARIOS[name].measured_by):
            continue
        rows = SCENARIOS[name].measure(systems, options, say)
        failures += sum("error" in each for each in rows)
        results.add(SCENARIOS[name], options, rows)
        write_report(results.values, given.out)
    say(f"wrote {given.out / 'index.md'}; {failures or 'no'} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that brokers are ended too
    try:
        sys.exit(main())
    except Failed as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
