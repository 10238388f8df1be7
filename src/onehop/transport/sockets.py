"""ZeroMQ sockets: every option in one table, with its reason, and the limits of the machine."""

from __future__ import annotations

import os
import resource
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from onehop.errors import ResourceLimit, SettingsError
from onehop.protocol import wire
from onehop.protocol.wire import Frame
from onehop.transport.carrier import Unreachable

# Plain integers: arithmetic on zmq's enumerations costs a microsecond each time.
_NOWAIT = int(zmq.NOBLOCK)
_NOWAIT_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
_EVENTS, _POLLIN, _RCVMORE = int(zmq.EVENTS), int(zmq.POLLIN), int(zmq.RCVMORE)
_HANDSHAKE_FAILURES = int(
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)

LINK_DESCRIPTORS = 5
"""Of one link: mailbox, connection, both ends of its monitor, and the engine's eventfd."""
RESERVED_DESCRIPTORS = 64
"""Left to the program: no link is opened when fewer are free. Where none is, libzmq aborts the process, or spins."""

COMMON_OPTIONS: tuple[tuple[int, int, str], ...] = (
    (zmq.LINGER, 0, "closing never waits by accident; who wants to wait drains first"),
    (zmq.MAXMSGSIZE, 64 * 1024 * 1024, "a header that promises gigabytes is refused before memory is taken"),
    (zmq.HANDSHAKE_IVL, 5_000, "a scanner or a hung peer holds a connection for 5 s, not 30"),
    (zmq.HEARTBEAT_IVL, 2_000, "a peer whose host vanished sends no FIN; ask it every 2 s"),
    (zmq.HEARTBEAT_TIMEOUT, 4_500, "and count the connection as ended after 4.5 s without an answer: 6.5 s in all"),
    (zmq.HEARTBEAT_TTL, 4_500, "so does the other side"),
)
LINK_OPTIONS: tuple[tuple[int, int, str], ...] = (
    *COMMON_OPTIONS,
    (
        zmq.RECONNECT_IVL,
        -1,
        "libzmq reconnects without jitter and silently; a link that ends is reported, and ours to replace",
    ),
    (zmq.IMMEDIATE, 0, "the hello may be queued before the connection stands; requests wait for its answer"),
    (zmq.SNDHWM, 8_192, "above the window of calls, which is the real bound; a second fence"),
    (zmq.RCVHWM, 8_192, "the same for replies"),
)
INBOUND_OPTIONS: tuple[tuple[int, int, str], ...] = (
    *COMMON_OPTIONS,
    (zmq.ROUTER_MANDATORY, 1, "a reply to a connection that ended is an error, not a silent drop"),
    (zmq.ROUTER_HANDOVER, 0, "nobody takes over another's connection by its identity"),
    (zmq.BACKLOG, 4_096, "many peers may come at once after a restart"),
    (zmq.SNDHWM, 16_384, "above all a well-behaved caller can be owed; a caller that never reads loses its replies"),
    (zmq.RCVHWM, 1_024, "what is not read waits in the senders, whose windows bound it"),
)


