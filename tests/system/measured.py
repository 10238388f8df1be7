"""Writes docs/registries/measured.md from what beyond.py and crowd.py have printed, given as files:

    python tests/system/beyond.py > beyond.json
    python tests/system/crowd.py --registry etcd zookeeper redis > crowd.json
    python tests/system/measured.py beyond.json crowd.json > docs/registries/measured.md

A file holds one JSON object after the other; of two for the same registry the later counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

Found = Mapping[str, Any]

MISDIRECTED = "meant for the old one ran at the new one"

HEAD = """\
# What was measured of the registries

Made by `tests/system/measured.py` from the output of two programs that stand beside it: `beyond.py` runs the real
servers and real nodes on [test hosts](../howto/hosts.md), `crowd.py` thousands of registry sessions at one server.
Which registry suits whom is on [the page about all of them](index.md).

*{date}. One machine with {processors} processors for everything: the hosts, the nodes and the registry's server.
Linux {kernel}, Python {python}.{note}*
"""


class Column(NamedTuple):
    """A figure of a table.

    Args:
        head: what stands above it.
        value: what stands below, from what was found of one registry.
    """

    head: str
    value: Callable[[Any], str]


class Table(NamedTuple):
    """One table.

    Args:
        key: under which a registry's figures stand; empty where they are the object itself.
        has: a figure that says whether an object is of this kind.
    """

    title: str
    text: str
    key: str
    has: str
    columns: Sequence[Column]


def figure(name: str, unit: str = "", digits: int = 2) -> Callable[[Found], str]:
    """The figure of that name."""
    return lambda found: f"{max(0.0, found[name]):,.{digits}f}{unit}"


def outcomes(found: Found) -> str:
    """Calls, and what became of those that did not end well."""
    bad = {name: number for name, number in found["outcomes"].items() if name != "ok"}
    told = ", ".join(f"{number} {name.replace(' ', ' (')})" for name, number in sorted(bad.items()))
    return f"{found['calls']:,}: " + (f"all but {told}" if told else "all well")


def death(*more: Column) -> Sequence[Column]:
    """What is said of a server that is gone."""
    suffered = "last one that suffered {} after"
    return [
        Column("calls", outcomes),
        Column("last that suffered began", figure(suffered.format("began"), " s")),
        Column("and ended", figure(suffered.format("ended"), " s")),
        *more,
    ]


TABLES = (
    Table(
        "A server joins",
        "From the moment a server begins to announce itself until a call from another host, which waited for it, has "
        "come back.",
        "joins", "joins",
        [
            Column("joins", figure("joins", digits=0)),
            Column("p50", figure("p50", " s", 3)),
            Column("p99", figure("p99", " s", 3)),
            Column("worst", figure("worst", " s", 3)),
        ],
    ),
    Table(
        "A server is killed",
        "One of two servers is killed with SIGKILL under 200 calls a second to either. A call *suffered* if it failed "
        "or took more than 0.5 s; seconds count from the kill.",
        "killed", "killed", death(),
    ),
    Table(
        "A host loses power",
        "The same, and nobody closes a connection. 9 s later the host is back with another address, and a server of "
        "the same name.",
        "power lost", "power lost",
        death(
            Column("called at its new address after", figure("new address reached after", " s")),
            Column("meant for the old one, run by the new", lambda found: f"{len(found[MISDIRECTED])}"),
        ),
    ),
    Table(
        "The registry is away, and has lost its data when it is back",
        "Its server is killed under 500 calls a second between nodes that know each other, its data is removed, and it "
        "is started again.",
        "outage", "outage",
        [
            Column("calls", outcomes),
            Column("slowest call", figure("slowest call", " s")),
            Column("servers known while it was away (of 2)", figure("servers known while it was away", digits=0)),
            Column("an idle node's CPU meanwhile", figure("idle CPU, % of a processor", " %")),
            Column("all listed again after", figure("all listed again after", " s")),
        ],
    ),
    Table(
        "A server with many links starts anew",
        "It is killed and started at once; its callers, which have no other server, call every five seconds or so. The "
        "nodes of a process of callers share a session at the registry.",
        "restart", "restart",
        [
            Column("callers", figure("callers", digits=0)),
            Column("there again after", figure("server was there again after", " s")),
            Column("all answered again after", figure("all answered again after", " s")),
            Column("most attempts to connect in a second", figure("most attempts in a second", digits=0)),
            Column("attempts in all", figure("attempts", digits=0)),
        ],
    ),
    Table(
        "Many at one registry: joining",
        "Each is a registry session of its own; one in 250 is a controller and follows all agents; agents follow "
        "the controllers. All join at once.",
        "", "all announced, s",
        [
            Column("nodes", figure("nodes", digits=0)),
            Column("all are announced", figure("all announced, s", " s", 1)),
            Column("all know whom they want", figure("all know whom they want, s", " s", 1)),
            Column("the server's CPU time", figure("registry's CPU of the join, s", " s", 1)),
        ],
    ),
    Table(
        "Many at one registry: at rest",
        "CPU and traffic are of one second and one node. Memory is the process's, divided by its nodes.",
        "", "all announced, s",
        [
            Column("server's CPU", figure("registry's CPU at rest, us a node and second", " µs", 1)),
            Column("of a processor", figure("registry's CPU at rest, % of a processor", " %", 1)),
            Column("traffic", figure("traffic at rest, bytes a node and second", " bytes", 0)),
            Column("node's CPU", figure("nodes' CPU at rest, us a node and second", " µs", 1)),
            Column("memory a node", figure("nodes' memory, KiB a node", " KiB", 0)),
            Column("memory a known record", figure("bytes a known record", " bytes", 0)),
        ],
    ),
)  # fmt: skip


def objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects that stand one after the other in ``text``."""
    decoder, at = json.JSONDecoder(), 0
    while text[at:].strip():
        at += len(text[at:]) - len(text[at:].lstrip())
        found, at = decoder.raw_decode(text, at)
        yield found


def rendered(table: Table, found: Sequence[Found]) -> str:
    """``table`` with a row for each registry of which there are such figures; nothing where there is none."""
    rows = {each["registry"]: each[table.key] if table.key else each for each in found if table.has in each}
    if not rows:
        return ""
    lines = [f"## {table.title}\n", f"{table.text}\n"]
    lines.append("| registry | " + " | ".join(column.head for column in table.columns) + " |")
    lines.append("| --- |" + " --: |" * len(table.columns))
    for name, figures in rows.items():
        lines.append(f"| {name} | " + " | ".join(column.value(figures) for column in table.columns) + " |")
    return "\n".join(lines) + "\n"


def page(files: Sequence[Path], note: str) -> str:
    """The page; its date is that of the newest of ``files``."""
    found = [each for file in files for each in objects(file.read_text())]
    newest = max(file.stat().st_mtime for file in files)
    head = HEAD.format(
        date=datetime.fromtimestamp(newest, UTC).strftime("%Y-%m-%d %H:%M UTC"),
        processors=os.cpu_count(), kernel=platform.release().partition("-")[0], python=platform.python_version(),
        note=f" {note}" if note else "",
    )  # fmt: skip
    return "\n".join([head, *filter(None, (rendered(each, found) for each in TABLES))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--note", default="", help="a sentence that stands behind the date")
    given = parser.parse_args()
    print(page(given.files, given.note), end="")


if __name__ == "__main__":
    main()
