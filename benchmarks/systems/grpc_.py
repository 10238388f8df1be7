"""gRPC: grpcio with generic handlers, that is, with MessagePack in place of protobuf's classes.

What is encoded is bytes to gRPC, since grpc.aio does not hand every Python object to a serializer as it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from benchmarks.messages import Message, answer, decode, encode
from benchmarks.system import Sample, Setup, in_tasks, in_threads

METHOD = "/bench/call"
UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
IN_TURN = [("grpc.lb_policy_name", "round_robin")]


def handlers(call: Callable[..., Any]) -> grpc.GenericRpcHandler:
    """The service, whose one method is ``call``: a function, or a coroutine function."""
    return grpc.method_handlers_generic_handler("bench", {"call": grpc.unary_unary_rpc_method_handler(call)})


def target(addresses: list[str]) -> str:
    """All addresses behind one name."""
    return f"ipv4:{','.join(addresses)}"


class Server:
    """Threads of a pool answer."""

    def __init__(self, setup: Setup) -> None:
        self._callers = setup.callers

    def start(self) -> str:
        self._server = grpc.server(ThreadPoolExecutor(min(self._callers, 8)), options=UNLIMITED)
        self._server.add_generic_rpc_handlers([handlers(lambda request, _context: encode(answer(decode(request))))])
        port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()
        return f"127.0.0.1:{port}"

    def serve(self) -> None:
        self._server.wait_for_termination()

    def received(self) -> int:
        return 0


class Client:
    """Threads call over one channel, which takes servers in turn."""

    def __init__(self, setup: Setup) -> None:
        self._message = Message(setup.message)

    def connect(self, addresses: list[str]) -> None:
        channel = grpc.insecure_channel(target(addresses), options=UNLIMITED + IN_TURN)
        grpc.channel_ready_future(channel).result(timeout=30)
        self._method = channel.unary_unary(METHOD)

    def run(self, seconds: float, callers: int) -> Sample:
        method, body = self._method, self._message.body
        return in_threads(lambda: decode(method(encode(body))), seconds, callers, self._message.answer)


class AioServer:
    """Coroutines answer."""

    def __init__(self, setup: Setup) -> None:
        self._runner = asyncio.Runner()

    def start(self) -> str:
        return self._runner.run(self._start())

    async def _start(self) -> str:
        async def call(request: bytes, _context: object) -> bytes:
            return encode(answer(decode(request)))

        self._server = grpc.aio.server(options=UNLIMITED)
        self._server.add_generic_rpc_handlers([handlers(call)])
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return f"127.0.0.1:{port}"

    def serve(self) -> None:
        self._runner.run(self._server.wait_for_termination())

    def received(self) -> int:
        return 0


class AioClient:
    """Tasks call over one channel, which takes servers in turn."""

    def __init__(self, setup: Setup) -> None:
        self._message, self._runner = Message(setup.message), asyncio.Runner()

    def connect(self, addresses: list[str]) -> None:
        self._method = self._runner.run(self._open(addresses))

    async def _open(self, addresses: list[str]) -> Callable[[bytes], Awaitable[bytes]]:
        channel = grpc.aio.insecure_channel(target(addresses), options=UNLIMITED + IN_TURN)
        await channel.channel_ready()
        method: Callable[[bytes], Awaitable[bytes]] = channel.unary_unary(METHOD)
        return method

    def run(self, seconds: float, callers: int) -> Sample:
        method, body = self._method, self._message.body

        async def call() -> Any:
            return decode(await method(encode(body)))

        return self._runner.run(in_tasks(call, seconds, callers, self._message.answer))
