"""ZeroMQ sockets: every option in one table, with its reason, and the limits of the machine."""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from onehop.errors import ResourceLimit, SettingsError
from onehop.protocol import wire
from onehop.protocol.wire import Body, Frame
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

Options = tuple[tuple[int, int, str], ...]

COMMON_OPTIONS: Options = (
    (zmq.LINGER, 0, "closing never waits by accident; who wants to wait drains first"),
    (zmq.MAXMSGSIZE, 64 * 1024 * 1024, "a header that promises gigabytes is refused before memory is taken"),
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


class _Socket:
    """What both ends share: the backend's methods (the public ones add a Python frame to each message)."""

    def __init__(self, context: zmq.Context[Any], kind: int, options: Options) -> None:
        try:
            self._socket = context.socket(kind)  # so that the context can close what an error left open
        except zmq.ZMQError as error:
            raise ResourceLimit(f"ZeroMQ gives no more sockets: {error}; raise the descriptor limit") from None
        for option, value, _reason in options:
            self._socket.set(option, value)
        backend: Any = super(zmq.Socket, self._socket)
        self._send, self._recv, self._get = backend.send, backend.recv, backend.get
        self.fd = int(self._get(zmq.FD))

    def _send_frame(self, frame: Frame) -> None:
        if type(frame) is bytes:
            self._send(frame, _NOWAIT)
        else:
            self._send(frame[0], _NOWAIT_MORE)
            self._send(frame[1], _NOWAIT, False)

    def readable(self) -> bool:
        return bool(self._get(_EVENTS) & _POLLIN)


class _Link(_Socket):
    """A DEALER connected to one peer, with its monitor."""

    def __init__(self, context: zmq.Context[Any], endpoint: str) -> None:
        super().__init__(context, zmq.DEALER, LINK_OPTIONS)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | _HANDSHAKE_FAILURES)
        self.monitor_fd = int(self._monitor.get(zmq.FD))
        self._ended: str | None = None
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close(0.0)
            raise SettingsError(f"cannot connect to {endpoint}: {error}") from None

    def send(self, frame: Frame) -> bool:
        try:
            self._send_frame(frame)
        except zmq.Again:
            return False
        return True

    def receive(self) -> tuple[bytes, Body | None] | None:
        try:
            frame = self._recv(_NOWAIT)
        except zmq.Again:
            return None
        if wire.has_second_frame(frame) and self._get(_RCVMORE):
            return frame, self._recv(_NOWAIT, False).buffer
        return frame, None

    def ended(self) -> str | None:
        while self._ended is None:
            try:
                event = zmq.Event(parse_monitor_message(self._monitor.recv_multipart(_NOWAIT))["event"])
            except zmq.Again:
                break
            known = {zmq.Event.DISCONNECTED: "the connection ended", zmq.Event.CLOSED: "nobody listens there"}
            self._ended = known.get(event, f"the handshake failed ({event.name})")
        return self._ended

    def close(self, linger: float) -> None:
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(int(linger * 1000))


class _Inbound(_Socket):
    """A ROUTER bound to this node's endpoint."""

    def __init__(self, context: zmq.Context[Any], endpoint: str) -> None:
        super().__init__(context, zmq.ROUTER, INBOUND_OPTIONS)
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self._socket.close(0)
            raise SettingsError(
                f"cannot listen at {endpoint}: {error}; is the path writable and short enough?"
            ) from None
        self.endpoints: tuple[str, ...] = (endpoint,)

    def send(self, identity: bytes, frame: Frame) -> bool:
        try:
            self._send(identity, _NOWAIT_MORE)
            self._send_frame(frame)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                raise Unreachable from None
            raise
        return True

    def receive(self) -> tuple[bytes, bytes, Body | None] | None:
        try:
            identity = self._recv(_NOWAIT)
            frame = self._recv(_NOWAIT)
        except zmq.Again:
            return None
        if not self._get(_RCVMORE):
            return identity, frame, None
        # Asked of the socket, never of the frame: a lying header must not shift the border between messages, or the
        # next frame would be read as an identity, somebody else's perhaps.
        body = self._recv(_NOWAIT, False).buffer
        while self._get(_RCVMORE):
            self._recv(_NOWAIT)
            frame = b""  # no message has three frames: refused by the core as too short
        return identity, frame, body

    def close(self, linger: float) -> None:
        self._socket.close(int(linger * 1000))
        if self.endpoints[0].startswith("ipc://"):  # libzmq leaves the file
            with suppress(FileNotFoundError):
                os.unlink(self.endpoints[0].removeprefix("ipc://"))


class ZmqCarrier:
    """Carries messages over ZeroMQ; one context with one I/O thread.

    Args:
        mode: of the file that is the socket, where it listens on one: who may connect.
    """

    def __init__(self, mode: int = 0o600) -> None:
        self._mode = mode
        self._context: zmq.Context[Any] | None = None

    def _get_context(self) -> zmq.Context[Any]:
        if self._context is None:
            self._context = zmq.Context()
            self._context.set(zmq.MAX_SOCKETS, min(self._context.get(zmq.SOCKET_LIMIT), 65_535))
        return self._context

    def bind(self, endpoint: str) -> _Inbound:
        check_descriptors(16)
        inbound = _Inbound(self._get_context(), endpoint)
        if endpoint.startswith("ipc://"):
            os.chmod(endpoint.removeprefix("ipc://"), self._mode)
        return inbound

    def connect(self, endpoint: str) -> _Link:
        check_descriptors(LINK_DESCRIPTORS)
        return _Link(self._get_context(), endpoint)

    def close(self) -> None:
        if self._context is not None:
            # Its owner has closed every socket (a link that failed while it was made excepted); what the inbound one
            # still lets leave is waited for.
            self._context.destroy(linger=0)
            self._context = None
