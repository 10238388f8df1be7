"""Limits without ZeroMQ: plain blocking sockets, and asyncio with a protocol of length, number and message."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, cast

from benchmarks.messages import Message, answer, decode, encode
from benchmarks.system import Sample, Setup, in_tasks, in_threads

LENGTH = struct.Struct("!I")
HEADER = struct.Struct("!II")


def listen(setup: Setup, transport: str) -> tuple[socket.socket, str]:
    """A listening socket and its address: a port, or a path."""
    if transport == "tcp":
        listening = socket.create_server(("127.0.0.1", 0))
        return listening, str(listening.getsockname()[1])
    path = os.path.join(setup.directory, f"{setup.name}.sock")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen()
    return listening, path


def connect(address: str) -> socket.socket:
    """A connection to what :func:`listen` told."""
    if address.isdecimal():
        return without_delay(socket.create_connection(("127.0.0.1", int(address))))
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    return connection


def without_delay(connection: socket.socket) -> socket.socket:
    """Small messages leave at once."""
    if connection.family == socket.AF_INET:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


# --- blocking -------------------------------------------------------------------------------------------------------


def receive_frame(connection: socket.socket) -> bytes:
    """The next length and what it tells of; empty at the end."""
    got = connection.recv(65_536)
    if not got:
        return b""
    missing = LENGTH.size + LENGTH.unpack_from(got)[0] - len(got)
    if not missing:
        return got
    parts = [got]
    while missing > 0:
        parts.append(connection.recv(missing))
        missing -= len(parts[-1])
    return b"".join(parts)


class SocketServer:
    """Echoes bytes to one client."""

    def __init__(self, setup: Setup, transport: str) -> None:
        self._setup, self._transport = setup, transport

    def start(self) -> str:
        self._listening, address = listen(self._setup, self._transport)
        return address

    def serve(self) -> None:
        connection = without_delay(self._listening.accept()[0])
        while frame := receive_frame(connection):
            connection.sendall(frame)

    def received(self) -> int:
        return 0


class SocketClient:
    """Sends bytes and reads them back."""

    def __init__(self, setup: Setup, transport: str) -> None:
        body = encode(Message(setup.message).body)
        self._frame = LENGTH.pack(len(body)) + body

    def connect(self, addresses: list[str]) -> None:
        self._socket = connect(addresses[0])

    def _call(self) -> bytes:
        self._socket.sendall(self._frame)
        return receive_frame(self._socket)

    def run(self, seconds: float, callers: int) -> Sample:
        return in_threads(self._call, seconds, 1, self._frame)


# --- asyncio --------------------------------------------------------------------------------------------------------


def runner(uvloop: bool) -> asyncio.Runner:
    """Runs a loop: asyncio's own, or uvloop's."""
    if not uvloop:
        return asyncio.Runner()
    from uvloop import new_event_loop

    return asyncio.Runner(loop_factory=new_event_loop)


class Framed(asyncio.Protocol):
    """Calls ``take`` with the number and the body of each message that comes."""

    def __init__(self, take: Callable[[Framed, int, memoryview], None]) -> None:
        self._take = take
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def send(self, number: int, body: bytes) -> None:
        """Send one message."""
        self._transport.write(HEADER.pack(len(body), number) + body)

    def data_received(self, data: bytes) -> None:
        data = self._rest + data if self._rest else data
        view, start = memoryview(data), 0
        while len(data) - start >= HEADER.size:
            size, number = HEADER.unpack_from(data, start)
            end = start + HEADER.size + size
            if end > len(data):
                break
            self._take(self, number, view[start + HEADER.size : end])
            start = end
        self._rest = data[start:]


class AsyncioServer:
    """Answers as an RPC server does, with nothing around it."""

    def __init__(self, setup: Setup, transport: str, uvloop: bool = False) -> None:
        self._setup, self._transport, self._uvloop = setup, transport, uvloop

    def start(self) -> str:
        self._listening, address = listen(self._setup, self._transport)
        return address

    def serve(self) -> None:
        with runner(self._uvloop) as running:
            running.run(self._serve())

    async def _serve(self) -> None:
        def take(connection: Framed, number: int, body: memoryview) -> None:
            connection.send(number, encode(answer(decode(body))))

        loop = asyncio.get_running_loop()
        make = loop.create_unix_server if self._transport == "ipc" else loop.create_server
        server = await make(lambda: Framed(take), sock=self._listening)
        await server.serve_forever()

    def received(self) -> int:
        return 0


class AsyncioClient:
    """Numbers its calls, and finds a future for each answer."""

    def __init__(self, setup: Setup, transport: str, uvloop: bool = False) -> None:
        self._message = Message(setup.message)
        self._transport = transport
        self._runner = runner(uvloop)
        self._numbers: Iterator[int] = count()
        self._pending: dict[int, asyncio.Future[Any]] = {}

    def connect(self, addresses: list[str]) -> None:
        self._runner.run(self._connect(addresses[0]))

    async def _connect(self, address: str) -> None:
        def take(_connection: Framed, number: int, body: memoryview) -> None:
            self._pending.pop(number).set_result(decode(body))

        self._loop = asyncio.get_running_loop()
        make = self._loop.create_unix_connection if self._transport == "ipc" else self._loop.create_connection
        _transport, self._connection = await make(lambda: Framed(take), sock=connect(address))

    def _call(self) -> asyncio.Future[Any]:
        future = self._loop.create_future()
        number = next(self._numbers)
        self._pending[number] = future
        self._connection.send(number, encode(self._message.body))
        return future

    def run(self, seconds: float, callers: int) -> Sample:
        return self._runner.run(in_tasks(self._call, seconds, callers, self._message.answer))
