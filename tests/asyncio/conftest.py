"""Tests that are coroutines: in asyncio's own loop (its debug mode) and in uvloop's, where their nodes are closed."""

from __future__ import annotations

import asyncio
import inspect
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import uvloop

from onehop.asyncio import Node
from onehop.testing.memory import Network

LONGEST = 60.0
"""Seconds for one test."""


@pytest.fixture(params=["asyncio", "uvloop"])
def loop_kind(request: pytest.FixtureRequest) -> str:
    """Whose loop runs the test."""
    return str(request.param)


class Nodes:
    """Makes nodes that know each other; they are closed in the loop when the test is over."""

    def __init__(self, **settings: Any) -> None:
        self.made: list[Node] = []
        self._settings = settings

    def __call__(self, **settings: Any) -> Node:
        self.made.append(Node(**self._settings, **settings))
        return self.made[-1]


@pytest.fixture(params=["zmq", "memory"])
def node(request: pytest.FixtureRequest, loop_kind: str) -> Nodes:
    """Makes nodes: over ZeroMQ, then over memory."""
    return Nodes() if request.param == "zmq" else Nodes(network=Network())


@pytest.fixture
def zmq_node(loop_kind: str) -> Nodes:
    """Makes nodes over ZeroMQ."""
    return Nodes()


@pytest.fixture
def until() -> Callable[..., Awaitable[None]]:
    """``await until(condition, within=5.0)``; fails if it does not come true."""

    async def wait(condition: Callable[[], Any], within: float = 5.0) -> None:
        deadline = time.monotonic() + within
        while not condition():
            assert time.monotonic() < deadline, f"not within {within} s"
            await asyncio.sleep(0.002)

    return wait


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is a coroutine. What the loop has to complain about fails it."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    given = pyfuncitem.funcargs
    arguments = {name: given[name] for name in inspect.signature(pyfuncitem.obj).parameters}
    made = next((each.made for each in given.values() if isinstance(each, Nodes)), [])
    complaints: list[dict[str, Any]] = []

    async def test() -> None:
        loop = asyncio.get_running_loop()
        loop.slow_callback_duration = LONGEST  # it measures the machine, which may be busy
        loop.set_exception_handler(lambda _loop, context: complaints.append(context))
        try:
            async with asyncio.timeout(LONGEST):
                await pyfuncitem.obj(**arguments)
        finally:
            for each in reversed(made):
                await each.close()

    own = pyfuncitem.callspec.params["loop_kind"] == "asyncio"
    with asyncio.Runner(debug=own, loop_factory=None if own else uvloop.new_event_loop) as runner:
        runner.run(test())
    assert complaints == []
    return True


# Programs -----------------------------------------------------------------------------------------

HEAD = """
import asyncio, os, signal, sys, threading, time, warnings
import onehop
from onehop.asyncio import Node

def run(main):
    if sys.argv[1] == "uvloop":
        import uvloop
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(main)
    return asyncio.run(main, debug="debug" in sys.argv)
"""


@pytest.fixture
def program(loop_kind: str) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """``program(text)`` starts it in a process of its own, with warnings as errors; ends it with the test."""
    started: list[subprocess.Popen[str]] = []

    def start(text: str, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-W", "error", "-c", HEAD + text, loop_kind, *arguments]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.communicate(timeout=10)
