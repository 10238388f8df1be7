"""What was measured, in a file, and the machine that it was measured on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec
import zmq

from benchmarks.measure import Options, Row
from benchmarks.nats_server import NatsMissing
from benchmarks.nats_server import find_server as find_nats
from benchmarks.rabbitmq import RabbitMQMissing
from benchmarks.rabbitmq import find_server as find_rabbit
from benchmarks.scenarios import SCENARIOS, Scenario

PACKAGES = (
    "onehop", "pyzmq", "msgspec", "uvloop", "oslo.messaging", "kombu", "grpcio", "nats-py", "rpyc", "zerorpc", "gevent",
    "pynng", "eclipse-zenoh",
)  # fmt: skip
MEMORY = r"^MemTotal:\s+(\d+)"


class Results:
    """results.json: scenarios measured again take the place of their old figures, unless the machine is another."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.values: dict[str, Any] = {"machine": machine(), "scenarios": {}}
        if path.exists():
            before = msgspec.json.decode(path.read_bytes())
            if before["machine"] == self.values["machine"]:
                self.values = before

    def add(self, scenario: Scenario, options: Options, rows: Sequence[Row]) -> None:
        """Keep the rows of one scenario, in the file too."""
        self.values["scenarios"][scenario.name] = {
            "title": scenario.title,
            "unit": scenario.unit,
            "date": time.strftime("%Y-%m-%d %H:%M"),
            "quick": options.quick,
            "rounds": options.rounds,
            "seconds": options.seconds,
            "rows": rows,
        }
        self.values["scenarios"] = {
            name: self.values["scenarios"][name] for name in SCENARIOS if name in self.values["scenarios"]
        }
        text = msgspec.json.format(msgspec.json.encode(self.values), indent=1)
        unfinished = self._path.with_suffix(".new")
        unfinished.write_bytes(text + b"\n")
        unfinished.replace(self._path)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cpu": _first(r"^model name\s*:\s*(.+)$", "/proc/cpuinfo") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": f"{int(_first(MEMORY, '/proc/meminfo') or 0) / 2**20:.0f} GiB",
        "virtual": "hypervisor" in (_first(r"^flags\s*:\s*(.+)$", "/proc/cpuinfo") or "").split(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of all libraries and brokers that are here."""
    found = {"libzmq": zmq.zmq_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    try:
        told = subprocess.run([find_nats(), "--version"], capture_output=True, text=True, check=True).stdout
        found["nats-server"] = told.split()[-1].removeprefix("v")
    except NatsMissing:
        pass
    try:
        # Its path tells it; the program itself would start an Erlang machine to say so.
        if named := re.search(r"rabbitmq_server-([\d.]+)", os.path.realpath(find_rabbit())):
            found["rabbitmq-server"] = named[1]
    except RabbitMQMissing:
        pass
    return found


def _first(pattern: str, path: str) -> str:
    """What the pattern's group finds first in a file; empty where it finds nothing."""
    try:
        found = re.search(pattern, Path(path).read_text(), re.MULTILINE)
    except OSError:
        return ""
    return found[1].strip() if found else ""
