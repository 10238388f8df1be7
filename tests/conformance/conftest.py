"""The arms of the conformance suites: the same tests run against ZeroMQ, against memory and against the model."""

from __future__ import annotations

import asyncio
import random
import socket as net
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import pytest

from onehop import CallError, Client, Node, payload
from onehop.addresses import bracketed
from onehop.interfaces import Record
from onehop.protocol import wire
from onehop.testing.clock import Clock
from onehop.testing.engine import VirtualEngine
from onehop.testing.invariants import ENTRY_NUMBER, Entry
from onehop.testing.memory import Network
from onehop.testing.network import Network as VirtualNetwork
from onehop.testing.simulation import VirtualNode, World
from onehop.transport.sockets import ZmqCarrier

SERVICE = "echo"


def wait_really(condition: Callable[[], Any], within: float) -> bool:
    """Wait for something outside; whether it came about."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.001)
    return True


# Carriers -----------------------------------------------------------------------------------------


class CarrierArm:
    """One carrier: where its sockets are bound, and how one waits for them.

    Args:
        carrier: makes the sockets.
        endpoint: gives a new address at each call.
        wait: waits for a condition, for some seconds.
    """

    def __init__(
        self, carrier: Any, endpoint: Callable[[int], str], wait: Callable[[Callable[[], Any], float], bool]
    ) -> None:
        self._carrier = carrier
        self._endpoint = endpoint
        self._open: list[tuple[Any, float]] = []
        self._addresses = 0
        self.wait = wait

    def address(self) -> str:
        """An address where nobody listens yet."""
        self._addresses += 1
        return self._endpoint(self._addresses)

    def bind(self) -> Any:
        socket = self._carrier.bind(self.address())
        self._open.append(socket)
        return socket

    def connect(self, endpoint: str) -> Any:
        socket = self._carrier.connect(endpoint)
        self._open.append(socket)
        return socket

    def joined(self) -> tuple[Any, Any, bytes]:
        """An inbound socket, a link to it, and the identity under which it is known there."""
        inbound = self.bind()
        link = self.connect(inbound.endpoints[0])
        assert self.sent(link, wire.pack(wire.PING))
        (identity, frame, body), *_ = self.received(inbound, 1)
        assert (frame, body) == (wire.pack(wire.PING), None)
        return inbound, link, identity

    def sent(self, link: Any, frame: wire.Frame) -> bool:
        """Send, when there is room."""
        send = link.send if isinstance(frame, bytes) else lambda parts: link.send_large(*parts)
        return self.wait(lambda: send(frame), 5.0)

    def answered(self, inbound: Any, identity: bytes, frame: wire.Frame) -> bool:
        """Send to one connection."""
        if isinstance(frame, bytes):
            return inbound.send(identity, frame)
        return inbound.send_large(identity, *frame)

    def received(self, socket: Any, number: int, within: float = 5.0) -> list[Any]:
        """``number`` messages, or those that came in time; bodies as bytes."""
        messages: list[Any] = []

        def take() -> bool:
            more = True
            while more and len(messages) < number:
                found: list[Any] = []
                more = socket.drain(number - len(messages), found)
                messages.extend((*front, None if body is None else bytes(body)) for *front, body in found)
            return len(messages) >= number

        self.wait(take, within)
        return messages

    def closed(self, socket: Any, linger: float = 0.0) -> None:
        """Close a socket before the test is over."""
        self._open.remove(socket)
        socket.close(linger)

    def close(self) -> None:
        for socket in self._open:
            socket.close(0.0)
        self._carrier.close()


class _VirtualCarrier:
    """The model behind the methods of a carrier; everybody is at a site of its own."""

    def __init__(self) -> None:
        self.network = VirtualNetwork(Clock(1))
        self._sites = 0

    def bind(self, endpoint: str) -> Any:
        self._sites += 1
        return self.network.bind(self._sites, endpoint)

    def connect(self, endpoint: str) -> Any:
        self._sites += 1
        return self.network.connect(self._sites, endpoint)

    def wait(self, condition: Callable[[], Any], within: float) -> bool:
        clock = self.network.clock
        until = clock.now + within
        while not condition():
            if clock.now >= until:
                return False
            clock.run(clock.now + 0.001)
        return True

    def close(self) -> None:
        pass


def free_port(host: str) -> int:
    """A port that nobody listens at, outside the kernel's ephemeral range: no connection takes it meanwhile."""
    while True:
        port = random.randrange(10_000, 15_000)
        with net.socket(net.AF_INET6 if ":" in host else net.AF_INET) as probe, suppress(OSError):
            probe.bind((host, port))
            return port


