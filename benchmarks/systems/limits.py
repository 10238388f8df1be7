"""Limits: what ZeroMQ does when nothing is promised. No deadline, no error, no second server.

``codec`` says whether the message is encoded and decoded at both ends, as an RPC library must; without it the bytes
are echoed.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import zmq

from benchmarks.messages import Message, answer, decode, encode
from benchmarks.system import Sample, Setup, check, in_threads, stream


def endpoint(setup: Setup, transport: str) -> str:
    """Where a ZeroMQ socket is to bind."""
    return f"ipc://{setup.directory}/{setup.name}.sock" if transport == "ipc" else "tcp://127.0.0.1:*"


def bind(kind: int, setup: Setup, transport: str) -> tuple[zmq.Socket[bytes], str]:
    """A bound socket and its address."""
    bound: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
    bound.bind(endpoint(setup, transport))
    return bound, bound.get_string(zmq.LAST_ENDPOINT)


def connect(kind: int, addresses: list[str]) -> zmq.Socket[bytes]:
    """A socket connected to all; a DEALER or PUSH sends to them in turn."""
    connected: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
    for each in addresses:
        connected.connect(each)
    return connected


# --- ZeroMQ, one frame a message ------------------------------------------------------------------------------------


class Router:
    """Answers requests of one frame, by plain blocking calls in one thread."""

    def __init__(self, setup: Setup, transport: str, codec: bool = True) -> None:
        self._setup, self._transport, self._codec = setup, transport, codec

    def start(self) -> str:
        self._socket, address = bind(zmq.ROUTER, self._setup, self._transport)
        return address

    def serve(self) -> None:
        receive, send = self._socket.recv, self._socket.send
        while True:
            identity = receive()
            frame = receive()
            send(identity, zmq.SNDMORE)
            send(encode(answer(decode(frame))) if self._codec else frame)

    def received(self) -> int:
        return 0


class Dealer:
    """Sends requests of one frame: one at a time, or one thread that keeps so many in flight."""

    def __init__(self, setup: Setup, transport: str, codec: bool = True) -> None:
        message = Message(setup.message)
        self._body: Any = message.body if codec else encode(message.body)
        self._encode: Callable[[Any], bytes] = encode if codec else bytes
        self._decode: Callable[[bytes], Any] = decode if codec else bytes
        self._expected = message.answer if codec else self._body

    def connect(self, addresses: list[str]) -> None:
        self._socket = connect(zmq.DEALER, addresses)

    def _send(self) -> None:
        self._socket.send(self._encode(self._body))

    def _receive(self) -> Any:
        return self._decode(self._socket.recv())

    def _call(self) -> Any:
        self._send()
        return self._receive()

    def run(self, seconds: float, callers: int) -> Sample:
        if callers == 1:
            return in_threads(self._call, seconds, 1, self._expected)
        return pipeline(self._send, self._receive, seconds, callers, self._expected)


def pipeline(send: Callable[[], Any], receive: Callable[[], Any], seconds: float, depth: int, expected: Any) -> Sample:
    """One thread keeps ``depth`` calls in flight. The latency is that of a whole depth."""
    latencies: list[float] = []
    clock = perf_counter
    began = sent = clock()
    end = began + seconds
    for _ in range(depth):
        send()
    while sent < end:
        for _ in range(depth):
            got = receive()
            send()
        now = clock()
        latencies.append(now - sent)
        sent = now
    for _ in range(depth):
        got = receive()
    check(got, expected)
    return Sample((len(latencies) + 1) * depth, clock() - began, latencies)


# --- the same in several frames, as most programs with ZeroMQ are written -------------------------------------------


class MultipartRouter(Router):
    """Echoes bytes with their number, by send_multipart and recv_multipart."""

    def serve(self) -> None:
        receive, send = self._socket.recv_multipart, self._socket.send_multipart
        while True:
            send(receive())


class MultipartDealer(Dealer):
    """A frame with a number, and a frame with the message."""

    def __init__(self, setup: Setup, transport: str) -> None:
        super().__init__(setup, transport, codec=False)
        self._number = 0

    def _send(self) -> None:
        self._number += 1
        self._socket.send_multipart([self._number.to_bytes(8, "big"), self._body])

    def _receive(self) -> Any:
        return self._socket.recv_multipart()[1]


# --- ZeroMQ, one way ------------------------------------------------------------------------------------------------


class Pull:
    """Decodes what comes."""

    def __init__(self, setup: Setup, transport: str) -> None:
        self._setup, self._transport = setup, transport
        self._received = 0

    def start(self) -> str:
        self._socket, address = bind(zmq.PULL, self._setup, self._transport)
        return address

    def serve(self) -> None:
        receive = self._socket.recv
        while True:
            decode(receive())
            self._received += 1

    def received(self) -> int:
        return self._received


class Push:
    """Encodes and sends; the high water marks of both ends hold it back."""

    def __init__(self, setup: Setup, transport: str) -> None:
        self._body = Message(setup.message).body

    def connect(self, addresses: list[str]) -> None:
        self._socket = connect(zmq.PUSH, addresses)

    def cast(self, seconds: float) -> Sample:
        send, body = self._socket.send, self._body
        sent, began = stream(lambda: send(encode(body)), seconds)
        return Sample(sent, perf_counter() - began)
