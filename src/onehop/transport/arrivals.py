"""Who connects to an inbound socket, and what becomes of them where the machine has no room.

At the limit of descriptors libzmq cannot accept a connection: over TCP it then takes a whole processor with trying, and
at a file it aborts the process. Nor can it be told to stop listening, as that ends every connection it has accepted. So
this stays away from the limit. While few descriptors are free, the file is out of sight, and who comes over TCP is
turned away: its connection is shut down under libzmq, which takes that for the caller's doing.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from time import monotonic
from typing import Any

import zmq

from onehop.errors import ResourceLimit
from onehop.transport.descriptors import RESERVED_DESCRIPTORS, check_descriptors, free_descriptors, listening_reserve
from onehop.transport.waiting import poll

log = logging.getLogger("onehop")

_EVENT = struct.Struct("=HI")
"""How a monitor's message begins: an event, and the descriptor it is about."""
_EVENTS, _POLLIN, _NOWAIT = int(zmq.EVENTS), int(zmq.POLLIN), int(zmq.NOBLOCK)
_ACCEPTED = int(zmq.EVENT_ACCEPTED)
_FAILED = int(
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
# Not ACCEPT_FAILED: at the limit libzmq tells it a hundred thousand times a second.

SPARE = 4
"""Descriptors kept for when the program has opened all others: with them libzmq can accept whom it is to lose."""
AT_LAST = 0.02
"""Seconds for which whoever waits to be accepted is turned away by them, at most."""


class Arrivals:
    """The connections of one inbound socket.

    Args:
        inbound: the ROUTER.
        pair: a PAIR of the same context.

    Attributes:
        fd: becomes readable when somebody comes.
        crowded: whether who comes now is turned away.
    """

    def __init__(self, inbound: Any, pair: Any) -> None:
        self.crowded = False
        address = f"inproc://arrivals-{int(inbound.get(zmq.FD))}"
        inbound.monitor(address, _ACCEPTED | _FAILED)
        self._inbound, self._pair = inbound, pair
        pair.set(zmq.RCVHWM, 0)  # libzmq's I/O thread would wait for room
        pair.connect(address)
        self.fd = int(pair.get(zmq.FD))
        self._lock = threading.Lock()
        self._closed = False
        self._spare: list[int] = []
        self._keep_spare()

    def look(self, endpoints: Sequence[str], counts: Counter[str]) -> bool:
        """See who came, and turn them away if there is no room.

        Args:
            endpoints: at which the socket listens.
            counts: gets what went wrong.

        Returns:
            Whether there is none.
        """
        with self._lock:
            if not self._closed:
                self._look(endpoints, counts)
            return self.crowded

    def _look(self, endpoints: Sequence[str], counts: Counter[str]) -> None:
        came = self._arrived(counts)
        reserve = listening_reserve()
        free = free_descriptors()
        if free < reserve:
            try:
                check_descriptors(reserve - RESERVED_DESCRIPTORS)
            except ResourceLimit as limit:
                if not self.crowded:
                    self._show(endpoints, False)
                    counts["times that listening ended for want of descriptors"] += 1
                    log.warning("who connects to %s is turned away until descriptors are free: %s", endpoints[0], limit)
                self.crowded = True
                counts["connections turned away"] += _shut(came, endpoints, free, reserve)
                if free < SPARE and any(not is_local(each) for each in endpoints):
                    self._clear(endpoints, counts, reserve)
        elif self.crowded and free >= reserve + reserve // 8:  # not for the first that leaves
            self.crowded = False
            self._show(endpoints, True)
            log.warning("who connects to %s is accepted again: descriptors are free", endpoints[0])
        self._keep_spare()

    def _show(self, endpoints: Sequence[str], visible: bool) -> None:
        for path in map(path_of, filter(is_local, endpoints)):
            shown, hidden = path, hidden_path(path)
            with suppress(OSError):  # somebody took it away
                os.rename(*((hidden, shown) if visible else (shown, hidden)))

    def _arrived(self, counts: Counter[str]) -> list[int]:
        came = []
        while self._pair.get(_EVENTS) & _POLLIN:
            event, descriptor = _EVENT.unpack_from(self._pair.recv_multipart(_NOWAIT)[0])
            if event == _ACCEPTED:
                came.append(descriptor)
            else:
                counts["handshakes that failed"] += 1
        return came

    def _clear(self, endpoints: Sequence[str], counts: Counter[str], reserve: int) -> None:
        """Have libzmq accept and lose who waits to be accepted, since it would try that without a pause."""
        while self._spare:
            os.close(self._spare.pop())
        until = monotonic() + AT_LAST
        while (left := until - monotonic()) > 0:
            poll([self.fd], left / 4)
            came = self._arrived(counts)
            if not came:
                return
            counts["connections turned away"] += _shut(came, endpoints, 0, reserve)

    def _keep_spare(self) -> None:
        with suppress(OSError):
            while len(self._spare) < SPARE:
                self._spare.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))

    def close(self) -> None:
        """Give everything back; comes before the socket's own end."""
        with self._lock:
            self._closed = True
            self._inbound.monitor(None, 0)
            self._pair.close(0)
            while self._spare:
                os.close(self._spare.pop())


def is_local(endpoint: str) -> bool:
    """Whether ``endpoint`` is a file of this host."""
    return endpoint.startswith("ipc://")


def path_of(endpoint: str) -> str:
    """The file that a local ``endpoint`` is."""
    return endpoint.removeprefix("ipc://")


def hidden_path(path: str) -> str:
    """Where the file of a socket is while nobody is to connect: a name by which the sockets of the dead are found."""
    directory, name = os.path.split(path)
    return f"{directory}/full-{name}"


def _shut(came: list[int], endpoints: Sequence[str], free: int, reserve: int) -> int:
    """Shut down so many of the last that came that ``reserve`` descriptors are free again.

    Whoever came at a file stays as long as the program has its share: no others follow.

    Returns:
        How many were shut down.
    """
    ended = 0
    for descriptor in reversed(came):
        try:
            connection = socket.socket(fileno=descriptor)
        except OSError:  # libzmq has closed it, and the number may be another file's by now
            continue
        try:
            least = RESERVED_DESCRIPTORS if connection.family == socket.AF_UNIX else reserve
            if free + ended < least and _is_of(connection, endpoints):
                connection.shutdown(socket.SHUT_RDWR)
                ended += 1
        except OSError:
            pass  # the caller has ended it
        finally:
            connection.detach()  # to close it is libzmq's
    return ended


def _is_of(connection: socket.socket, endpoints: Sequence[str]) -> bool:
    """Whether ``connection`` was made to one of ``endpoints``."""
    name = connection.getsockname()
    if connection.family == socket.AF_UNIX:
        return f"ipc://{name}" in endpoints
    return any(each.startswith("tcp://") and each.endswith(f":{name[1]}") for each in endpoints)
