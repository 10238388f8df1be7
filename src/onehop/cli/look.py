"""Looking: who is there, does it answer, which versions are these."""

from __future__ import annotations

import platform
from enum import StrEnum
from importlib import metadata
from typing import Annotated, Any

import typer

import onehop
from onehop import Node
from onehop.cli.console import FAILED, NOBODY, AsJson, complain, open_node, print_json, print_table

PING_TIMEOUT = 1.0


class What(StrEnum):
    """What there is to list."""

    servers = "servers"
    services = "services"
    nodes = "nodes"


def ls(
    context: typer.Context,
    what: Annotated[What, typer.Argument(help="What to list.")] = What.servers,
    as_json: AsJson = False,
) -> None:
    """List the servers, services or nodes that are known now."""
    with open_node(context) as node:
        rows = LISTS[what](node)
        settings = node.settings
    if as_json:
        print_json(rows)
    elif rows:
        print_table(rows[0], [_shown(row) for row in rows])
    else:
        where = f"registry {settings.shown_registry!r}, realm {settings.realm!r}"
        complain(f"no {what} are known ({where}); is something serving there? Try: onehop serve MODULE:OBJECT")


def _servers(node: Node) -> list[dict[str, Any]]:
    own = {"local"}  # this command's own node serves nothing
    return [{name: value for name, value in view._asdict().items() if name not in own} for view in node.servers()]


def _services(node: Node) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for view in node.servers():
        entry = found.setdefault(view.service, {"service": view.service, "instances": 0, "nodes": [], "servers": []})
        entry["instances"] += 1
        for name, value in (("nodes", view.node), ("servers", view.server)):
            if value not in entry[name]:
                entry[name].append(value)
    return [found[name] for name in sorted(found)]


def _nodes(node: Node) -> list[dict[str, Any]]:
    names = ("node", "host", "pid", "state", "services", "endpoints", "zone", "version")
    return [{name: getattr(record, name) for name in names} for record in node.nodes()]


LISTS = {What.servers: _servers, What.services: _services, What.nodes: _nodes}


def _shown(row: dict[str, Any]) -> list[object]:
    shown: list[object] = []
    for value in row.values():
        if isinstance(value, dict):
            value = [f"{name} ({', '.join(each)})" for name, each in sorted(value.items())]
        shown.append("\n".join(map(str, value)) if isinstance(value, list | tuple) else value)
    return shown


def ping(
    context: typer.Context,
    service: Annotated[str, typer.Argument(help="The service's name.")],
    server: Annotated[str, typer.Option(help="Only the servers of this name.")] = "",
    as_json: AsJson = False,
) -> None:
    """Ask every server of a service for a sign of life. Exit code 3 if there is none, 1 if one does not answer."""
    with open_node(context) as node:
        receipts = node.ping(service, server=server, timeout=(context.obj or {}).get("timeout", PING_TIMEOUT))
    if as_json:
        print_json([receipt._asdict() for receipt in receipts])
    elif receipts:
        print_table(
            ("server", "host", "node", "outcome", "milliseconds", "reason"),
            [
                (each.server, each.host, each.node, ANSWERS.get(each.outcome, each.outcome),
                 round(each.seconds * 1000, 2), each.reason)
                for each in receipts
            ],
        )  # fmt: skip
    if not receipts:
        which = f"server {server!r} of service {service!r}" if server else f"service {service!r}"
        complain(f"nobody offers {which}; see who is there with: onehop ls")
        raise typer.Exit(NOBODY)
    if any(each.outcome != "taken" for each in receipts):
        raise typer.Exit(FAILED)


ANSWERS = {"taken": "alive"}


def version(as_json: AsJson = False) -> None:
    """Show the versions of onehop and of what it stands on."""
    found = {"onehop": onehop.__version__, "python": platform.python_version()}
    for name in ("pyzmq", "msgspec", "oslo.messaging"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["compiled functions"] = "in use" if onehop.compiled else "not in use"
    if as_json:
        print_json(found)
    else:
        for name, release in found.items():
            print(f"{name} {release}")
