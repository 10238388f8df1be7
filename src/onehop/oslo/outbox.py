"""What a sender holds for receivers that are away: bounded, in order for each of them, loud about what it drops."""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from onehop import Node, errors

LOG = logging.getLogger(__name__)

LOOK_AGAIN = 0.5  # seconds between two attempts for a receiver that refuses; one that appears is noticed at once
QUIET = 10.0  # seconds between two log lines about dropped messages


class Address(NamedTuple):
    """Whom a message is for: a service, and one server of it or, if empty, any."""

    service: str
    server: str = ""

    def __str__(self) -> str:
        return f"{self.service} at {self.server}" if self.server else self.service


class Held(NamedTuple):
    """A message that waits. ``send(seconds)`` tries once; ``deadline`` is monotonic time."""

    send: Callable[[float], None]
    size: int
    deadline: float


class Outbox:
    """The held messages of one node.

    Attributes:
        dropped: messages given up so far: nobody took them in time, or there was no room.
        unknown: messages whose receiver went away before it said that it had taken them.
    """

    def __init__(self, node: Node) -> None:
        self.dropped = 0
        self.unknown = 0
        self._node = node
        # Reentrant: a signal handler may send while the thread it interrupts is in here.
        self._lock = threading.RLock()
        self._held: dict[Address, deque[Held]] = {}
        self._messages = 0
        self._bytes = 0
        self._wake: threading.Event | None = None
        self._running = False
        self._quiet_until = 0.0
        self._unlogged = 0

    def __len__(self) -> int:
        return self._messages

    def holds(self, address: Address) -> bool:
        """Whether a message for ``address`` waits, so that a later one has to queue behind it."""
        return address in self._held

    def put(self, address: Address, held: Held, messages: int, size: int) -> None:
        """Hold a message, or drop it loudly if ``messages``, or ``size`` bytes, are held already."""
        with self._lock:
            if self._messages >= messages or self._bytes + held.size > size:
                self._drop(address, f"the outbox is full ({self._messages} messages, {self._bytes} bytes)")
                return
            self._held.setdefault(address, deque()).append(held)
            self._messages += 1
            self._bytes += held.size
            start, self._running = not self._running, True
        if start:
            if self._wake is None:
                self._wake = threading.Event()
                self._node.on_change(self._wake.set)
            threading.Thread(target=self._run, name="onehop-outbox", daemon=True).start()

    def close(self) -> None:
        """Drop what is held; the thread ends."""
        with self._lock:
            for address, waiting in self._held.items():
                self._drop(address, "the transport was cleaned up", len(waiting))
            self._held.clear()
            self._messages = self._bytes = 0
        if self._wake is not None:
            self._wake.set()

    def _run(self) -> None:
        assert self._wake is not None
        while True:
            self._wake.clear()
            with contextlib.suppress(errors.OnehopError):  # the registry is away: try again
                known = {(view.service, server) for view in self._node.servers() for server in (view.server, "")}
                for address in list(self._held):
                    while self._send_first(address, present=address in known):
                        pass
            with self._lock:
                if not self._held:
                    self._running = False
                    return
            self._wake.wait(random.uniform(0.5, 1.0) * LOOK_AGAIN)

    def _send_first(self, address: Address, *, present: bool) -> bool:
        """Try to send the oldest message for ``address``; whether it is dealt with and another one waits."""
        waiting = self._held.get(address)
        if not waiting:
            return False
        held = waiting[0]
        left = held.deadline - time.monotonic()
        problem = ""
        if left <= 0:
            problem = "nobody took it in time"
        elif not present:
            return False
        else:
            try:
                held.send(left)
            except errors.CallError as error:
                if error.executed == "no":
                    return False
                self.doubt(address, error)
            except Exception as error:
                problem = str(error)
        with self._lock:
            if problem:
                self._drop(address, problem)
            # close() may have emptied everything meanwhile.
            if self._held.get(address) is waiting:
                waiting.popleft()
                self._messages -= 1
                self._bytes -= held.size
                if not waiting:
                    del self._held[address]
            return bool(waiting)

    def doubt(self, address: Address, error: Exception) -> None:
        """Count and log a message of which nobody knows whether it was taken; it is not sent again."""
        self.unknown += 1
        LOG.error("A message to %s may be lost, and is not sent again: %s", address, error)

    def _drop(self, address: Address, problem: str, count: int = 1) -> None:
        self.dropped += count
        self._unlogged += count
        now = time.monotonic()
        if now >= self._quiet_until:
            LOG.error("Dropped %d messages, the last to %s: %s", self._unlogged, address, problem)
            self._quiet_until, self._unlogged = now + QUIET, 0
