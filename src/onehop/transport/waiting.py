"""How a thread waits for descriptors, and is woken: looked up when used.

A program may patch ``select`` and the locks for green threads at any time (and the patch removes ``poll``). Nothing
here imports such a library; it takes what the standard modules hold at that moment.
"""

from __future__ import annotations

import _thread
import os
import select
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from onehop.errors import NoThread
from onehop.transport.native import native

PATIENCE = 2.0
"""Seconds that closing waits for the thread that has a socket."""
LONGEST_WAIT = 3600.0
"""Seconds; a wait that has no end is cut into these."""


def new_lock() -> Any:
    """A lock of the kind that suits the running program (a green one under a patch)."""
    return _thread.allocate_lock()


def acquire(lock: Any, seconds: float) -> bool:
    """Take ``lock`` within ``seconds``."""
    return bool(lock.acquire(True, min(max(seconds, 0.0), LONGEST_WAIT)))


def release(lock: Any) -> None:
    """Wake who sleeps on ``lock``. Waking twice is harmless: sleepers look at what they wait for, not at the lock."""
    try:
        lock.release()
    except RuntimeError:
        pass


def poll(descriptors: Sequence[int], seconds: float) -> list[int]:
    """Wait until one of ``descriptors`` is readable, at most ``seconds``; returns those that are."""
    poll_type = getattr(select, "poll", None)
    seconds = min(max(seconds, 0.0), LONGEST_WAIT)
    if poll_type is None:
        return select.select(list(descriptors), [], [], seconds)[0]
    poller = poll_type()
    for descriptor in descriptors:
        poller.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in poller.poll(seconds * 1000)]


class Watch:
    """Many descriptors, of which one thread waits for any; each is told of for as long as it is readable."""

    __slots__ = ("_epoll", "_watched")

    def __init__(self) -> None:
        self._watched: dict[int, Any] = {}
        self._epoll: Any = select.epoll() if hasattr(select, "epoll") else None

    @property
    def shares(self) -> bool:
        """Whether another thread may wait for the same descriptor meanwhile: a green one must not."""
        return self._epoll is not None and hasattr(select, "epoll")

    def add(self, descriptor: int, whose: Any) -> None:
        """Wait for ``descriptor`` from now on."""
        if descriptor not in self._watched:
            if self._epoll is not None:
                self._epoll.register(descriptor, select.EPOLLIN)
            self._watched[descriptor] = whose

    def discard(self, descriptor: int) -> None:
        """Do not wait for ``descriptor`` any more. Comes before it is closed: a forked child may hold it open."""
        if self._watched.pop(descriptor, None) is not None and self._epoll is not None:
            self._epoll.unregister(descriptor)

    def close(self) -> None:
        """Give the descriptors back; what is added from now on is not waited for. Nobody may be waiting."""
        if self._epoll is not None:
            self._epoll.close()
            self._epoll = None

    def wait(self, seconds: float) -> list[tuple[int, Any]]:
        """Those that are readable, and whose they are, after at most ``seconds``."""
        if self.shares:
            ready = [descriptor for descriptor, _ in self._epoll.poll(seconds)]
        else:
            ready = poll(list(self._watched), seconds)
        return [(descriptor, self._watched[descriptor]) for descriptor in ready if descriptor in self._watched]


class Wake:
    """Something to poll beside a socket, so that another thread can end the wait.

    Args:
        beside: the descriptor of the socket; -1 where there is none.

    Attributes:
        native: the compiled functions, where they may wait here: not under green threads.
    """

    __slots__ = ("_beside", "_open", "_poller", "_setting", "fd", "native")

    def __init__(self, beside: int = -1) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._open = [self.fd]
        self._setting: list[None] = []
        self._beside = beside
        self._poller: Any = None
        self.native: Any = native if hasattr(select, "poll") else None
        if self.native is None and hasattr(select, "poll"):
            self._poller = select.poll()
            for descriptor in (beside, self.fd):
                if descriptor >= 0:
                    self._poller.register(descriptor, select.POLLIN)

    def wait(self, seconds: float) -> None:
        """Sleep until the socket's descriptor or :meth:`set` ends it, at most ``seconds``. One thread at a time."""
        if seconds > LONGEST_WAIT:
            seconds = LONGEST_WAIT
        # Rounded up: a wait that ends a little early would turn into a busy one.
        milliseconds = int(seconds * 1000) + 1 if seconds > 0 else 0
        if self.native is not None:
            self.native.wait(self._beside, self.fd, milliseconds)
            return
        if self._poller is not None:
            ready = self._poller.poll(milliseconds)
        else:
            both = [fd for fd in (self._beside, self.fd) if fd >= 0]
            ready = [(fd, 0) for fd in select.select(both, (), (), milliseconds / 1000)[0]]
        for fd, _ in ready:
            if fd == self.fd:
                self.clear()

    def clear(self) -> None:
        """Take back what :meth:`set` did, if anything."""
        try:
            os.eventfd_read(self.fd)
        except (BlockingIOError, ValueError):  # it was not set, or is closed
            pass

    def set(self) -> None:
        """End the wait under way, or the next one; nothing after :meth:`close`. From any thread."""
        setting = self._setting
        setting.append(None)
        if (fd := self.fd) >= 0:  # looked at after close() can see us
            os.eventfd_write(fd, 1)
        setting.pop()
        if self.fd < 0:
            self._give_back()

    def close(self) -> None:
        """Give the descriptor back. Nobody may be waiting; a later wait ends by its time alone. May be called twice.

        Who is about to set it must not write to whatever gets the number next: where somebody is, the last of them
        gives the descriptor back.
        """
        self.fd = self._beside = -1
        self._poller = None
        self._give_back()

    def _give_back(self) -> None:
        if not self._setting:
            with suppress(IndexError):  # another thread has, or did so before
                os.close(self._open.pop())

    def __del__(self) -> None:
        for fd in getattr(self, "_open", ()):  # none where there was no descriptor for it
            os.close(fd)


def start_thread(name: str, target: Any, *arguments: Any) -> threading.Thread:
    """Start a daemon thread of the kind that suits the running program.

    Raises:
        NoThread: the machine gives none. It is a RuntimeError.
    """
    thread = threading.Thread(name=name, target=target, args=arguments, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise NoThread.told(name, error) from None
    return thread
