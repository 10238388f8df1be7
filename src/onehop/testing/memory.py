"""A network inside one process: no ZeroMQ, no files, and as strict as the wire.

For tests, ours and users': ``Node(network=Network())``. It keeps the promises of a carrier and withholds the same:
bounded queues, bytes only, an edge-triggered descriptor, loss of what is under way when a connection ends. The
conformance suite holds it and ZeroMQ to the same rules.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence

from onehop.errors import SettingsError
from onehop.interfaces import Deliver, Record, Registry
from onehop.protocol.wire import Body, Frame
from onehop.transport.carrier import InboundSocket, LinkSocket

HIGH_WATER = 8_192
LARGEST = 64 * 1024 * 1024

Message = tuple[bytes, bytes | None]


def _copied(frame: Frame) -> Message:
    """What arrives: bytes of its own, as after a copy through the kernel."""
    head, body = (frame, None) if isinstance(frame, bytes) else (frame[0], bytes(frame[1]))
    if not isinstance(head, bytes):
        raise TypeError(f"a frame is bytes, not {type(head).__name__}")
    return head, body


def _too_large(message: Message) -> bool:
    return max(len(message[0]), len(message[1] or b"")) > LARGEST


class _Edge:
    """A descriptor that becomes readable once for all that came since a look that found nothing."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._armed = True

    def signal(self) -> None:
        if self._armed and self.fd >= 0:
            self._armed = False
            os.eventfd_write(self.fd, 1)

    def arm(self) -> None:
        try:
            os.eventfd_read(self.fd)
        except (BlockingIOError, OSError):
            pass
        self._armed = True

    def close(self) -> None:
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)


class _Connection:
    def __init__(self, identity: bytes, lock: threading.RLock) -> None:
        self.identity = identity
        self.lock = lock
        self.inbound: _MemoryInbound | None = None
        self.to_client: deque[Message] = deque()
        self.client_edge = _Edge()
        self.monitor_edge = _Edge()
        self.under_way = 0
        self.ended: str | None = None

    def end(self, why: str) -> None:
        if self.ended is None:
            self.ended = why
            if self.inbound is not None:
                self.inbound.connections.pop(self.identity, None)
            self.client_edge.signal()
            self.monitor_edge.signal()


class _MemoryLink(LinkSocket):
    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self.fd = connection.client_edge.fd
        self.monitor_fd = connection.monitor_edge.fd

    def send(self, frame: bytes) -> bool:
        return self._hand_over(frame)

    def send_large(self, head: bytes, body: Body) -> bool:
        return self._hand_over((head, body))

    def _hand_over(self, frame: Frame) -> bool:
        connection, message = self._connection, _copied(frame)
        with connection.lock:
            inbound = connection.inbound
            if connection.ended is not None or inbound is None or connection.under_way >= HIGH_WATER:
                return False
            if _too_large(message):
                connection.end("the message was larger than the other side takes")
                return True
            connection.under_way += 1
            inbound.messages.append((connection, message))
            inbound.edge.signal()
        return True

    def drain(self, limit: int, into: list[tuple[bytes, Body | None]]) -> bool:
        connection = self._connection
        with connection.lock:
            while connection.to_client:
                if limit <= 0:
                    return True
                limit -= 1
                into.append(connection.to_client.popleft())
            connection.client_edge.arm()
        return False

    def ended(self) -> str | None:
        with self._connection.lock:
            self._connection.monitor_edge.arm()
            return self._connection.ended

    def close(self, linger: float) -> None:
        with self._connection.lock:
            self._connection.end("closed here")
            self._connection.client_edge.close()
            self._connection.monitor_edge.close()


class _MemoryInbound(InboundSocket):
    def __init__(self, network: MemoryCarrier, endpoint: str, lock: threading.RLock) -> None:
        self.endpoints = (endpoint,)
        self.connections: dict[bytes, _Connection] = {}
        self.messages: deque[tuple[_Connection, Message]] = deque()
        self.edge = _Edge()
        self.fd = self.edge.fd
        self._network = network
        self._lock = lock

    def send(self, identity: bytes, frame: bytes) -> bool:
        return self._hand_over(identity, frame)

    def send_large(self, identity: bytes, head: bytes, body: Body) -> bool:
        return self._hand_over(identity, (head, body))

    def _hand_over(self, identity: bytes, frame: Frame) -> bool:
        message = _copied(frame)
        with self._lock:
            connection = self.connections.get(identity)
            if connection is None:
                raise ConnectionResetError
            if len(connection.to_client) >= HIGH_WATER:
                return False
            connection.to_client.append(message)
            connection.client_edge.signal()
        return True

    def drain(self, limit: int, into: list[tuple[bytes, bytes, Body | None]]) -> bool:
        with self._lock:
            while self.messages:
                if limit <= 0:
                    return True
                limit -= 1
                connection, (head, body) = self.messages.popleft()
                connection.under_way -= 1
                into.append((connection.identity, head, body))
            self.edge.arm()
        return False

    def close(self, linger: float) -> None:
        with self._lock:
            self._network.sockets.pop(self.endpoints[0], None)
            for connection in list(self.connections.values()):
                connection.end("the connection ended")
            self.messages.clear()
            self.edge.close()


