"""A cluster on a virtual clock."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from onehop.cli.console import FAILED, AsJson, complain, print_json, print_table


def simulate(
    seed: Annotated[int, typer.Option(help="The same seed gives the same run.")] = 1,
    nodes: Annotated[int, typer.Option(min=2, help="Nodes in the world.")] = 100,
    seconds: Annotated[float, typer.Option(min=0.1, help="Virtual seconds.")] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Run a simulated world with crashes, restarts and partitions, and check every promise at every step.

    Exit code 1 if a promise was broken.
    """
    from onehop.testing.simulation import run

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


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{number} {name}" for name, number in value.items())
    return str(value)