def check_descriptors(wanted: int) -> None:
    """Make sure that ``wanted`` more descriptors may be opened, raising the soft limit if that helps.

    Raises:
        ResourceLimit: they would leave the program fewer than it needs.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    needed = used + wanted + RESERVED_DESCRIPTORS
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard == resource.RLIM_INFINITY or needed <= hard:
        raised = max(needed, min(hard, 65_536)) if hard != resource.RLIM_INFINITY else max(needed, 65_536)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            return
        except (ValueError, OSError):
            hard = soft
    raise ResourceLimit(
        f"this process has {used} of {soft} descriptors open; {wanted} more are needed, with {RESERVED_DESCRIPTORS} in "
        "reserve: raise the limit (ulimit -n, or LimitNOFILE= in its systemd unit)"
    )


class _Link:
    """A DEALER connected to one peer, with its monitor."""

    def __init__(self, context: zmq.Context[Any], endpoint: str) -> None:
        self._socket = socket = _create(context, zmq.DEALER, LINK_OPTIONS)
        self._monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | _HANDSHAKE_FAILURES)
        # The backend's methods: the public ones add a Python frame to each message.
        backend: Any = super(zmq.Socket, socket)
        self._send, self._recv, self._get = backend.send, backend.recv, backend.get
        self.fd = int(socket.get(zmq.FD))
        self.monitor_fd = int(self._monitor.get(zmq.FD))
        self._ended: str | None = None
        socket.connect(endpoint)

    def send(self, frame: Frame) -> bool:
        try:
            if type(frame) is bytes:
                self._send(frame, _NOWAIT)
            else:
                self._send(frame[0], _NOWAIT_MORE)
                self._send(frame[1], _NOWAIT, False)
        except zmq.Again:
            return False
        return True

    def receive(self) -> tuple[bytes, bytes | memoryview | None] | None:
        try:
            frame = self._recv(_NOWAIT)
            if wire.has_second_frame(frame) and self._get(_RCVMORE):
                return frame, self._recv(_NOWAIT, False).buffer
        except zmq.Again:
            return None
        return frame, None

    def readable(self) -> bool:
        return bool(self._get(_EVENTS) & _POLLIN)

    def ended(self) -> str | None:
        while self._ended is None:
            try:
                event = zmq.Event(parse_monitor_message(self._monitor.recv_multipart(_NOWAIT))["event"])
            except zmq.Again:
                break
            if event == zmq.Event.DISCONNECTED:
                self._ended = "the connection ended"
            elif event == zmq.Event.CLOSED:
                self._ended = "nobody listens there"
            else:
                self._ended = f"the handshake failed ({event.name})"
        return self._ended

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)


class _Inbound:
    """A ROUTER bound to this node's endpoint."""

    def __init__(self, context: zmq.Context[Any], endpoint: str) -> None:
        self._socket = socket = _create(context, zmq.ROUTER, INBOUND_OPTIONS)
        backend: Any = super(zmq.Socket, socket)
        self._send, self._recv, self._get = backend.send, backend.recv, backend.get
        self.fd = int(socket.get(zmq.FD))
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            socket.close(0)
            raise SettingsError(
                f"cannot listen at {endpoint}: {error}; is the path writable and short enough?"
            ) from None
        self.endpoints: tuple[str, ...] = (endpoint,)

    def send(self, identity: bytes, frame: Frame) -> bool:
        try:
            self._send(identity, _NOWAIT_MORE)
            if type(frame) is bytes:
                self._send(frame, _NOWAIT)
            else:
                self._send(frame[0], _NOWAIT_MORE)
                self._send(frame[1], _NOWAIT, False)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                raise Unreachable from None
            raise
        return True

    def receive(self) -> tuple[bytes, bytes, bytes | memoryview | None] | None:
        try:
            identity = self._recv(_NOWAIT)
            frame = self._recv(_NOWAIT)
        except zmq.Again:
            return None
        if not self._get(_RCVMORE):
            return identity, frame, None
        # Asked of the socket, never of the frame: a lying header must not shift the border between messages, or the
        # next frame would be read as an identity, somebody else's perhaps.
        rest = []
        while self._get(_RCVMORE):
            rest.append(self._recv(_NOWAIT, False))
        if len(rest) > 1:
            return identity, b"", None  # no message has three frames: refused by the core as too short
        return identity, frame, rest[0].buffer

    def readable(self) -> bool:
        return bool(self._get(_EVENTS) & _POLLIN)

    def close(self, linger: float) -> None:
        self._socket.close(int(linger * 1000))


class ZmqCarrier:
    """Carries messages over ZeroMQ; one context with one I/O thread."""

    def __init__(self) -> None:
        self._context: zmq.Context[Any] | None = None

    def _get_context(self) -> zmq.Context[Any]:
        if self._context is None:
            context: zmq.Context[Any] = zmq.Context()
            context.set(zmq.MAX_SOCKETS, min(context.get(zmq.SOCKET_LIMIT), 65_535))
            self._context = context
        return self._context

    def bind(self, endpoint: str) -> _Inbound:
        check_descriptors(16)
        return _Inbound(self._get_context(), endpoint)

    def connect(self, endpoint: str) -> _Link:
        check_descriptors(LINK_DESCRIPTORS)
        return _Link(self._get_context(), endpoint)

    def close(self) -> None:
        if self._context is not None:
            # Its owner has closed every socket (a link that failed while it was made excepted); what the inbound one
            # still lets leave is waited for.
            self._context.destroy(linger=0)
            self._context = None


def _create(context: zmq.Context[Any], kind: int, options: tuple[tuple[int, int, str], ...]) -> zmq.Socket[bytes]:
    try:
        socket: zmq.Socket[bytes] = zmq.Socket(context, kind)
    except zmq.ZMQError as error:
        raise ResourceLimit(
            f"ZeroMQ gives no more sockets ({error}); close nodes or raise the descriptor limit"
        ) from None
    for option, value, _reason in options:
        socket.set(option, value)
    return socket
