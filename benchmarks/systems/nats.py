"""NATS: nats-py over one nats-server. Servers of one service are a queue group; one-way messages are its subject's."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import nats
from nats.aio.client import Client as Connection
from nats.aio.msg import Msg

from benchmarks.messages import Message, answer, decode, encode
from benchmarks.system import Sample, Setup, in_tasks
from benchmarks.systems.sockets import runner

CALL_LIMIT = 30.0
FLUSH_LIMIT = 60
BATCH = 100


async def open_connection(setup: Setup) -> Connection:
    """A connection to the broker. Subjects are known to be right, so that they need not be checked at each message."""
    return await nats.connect(setup.broker, name=setup.name, skip_subject_validation=True)


class Server:
    """Answers in the subscription's callback, in its loop: as quick as nats-py can be."""

    def __init__(self, setup: Setup, uvloop: bool = False) -> None:
        self._setup, self._runner, self._received = setup, runner(uvloop), 0

    def start(self) -> str:
        self._runner.run(self._subscribe())
        return ""

    async def _subscribe(self) -> None:
        service = self._setup.service
        for _ in range(self._setup.receivers):
            connection = await open_connection(self._setup)
            await connection.subscribe(f"{service}.call", queue=service, cb=self._answer)
            await connection.subscribe(f"{service}.cast", cb=self._take)
            await connection.flush()

    async def _answer(self, message: Msg) -> None:
        await message.respond(encode(answer(decode(message.data))))

    async def _take(self, message: Msg) -> None:
        decode(message.data)
        self._received += 1

    def serve(self) -> None:
        self._runner.get_loop().run_forever()

    def received(self) -> int:
        return self._received


class Client:
    """Calls in tasks of one loop, over one connection."""

    def __init__(self, setup: Setup, uvloop: bool = False) -> None:
        self._setup, self._message, self._runner = setup, Message(setup.message), runner(uvloop)

    def connect(self, addresses: list[str]) -> None:
        self._connection = self._runner.run(open_connection(self._setup))

    def run(self, seconds: float, callers: int) -> Sample:
        subject, body, request = f"{self._setup.service}.call", self._message.body, self._connection.request

        async def call() -> Any:
            return decode((await request(subject, encode(body), timeout=CALL_LIMIT)).data)

        return self._runner.run(in_tasks(call, seconds, callers, self._message.answer))

    def cast(self, seconds: float) -> Sample:
        return self._runner.run(self._publish(seconds))

    async def _publish(self, seconds: float) -> Sample:
        subject, body, publish = f"{self._setup.service}.cast", self._message.body, self._connection.publish
        sent, began = 0, perf_counter()
        while perf_counter() - began < seconds:
            for _ in range(BATCH):
                await publish(subject, encode(body))
            sent += BATCH
        await self._connection.flush(FLUSH_LIMIT)
        return Sample(sent, perf_counter() - began)

    fanout = cast  # the broker multiplies it