def carrier_arm(name: str, directory: str) -> CarrierArm:
    if name == "zmq":
        return CarrierArm(ZmqCarrier(), lambda number: f"ipc://{directory}/{number}.sock", wait_really)
    if name.startswith("tcp"):
        host = "::1" if name == "tcp6" else "127.0.0.1"
        return CarrierArm(ZmqCarrier(), lambda _number: f"tcp://{bracketed(host)}:{free_port(host)}", wait_really)
    if name == "memory":
        return CarrierArm(Network().carrier, lambda number: f"memory://{number}", wait_really)
    virtual = _VirtualCarrier()
    return CarrierArm(virtual, lambda number: f"virtual://{number}", virtual.wait)


@pytest.fixture(params=["zmq", "tcp", "tcp6", "memory", "virtual"])
def arm(request: pytest.FixtureRequest, run_directory: str) -> Iterator[CarrierArm]:
    made = carrier_arm(request.param, run_directory)
    yield made
    made.close()


@pytest.fixture(params=["zmq", "tcp", "memory"])
def real_arm(request: pytest.FixtureRequest, run_directory: str) -> Iterator[CarrierArm]:
    """Those that threads can poll."""
    made = carrier_arm(request.param, run_directory)
    yield made
    made.close()


# Nodes --------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """How a request ended."""

    outcome: str
    """``"replied"``, ``"taken"``, ``"failed"`` or the name of the error."""
    executed: str
    by: str
    """The server whose reply it is; empty where there is none."""
    seconds: float


class RealRequest:
    """A request made by a thread of its own."""

    def __init__(self, cloud: RealCloud, client: Client, kind: str, work: float, fails: bool) -> None:
        self.number = cloud.number()
        self.outcome: Outcome | None = None
        self._cloud = cloud
        self._thread = threading.Thread(target=self._make, args=(client, kind, work, fails), daemon=True)
        self._thread.start()

    def _make(self, client: Client, kind: str, work: float, fails: bool) -> None:
        started = time.monotonic()
        outcome, executed, by = "taken", "", ""
        try:
            if kind == "call":
                by = client.call("work", self.number, work, fails)
                outcome, executed = "replied", "yes"
            else:
                client.cast("work", self.number, work, fails)
        except CallError as error:
            outcome, executed = type(error).__name__, error.executed
        self.outcome = Outcome(outcome, executed, by, time.monotonic() - started)

    def result(self) -> Outcome:
        self._thread.join(20.0)
        assert self.outcome is not None
        return self.outcome

    @property
    def runs(self) -> int:
        return self._cloud.runs.count(self.number)


