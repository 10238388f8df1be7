"""A cluster on a virtual clock."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onehop.cli.console import FAILED, INTERRUPTED, AsJson, complain, print_json, print_table

if TYPE_CHECKING:
    from onehop.testing.search import Found, Progress

TELL_EVERY = 10.0
"""Seconds between two lines of progress, where they do not replace each other."""


def simulate(
    seed: Annotated[int, typer.Option(help="The same seed gives the same run.")] = 1,
    nodes: Annotated[int, typer.Option(min=2, help="Nodes in the world.")] = 100,
    seconds: Annotated[float, typer.Option(min=0.1, help="Virtual seconds.")] = 60.0,
    explore: Annotated[int, typer.Option(min=0, metavar="N", help="Run N worlds, from --seed on.")] = 0,
    processes: Annotated[int, typer.Option(min=0, help="Processes that explore; 0 for one a processor.")] = 0,
    shrink: Annotated[float, typer.Option(min=0.0, help="Seconds to look for the shortest trace of a breach.")] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Run a simulated world with all kinds of faults, and check every promise at every step; or explore many.

    With --explore each seed gives a world of its own; of each promise that was broken the shortest trace found is
    shown, and the program that brings it back. Ctrl-C ends the exploration with what was found. Exit code 1 if a
    promise was broken.
    """
    if explore:
        _explore(range(seed, seed + explore), nodes, seconds, processes or os.cpu_count() or 1, shrink, as_json)
        return
    from onehop.testing.exploration import run

    begun = time.perf_counter()
    world = run(seed=seed, nodes=nodes, seconds=seconds)
    took = time.perf_counter() - begun
    if as_json:
        print_json({
            "seed": seed, "nodes": nodes, "seconds": seconds, "took": round(took, 3),
            "digest": world.digest, "broken": world.broken, "summary": world.summary,
        })  # fmt: skip
    else:
        title = f"{nodes} nodes, {seconds:g} virtual seconds in {took:.1f} s, seed {seed}"
        print_table(("what", "how much"), [(name, _shown(value)) for name, value in world.summary.items()], title)
        print(f"trace {world.digest}")
        print("no promise was broken" if not world.broken else f"{len(world.broken)} promises were broken:")
        for each in world.broken:
            print(f"  {each}")
    if world.broken:
        complain(f"{len(world.broken)} promises were broken; run it again with --seed {seed} --nodes {nodes}")
        raise typer.Exit(FAILED)


def _explore(seeds: range, nodes: int, seconds: float, processes: int, shrink: float, as_json: bool) -> None:
    from onehop.testing.search import Search

    begun = time.perf_counter()
    search = Search(seeds, nodes, seconds, processes, shrink)
    found = search.run(_Teller().tell)
    took = time.perf_counter() - begun
    if as_json:
        print_json({
            "first": seeds[0], "last": seeds[-1], "nodes": nodes, "seconds": seconds, "took": round(took, 3),
            "done": search.done, "broken": [_as_json(each) for each in found],
        })  # fmt: skip
    else:
        for each in found:
            _show(each)
        print(
            f"{search.done} worlds of {nodes} nodes and {seconds:g} virtual seconds in {took:.0f} s "
            f"({search.done / took:.1f} a second, {processes} processes): "
            + (f"{len(found)} promises were broken" if found else "no promise was broken")
        )
    if found:
        complain(
            f"{len(found)} promises were broken; run one again with --seed SEED --nodes {nodes} --seconds {seconds:g}"
        )
        raise typer.Exit(FAILED)
    if search.is_interrupted:
        raise typer.Exit(INTERRUPTED)


class _Teller:
    """Says on standard error how far it is."""

    def __init__(self) -> None:
        self._told = time.monotonic()

    def tell(self, progress: Progress) -> None:
        if sys.stderr.isatty():
            print(f"\r{progress}\x1b[K", end="\n" if progress.done == progress.all else "", file=sys.stderr, flush=True)
        elif time.monotonic() > self._told + TELL_EVERY or progress.done == progress.all:
            self._told = time.monotonic()
            print(progress, file=sys.stderr, flush=True)


def _show(found: Found) -> None:
    print(f"broken by {len(found.seeds)} seeds, {', '.join(map(str, found.seeds[:10]))}: {found.rule}")
    if found.shortest is None:
        print(found.breach)
    else:
        whether = "the shortest" if found.shortest.is_done else "the shortest found in the time"
        print(f"\n# seed {found.shortest.plan.seed}, {whether} of {found.shortest.tried} plans:")
        print(f"{found.shortest.plan.program()}\n\n{found.shortest.breach}")
    print()


def _as_json(found: Found) -> dict[str, Any]:
    shortest = found.shortest
    return {
        "rule": found.rule, "seeds": found.seeds, "breach": found.breach if shortest is None else shortest.breach,
        "program": None if shortest is None else shortest.plan.program(),
    }  # fmt: skip


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{number} {name}" for name, number in value.items())
    return str(value)
