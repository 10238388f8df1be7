"""ZeroMQ sockets: every option in one table, with its reason, and the limits of the machine."""

from __future__ import annotations

import os
import struct
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar

import zmq

from onehop.errors import ResourceLimit, SettingsError
from onehop.protocol import wire
from onehop.protocol.inbox import Message
from onehop.protocol.wire import Body
from onehop.settings import LARGEST_MESSAGE
from onehop.transport.arrivals import Arrivals, hidden_path, is_local, path_of
from onehop.transport.carrier import InboundSocket, LinkSocket
from onehop.transport.descriptors import LARGEST_RESERVE, check_descriptors, listening_reserve
from onehop.transport.native import native
from onehop.transport.waiting import Wake

# Plain integers: arithmetic on zmq's enumerations costs a microsecond each time.
_NOWAIT = int(zmq.NOBLOCK)
_NOWAIT_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
_FD, _EVENTS, _POLLIN, _RCVMORE = int(zmq.FD), int(zmq.EVENTS), int(zmq.POLLIN), int(zmq.RCVMORE)
_ENDS = int(
    zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)  # fmt: skip

_MONITOR_EVENT = struct.Struct("=H")
"""How a monitor's message begins. Not ``zmq.utils.monitor``: it imports asyncio, seven megabytes."""

LINK_DESCRIPTORS = 5
"""Of one link: mailbox, connection, both ends of its monitor, and the engine's eventfd."""
Options = tuple[tuple[int, int, str], ...]

COMMON_OPTIONS: Options = (
    (zmq.LINGER, 0, "closing never waits by accident; who wants to wait drains first"),
    (zmq.MAXMSGSIZE, LARGEST_MESSAGE, "a header that promises gigabytes is refused before memory is taken"),
    (zmq.HANDSHAKE_IVL, 5_000, "a scanner or a hung peer holds a connection for 5 s, not 30"),
    (zmq.HEARTBEAT_IVL, 2_000, "a peer whose host vanished sends no FIN; ask it every 2 s"),
    (zmq.HEARTBEAT_TIMEOUT, 4_500, "and count the connection as ended after 4.5 s without an answer: 6.5 s in all"),
    (zmq.HEARTBEAT_TTL, 4_500, "so does the other side"),
)
LINK_OPTIONS: Options = (
    *COMMON_OPTIONS,
    # Not -1 (never): libzmq then throws away what has arrived and was not read when the connection ends.
    (zmq.RECONNECT_IVL, 86_400_000, "libzmq reconnects silently, without jitter; a link that ends is ours to replace"),
    (zmq.IMMEDIATE, 0, "the hello may be queued before the connection stands; requests wait for its answer"),
    (zmq.SNDHWM, 8_192, "above the window of calls, which is the real bound; a second fence"),
    (zmq.RCVHWM, 8_192, "the same for replies"),
)
INBOUND_OPTIONS: Options = (
    *COMMON_OPTIONS,
    (zmq.ROUTER_MANDATORY, 1, "a reply to a connection that ended is an error, not a silent drop"),
    (zmq.ROUTER_HANDOVER, 0, "nobody takes over another's connection by its identity"),
    (zmq.BACKLOG, 4_096, "many peers may come at once after a restart"),
    (zmq.SNDHWM, 16_384, "above all a well-behaved caller can be owed; a caller that never reads loses its replies"),
    (zmq.RCVHWM, 1_024, "what is not read waits in the senders, whose windows bound it"),
)
LOCAL_LINK_OPTIONS: Options = (
    # The kernel tells at once when a process of this host ends; only one that is stopped ends nothing. Who connects
    # asks for that, now and then: 1,200 idle connections that ask every 2 s take one processor's hundredth at each end.
    (zmq.HEARTBEAT_IVL, 15_000, "a stopped process is noticed, after 20 s"),
    (zmq.HEARTBEAT_TIMEOUT, 5_000, "it is given time, since a busy host stops everybody now and then"),
    (zmq.HEARTBEAT_TTL, 0, "the other side hears from the kernel"),
)
"""In place of those above where both ends are on one host, for the end that connects."""
LOCAL_INBOUND_OPTIONS: Options = ((zmq.HEARTBEAT_IVL, 0, "whoever connects asks"),)


