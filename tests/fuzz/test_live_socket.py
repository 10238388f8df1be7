"""A serving node and those who send it what it did not ask for, over real sockets."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import zmq

from onehop import Node
from onehop.protocol import wire
from onehop.protocol.inbox import Inbox

MESSAGES = 20_000
STRANGER = b"a-stranger-node-"
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + b"\0" + bytes(31)  # of ZMTP 3.0, whole: 64 bytes
RECEIVE_LIMIT = 20_000  # milliseconds


class Served:
    """A node that serves "echo", and the path of its socket."""

    def __init__(self, node: Node) -> None:
        self.node = node
        node.serve("echo", {"echo": lambda *arguments, **keywords: arguments}, server="a")
        [record] = [each for each in node.nodes() if each.node == node.id]
        [self.endpoint] = record.endpoints
        self.path = self.endpoint.removeprefix("ipc://")

    def received(self, what: str) -> int:
        return self.node.statistics().received.get(what, 0)


@pytest.fixture
def served(make_node: Callable[..., Node]) -> Served:
    return Served(make_node(timeout=20.0))


@pytest.fixture
def dealer(served: Served) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.linger = 0
        sock.rcvtimeo = sock.sndtimeo = RECEIVE_LIMIT
        sock.connect(served.endpoint)
        yield sock


def catch_up(dealer: zmq.Socket[bytes], mark: int) -> None:
    """Read answers until the one to our ping: then everything sent before it was dealt with."""
    dealer.send(wire.pack(wire.PING, id=mark))
    while dealer.recv_multipart() != [wire.pack(wire.PONG, id=mark)]:
        pass


def still_works(make_node: Callable[..., Node]) -> bool:
    client = make_node(timeout=20.0)
    try:
        return all(client.call("echo", "echo", number) == [number] for number in range(20))
    finally:
        client.close()


def test_fuzzed_messages_are_refused_and_counted_and_others_are_served(
    served: Served,
    dealer: zmq.Socket[bytes],
    make_node: Callable[..., Node],
    make_fuzz: Callable[..., Any],
    memory: Callable[[], int],
) -> None:
    fuzz = make_fuzz(5, STRANGER)
    # What the core alone makes of the same messages: the live node must count as it does.
    alone = Inbox(bytes.fromhex(served.node.id), host="", messages=1 << 30, size=1 << 60)
    alone.offer("echo", "a", [])
    held = 0
    for number in range(MESSAGES):
        message = fuzz.message() if number else [wire.hello(wire.Hello(STRANGER, bytes(16)))]
        dealer.send_multipart(message)
        first, second = (message[0], message[1] if len(message) == 2 else None) if len(message) < 3 else (b"", None)
        alone.receive(b"\0one", first, second, 0.0, [])
        alone.outgoing.clear()
        if number % 500 == 499:
            catch_up(dealer, (1 << 62) + number)
        if number == MESSAGES // 5:
            gc.collect()
            held = memory()
    catch_up(dealer, 1 << 63)
    assert alone.counts["bad frames"] > MESSAGES // 4
    assert served.received("bad frames") == alone.counts["bad frames"]
    assert served.received("version mismatches") == alone.counts["version mismatches"]
    assert still_works(make_node)
    gc.collect()
    assert memory() - held < 16 << 20


def test_message_of_many_frames_does_not_shift_the_border_to_the_next(
    served: Served, dealer: zmq.Socket[bytes]
) -> None:
    dealer.send(wire.hello(wire.Hello(STRANGER, bytes(16))))
    dealer.recv()
    names = wire.names("echo", "", "echo")
    frame = wire.request(wire.REQUEST, 0, 1, 5.0, None, names, b"\x92\x91\x01\x80")
    assert isinstance(frame, bytes)
    lying = wire.pack(wire.REQUEST, wire.BODY_FOLLOWS, len(names), 5000, 9) + names
    for message in ([lying], [frame] * 3, [b""], [b"", b""], [lying, b"", b""], [frame, b"not announced"]):
        dealer.send_multipart(message)
    dealer.send(frame)
    catch_up(dealer, 77)
    assert served.received("bad frames") == 6


def raw(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20.0)
    sock.connect(path)
    return sock


NOISE = {
    "noise": [os.urandom(4096)],
    "HTTP": [b"GET / HTTP/1.1\r\nHost: onehop\r\n\r\n"],
    "TLS": [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200)],
    "half a greeting": [GREETING[:32]],
    "a greeting, then noise": [GREETING, b"\x04\xff" + b"\xff" * 64],
    "a frame that promises more than there is memory": [GREETING, b"\x02" + b"\xff" * 8 + b"x"],
    "an old greeting": [b"\xff" + bytes(7) + b"\x01\x7f\x01\x05"],
    "nothing": [],
}


@pytest.mark.parametrize("pieces", NOISE.values(), ids=NOISE)
def test_bytes_that_are_no_conversation_disturb_nobody(
    pieces: list[bytes], served: Served, make_node: Callable[..., Node]
) -> None:
    for _ in range(30):
        with raw(served.path) as sock, suppress(BrokenPipeError, ConnectionResetError):
            for piece in pieces:
                sock.sendall(piece)
    assert still_works(make_node)


def test_connections_that_say_a_byte_now_and_then_hold_nobody_up(
    served: Served, make_node: Callable[..., Node]
) -> None:
    with ExitStack() as stack:
        slow = [stack.enter_context(raw(served.path)) for _ in range(100)]
        for at in range(len(GREETING)):
            for sock in slow:
                with suppress(BrokenPipeError, ConnectionResetError):
                    sock.sendall(GREETING[at : at + 1])
            if at % 16 == 0:
                assert still_works(make_node)


def test_connections_that_come_and_go_leave_no_descriptor_behind(
    served: Served, make_node: Callable[..., Node], eventually: Callable[..., bool]
) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    assert still_works(make_node)
    before = descriptors()
    for number in range(300):
        with raw(served.path) as sock, suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(GREETING[: number % 65])
    assert still_works(make_node)
    # An engine in the middle of a handshake is closed when its time is over, HANDSHAKE_IVL at the latest.
    eventually(lambda: descriptors() <= before + 5, within=15.0)
