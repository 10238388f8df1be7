"""Connections that carry lines, and a thread that waits for many of them."""

from __future__ import annotations

import errno
import logging
import os
import selectors
import socket
import threading
import time
from collections import deque
from contextlib import suppress
from typing import Any

from onehop.registry.threads import start

ALIVE = b"\n"  # an empty line: a sign of life
BACKLOG_LIMIT = 8 * 1024 * 1024  # bytes that wait for a slow reader, beside one line
_CHUNK = 256 * 1024

_log = logging.getLogger(__name__)


class Broken(Exception):
    """A connection ended, or has to; says why.

    Attributes:
        refused: nobody listens there, as the host itself says.
    """

    def __init__(self, why: str, *, refused: bool = False) -> None:
        super().__init__(why)
        self.refused = refused


class Fault(Broken):
    """The other end does what it must not. What differs from case to case comes after a colon."""


class Line:
    """One end of a connection: lines in, lines out, neither without bound; nothing waits.

    Args:
        connection: connected, or about to be.
        owner: what ``selector`` gives back when there is something to do.
        limit: bytes of one line that comes in.
    """

    def __init__(self, connection: socket.socket, selector: selectors.BaseSelector, owner: object, limit: int) -> None:
        self.limit = limit
        self._socket, self._selector, self._owner = connection, selector, owner
        self._begun = bytearray()
        self._out: deque[memoryview] = deque()
        self._waiting = 0
        self._events = selectors.EVENT_READ
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        selector.register(connection, self._events, owner)

    def read(self) -> list[bytes]:
        """The lines that have come. Raises :class:`Broken`."""
        try:
            data = self._socket.recv(_CHUNK)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError as error:
            raise _broken(error) from error
        if not data:
            raise Broken("the other end closed it")
        self._begun += data
        lines: list[bytes] = []
        if b"\n" in data:
            *whole, rest = self._begun.split(b"\n")
            lines, self._begun = [bytes(each) for each in whole], rest
        if max(len(self._begun), *map(len, lines), 0) > self.limit:
            raise Fault(f"it sent a line of more than {self.limit} bytes")
        return lines

    def send(self, data: bytes) -> None:
        """Send it as soon as it goes. Raises :class:`Broken`, also for a reader that is too slow."""
        if self._waiting > BACKLOG_LIMIT and self._waiting - max(map(len, self._out)) > BACKLOG_LIMIT:
            raise Fault(f"it reads too slowly: {self._waiting} bytes wait for it")
        self._out.append(memoryview(data))
        self._waiting += len(data)
        self.flush()

    def flush(self) -> None:
        """Send what goes now. Raises :class:`Broken`."""
        try:
            while self._out:
                sent = self._socket.send(self._out[0])
                self._waiting -= sent
                if sent == len(self._out[0]):
                    self._out.popleft()
                else:
                    self._out[0] = self._out[0][sent:]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            raise _broken(error) from error
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._out else 0)
        if events != self._events:
            self._events = events
            self._selector.modify(self._socket, events, self._owner)

    def close(self) -> None:
        """End the connection."""
        self._selector.unregister(self._socket)
        self._socket.close()

    def forget(self) -> None:
        """In a forked child: give the descriptor back; the connection stays the parent's, and so does its selector."""
        self._socket.close()


def _broken(error: OSError) -> Broken:
    return Broken(error.strerror or str(error), refused=error.errno == errno.ECONNREFUSED)


class Loop:
    """A thread that waits for many connections. The heirs say in :meth:`turn` what it does."""

    def __init__(self, name: str) -> None:
        self.selector = selectors.DefaultSelector()
        self.ending = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._waking = threading.Lock()  # the descriptor may be another's once it was given back
        self._forgotten = False
        self.selector.register(self._wake, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        start(self._thread)

    def wake(self) -> None:
        """Have the thread take a turn. From any thread."""
        with self._waking:
            if not self.ending:
                os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        """End the thread, and wait for that a moment."""
        with self._waking:
            if not self.ending:
                self.ending = True
                os.eventfd_write(self._wake, 1)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout=1.0)

    def turn(self, ready: list[tuple[Any, int]], now: float) -> float:
        """Do what is due. Given are the owners that are ready, with the events; returns seconds until the next turn."""
        raise NotImplementedError

    def end(self) -> None:
        """Give everything back, at the end of the thread."""

    def forget(self) -> None:
        """In a forked child: close what it inherited."""
        self.ending = self._forgotten = True
        self.selector.close()  # nothing is unregistered: the parent waits with the same
        os.close(self._wake)

    def _run(self) -> None:
        timeout = 0.0
        while not self.ending:
            try:
                keys = self.selector.select(timeout)
            except (OSError, ValueError):
                if self._forgotten:
                    return
                raise
            if self._forgotten:  # green threads survive a fork; this one belongs to the parent
                return
            with suppress(BlockingIOError):
                os.eventfd_read(self._wake)
            ready = [(key.data, events) for key, events in keys if key.data is not None]
            try:
                timeout = max(0.0, self.turn(ready, time.monotonic()))
            except Exception:
                _log.exception("a turn of %s failed; another follows", self._thread.name)
                timeout = 1.0
        self.end()
        with self._waking:
            self.selector.close()
            os.close(self._wake)
