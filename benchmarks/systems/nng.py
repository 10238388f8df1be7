"""nng: pynng's REQ and REP, with a context for each call in flight."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

import pynng

from benchmarks.messages import Message, answer, decode, encode
from benchmarks.system import Sample, Setup, in_threads

MOST_CONTEXTS = 8
"""Of a server: more threads than that answer no sooner."""
NO_RESENDING = -1


class Server:
    """As many threads as there are callers, up to eight, each receive, answer and send in a context of their own."""

    def __init__(self, setup: Setup) -> None:
        self._contexts = min(setup.callers, MOST_CONTEXTS)

    def start(self) -> str:
        # A message may be of any size.
        self._socket = pynng.Rep0(recv_max_size=0)
        self._socket.listen("tcp://127.0.0.1:0")
        return f"tcp://{self._socket.listeners[0].local_address}"

    def serve(self) -> None:
        for _ in range(self._contexts - 1):
            threading.Thread(target=serve, args=(self._socket.new_context(),), daemon=True).start()
        serve(self._socket if self._contexts == 1 else self._socket.new_context())

    def received(self) -> int:
        return 0


def serve(end: pynng.Rep0 | pynng.Context) -> None:
    """Answer what comes, one after another."""
    while True:
        end.send(encode(answer(decode(end.recv()))))


class Client:
    """Threads borrow a context for each call; the socket sends to whichever server is ready. A lone caller uses the
    socket, which is cheaper.
    """

    def __init__(self, setup: Setup) -> None:
        self._message, self._callers = Message(setup.message), setup.callers

    def connect(self, addresses: list[str]) -> None:
        self._socket = pynng.Req0(resend_time=NO_RESENDING, recv_max_size=0)
        for each in addresses:
            self._socket.dial(each, block=True)
        alone = self._callers == 1
        self._ends = deque([self._socket] if alone else [self._socket.new_context() for _ in range(self._callers)])

    def run(self, seconds: float, callers: int) -> Sample:
        ends, body = self._ends, self._message.body

        def call() -> Any:
            end = ends.popleft()
            try:
                end.send(encode(body))
                return decode(end.recv())
            finally:
                ends.append(end)

        return in_threads(call, seconds, callers, self._message.answer)
