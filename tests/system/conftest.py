"""Programs in processes of their own, ended by their process id."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.processes import send

PRELUDE = """
import os, signal, sys, threading, time
import onehop
"""


class Program:
    """A process that runs a piece of Python with ``onehop``, ``os``, ``sys``, ``threading`` and ``time`` imported."""

    def __init__(self, source: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + textwrap.dedent(source), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        return self.process.pid

    def line(self) -> str:
        """The next line it prints."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"it ended with {self.process.wait(10)}"
        return line.strip()

    def signal(self, number: signal.Signals) -> None:
        send(self.process, number)

    def catches(self, number: signal.Signals) -> bool:
        """Whether it has a handler for that signal by now."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        caught = int(status.partition("SigCgt:")[2].split()[0], 16)
        return bool(caught & 1 << number - 1)

    def wait(self, within: float = 30.0) -> int:
        return self.process.wait(within)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        for each in (self.process.stdin, self.process.stdout):
            if each is not None:
                each.close()


@pytest.fixture
def start() -> Iterator[Callable[..., Program]]:
    """``start(source, *arguments)`` runs a program; all are ended when the test is over."""
    programs: list[Program] = []

    def begin(source: str, *arguments: str) -> Program:
        programs.append(Program(source, *arguments))
        return programs[-1]

    yield begin
    for each in reversed(programs):  # callers before their servers
        each.end()


class Ledger:
    """A file to which processes append a line for each request they run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def lines(self) -> list[str]:
        return self.path.read_text().split()


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger")


SERVER = """
ledger = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)
name = sys.argv[2]

class Clock:
    def note(self, number, seconds=0.0):
        os.write(ledger, b"%d\\n" % number)
        if seconds:
            time.sleep(seconds)
        return number

    def name(self):
        return name

    def hang(self):
        threading.Event().wait()

node = onehop.Node(inbox_messages=5000, drain_timeout=20.0)
node.serve("clock", Clock(), server=name, workers=int(sys.argv[3]))
print("serving", flush=True)
print("drained", node.run(), flush=True)
"""


@pytest.fixture
def serve(start, ledger: Ledger) -> Callable[..., Program]:  # type: ignore[no-untyped-def]
    """``serve(name, workers)`` starts a process that serves "clock", and drains at SIGTERM."""

    def begin(name: str, workers: int = 8) -> Program:
        program: Program = start(SERVER, str(ledger.path), name, str(workers))
        assert program.line() == "serving"
        return program

    return begin