def _values(*tables: Options) -> tuple[tuple[int, int], ...]:
    """Each option once, with the value of the last table that has it: pyzmq takes a microsecond to set one."""
    return tuple({int(option): value for table in tables for option, value, _reason in table}.items())


_LINK, _LOCAL_LINK = _values(LINK_OPTIONS), _values(LINK_OPTIONS, LOCAL_LINK_OPTIONS)
_INBOUND, _LOCAL_INBOUND = _values(INBOUND_OPTIONS), _values(INBOUND_OPTIONS, LOCAL_INBOUND_OPTIONS)


def _new_socket(context: zmq.Context[Any], kind: int) -> Any:
    try:
        return context.socket(kind)  # so that the context can close what an error left open
    except zmq.ZMQError as error:
        raise ResourceLimit(f"ZeroMQ gives no more sockets: {error}; raise the descriptor limit") from None


class _Socket:
    """What both ends share: the backend's methods (the public ones add a Python frame to each message)."""

    def __init__(self, context: zmq.Context[Any], kind: int, options: tuple[tuple[int, int], ...]) -> None:
        self._socket = _new_socket(context, kind)
        for option, value in options:
            self._socket.set(option, value)
        backend: Any = super(zmq.Socket, self._socket)
        self._send, self._recv, self._get = backend.send, backend.recv, backend.get
        self._address = self._socket.underlying
        self.fd = int(self._get(_FD))

    def _break_off(self) -> None:
        """End a message of which some parts were sent: what comes next would be taken for its rest.

        Where nothing was sent, an empty message leaves, which means nothing.
        """
        with suppress(zmq.ZMQError):
            self._send(b"", _NOWAIT)


class _Link(_Socket):
    """A DEALER connected to one peer, with its monitor."""

    send: Callable[[bytes], bool]
    drain: Callable[[int, list[tuple[bytes, Body | None]]], bool]

    def __init__(self, context: zmq.Context[Any], endpoint: str) -> None:
        super().__init__(context, zmq.DEALER, _LOCAL_LINK if is_local(endpoint) else _LINK)
        if native is None:
            self.send, self.drain = self._send_frame, self._drain
        else:
            self.send, self.drain = partial(native.send, self._address), partial(native.drain, self._address)
        # What get_monitor_socket() does, which takes three times as long to find out whether libzmq can.
        address = f"inproc://monitor-{self.fd}"
        self._socket.monitor(address, _ENDS)
        self._monitor = _new_socket(context, zmq.PAIR)
        self._monitor.connect(address)
        self.monitor_fd = int(self._monitor.get(_FD))
        self._ended: str | None = None
        try:
            if "[" in endpoint:
                self._socket.set(zmq.IPV6, 1)
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close(0.0)
            raise SettingsError(f"cannot connect to {endpoint}: {error}") from None

    def _send_frame(self, frame: bytes) -> bool:
        try:
            self._send(frame, _NOWAIT)
        except zmq.Again:
            return False
        return True

    def send_large(self, head: bytes, body: Body) -> bool:
        try:
            self._send(head, _NOWAIT_MORE)
            self._send(body, _NOWAIT, False)
        except zmq.Again:
            return False
        except BaseException:
            self._break_off()
            raise
        return True

    def exchange(self, frame: bytes, wake: Wake, milliseconds: int, into: list[tuple[bytes, Body | None]]) -> bool:
        if wake.native is None:
            return LinkSocket.exchange(self, frame, wake, milliseconds, into)
        return bool(wake.native.exchange(self._address, frame, self.fd, wake.fd, milliseconds, into))

    def _drain(self, limit: int, into: list[tuple[bytes, Body | None]]) -> bool:
        # To ask for the events is cheaper than the exception of a receive that fails, and dearer than a receive: so it
        # is asked before the first message and the second, and a third is taken for the beginning of a crowd.
        get, receive = self._get, self._recv
        for count in range(limit):
            if count < 2 and not get(_EVENTS) & _POLLIN:
                return False
            try:
                frame = receive(_NOWAIT)
            except zmq.Again:
                return False
            if wire.has_second_frame(frame) and get(_RCVMORE):
                into.append((frame, receive(_NOWAIT, False).buffer))
            else:
                into.append((frame, None))
        return True

    def ended(self) -> str | None:
        while self._ended is None and self._monitor.get(_EVENTS) & _POLLIN:  # cheaper than a receive that fails
            event = zmq.Event(_MONITOR_EVENT.unpack_from(self._monitor.recv_multipart(_NOWAIT)[0])[0])
            known = {zmq.Event.DISCONNECTED: "the connection ended", zmq.Event.CLOSED: "nobody listens there"}
            self._ended = known.get(event, f"the handshake failed ({event.name})")
        return self._ended

    def close(self, linger: float) -> None:
        self._socket.monitor(None, 0)
        self._monitor.close(0)
        self._socket.close(int(linger * 1000))


