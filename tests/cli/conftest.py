"""Running the command: in this process where that will do, and as a process where signals or exit codes matter."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, NamedTuple

import pytest

import onehop
from onehop import Node
from onehop.cli.app import app

COMMAND = (sys.executable, "-m", "onehop")


class Ended(NamedTuple):
    """What a command said, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def sentence(self) -> str:
        """The only line on standard error, without the command's name."""
        lines = self.err.strip().splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("onehop: "), self.err
        return lines[0].removeprefix("onehop: ")


@pytest.fixture
def eventually() -> Callable[..., None]:
    """``eventually(condition, within=10.0)``: wait for something outside to become true."""

    def wait(condition: Callable[[], Any], within: float = 10.0) -> None:
        deadline = time.monotonic() + within
        while not condition():
            assert time.monotonic() < deadline, f"not within {within} s"
            time.sleep(0.005)

    return wait


@pytest.fixture
def background() -> Iterator[Callable[..., Future[Any]]]:
    """``background(function, *arguments)``: run it in a thread."""
    with ThreadPoolExecutor() as pool:
        yield pool.submit


@pytest.fixture
def run() -> Callable[..., Ended]:
    """``run("call", "clock", "read")``: the command, in this process."""

    def run(*arguments: object) -> Ended:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            try:
                app([str(each) for each in arguments], prog_name="onehop")
                code: Any = 0
            except SystemExit as ended:
                code = ended.code
        return Ended(code or 0, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """``start("serve", "clock:Clock", cwd=...)``: the command as a process, which is killed when the test is over."""
    processes = []

    def start(*arguments: object, command: tuple[str, ...] = COMMAND, **more: Any) -> subprocess.Popen[str]:
        processes.append(
            subprocess.Popen(
                [*command, *map(str, arguments)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
                # The pytest setting `pythonpath` is not seen by processes.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONUNBUFFERED": "1"},
                **more,
            )
        )
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


class Clock:
    """A service to call."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.entered = threading.Event()

    def read(self, zone: str = "utc") -> dict[str, Any]:
        return {"zone": zone, "server": getattr(onehop.current(), "server", "")}

    def text(self) -> str:
        return "noon"

    def odd(self) -> dict[Any, Any]:
        return {1: b"\x00\xff", "not a number": float("nan"), "big": 2**70}

    def bad(self) -> None:
        raise ValueError("the clock stands")

    def slow(self, seconds: float) -> str:
        self.entered.set()
        time.sleep(seconds)
        return "done"

    def count(self, end: int) -> Iterator[int]:
        yield from range(end)

    def set(self, value: Any) -> None:
        self.values.append(value)


@pytest.fixture
def clock(make_node: Callable[..., Node]) -> Clock:
    """A service ``clock``, with one server named ``tower``."""
    served = Clock()
    make_node().serve("clock", served, server="tower")
    return served


MODULE = """
import time

class Clock:
    def read(self, zone="utc"):
        return zone
    def slow(self, seconds):
        print("entered", flush=True)
        time.sleep(seconds)
        return "done"

class Needy:
    def __init__(self, what):
        self.what = what

def now():
    return 12

clock = Clock()
empty = {}
"""


@pytest.fixture
def here(tmp_path: Any) -> Any:
    """A directory with a module ``watch`` to serve."""
    (tmp_path / "watch.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("1 / 0")
    return tmp_path
