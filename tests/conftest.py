"""What all tests share: a run directory, nodes that are closed at the end, threads, waiting, and a loop in a thread."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

import pytest
import uvloop
from hypothesis import settings

import onehop.asyncio
from onehop import Node
from onehop.settings import ENVIRONMENT_PREFIX

pytest.register_assert_rewrite("tests.registry.outages")  # tests of several registries, which say what was there, too

# An example that the machine held up is no failure: a test that is about time measures it itself.
settings.register_profile("no deadline", parent=settings(), deadline=None)
settings.load_profile("no deadline")

FIGURES = re.compile(r"(R\d+|Soak)  ")
"""How a line of output begins that tells the figures of a row of docs/reliability."""


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Show the figures of the rows, whichever process has found them, and though their tests have passed."""
    found = [
        line
        for report in terminalreporter.getreports("passed")
        for name, text in report.sections if "stdout" in name
        for line in text.splitlines() if FIGURES.match(line)
    ]  # fmt: skip
    if found:
        terminalreporter.section("figures")
    for line in sorted(found, key=lambda line: int("".join(filter(str.isdigit, line.split()[0])) or 99)):
        terminalreporter.line(line)


@pytest.fixture(autouse=True)
def run_directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A run directory that only this test (and the processes it starts) use.

    Short, since the path of a socket has 107 bytes at most. No other setting comes from the environment.
    """
    for name in list(os.environ):
        if name.startswith(ENVIRONMENT_PREFIX):
            monkeypatch.delenv(name)
    path = tempfile.mkdtemp(prefix="oh-", dir="/tmp")
    monkeypatch.setenv("ONEHOP_RUN_DIRECTORY", path)
    monkeypatch.setenv("ONEHOP_CACHE_DIRECTORY", f"{path}.cache")
    yield path
    for each in (path, f"{path}.cache"):
        shutil.rmtree(each, ignore_errors=True)


@pytest.fixture
def make_node() -> Iterator[Callable[..., Node]]:
    """Makes nodes, and closes them when the test is over."""
    nodes: list[Node] = []

    def make(**settings: Any) -> Node:
        nodes.append(Node(**settings))
        return nodes[-1]

    yield make
    for node in reversed(nodes):
        node.close()


@pytest.fixture
def eventually() -> Callable[..., None]:
    """``eventually(condition, within=5.0)``: wait for something outside to become true; fails if it does not."""

    def wait(condition: Callable[[], Any], within: float = 5.0) -> None:
        deadline = time.monotonic() + within
        while not condition():
            assert time.monotonic() < deadline, f"not within {within} s"
            time.sleep(0.002)

    return wait


class Background:
    """A function that runs in a thread of its own, and what came of it."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(function, arguments), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        try:
            self._result = function(*arguments)
        except BaseException as error:
            self._error = error

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def result(self, within: float = 10.0) -> Any:
        """What the function returned; raises what it raised."""
        self._thread.join(within)
        assert self.ended, f"it did not end within {within} s"
        if self._error is not None:
            raise self._error
        return self._result


@pytest.fixture
def background() -> type[Background]:
    """``background(function, *arguments)`` runs it in a thread; ``.result()`` waits for it."""
    return Background


class Portal:
    """A loop in a thread, for tests that block.

    Args:
        kind: whose loop: ``"asyncio"`` or ``"uvloop"``.
    """

    def __init__(self, kind: str = "asyncio") -> None:
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop if kind == "uvloop" else None)
        self._ready, self._end = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(name=f"{kind} loop", target=self._runner.run, args=(self._main(),), daemon=True)

    async def _main(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._ready.set()
        await self._end.wait()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10.0)
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self._end.set)
        self._thread.join(20.0)
        assert not self._thread.is_alive()
        self._runner.close()

    def node(self, *arguments: Any, **settings: Any) -> Any:
        """A node of the asyncio face, to be used from any thread."""
        return _Shown(self, onehop.asyncio.Node(*arguments, **settings))

    def do(self, action: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> Any:
        """What ``action`` comes to in the loop; awaited where it can be."""

        async def steps() -> Any:
            result = action(*arguments, **keywords)
            if inspect.isawaitable(result):
                result = await result
            if isinstance(result, onehop.asyncio.Stream):
                await result.__aenter__()
            return result

        result = asyncio.run_coroutine_threadsafe(steps(), self.loop).result()
        return _Shown(self, result) if type(result).__module__.startswith("onehop.asyncio") else result


class _Shown:
    """A node of the asyncio face, or what it gave, as its blocking twin would be."""

    def __init__(self, portal: Portal, inner: Any) -> None:
        self._portal = portal
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if isinstance(getattr(type(self._inner), name, None), property):
            return self._portal.do(getattr, self._inner, name)
        value = getattr(self._inner, name)
        return functools.partial(self._portal.do, value) if callable(value) else value

    def __repr__(self) -> str:
        return repr(self._inner)

    def __iter__(self) -> _Shown:
        return self

    def __next__(self) -> Any:
        try:
            return self._portal.do(self._inner.__anext__)
        except StopAsyncIteration:
            raise StopIteration from None

    def __enter__(self) -> Self:
        self._portal.do(self._inner.__aenter__)
        return self

    def __exit__(self, *error: object) -> None:
        self._portal.do(self._inner.__aexit__, *error)


@pytest.fixture
def open_portal() -> type[Portal]:
    """``with open_portal(kind) as portal``: nodes of the asyncio face, for tests that block."""
    return Portal
