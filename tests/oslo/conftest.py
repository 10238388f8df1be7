"""What the tests of the driver share: a run directory of their own, transports in this process, and programs."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.processes import send

with warnings.catch_warnings():
    # oslo.service and futurist import eventlet where it is installed, and eventlet warns of itself.
    warnings.simplefilter("ignore")
    import oslo_messaging
    import oslo_messaging.notify
from oslo_config import cfg

PROGRAMS = Path(__file__).with_name("programs.py")
LIMIT = 20.0


def wait_until(condition: Callable[[], Any], limit: float = LIMIT) -> Any:
    """Wait until ``condition`` is true, and return what it said."""
    until = time.monotonic() + limit
    while True:
        value = condition()
        if value or time.monotonic() > until:
            assert value, f"not so within {limit} s"
            return value
        time.sleep(0.01)


@pytest.fixture
def eventually() -> Callable[..., Any]:
    return wait_until


class Program:
    """A process that runs one of programs.py and says one JSON value a line."""

    def __init__(self, name: str, **arguments: Any) -> None:
        self.lines: list[Any] = []
        self._news: queue.Queue[Any] = queue.Queue()
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the program)
        command = [sys.executable, "-W", "ignore", str(PROGRAMS), name, *(f"{k}={v}" for k, v in arguments.items())]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            start_new_session=True,
        )  # fmt: skip
        self.pid = self.process.pid
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            value = json.loads(line)
            self.lines.append(value)
            self._news.put(value)
        self._news.put(EOFError)

    def line(self, limit: float = LIMIT) -> Any:
        """The next line."""
        try:
            value = self._news.get(timeout=limit)
        except queue.Empty:
            value = TimeoutError
        assert value not in (EOFError, TimeoutError), f"{value}:\n{self.errors()}"
        return value

    def ran(self) -> list[Any]:
        """What its endpoint said that it ran."""
        return [line["ran"] for line in self.lines if isinstance(line, dict) and "ran" in line]

    def tell(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def kill(self, number: int = signal.SIGKILL) -> None:
        send(self.process, number)

    def wait(self, limit: float = LIMIT) -> int:
        return self.process.wait(limit)

    def errors(self) -> str:
        self._errors.seek(0)
        return self._errors.read()

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # what it has forked too, which would keep its output open
        self.process.wait()
        self._reader.join()
        for stream in (self.process.stdin, self.process.stdout, self._errors):
            assert stream is not None
            stream.close()


@pytest.fixture(autouse=True)
def run_directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A short path: that of a unix socket has 107 bytes at most."""
    directory = tempfile.mkdtemp(prefix="oh-", dir="/tmp")
    monkeypatch.setenv("ONEHOP_RUN_DIRECTORY", directory)
    # The programs find the sources that these tests use.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(each for each in sys.path if each))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def start() -> Iterator[Callable[..., Program]]:
    """Start a program; all of them are ended after the test."""
    started: list[Program] = []

    def start_one(name: str, **arguments: Any) -> Program:
        started.append(Program(name, **arguments))
        return started[-1]

    yield start_one
    for each in started:
        each.end()


class Bus:
    """Transports, clients and servers in this process, cleaned up after the test."""

    def __init__(self) -> None:
        self._transports: list[Any] = []
        self._servers: list[Any] = []

    def transport(self, url: str = "zmq://", conf: cfg.ConfigOpts | None = None, **kwargs: Any) -> Any:
        made = oslo_messaging.get_rpc_transport(conf or cfg.ConfigOpts(), url, **kwargs)
        self._transports.append(made)
        return made

    def client(self, topic: str, transport: Any = None, timeout: float = 10, **kwargs: Any) -> Any:
        names = {name: kwargs.pop(name) for name in ("server", "exchange", "fanout", "namespace") if name in kwargs}
        target = oslo_messaging.Target(topic=topic, **names)
        return oslo_messaging.get_rpc_client(transport or self.transport(), target, timeout=timeout, **kwargs)

    def serve(self, topic: str, endpoint: Any, server: str = "host-1", transport: Any = None, **target: Any) -> Any:
        where = oslo_messaging.Target(topic=topic, server=server, **target)
        made = oslo_messaging.get_rpc_server(transport or self.transport(), where, [endpoint])
        made.start()
        self._servers.append(made)
        return made

    def notification_transport(self, url: str = "zmq://") -> Any:
        made = oslo_messaging.get_notification_transport(cfg.ConfigOpts(), url)
        self._transports.append(made)
        return made

    def notifier(self, *topics: str, **kwargs: Any) -> Any:
        driver = kwargs.pop("driver", "messaging")
        return oslo_messaging.Notifier(
            self.notification_transport(), "publisher", driver=driver, topics=list(topics), **kwargs
        )

    def listen(self, endpoint: Any, *topics: str, batch: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        make = oslo_messaging.get_batch_notification_listener if batch else oslo_messaging.get_notification_listener
        targets = [oslo_messaging.Target(topic=topic) for topic in topics]
        made = make(self.notification_transport(), targets, [endpoint], **kwargs, **(batch or {}))
        made.start()
        self._servers.append(made)
        return made

    def close(self) -> None:
        for server in self._servers:
            server.stop()
            server.wait()
        for transport in self._transports:
            transport.cleanup()


@pytest.fixture
def bus() -> Iterator[Bus]:
    made = Bus()
    yield made
    made.close()
