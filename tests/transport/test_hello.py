"""Peers that are not what the record says: made of bare ZeroMQ sockets."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq

from onehop import CallTimeout, Node, PeerLost, Record, Settings, VersionMismatch
from onehop.protocol import wire
from onehop.protocol.wire import Hello
from onehop.registry.local import LocalRegistry
from onehop.transport.connector import HANDSHAKE

FALSE = b"falsenode-000001"
OTHER = b"othernode-000001"


class FalseServer:
    """A ROUTER that answers each message as the test says, with a record in the registry."""

    def __init__(self, run_directory: str, answer: Callable[[bytes], list[bytes]]) -> None:
        self.endpoint = f"ipc://{run_directory}/false.sock"
        self._context: zmq.Context[Any] = zmq.Context()
        self._stop = threading.Event()
        self._answer = answer
        self.received: list[bytes] = []
        self._bound = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        assert self._bound.wait(5)
        self.registry = LocalRegistry(Settings(run_directory=run_directory))
        self.registry.announce(
            Record(node=FALSE.hex(), host="false", endpoints=(self.endpoint,), services={"clock": ("false",)})
        )

    def _serve(self) -> None:
        socket = self._context.socket(zmq.ROUTER)
        socket.bind(self.endpoint)
        self._bound.set()
        while not self._stop.is_set():
            if socket.poll(20):
                identity, frame, *_ = socket.recv_multipart()
                self.received.append(frame)
                for each in self._answer(frame):
                    socket.send_multipart([identity, each])
        socket.close(0)

    def close(self) -> None:
        self.registry.close()
        self._stop.set()
        self._thread.join()
        self._context.term()


@pytest.fixture
def false_server(run_directory: str) -> Iterator[Callable[..., FalseServer]]:
    servers: list[FalseServer] = []

    def make(answer: Callable[[bytes], list[bytes]]) -> FalseServer:
        servers.append(FalseServer(run_directory, answer))
        return servers[-1]

    yield make
    for each in servers:
        each.close()


def hello(**changes: Any) -> bytes:
    return wire.hello(Hello(**{"node": FALSE, "expected": b"\0" * 16, **changes}), is_answer=True)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (hello(node=OTHER), f"the address of node {FALSE.hex()} answers as node {OTHER.hex()} of realm ''"),
        (hello(realm="elsewhere"), f"answers as node {FALSE.hex()} of realm 'elsewhere'"),
        (hello(version=9, oldest=7, host="h9"), "speaks wire versions 7 to 9, this node 1 to 1; upgrade the older"),
        (wire.reject(0, "wrong node", "this is node 77"), r"wrong node: this is node 77"),
    ],
)
def test_peer_that_is_not_the_right_one_is_told_in_one_sentence(false_server, make_node, answer, told) -> None:
    server = false_server(lambda frame: [answer])
    began = time.monotonic()
    with pytest.raises(PeerLost, match=told) as caught:
        make_node().client("clock", ready_timeout=0.0).call("read")
    assert time.monotonic() - began < 3.0
    assert caught.value.executed == "no"
    assert "\n" not in str(caught.value)
    assert {wire.kind_of(frame) for frame in server.received} == {wire.HELLO}  # no request was shown to it


def test_version_mismatch_is_the_cause(false_server, make_node) -> None:
    false_server(lambda frame: [hello(version=9, oldest=7)])
    with pytest.raises(PeerLost) as caught:
        make_node().client("clock", ready_timeout=0.0).call("read")
    assert isinstance(caught.value.__cause__, VersionMismatch)


def test_newer_peer_that_still_speaks_our_version_is_talked_to(false_server, make_node) -> None:
    def answer(frame: bytes) -> list[bytes]:
        if wire.kind_of(frame) == wire.HELLO:
            return [hello(version=9, oldest=1, features=0xFFFF) + b"of a newer version"]
        if wire.kind_of(frame) == wire.REQUEST:
            return [wire.answer(wire.REPLY, 0, wire.header(frame).id, b"\x05")]  # type: ignore[list-item]
        return []

    false_server(answer)
    assert make_node().call("clock", "read") == 5


def test_peer_that_never_answers_ends_the_call_at_its_deadline(false_server, make_node) -> None:
    false_server(lambda frame: [])
    began = time.monotonic()
    with pytest.raises(CallTimeout, match="did not answer the hello before the deadline") as caught:
        make_node().client("clock", timeout=0.4).call("read")
    assert 0.39 < time.monotonic() - began < HANDSHAKE
    assert caught.value.executed == "no"


def test_silent_peer_does_not_hold_up_the_others(false_server, make_node) -> None:
    false_server(lambda frame: [])
    for number in range(3):
        make_node().serve("clock", {"read": lambda number=number: number}, server=f"s{number}")
    calling = make_node()
    assert calling.wait_for("clock", count=4, timeout=5.0)
    began = time.monotonic()
    receipts = {each.server: each for each in calling.client("clock", timeout=3.0).fanout("read")}
    assert time.monotonic() - began < HANDSHAKE
    assert [receipts[f"s{number}"].outcome for number in range(3)] == ["taken"] * 3
    assert all(receipts[f"s{number}"].seconds < 2.0 for number in range(3))
    assert receipts["false"].outcome == "unreachable"
    assert receipts["false"].seconds >= 2.9


@pytest.mark.parametrize("verb", ["fanout", "ping", "gather"])
def test_silent_peer_makes_nobody_elses_time_longer(false_server, make_node, reader, verb: str) -> None:
    false_server(lambda frame: [hello()] if wire.kind_of(frame) == wire.HELLO else [])
    for number in range(6):
        make_node().serve("clock", {"read": lambda number=number: number}, server=f"s{number}")
    assert reader.wait_for("clock", count=7, timeout=5.0)
    client = reader.client("clock", timeout=2.0)
    began = time.monotonic()
    told = client.ping() if verb == "ping" else getattr(client, verb)("read")
    assert 1.9 < time.monotonic() - began < HANDSHAKE
    if verb == "gather":  # which tells no times
        assert (sorted(told.replies.values()), [server for server, _ in told.missing]) == (list(range(6)), ["false"])
        return
    receipts = {each.server: each for each in told}
    assert receipts.pop("false").seconds >= 1.9
    assert {each.outcome for each in receipts.values()} == {"taken"}
    assert max(each.seconds for each in receipts.values()) < 1.0


def test_garbage_in_answer_to_the_hello_is_passed_over(false_server, make_node) -> None:
    def answer(frame: bytes) -> list[bytes]:
        if wire.kind_of(frame) == wire.HELLO:
            return [b"", b"\xff" * 40, frame[:20], wire.answer(wire.REPLY, 0, 77, b""), hello()]  # type: ignore[list-item]
        if wire.kind_of(frame) == wire.REQUEST:
            return [wire.answer(wire.REPLY, 0, wire.header(frame).id, b"\x05")]  # type: ignore[list-item]
        return []

    false_server(answer)
    calling = make_node()
    assert calling.call("clock", "read") == 5
    (peer,) = calling.statistics().peers
    assert peer.bad_frames + peer.late >= 4


def test_reply_that_is_no_value_is_told_and_the_link_goes_on(false_server, make_node) -> None:
    replies = iter([b"\xc1", b"", b"\x05"])

    def answer(frame: bytes) -> list[bytes]:
        if wire.kind_of(frame) == wire.HELLO:
            return [hello()]
        if wire.kind_of(frame) == wire.REQUEST:
            return [wire.answer(wire.REPLY, 0, wire.header(frame).id, next(replies))]  # type: ignore[list-item]
        return []

    false_server(answer)
    client = make_node().client("clock")
    for _ in range(2):
        with pytest.raises(Exception, match="not a value"):
            client.call("read")
    assert client.call("read") == 5


def test_record_whose_process_is_gone_is_tried_and_another_taken(false_server, make_node, run_directory: str) -> None:
    registry = LocalRegistry(Settings(run_directory=run_directory))
    registry.announce(
        Record(
            node=OTHER.hex(), host="gone", endpoints=(f"ipc://{run_directory}/gone.sock",), services={"clock": ("g",)}
        )
    )
    make_node().serve("clock", {"read": lambda: 1}, server="here")
    calling = make_node()
    assert calling.wait_for("clock", count=2, timeout=5.0)
    began = time.monotonic()
    assert [calling.call("clock", "read") for _ in range(6)] == [1] * 6
    assert time.monotonic() - began < HANDSHAKE
    with pytest.raises(PeerLost, match="nobody listens there") as caught:
        make_node().client("clock", server="g", ready_timeout=0.0).call("read")
    assert caught.value.executed == "no"
    registry.close()


# The other end ------------------------------------------------------------------------------------


class Stranger:
    """A DEALER that says what it likes to a real server."""

    def __init__(self, node: Node) -> None:
        (record,) = node.nodes()
        self.server = bytes.fromhex(record.node)
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.connect(record.endpoints[0])

    def say(self, *frames: bytes) -> None:
        self._socket.send_multipart(frames)

    def hear(self) -> bytes:
        assert self._socket.poll(5000), "nothing came back"
        return self._socket.recv()

    def hello(self, **changes: Any) -> bytes:
        self.say(wire.hello(Hello(**{"node": OTHER, "expected": self.server, **changes})))
        return self.hear()

    def close(self) -> None:
        self._socket.close(0)
        self._context.term()


@pytest.fixture
def serving(make_node) -> Node:
    node = make_node()
    node.serve("clock", {"read": lambda: 5})
    return node


@pytest.fixture
def stranger(serving: Node) -> Iterator[Stranger]:
    stranger = Stranger(serving)
    yield stranger
    stranger.close()


def request(id: int = 1, service: str = "clock") -> bytes:
    frame = wire.request(wire.REQUEST, 0, id, 60.0, None, wire.names(service, "", "read"), b"\x92\x90\x80")
    assert isinstance(frame, bytes)
    return frame


def test_hello_is_answered_and_requests_after_it_run(stranger: Stranger) -> None:
    answer = wire.parse_hello(stranger.hello())
    assert (answer.node, answer.version) == (stranger.server, 1)
    stranger.say(request())
    reply = stranger.hear()
    assert wire.kind_of(reply) == wire.REPLY
    assert reply[16:] == b"\x05"


def test_request_without_a_hello_is_refused(stranger: Stranger, serving: Node) -> None:
    stranger.say(request())
    assert wire.rejection(stranger.hear())[0] == "hello first"
    assert serving.statistics().refused == {"hello first": 1}


@pytest.mark.parametrize("change", [{"expected": OTHER}, {"realm": "elsewhere"}])
def test_hello_meant_for_another_is_refused(stranger: Stranger, serving: Node, change: dict[str, Any]) -> None:
    reason, text = wire.rejection(stranger.hello(**change))
    assert reason == "wrong node"
    assert stranger.server.hex() in text
    stranger.say(request())
    assert wire.rejection(stranger.hear())[0] == "hello first"
    assert serving.statistics().refused == {"wrong node": 1, "hello first": 1}


def test_hello_of_another_version_is_answered_counted_and_not_taken_in(stranger: Stranger, serving: Node) -> None:
    assert wire.parse_hello(stranger.hello(version=9, oldest=7)).version == 1
    stranger.say(request())
    assert wire.rejection(stranger.hear())[0] == "hello first"
    assert serving.statistics().received == {"version mismatches": 1}


def test_same_request_twice_runs_once(stranger: Stranger, serving: Node) -> None:
    stranger.hello()
    stranger.say(request(7))
    assert wire.kind_of(stranger.hear()) == wire.REPLY
    stranger.say(request(7))
    assert wire.rejection(stranger.hear())[0] == "duplicate"
    assert serving.statistics().received == {"duplicates": 1}


def test_garbage_is_counted_and_others_go_on(stranger: Stranger, serving: Node, make_node, eventually) -> None:
    stranger.hello()
    garbage = [
        b"",
        b"\0",
        b"\xff" * 16,
        b"\x02" + b"\0" * 15,
        wire.pack(wire.ACK),
        request()[:20],
        b"\x01" + b"\0" * 20,
    ]
    for frame in garbage:
        stranger.say(frame)
    stranger.say(b"one", b"two", b"three", b"four")
    eventually(
        lambda: serving.statistics().received.get("bad frames", 0) + sum(serving.statistics().refused.values()) >= 8
    )
    assert make_node().call("clock", "read") == 5
    stranger.say(request(50))
    while wire.kind_of(frame := stranger.hear()) == wire.REJECT:
        pass
    assert wire.kind_of(frame) == wire.REPLY


def test_credit_and_cancel_for_nothing_change_nothing(stranger: Stranger, serving: Node) -> None:
    stranger.hello()
    for kind in (wire.CREDIT, wire.CANCEL):
        stranger.say(wire.pack(kind, id=99, number=0xFFFF_FFFF))
    stranger.say(wire.pack(wire.PING, id=3))
    assert wire.header(stranger.hear())[::4] == (wire.PONG, 3)
    assert serving.statistics().taken == 0


@pytest.fixture(params=["blocking", "asyncio"])
def reader(request: pytest.FixtureRequest, open_portal: Any, make_node: Callable[..., Node]) -> Iterator[Any]:
    """A node of each face."""
    if request.param == "blocking":
        yield make_node(timeout=20.0)
        return
    with open_portal() as portal:
        node = portal.node(timeout=20.0)
        yield node
        node.close()


def answer_with_a_gap(frame: bytes) -> list[bytes]:
    if wire.kind_of(frame) == wire.HELLO:
        return [hello()]
    if wire.kind_of(frame) == wire.CREDIT:
        id = wire.header(frame).id
        items = [wire.answer(wire.ITEM, 0, id, bytes([number]), number=number) for number in (0, 1, 1, 3, 2)]
        return [*items, wire.answer(wire.REPLY, wire.STREAM, id, b"\xc0")]  # type: ignore[list-item]
    return []


def test_stream_with_a_missing_item_ends_with_what_is_missing_and_the_server_is_told(
    false_server, reader, eventually
) -> None:
    server = false_server(answer_with_a_gap)
    stream = reader.stream("clock", "count")
    assert [next(stream), next(stream)] == [0, 1]
    with pytest.raises(PeerLost, match="item 3 of the stream came, item 2 is missing") as caught:
        next(stream)
    assert caught.value.executed == "unknown"
    eventually(lambda: wire.CANCEL in [wire.kind_of(frame) for frame in server.received])
    # The two frames behind the gap are late, and may still be on their way when the stream has ended.
    eventually(lambda: reader.statistics().peers[0].late == 2)
    (peer,) = reader.statistics().peers
    assert (peer.bad_frames, peer.late) == (1, 2)
    assert peer.state == "ready"


def test_stream_that_is_closed_before_its_gap_is_read_is_cancelled_at_the_server(
    false_server, reader, eventually
) -> None:
    server = false_server(answer_with_a_gap)
    stream = reader.stream("clock", "count")
    assert next(stream) == 0
    eventually(lambda: reader.statistics().peers[0].late == 2)
    assert wire.CANCEL not in [wire.kind_of(frame) for frame in server.received]
    stream.close()
    eventually(lambda: wire.CANCEL in [wire.kind_of(frame) for frame in server.received])
