"""Real processes under load and faults, and a ledger that has to balance."""

from __future__ import annotations

import shutil
import sys
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import typer

from onehop import SettingsError
from onehop.cli.console import FAILED, AsJson, complain, print_json, print_table, terminated_as_interrupted
from onehop.testing.chaos import figures, plan
from onehop.testing.chaos.cluster import Cluster
from onehop.testing.hosts import Hosts, HostsUnavailable

Fault = StrEnum("Fault", {each.replace("-", "_").upper(): each for each in plan.FAULTS})  # type: ignore[misc]
OURS = "onehop.testing.chaos.programs:Onehop"
LOOK = 5.0
"""Seconds between two lines of progress."""
BREACHES_SHOWN = 10


def chaos(
    context: typer.Context,
    seed: Annotated[int, typer.Option(help="The same seed gives the same plan of faults.")] = 1,
    seconds: Annotated[float, typer.Option(min=4.0, help="How long the load lasts.")] = 30.0,
    servers: Annotated[int, typer.Option(min=1, help="How many servers, each a process.")] = 3,
    callers: Annotated[int, typer.Option(min=1, help="How many callers, each a process.")] = 1,
    rate: Annotated[float, typer.Option(min=1.0, help="Requests a second, all callers together.")] = 500.0,
    hosts: Annotated[
        bool, typer.Option("--hosts", help="Give each server a test host; the faults between hosts too; needs root.")
    ] = False,
    fault: Annotated[
        list[Fault] | None, typer.Option(metavar="KIND", help="Only faults of this kind; may be given several times.")
    ] = None,
    in_loop: Annotated[
        int, typer.Option("--asyncio", min=0, metavar="N", help="So many of the callers use the asyncio face.")
    ] = 0,
    over: Annotated[
        str, typer.Option(metavar="MODULE:CLASS", help="Run over other Messages of onehop.testing.chaos.programs.")
    ] = OURS,
    ledger: Annotated[str, typer.Option(metavar="PATH", help="Leave the ledger in this new directory.")] = "",
    as_json: AsJson = False,
) -> None:
    """Run servers and callers as processes, disturb the servers by a plan drawn from a seed, and balance the ledger.

    Servers are killed (kill), stopped (pause), restarted in order (roll), or all their workers wait for a lock
    (hang). With --hosts, their hosts are cut off both ways (cut) or one way (one-way, deaf), lose packets (lossy) or
    lose their power (power). Of several servers one at least is left alone at any time.
    With --fault registry, a Redis server of the run's own is the registry, on this host alone; it is killed, and
    comes back without what it knew.
    Every call, idempotent call and cast stands in the ledger, with its outcome and each of its executions; exit
    code 1 if it does not balance, if half of them or more did not come to what was wanted, or if a process ended
    badly that nobody had killed.
    """
    if context.obj:
        given = ", ".join(f"--{name.replace('_', '-')}" for name in context.obj)
        raise SettingsError(f"{given}: is of no use here; the nodes of a run are told all by the run")
    kinds = checked(fault, hosts)
    faults = plan.draw(seed, seconds, servers, kinds)
    if in_loop > callers:
        raise SettingsError(f"--asyncio {in_loop}: there are {callers} callers; give more (--callers)")
    loops = plan.in_a_loop(seed, callers, in_loop)
    if in_loop and over != OURS:
        raise SettingsError(f"--asyncio and --over do not go together: {over} says by itself how its callers wait")
    directory = Path(ledger) if ledger else None
    if directory is not None and directory.exists():
        raise SettingsError(f"--ledger {ledger}: it exists; name a directory that does not")

    def say(text: str) -> None:
        if not as_json:
            print(text, file=sys.stderr, flush=True)

    with terminated_as_interrupted(), ExitStack() as end:
        machines = None
        if hosts:
            try:
                machines = end.enter_context(Hosts(servers + 1, seed=seed))
            except (HostsUnavailable, ValueError) as error:
                raise SettingsError(f"--hosts cannot be had: {error}") from error
        say(f"starting {servers} servers and {callers} callers; {len(faults)} faults in {seconds:g} s, seed {seed}")
        job: dict[str, Any] = {"rate": rate, "seed": seed, "over": over}
        own = plan.REGISTRY in kinds
        cluster = end.enter_context(
            Cluster(servers, callers, hosts=machines, directory=directory, in_loop=loops, registry=own, **job)
        )
        follow(cluster, faults, seconds, say)
        say("the load ends; waiting for what is under way")
        found = cluster.stop()
        report = {
            "seed": seed,
            "plan": [each._asdict() for each in faults],
            "asyncio": [f"caller-{place + 1}" for place in loops],
            "not_sent": sum(each["behind"] for each in cluster.counts("caller")),
            **figures.report(found, cluster.outages, cluster.began),
        }
    if as_json:
        print_json(report)
    else:
        present(report)
    if report["breaches"]:
        complain(f"the ledger does not balance: {report['breaches'][0]}; run it again with --seed {seed}")
        raise typer.Exit(FAILED)


def checked(wanted: list[Fault] | None, hosts: bool) -> list[str]:
    """The kinds of faults there are to be.

    Raises:
        SettingsError: one of them needs test hosts, and there are none; or a Redis server, or must not have test hosts.
    """
    usual = {**plan.ON_ONE_HOST, **(plan.BETWEEN_HOSTS if hosts else {})}
    kinds = [str(each) for each in wanted or usual]
    for each in kinds:
        if each in plan.BETWEEN_HOSTS and not hosts:
            raise SettingsError(f"--fault {each} needs --hosts; without there are {', '.join(plan.ON_ONE_HOST)}")
        if each == plan.REGISTRY and hosts:
            raise SettingsError("--fault registry and --hosts do not go together: test hosts have a registry of theirs")
        if each == plan.REGISTRY and shutil.which("redis-server") is None:
            raise SettingsError("--fault registry needs redis-server, which is not to be found: install it")
    return kinds


def follow(cluster: Cluster, faults: list[plan.Fault], seconds: float, say: Any) -> None:
    """Let the load run and the faults happen, and tell of it."""
    told, looked = 0, monotonic()

    def tick() -> None:
        nonlocal told, looked
        for at, what in cluster.events[told:]:
            say(f"{at:6.1f} s  {what}")
        told = len(cluster.events)
        if monotonic() - looked >= LOOK:
            looked = monotonic()
            say(f"{looked - cluster.began:6.1f} s  {seconds - (looked - cluster.began):.0f} s to go")

    cluster.go()
    cluster.follow(faults, seconds, tick)
    tick()


def present(report: dict[str, Any]) -> None:
    """The report for people."""
    rows = [(verb, *line.values()) for verb, line in report["ledger"].items()]
    columns = next(iter(report["ledger"].values()))
    title = f"{report['requests']} requests in {report['seconds']:g} s, {report['per_second']} a second"
    print_table(("", *columns), rows, title)
    print(f"latency: {', '.join(f'{name} {value:g} ms' for name, value in report['latency_ms'].items())}")
    if report["errors"]:
        print(f"errors: {', '.join(f'{number} {name}' for name, number in report['errors'].items())}")
    for name, number in report["explained_by_outages"].items():
        print(f"{number} {name}: with a server that was struck at the time")
    if report["not_sent"]:
        print(f"{report['not_sent']} not sent: all threads of a caller waited when they were due")
    print(f"the machine held a process up for {report['worst_stall_ms']:g} ms at most")
    breaches = report["breaches"]
    print("The ledger balances." if not breaches else f"The ledger does not balance, in {len(breaches)} ways:")
    for each in breaches[:BREACHES_SHOWN]:
        print(f"  {each}")
