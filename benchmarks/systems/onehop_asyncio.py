"""onehop's asyncio face, as a program uses it, on asyncio's loop or uvloop's; over its default transport, ipc."""

from __future__ import annotations

import asyncio
from time import perf_counter
from typing import Any

import onehop
from benchmarks.messages import Message, answer
from benchmarks.system import Sample, Setup, in_tasks
from benchmarks.systems.onehop_ import FANNERS, START_LIMIT, CastStream, settings
from benchmarks.systems.sockets import runner
from onehop.asyncio import Node


class Server:
    """Nodes whose handlers run in their loop: ``inline``, or each in a task of its own."""

    def __init__(self, setup: Setup, inline: bool = True, uvloop: bool = False) -> None:
        self._setup, self._inline = setup, inline
        self._runner = runner(uvloop)
        self._received = 0

    def _methods(self) -> dict[str, Any]:
        if not self._inline:
            return {"answer": self._answer, "note": self._note}

        @onehop.method(inline=True)
        def note(body: dict[str, Any]) -> None:
            self._received += 1

        return {"answer": onehop.method(inline=True)(lambda body: answer(body)), "note": note}

    async def _answer(self, body: dict[str, Any]) -> Any:
        return answer(body)

    async def _note(self, body: dict[str, Any]) -> None:
        self._received += 1

    def start(self) -> str:
        self._runner.run(self._start())
        return self._setup.name

    async def _start(self) -> None:
        self._nodes = [Node(**settings(self._setup)) for _ in range(self._setup.receivers)]
        for number, node in enumerate(self._nodes):
            await node.serve(self._setup.service, self._methods(), server=f"{self._setup.name}-{number}")

    def serve(self) -> None:
        self._runner.run(asyncio.Event().wait())

    def received(self) -> int:
        return self._received


class Client:
    """One node and one client of the service, shared by its tasks."""

    def __init__(self, setup: Setup, inline: bool = True, uvloop: bool = False) -> None:
        self._setup = setup
        self._message = Message(setup.message)
        self._runner = runner(uvloop)

    def connect(self, addresses: list[str]) -> None:
        self._receivers = len(addresses) * self._setup.receivers
        self._runner.run(self._connect())

    async def _connect(self) -> None:
        node = Node(**settings(self._setup))
        self._client = node.client(self._setup.service)
        if not await node.wait_for(self._setup.service, count=self._receivers, timeout=START_LIMIT):
            raise TimeoutError(f"not all of {self._receivers} servers were seen within {START_LIMIT:.0f} s")

    def run(self, seconds: float, callers: int) -> Sample:
        call, body = self._client.call, self._message.body
        return self._runner.run(in_tasks(lambda: call("answer", body), seconds, callers, self._message.answer))

    def cast(self, seconds: float) -> Sample:
        stream, began = CastStream(self._message.body, seconds), perf_counter()
        self._runner.run(self._client.cast_many("note", stream))
        return Sample(stream.sent, perf_counter() - began)

    def fanout(self, seconds: float) -> Sample:
        return self._runner.run(in_tasks(self._fan_out, seconds, FANNERS, self._receivers))

    async def _fan_out(self) -> int:
        receipts = await self._client.fanout("note", self._message.body)
        return sum(each.outcome == "taken" for each in receipts)
