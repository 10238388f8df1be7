"""One process under measurement: ``python -m benchmarks.worker server|client NAME``.

Commands come as lines of JSON on standard input, answers leave on standard output; when the input ends, so does the
process. The first line is the :class:`~benchmarks.system.Setup`.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import Any, BinaryIO

import msgspec

from benchmarks.system import Client, Sample, Server, Setup, System
from benchmarks.systems import SYSTEMS

Commands = dict[str, Callable[..., Any]]


def build(path: str, setup: Setup, system: System) -> Any:
    """The system's server or client. Says what to install if a package is missing."""
    module, _, name = path.partition(":")
    try:
        return getattr(import_module(f"benchmarks.systems.{module}"), name)(setup, **system.options)
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"{system.name} needs the module {error.name}: pip install {system.needs or error.name}"
        ) from error


class ServerCommands:
    """What a server's process can be asked."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def received(self) -> int:
        """Casts so far."""
        return self._server.received()

    def settle(self, count: int, patience: float) -> tuple[int, float]:
        """Wait until ``count`` casts are here, or none has come for ``patience`` seconds.

        Returns:
            How many are here, and the time of the last (CLOCK_MONOTONIC, which all processes share).
        """
        seen, since = self._server.received(), time.monotonic()
        while seen < count and time.monotonic() - since < patience:
            time.sleep(0.002)
            if (now := self._server.received()) != seen:
                seen, since = now, time.monotonic()
        return seen, since


class ClientCommands:
    """What a client's process can be asked. What a run measured is fetched after it, outside its window."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._sample = Sample(0, 0.0)

    def connect(self, addresses: list[str]) -> None:
        self._client.connect(addresses)

    def run(self, seconds: float, callers: int) -> None:
        self._sample = self._client.run(seconds, callers)

    def cast(self, seconds: float) -> None:
        self._sample = self._client.cast(seconds)

    def fanout(self, seconds: float) -> None:
        self._sample = self._client.fanout(seconds)

    def sample(self) -> Sample:
        return self._sample


def obey(commands: object, lines: BinaryIO, answers: BinaryIO) -> None:
    """Carry out the commands that come on ``lines``, until they end."""
    for line in lines:
        command = msgspec.json.decode(line)
        reply(answers, getattr(commands, command.pop("do")), **command)


def reply(answers: BinaryIO, action: Callable[..., Any], **arguments: Any) -> bool:
    """Answer with what ``action`` returns, or with the error that it raises; returns whether it returned."""
    try:
        answer = {"value": action(**arguments)}
    except Exception:
        answer = {"error": traceback.format_exc()}
    answers.write(msgspec.json.encode(answer) + b"\n")
    answers.flush()
    return "value" in answer


def main(role: str, name: str) -> None:
    """Run one process. Whatever a library prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    lines = sys.stdin.buffer
    setup = msgspec.json.decode(lines.readline(), type=Setup)
    if setup.cpu is not None:
        os.sched_setaffinity(0, {setup.cpu})
    system = SYSTEMS[name]
    if role == "client":
        made: list[Client] = []
        if reply(answers, lambda: made.append(build(system.client, setup, system))):
            obey(ClientCommands(made[0]), lines, answers)
        os._exit(0)  # not held up by threads that a system left
    served: list[Server] = []

    def start() -> str:
        served.append(build(system.server, setup, system))
        return served[0].start()

    def listen() -> None:
        try:
            obey(ServerCommands(served[0]), lines, answers)
        finally:
            os._exit(0)

    if reply(answers, start):
        threading.Thread(target=listen, daemon=True).start()
        served[0].serve()


if __name__ == "__main__":
    main(*sys.argv[1:])