class RealCloud:
    """Real nodes in this process. What a crash of one leaves behind is what closing it at once leaves behind.

    Attributes:
        slack: seconds after its deadline that a call may end: the promise is a tenth, and the machine may be busy.
    """

    slack = 0.5

    def __init__(self, make_node: Callable[..., Node]) -> None:
        self._make_node = make_node
        self._numbers = 0
        self._clients: dict[Any, Client] = {}
        self._raw: list[Any] = []
        self._draining: list[threading.Thread] = []
        self.runs: list[int] = []

    def number(self) -> int:
        self._numbers += 1
        return self._numbers

    def server(self, name: str, *, workers: int = 8, **settings: Any) -> Node:
        node = self._make_node(**settings)
        node.serve(SERVICE, {"work": self._handler(name, workers)}, server=name, workers=workers)
        return node

    def _handler(self, name: str, workers: int) -> Callable[..., Any]:
        def work(number: int, seconds: float, fails: bool) -> str:
            self.runs.append(number)
            threading.Event().wait(seconds)
            if fails:
                raise ValueError("as asked")
            return name

        return work

    def client(self, **settings: Any) -> Node:
        return self._make_node(**settings)

    def knows(self, client: Node, count: int) -> bool:
        return wait_really(lambda: len(client.servers(SERVICE)) == count, 5.0)

    def begin(
        self, client: Node, *, kind: str = "call", work: float = 0.0, fails: bool = False, **options: Any
    ) -> RealRequest:
        key = (client, *sorted(options.items()))
        caller = self._clients.get(key)
        if caller is None:
            caller = self._clients[key] = client.client(SERVICE, **options)
        return RealRequest(self, caller, kind, work, fails)

    def has_run(self, request: RealRequest) -> bool:
        return wait_really(lambda: request.runs > 0, 5.0)

    def fanout(self, client: Node, **options: Any) -> dict[str, str]:
        receipts = client.client(SERVICE, **options).fanout("work", self.number(), 0.0, False)
        return {receipt.server: receipt.outcome for receipt in receipts}

    def gather(self, client: Node, **options: Any) -> tuple[list[str], list[str]]:
        gathered = client.client(SERVICE, **options).gather("work", self.number(), 0.0, False)
        return sorted(gathered.replies.values()), [server for server, _ in gathered.missing]

    def crash(self, node: Node) -> None:
        node.close()

    def drain(self, node: Node) -> None:
        draining = threading.Thread(target=node.close, kwargs={"drain": True}, daemon=True)
        draining.start()
        self._draining.append(draining)

    def vanish_and_return(self, node: Node, client: Node) -> None:
        """The record goes, is forgotten, and comes back, while the node lives."""
        engine = node._core()
        engine.registry.withdraw()
        assert wait_really(lambda: not client.servers(SERVICE), 5.0)
        assert wait_really(lambda: not client.statistics().peers, 5.0)
        engine._announce()
        assert self.knows(client, 1)

    def late(self, client: Node) -> int:
        return sum(peer.late for peer in client.statistics().peers)

    def wait(self, condition: Callable[[], Any], within: float = 5.0) -> bool:
        return wait_really(condition, within)

    def raw_link(self, server: Node) -> tuple[Any, bytes]:
        """A connection to a server, on which the test says what it wants; and the server's node id."""
        engine = server._core()
        assert engine.inbound is not None
        link = engine.carrier.connect(engine.inbound.socket.endpoints[0])
        self._raw.append(link)
        return link, engine.protocol.id

    def body(self) -> tuple[int, bytes]:
        """A request that a handler understands, and its number."""
        number = self.number()
        return number, payload.encode(((number, 0.0, False), {}))

    def runs_of(self, number: int) -> int:
        return self.runs.count(number)

    def close(self) -> None:
        for link in self._raw:
            link.close(0.0)
        for draining in self._draining:
            draining.join(30.0)


class LoopCloud(RealCloud):
    """Nodes of the asyncio face, whose handlers are coroutines; as many run at once as there would be workers."""

    def _handler(self, name: str, workers: int) -> Callable[..., Any]:
        room = asyncio.Semaphore(workers)

        async def work(number: int, seconds: float, fails: bool) -> str:
            async with room:
                self.runs.append(number)
                end = time.monotonic() + seconds
                while time.monotonic() < end:
                    with suppress(asyncio.CancelledError):  # as a thread would, it finishes what it began
                        await asyncio.sleep(end - time.monotonic())
            if fails:
                raise ValueError("as asked")
            return name

        return work


class VirtualRequest:
    def __init__(self, cloud: VirtualCloud, entry: Entry) -> None:
        self.number = entry.number
        self._cloud = cloud
        self._entry = entry

    @property
    def runs(self) -> int:
        return self._entry.times_run

    def result(self) -> Outcome:
        entry = self._entry
        assert self._cloud.wait(lambda: entry.outcome is not None, 20.0)
        assert entry.finished_at is not None
        by = entry.executions[0].server if entry.outcome == "replied" else ""
        names = {"failed": "RemoteError"}
        outcome = names.get(entry.outcome or "", entry.outcome or "")
        return Outcome(outcome, entry.executed or "", by, entry.finished_at - entry.started)