class MemoryCarrier:
    """Carries the messages of all nodes that share it; it can be cut."""

    def __init__(self) -> None:
        self.sockets: dict[str, _MemoryInbound] = {}
        self._lock = threading.RLock()
        self._count = 0

    def bind(self, *endpoints: str) -> InboundSocket:
        (endpoint,) = endpoints
        with self._lock:
            if endpoint in self.sockets:
                raise SettingsError(f"cannot listen at {endpoint}: it is in use")
            inbound = self.sockets[endpoint] = _MemoryInbound(self, endpoint, self._lock)
        return inbound

    def nearest(self, endpoints: Sequence[str]) -> str:
        return endpoints[0]

    def connect(self, endpoint: str) -> LinkSocket:
        with self._lock:
            self._count += 1
            connection = _Connection(b"\0" + self._count.to_bytes(4, "big"), self._lock)
            connection.inbound = self.sockets.get(endpoint)
            if connection.inbound is None:
                connection.end("nobody listens there")
            else:
                connection.inbound.connections[connection.identity] = connection
        return _MemoryLink(connection)

    def close(self) -> None:
        """Nothing: sockets are closed by their owners."""

    def cut(self, endpoint: str) -> None:
        """End every connection to ``endpoint``; what was under way is lost."""
        with self._lock:
            inbound = self.sockets[endpoint]
            inbound.messages.clear()
            for connection in list(inbound.connections.values()):
                connection.to_client.clear()
                connection.end("the connection ended")


class Records:
    """The records that the registries of one network share."""

    def __init__(self) -> None:
        self._telling = threading.RLock()
        self._members: list[MemoryRegistry] = []

    def registry(self) -> MemoryRegistry:
        """One node's view of these records."""
        return MemoryRegistry(self)

    def change(self, member: MemoryRegistry, action: Callable[[], None], *, stays: bool = True) -> None:
        """Apply ``action`` for ``member`` and tell everybody who watches."""
        with self._telling:
            if stays and member not in self._members:
                self._members.append(member)
            before = self._view()
            action()
            view = self._view()
            for each in list(self._members):
                if each.deliver is not None and (view != before or each is member):
                    each.deliver(view)
            if not stays and member in self._members:
                self._members.remove(member)

    def _view(self) -> list[Record]:
        records = [each.record for each in self._members if each.record is not None]
        return sorted(records, key=lambda record: record.node)


class MemoryRegistry(Registry):
    """See :class:`onehop.interfaces.Registry`."""

    def __init__(self, records: Records) -> None:
        self.record: Record | None = None
        self.deliver: Deliver | None = None
        self._records = records

    def _hold(self, record: Record | None) -> None:
        self.record = record

    def announce(self, record: Record) -> None:
        self._records.change(self, lambda: self._hold(record))

    def withdraw(self) -> None:
        if self.record is not None:
            self._records.change(self, lambda: self._hold(None))

    def watch(self, deliver: Deliver) -> None:
        def begin() -> None:
            self.deliver = deliver

        self._records.change(self, begin)

    def refresh(self) -> None:
        """Nothing: every change is told at once."""

    def is_fresh(self) -> bool:
        return True

    def close(self) -> None:
        self.deliver = None
        self._records.change(self, lambda: self._hold(None), stays=False)

    def forget(self) -> None:
        self.deliver = None
        self.record = None


class Network:
    """A network inside this process: nodes made with ``Node(network=network)`` know each other, and nobody else.

    Attributes:
        carrier: carries their messages, and can be cut.
        records: what their registries share.
    """

    def __init__(self) -> None:
        self.carrier = MemoryCarrier()
        self.records = Records()

    def registry(self) -> MemoryRegistry:
        """One node's view of the records."""
        return self.records.registry()

    def endpoint(self, node: bytes) -> str:
        """Where the node of that id listens."""
        return f"memory://{node.hex()}"
