"""RPyC: a service of one method that takes and returns MessagePack; each calling thread has a connection of its own.

Threads that share a connection take turns in reading it: ``connections`` = 1 shows what that costs.
"""

from __future__ import annotations

import socket
import sys
from collections import deque
from typing import Any

import rpyc
from rpyc.core.channel import Channel
from rpyc.core.stream import SocketStream
from rpyc.utils.server import ThreadedServer

from benchmarks.messages import Message, answer, decode, encode
from benchmarks.system import Sample, Setup, in_threads

# RPyC compresses what is longer than 3,000 bytes, which on one host costs more than it saves.
Channel.COMPRESSION_THRESHOLD = sys.maxsize
# It reads and writes by pieces of 64,000 bytes and copies the rest of a message at each; larger pieces make large
# messages twice as quick.
SocketStream.MAX_IO_CHUNK = 2**18


class Service(rpyc.Service):  # type: ignore[misc]
    """Bytes in, bytes out: a value of any other kind would be called back for, attribute by attribute."""

    def exposed_call(self, request: bytes) -> bytes:
        return encode(answer(decode(request)))


class PromptServer(ThreadedServer):  # type: ignore[misc]
    """A thread for each connection; the last bytes of a long answer leave at once."""

    def _accept_method(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super()._accept_method(sock)


class Server:
    """Accepts in the main thread."""

    def __init__(self, setup: Setup, connections: int = 0) -> None:
        pass

    def start(self) -> str:
        self._server = PromptServer(Service, hostname="127.0.0.1", port=0)
        return str(self._server.port)

    def serve(self) -> None:
        self._server.start()

    def received(self) -> int:
        return 0


class Client:
    """Threads borrow a connection for each call, in turn from those to all servers.

    Args:
        connections: how many there are; 0: one for each caller.
    """

    def __init__(self, setup: Setup, connections: int = 0) -> None:
        self._message, self._connections = Message(setup.message), connections or setup.callers
        self._shared = connections == 1

    def connect(self, addresses: list[str]) -> None:
        self._methods = deque(
            rpyc.connect_stream(SocketStream.connect("127.0.0.1", int(address), nodelay=True)).root.call
            for address in (addresses * self._connections)[: self._connections]
        )

    def run(self, seconds: float, callers: int) -> Sample:
        methods, body = self._methods, self._message.body

        def call() -> Any:
            method = methods.popleft()
            try:
                return decode(method(encode(body)))
            finally:
                methods.append(method)

        def call_shared() -> Any:
            return decode(methods[0](encode(body)))

        return in_threads(call_shared if self._shared else call, seconds, callers, self._message.answer)