class _Inbound(_Socket):
    """A ROUTER bound to this node's endpoint."""

    send: Callable[[bytes, bytes], bool]
    drain: Callable[[int, list[Message]], bool]

    def __init__(self, context: zmq.Context[Any], endpoints: Sequence[str]) -> None:
        super().__init__(context, zmq.ROUTER, ())
        if native is None:
            self.send, self.drain = self._send_frame, self._drain
        else:
            self.send, self.drain = partial(native.send_to, self._address), partial(native.drain_from, self._address)
        self.endpoints: tuple[str, ...] = ()
        self._arrivals = Arrivals(self._socket, _new_socket(context, zmq.PAIR))
        self.arrivals_fd = self._arrivals.fd
        try:
            for each in endpoints:
                self.endpoints += (self._listen(each),)
        except SettingsError:
            self.close(0.0)
            raise

    def _listen(self, endpoint: str) -> str:
        """Listen at ``endpoint``, at the first free port where it has several; returns what it is then.

        libzmq copies the options when it listens, so that those of each endpoint can be its own.
        """
        for option, value in _LOCAL_INBOUND if is_local(endpoint) else _INBOUND:
            self._socket.set(option, value)
        if is_local(endpoint):
            reserve = listening_reserve()
            if reserve < LARGEST_RESERVE:
                self._socket.set(zmq.BACKLOG, reserve // 2)  # whoever waits there is accepted, be there room or not
            try:
                self._socket.bind(endpoint)
            except zmq.ZMQError as error:
                raise SettingsError(
                    f"cannot listen at {endpoint}: {error}; is the path writable and short enough?"
                ) from None
            return endpoint
        self._socket.set(zmq.IPV6, int("[" in endpoint))
        place, _, ports = endpoint.rpartition(":")
        for port in ports.split(","):
            try:
                self._socket.bind(f"{place}:{port}")
                return f"{place}:{port}"
            except zmq.ZMQError as error:
                if error.errno != zmq.EADDRINUSE:
                    raise SettingsError(
                        f"cannot listen at {place}:{port}: {error}; is it an address of this host (address, "
                        "ONEHOP_ADDRESS)?"
                    ) from None
        raise SettingsError(
            f"cannot listen at {place}: each of the ports {ports[:40]}... is in use, and every process that serves "
            "takes one: give more (ports, ONEHOP_PORTS)"
        )

    def _send_frame(self, identity: bytes, frame: bytes) -> bool:
        return self._send_parts(identity, frame)

    def send_large(self, identity: bytes, head: bytes, body: Body) -> bool:
        return self._send_parts(identity, head, body)

    def _send_parts(self, identity: bytes, head: bytes, body: Body | None = None) -> bool:
        # What follows the identity is taken whenever that was: libzmq asks for room once, and counts it in messages.
        try:
            self._send(identity, _NOWAIT_MORE)
            self._send(head, _NOWAIT if body is None else _NOWAIT_MORE)
            if body is not None:
                self._send(body, _NOWAIT, False)
        except zmq.Again:
            return False
        except BaseException as error:
            if isinstance(error, zmq.ZMQError) and error.errno == zmq.EHOSTUNREACH:
                raise ConnectionResetError("the connection has ended") from None
            self._break_off()
            raise
        return True

    def receive(self, wake: Wake, milliseconds: int, into: list[Message]) -> bool:
        if wake.native is None:
            return InboundSocket.receive(self, wake, milliseconds, into)
        return bool(wake.native.receive_from(self._address, self.fd, wake.fd, milliseconds, into))

    def _drain(self, limit: int, into: list[Message]) -> bool:
        get, receive = self._get, self._recv
        for count in range(limit):
            if count < 2 and not get(_EVENTS) & _POLLIN:  # see _Link
                return False
            try:
                identity = receive(_NOWAIT)
            except zmq.Again:
                return False
            frame = receive(_NOWAIT)
            if not get(_RCVMORE):
                into.append((identity, frame, None))
                continue
            # Asked of the socket, never of the frame: a lying header must not shift the border between messages, or
            # the next frame would be read as an identity, somebody else's perhaps.
            body = receive(_NOWAIT, False).buffer
            while get(_RCVMORE):
                receive(_NOWAIT)
                frame = b""  # no message has three frames: refused by the core as too short
            into.append((identity, frame, body))
        return True

    def look_at_arrivals(self, counts: Counter[str]) -> bool:
        return self._arrivals.look(self.endpoints, counts)

    def close(self, linger: float) -> None:
        self._arrivals.close()
        self._socket.close(int(linger * 1000))
        for each in filter(is_local, self.endpoints):  # libzmq leaves the file
            with suppress(FileNotFoundError):
                os.unlink(path_of(each))
            with suppress(FileNotFoundError):
                os.unlink(hidden_path(path_of(each)))


class ZmqCarrier:
    """Carries messages over ZeroMQ, in one context with one I/O thread for all carriers of this process.

    Args:
        mode: of the file that is the socket, where it listens on one: who may connect.
        directory: where the nodes of this host have those files.
    """

    _sharing = threading.RLock()  # reentrant: a signal handler may send in the thread that it interrupts in here
    _context: zmq.Context[Any] | None = None
    _carriers: ClassVar[set[ZmqCarrier]] = set()
    _inherited: ClassVar[list[Any]] = []

    def __init__(self, mode: int = 0o600, directory: str = "") -> None:
        self._mode = mode
        self._directory = f"ipc://{directory}/"

    def _get_context(self) -> zmq.Context[Any]:
        with ZmqCarrier._sharing:
            ZmqCarrier._carriers.add(self)
            if ZmqCarrier._context is None:
                made = zmq.Context()
                made.set(zmq.MAX_SOCKETS, min(made.get(zmq.SOCKET_LIMIT), 65_535))
                if ZmqCarrier._context is None:
                    ZmqCarrier._context = made
            return ZmqCarrier._context

    def bind(self, *endpoints: str) -> _Inbound:
        check_descriptors(16)
        inbound = _Inbound(self._get_context(), endpoints)
        for each in filter(is_local, endpoints):
            os.chmod(path_of(each), self._mode)
        return inbound

    def nearest(self, endpoints: Sequence[str]) -> str:
        # A path in our own directory is no other host's, whose directory may have the same name: the socket's name is
        # the node's, and it is there.
        for each in endpoints:
            if not is_local(each) or (each.startswith(self._directory) and os.path.exists(each[len("ipc://") :])):
                return each
        return endpoints[0]

    def connect(self, endpoint: str) -> _Link:
        check_descriptors(LINK_DESCRIPTORS)
        return _Link(self._get_context(), endpoint)

    def close(self) -> None:
        """See :meth:`Carrier.close`; the last carrier to close waits for what all of them still let leave."""
        with ZmqCarrier._sharing:
            ZmqCarrier._carriers.discard(self)
            context = ZmqCarrier._context
            if ZmqCarrier._carriers or context is None:
                return
            ZmqCarrier._context = None
        # Their owners have closed every socket (a link that failed while it was made excepted); what the inbound ones
        # still let leave is waited for.
        context.destroy(linger=0)

    @classmethod
    def forget(cls) -> None:
        """In a forked child: begin anew. The parent's context is not touched; and kept, as dropping would end it."""
        cls._inherited.append(cls._context)
        cls._sharing, cls._context, cls._carriers = threading.RLock(), None, set()


os.register_at_fork(after_in_child=ZmqCarrier.forget)
