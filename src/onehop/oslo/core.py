"""One node for all transports of a process that agree in their settings, and what it holds for absent receivers."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from onehop import Client, errors
from onehop.oslo import options

LOG = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0  # seconds between two attempts to send what was refused
LOOK_AGAIN = 0.5  # the same for what is held; a receiver that appears is noticed at once
QUIET = 10.0  # seconds between two log lines about dropped messages
CLIENTS_KEPT = 1024


class Sending(NamedTuple):
    """A message on its way to a service and one server of it or, if empty, any.

    ``attempts`` is None without a bound; ``until`` (monotonic) is how long it may be held; ``everybody`` says that
    each pool of listeners gets a copy.
    """

    service: str
    server: str
    method: str
    body: bytes
    until: float
    attempts: int | None = None
    mandatory: bool = False
    everybody: bool = False

    def __str__(self) -> str:
        return f"{self.method!r} to {self.service}{self.server and ' at '}{self.server}"


class Core:
    """A node and its outbox.

    Attributes:
        users: transports that use it.
        held: messages that wait for their receivers, by (service, server), the oldest first.
        dropped: messages given up so far: nobody took them in time, or there was no room.
        unknown: messages of which nobody knows whether they were taken.
    """

    def __init__(self, given: dict[str, Any]) -> None:
        self.users = 0
        self.held: dict[tuple[str, str], deque[Sending]] = {}
        self.dropped = 0
        self.unknown = 0
        self.options = given
        self.node = options.node_of(given)
        self._clients: dict[tuple[str, str, float, float, float | None], Client] = {}
        # Reentrant: a signal handler may send while the thread it interrupts is in here.
        self._lock = threading.RLock()
        self._wake: threading.Event | None = None
        self._running = False
        self._messages = self._bytes = 0
        self._quiet_until = 0.0
        self._unlogged = 0

    # --- sending

    def call(self, sending: Sending, timeout: float, monitor: float | None) -> Any:
        """Call, waiting for a server as long as the timeout allows, unless attempts are counted.

        Raises:
            CallError: there is no reply; says whether the request may have run.
        """
        service, server, method, body, _, attempts, mandatory, _ = sending
        key = (service, server, timeout, math.inf if attempts is None and not mandatory else 0.0, monitor)
        client = self._clients.get(key) or self._client(*key)
        deadline = time.monotonic() + timeout
        try:
            return client.call_raw(method, body)
        except errors.CallError as error:
            return persist(lambda left: client.options(timeout=left).call_raw(method, body), deadline, attempts, error)

    def cast(self, sending: Sending, limit: float | None = None) -> None:
        """Deliver to a receiver that is there, or hold the message.

        Raises:
            CallError: not delivered, where attempts are counted or delivery is mandatory.
        """
        may_hold = sending.attempts is None and not sending.mandatory
        if may_hold and sending[:2] in self.held:
            return self._hold(sending)  # behind those that came before
        limit = limit or self.options["cast_timeout"]
        deadline = time.monotonic() + limit
        try:
            try:
                self._send(sending, limit)
            except errors.CallError as error:
                persist(lambda left: self._send(sending, left), deadline, sending.attempts, error)
        except errors.CallError as error:
            if not may_hold:
                raise
            if error.executed == "no":
                return self._hold(sending)
            self._doubt(sending, error)

    def fanout(self, sending: Sending) -> None:
        """Deliver to all receivers there are; those missed are logged."""
        client = self._client(sending.service, sending.server, self.options["cast_timeout"])
        receipts = client.fanout_raw(sending.method, sending.body)
        if sending.mandatory and not receipts:
            raise errors.NoRoute(f"nobody offers {sending.service}")
        for each in receipts:
            if each.outcome != "taken":
                LOG.warning("%s: missed %s on %s: %s", sending, each.server, each.host, each.reason)

    def _send(self, sending: Sending, left: float) -> None:
        """Try once. What is for everybody goes to each pool that listens now, and is delivered or held for each."""
        if not sending.everybody:
            client = self._client(sending.service, sending.server, limit := self.options["cast_timeout"])
            (client if left >= limit else client.options(timeout=left)).cast_raw(sending.method, sending.body)
        elif pools := sorted({view.server for view in self.node.servers(sending.service)}):
            for pool in pools:
                of_pool = sending._replace(server=pool, everybody=False, attempts=None)
                try:
                    self.cast(of_pool)
                except errors.ResourceLimit:  # to fail would be to have it sent again to those that have it
                    self._hold(of_pool)
        else:
            raise errors.NoRoute(f"nobody listens to {sending.service}")

    def _client(
        self, service: str, server: str, timeout: float, ready: float = 0.0, monitor: float | None = None
    ) -> Client:
        """A client, kept because the turn it takes among the servers is worth keeping."""
        key = (service, server, timeout, ready, monitor)
        client = self._clients.get(key)
        if client is None:
            if len(self._clients) >= CLIENTS_KEPT:
                self._clients.clear()
            given = {"server": server, "timeout": timeout, "ready_timeout": ready, "monitor": monitor}
            client = self._clients[key] = self.node.client(service, **given)
        return client

    # --- holding

    def _hold(self, sending: Sending) -> None:
        """Keep the message for the thread of the outbox.

        Raises:
            NoThread: the machine gives none; the message is not held, and the next one tries again.
        """
        if self._wake is None:  # outside of the lock, under which the node's must not be taken; twice does no harm
            wake = threading.Event()
            self.node.on_change(wake.set)
            self._wake = wake
        with self._lock:
            messages, size = self._messages + 1, self._bytes + len(sending.body)
            if messages > self.options["outbox_messages"] or size > self.options["outbox_bytes"]:
                return self._drop(sending, f"{self._messages} messages of {self._bytes} bytes are held already")
            if not self._running:
                self._start_delivery()
            # Behind the start, which may fail: until the lock is free, the thread does not find the outbox empty.
            self._messages += 1
            self._bytes += len(sending.body)
            self.held.setdefault(sending[:2], deque()).append(sending)
        return None

    def _start_delivery(self) -> None:
        thread = threading.Thread(target=self._deliver_held, name="onehop-outbox", daemon=True)
        self._running = True  # before: a signal handler may send, and come here
        try:
            thread.start()
        except RuntimeError as error:
            self._running = False
            raise errors.NoThread.told(thread.name, error) from None

    def _deliver_held(self) -> None:
        assert self._wake is not None
        while True:
            self._wake.clear()
            known: set[tuple[str, str]] = set()
            with contextlib.suppress(errors.OnehopError):  # the registry is away: look again
                for service in {service for service, _server in list(self.held)}:
                    known |= {(service, server) for view in self.node.servers(service) for server in (view.server, "")}
            for address in list(self.held):
                while self._deliver_first(address, present=address in known):
                    pass
            with self._lock:
                if not self.held:
                    self._running = False
                    return
            self._wake.wait(random.uniform(0.5, 1.0) * LOOK_AGAIN)

    def _deliver_first(self, address: tuple[str, str], *, present: bool) -> bool:
        """Try to send the oldest message for ``address``; whether that one is dealt with and there are more."""
        queue = self.held.get(address)
        if not queue:
            return False
        sending = queue[0]
        left = sending.until - time.monotonic()
        try:
            if left <= 0:
                raise errors.OnehopError("nobody took it in time")
            if not present:
                return False
            self._send(sending, left)
        except errors.CallError as error:
            if error.executed == "no":
                return False
            self._doubt(sending, error)
        except errors.ResourceLimit:  # it passes
            return False
        except Exception as error:
            self._drop(sending, str(error))
        with self._lock:
            if self.held.get(address) is queue:  # close() may have emptied everything meanwhile
                queue.popleft()
                self._messages -= 1
                self._bytes -= len(sending.body)
                if not queue:
                    del self.held[address]
            return bool(queue)

    def _doubt(self, sending: Sending, error: Exception) -> None:
        self.unknown += 1
        LOG.error("%s may be lost, and is not sent again: %s", sending, error)

    def _drop(self, sending: Sending, problem: str) -> None:
        self.dropped += 1
        self._unlogged += 1
        if time.monotonic() >= self._quiet_until:
            LOG.error("Dropped %d messages, the last one %s: %s", self._unlogged, sending, problem)
            self._quiet_until, self._unlogged = time.monotonic() + QUIET, 0

    def close(self) -> None:
        """Drop what is held, and close the node."""
        with self._lock:
            for sending in itertools.chain(*self.held.values()):
                self._drop(sending, "the transport was cleaned up")
            self.held.clear()
            self._messages = self._bytes = 0
        if self._wake is not None:
            self._wake.set()
        self.node.close()


class Cores:
    """The cores of this process by settings. A forked child starts with none, and leaves its parent's alone."""

    def __init__(self) -> None:
        self._start()
        os.register_at_fork(after_in_child=self._start)

    def _start(self) -> None:
        self.life = object()  # pids come again
        self.lock = threading.RLock()
        self._table: dict[tuple[tuple[str, Any], ...], Core] = {}

    def acquire(self, given: dict[str, Any]) -> Core:
        key = tuple(sorted(given.items()))
        with self.lock:
            core = self._table.get(key) or self._table.setdefault(key, Core(given))
            core.users += 1
            return core

    def release(self, core: Core) -> None:
        with self.lock:
            core.users -= 1
            if core.users:
                return
            self._table = {key: each for key, each in self._table.items() if each is not core}
        core.close()


CORES = Cores()


def persist(attempt: Callable[[float], Any], deadline: float, attempts: int | None, error: errors.CallError) -> Any:
    """Try again after ``error`` until it works, the deadline comes or the ``attempts`` are used up (None: no bound).

    Only what surely did not run is tried again. That nobody is there is final where attempts have no bound: the
    attempt itself waited then, or is not meant to.

    Args:
        attempt: is told how many seconds are left.
        attempts: the first included.

    Raises:
        CallError: the last one.
    """
    pause = FIRST_PAUSE
    for number in itertools.count(1):
        final = isinstance(error, errors.CallTimeout | errors.RemoteError) or error.executed != "no"
        if final or number == attempts or (attempts is None and isinstance(error, errors.NoRoute)):
            break
        pause = min(2 * pause, LONGEST_PAUSE) * random.uniform(0.5, 1.0)
        left = deadline - time.monotonic() - pause
        if left <= 0:
            break
        time.sleep(pause)
        try:
            return attempt(left)
        except errors.CallError as another:
            error = another
    raise error