class VirtualCloud:
    """Nodes of a simulated world."""

    slack = 0.1

    def __init__(self, world: World) -> None:
        self.world = world

    def server(self, name: str, *, workers: int = 8, inbox_messages: int = 10_000) -> VirtualNode:
        return self.world.nodes(1, SERVICE, server=name, workers=workers, room=inbox_messages)[0]

    def client(self) -> VirtualNode:
        return self.world.nodes(1)[0]

    def knows(self, client: VirtualNode, count: int) -> bool:
        return self.wait(lambda: len(client.engine.protocol.routes.of(SERVICE)) == count)

    def begin(self, client: VirtualNode, *, kind: str = "call", work: float = 0.0, **options: Any) -> VirtualRequest:
        entry = self.world._request(kind, client, SERVICE, work=work, **options)
        return VirtualRequest(self, entry)

    def has_run(self, request: VirtualRequest) -> bool:
        return self.wait(lambda: request.runs > 0)

    def _parts(self, entry: Entry) -> dict[str, str]:
        assert self.wait(lambda: entry.outcome is not None)
        return {part.server: part.outcome or "" for part in entry.parts}

    def fanout(self, client: VirtualNode, **options: Any) -> dict[str, str]:
        words = {"taken": "taken", "Rejected": "refused"}
        told = self._parts(self.world.fanout(client, SERVICE, work=0.0, **options))
        return {server: words.get(outcome, "unreachable") for server, outcome in told.items()}

    def gather(self, client: VirtualNode, **options: Any) -> tuple[list[str], list[str]]:
        told = self._parts(self.world.gather(client, SERVICE, work=0.0, **options))
        replied = sorted(server for server, outcome in told.items() if outcome == "replied")
        return replied, sorted(server for server, outcome in told.items() if outcome != "replied")

    def crash(self, node: VirtualNode) -> None:
        self.world.crash(node)

    def drain(self, node: VirtualNode) -> None:
        self.world.drain(node)

    def vanish_and_return(self, node: VirtualNode, client: VirtualNode) -> None:
        record: Record = self.world.registry.view()[0]
        self.world.registry.withdraw(record.node)
        assert self.wait(lambda: not client.engine.protocol.peers.peers)
        self.world.registry.announce(record)
        assert self.knows(client, 1)

    def late(self, client: VirtualNode) -> int:
        return sum(peer.calls.late for peer in client.engine.protocol.peers.peers.values())

    def wait(self, condition: Callable[[], Any], within: float = 5.0) -> bool:
        clock = self.world.clock
        until = clock.now + within
        while not condition():
            if clock.now >= until:
                return False
            clock.run(clock.now + 0.001)
        return True

    def raw_link(self, server: VirtualNode) -> tuple[Any, bytes]:
        engine: VirtualEngine = server.engine
        return self.world.network.connect(10_000, engine.endpoint), engine.protocol.id

    def body(self) -> tuple[int, bytes]:
        entry = self.world.invariants.enter("call", 0, SERVICE, "", 60.0)
        entry.work = 0.0
        return entry.number, ENTRY_NUMBER.pack(entry.number)

    def runs_of(self, number: int) -> int:
        return self.world.ledger[number].times_run

    def close(self) -> None:
        pass


@pytest.fixture
def loop_nodes(open_portal: Callable[[], Any]) -> Iterator[Callable[..., Any]]:
    """Makes nodes of the asyncio face, and closes them when the test is over."""
    with open_portal() as portal:
        nodes: list[Any] = []

        def make(**settings: Any) -> Any:
            nodes.append(portal.node(**settings))
            return nodes[-1]

        yield make
        for node in reversed(nodes):
            node.close()


@pytest.fixture(params=["zmq", "memory", "asyncio", "world"])
def cloud(request: pytest.FixtureRequest, make_node: Callable[..., Node]) -> Iterator[RealCloud | VirtualCloud]:
    made: RealCloud | VirtualCloud
    if request.param == "asyncio":
        made = LoopCloud(request.getfixturevalue("loop_nodes"))
    elif request.param == "world":
        made = VirtualCloud(World(11))
    elif request.param == "memory":
        network = Network()
        made = RealCloud(lambda **settings: make_node(network=network, **settings))
    else:
        made = RealCloud(make_node)
    yield made
    made.close()
