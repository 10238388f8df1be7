"""What all tests share: a run directory of their own, nodes that are closed at the end, threads and waiting."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from onehop import Node
from onehop.settings import ENVIRONMENT_PREFIX


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
    yield path
    shutil.rmtree(path, ignore_errors=True)


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
