"""The two programs of a chaos run, server and caller, as processes that write the ledger.

How they reach each other is one object with few methods (:class:`Messages`): :class:`Onehop`, or another that is named
as ``module:attribute``. Each says ``ready`` on standard output, takes words from standard input, and ends when that is
closed, so none outlives the run. A server ends in order at SIGTERM.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import random
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from importlib import import_module
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from time import monotonic, sleep
from typing import Any, Protocol
from urllib.parse import urlsplit

import msgspec

import onehop
import onehop.asyncio
from onehop.testing.ledger import AGAIN, CALL, CAST, FAILED, REPLIED, TAKEN, VERBS, Pendulum, Writer

SERVICE = "chaos"
_PR_SET_PDEATHSIG = 1
CATCH_UP = 0.1
"""Seconds of requests, at most, that a caller sends belatedly where it could not keep the pace."""
CHURN_CALLS = (CALL, CALL, AGAIN, CAST)
PRESENT = 3
"""Peers that come and go of which so many are there at a time."""
LEDGER, NAME = "CHAOS_LEDGER", "CHAOS_NAME"
"""The variables that say where the ledger is, and the process's name, to :class:`Handlers` in another program."""
NOT_DRAINED = 1
"""Exit code of a server that has not answered everything within its time."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What one process is told, as JSON.

    Attributes:
        name: the process's.
        directory: of the ledger.
        over: the :class:`Messages`, as ``module:attribute``.
        url: for that; onehop's registry.
        settings: for that; onehop's settings.
        workers: threads of a server.
        seconds: how long a handler works.
        servers: how many a caller waits for.
        rate: requests a second of a caller.
        threads: of a caller.
        mix: how often each verb occurs, beside the others.
        timeout: seconds for each request.
        seed: of the order of verbs.
    """

    name: str
    directory: str
    over: str = "onehop.testing.chaos.programs:Onehop"
    url: str = ""
    settings: dict[str, Any] = {}
    workers: int = 8
    seconds: float = 0.0
    servers: int = 1
    rate: float = 100.0
    threads: int = 32
    mix: dict[str, float] = msgspec.field(default_factory=lambda: {CALL: 6.0, AGAIN: 2.0, CAST: 2.0})
    timeout: float = 5.0
    seed: int = 0


class Messages(Protocol):
    """How the programs reach each other. Made with the :class:`Job`."""

    def serve(self, name: str, methods: Mapping[str, Callable[..., Any]]) -> Callable[[], bool]:
        """Offer ``methods`` as the server ``name``; of these, ``again`` may be run twice.

        Returns:
            What ends it in order, and says whether everything taken in was answered.
        """

    def wait_for(self, servers: int) -> None:
        """Return when so many servers can be called."""

    def call(self, method: str, *arguments: Any, timeout: float) -> Any:
        """The reply of one server."""

    def cast(self, method: str, *arguments: Any, timeout: float) -> None:
        """Have it run at one server; returns when that has taken it in."""

    def executed(self, error: Exception) -> str:
        """``"yes"``, ``"no"`` or ``"unknown"``: what an error of ``call`` or ``cast`` says."""

    def counts(self) -> dict[str, Any]:
        """What was counted, for the report."""

    def close(self) -> None:
        """The end."""


class Onehop:
    """The programs over onehop itself."""

    def __init__(self, job: Job) -> None:
        self._node = onehop.Node(**settings_of(job))
        self._client = self._node.client(SERVICE)
        self._workers = job.workers

    def serve(self, name: str, methods: Mapping[str, Callable[..., Any]]) -> Callable[[], bool]:
        self._node.serve(SERVICE, dict(methods), server=name, workers=self._workers)
        return self._node.drain

    def wait_for(self, servers: int) -> None:
        if not self._node.wait_for(SERVICE, count=servers):
            raise onehop.NoRoute(
                f"there are no {servers} servers of {SERVICE!r} within {self._node.settings.timeout} s"
            )

    def call(self, method: str, *arguments: Any, timeout: float) -> Any:
        return self._client.options(timeout=timeout).call(method, *arguments)

    def cast(self, method: str, *arguments: Any, timeout: float) -> None:
        self._client.options(timeout=timeout).cast(method, *arguments)

    def executed(self, error: Exception) -> str:
        return error.executed if isinstance(error, onehop.CallError) else "no"

    def counts(self) -> dict[str, Any]:
        return dict(msgspec.to_builtins(self._node.statistics()))

    def close(self) -> None:
        self._node.close()


class OnehopInLoop:
    """The programs over onehop's asyncio face: its loop runs in a thread, and others have it do what they wait for."""

    def __init__(self, job: Job) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="chaos-loop", daemon=True).start()
        self._node = onehop.asyncio.Node(**settings_of(job))
        self._client = self._node.client(SERVICE)
        self._workers = job.workers

    def _do(self, steps: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(steps, self._loop).result()

    def serve(self, name: str, methods: Mapping[str, Callable[..., Any]]) -> Callable[[], bool]:
        self._do(self._node.serve(SERVICE, dict(methods), server=name, workers=self._workers))
        return lambda: bool(self._do(self._node.drain()))

    def wait_for(self, servers: int) -> None:
        if not self._do(self._node.wait_for(SERVICE, count=servers)):
            raise onehop.NoRoute(
                f"there are no {servers} servers of {SERVICE!r} within {self._node.settings.timeout} s"
            )

    def call(self, method: str, *arguments: Any, timeout: float) -> Any:
        return self._do(self._client.options(timeout=timeout).call(method, *arguments))

    def cast(self, method: str, *arguments: Any, timeout: float) -> None:
        self._do(self._client.options(timeout=timeout).cast(method, *arguments))

    def executed(self, error: Exception) -> str:
        return error.executed if isinstance(error, onehop.CallError) else "no"

    def counts(self) -> dict[str, Any]:
        return dict(msgspec.to_builtins(self._node.statistics()))

    def close(self) -> None:
        self._do(self._node.close())
        self._loop.call_soon_threadsafe(self._loop.stop)


def settings_of(job: Job) -> dict[str, Any]:
    """onehop's settings for that job."""
    return {**job.settings, "registry": job.url} if job.url else job.settings


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends, even while it is stopped."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Handlers:
    """What servers run: each writes that it runs, then works for a while. Served by ``onehop serve``, too."""

    def __init__(self, writer: Writer | None = None, seconds: float = 0.0) -> None:
        self._writer = writer or Writer(os.environ[LEDGER], os.environ[NAME])
        self._seconds = seconds
        self._lock = threading.Lock()
        self._locked = False

    def _run(self, request: str) -> tuple[str, str]:
        self._writer.ran(request)
        if self._locked:
            with self._lock:
                pass
        if self._seconds:
            sleep(self._seconds)
        return self._writer.name, request

    def call(self, request: str) -> tuple[str, str]:
        """A method that must not run twice. Returns who ran what."""
        return self._run(request)

    @onehop.method(idempotent=True)
    def again(self, request: str) -> tuple[str, str]:
        """A method that may."""
        return self._run(request)

    def cast(self, request: str) -> None:
        """What casts run."""
        self._run(request)

    def methods(self) -> dict[str, Callable[..., Any]]:
        """All of them."""
        return {CALL: self.call, AGAIN: self.again, CAST: self.cast}

    def hang(self) -> None:
        """From now on whoever runs a request waits for a lock that nobody gives back."""
        self._lock.acquire()
        self._locked = True

    def go_on(self) -> None:
        """Give it back."""
        self._locked = False
        self._lock.release()


class Slow(Handlers):
    """Handlers that work for a while, without arguments: for ``onehop serve``."""

    def __init__(self) -> None:
        die_with_parent()
        super().__init__(seconds=0.02)


class Load:
    """Threads that together keep a pace; one that waits long leaves the others to keep it."""

    def __init__(self, job: Job, messages: Messages, writer: Writer) -> None:
        self._job = job
        self._messages = messages
        self._writer = writer
        self._lock = threading.Lock()
        self._random = random.Random(job.seed)
        self._weights = [job.mix.get(each, 0.0) for each in VERBS]
        self._quiet = threading.Event()
        self._pause = 1 / job.rate
        self._due = 0.0
        self._number = 0
        self.behind = 0
        """Requests not sent, because all threads were busy at their time."""
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(job.threads)]

    def go(self) -> None:
        """Begin."""
        self._due = monotonic()
        for each in self._threads:
            each.start()

    def rate(self, rate: float) -> None:
        """So many requests a second from now on."""
        with self._lock:
            self._pause = 1 / rate
            self._due = monotonic()

    def quiet(self) -> None:
        """Begin nothing more, and return when all has ended."""
        self._quiet.set()
        for each in self._threads:
            each.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                behind = monotonic() - self._due - CATCH_UP
                if behind > 0:
                    missed = int(behind / self._pause)
                    self.behind += missed
                    self._due += missed * self._pause
                due, number = self._due, self._number
                verb = self._random.choices(VERBS, self._weights)[0]
                self._due += self._pause
                self._number += 1
            if self._quiet.wait(max(0.0, due - monotonic())):
                return
            send(self._messages, self._writer, number, verb, self._job.timeout)


def send(messages: Messages, writer: Writer, number: int, verb: str, timeout: float) -> None:
    """One request, written before and after."""
    request = f"{writer.name}:{number}"
    writer.began(number, verb, "", timeout)
    try:
        if verb == CAST:
            messages.cast(CAST, request, timeout=timeout)
            writer.ended(number, TAKEN, "unknown")
        else:
            by, ran = messages.call(verb, request, timeout=timeout)
            # Another's reply is put down to nobody who ran this one, which does not balance.
            writer.ended(number, REPLIED, "yes", server=by if ran == request else f"{by}({ran})")
    except Exception as error:
        reason = getattr(error, "reason", "")
        named = f"{type(error).__name__}{f'({reason})'.replace(' ', '-') if reason else ''}"
        writer.ended(number, FAILED, messages.executed(error), named)


def words(take: Callable[[str], None]) -> None:
    """Hand over what comes on standard input; the process ends with it."""
    for line in sys.stdin:
        take(line.strip())
    os._exit(1)


def write_counts(job: Job, counts: dict[str, Any]) -> None:
    """Leave what was counted beside the ledger."""
    path = Path(job.directory) / f"{job.name}.{os.getpid()}.counts.json"
    path.write_text(json.dumps(counts))


def messages_of(job: Job) -> Messages:
    """What the job names."""
    module, _, attribute = job.over.partition(":")
    made: Messages = getattr(import_module(module), attribute)(job)
    return made


def server(job: Job) -> None:
    """Serve until SIGTERM. Words: ``hang``, ``go on``, ``counts``."""
    stops: SimpleQueue[int] = SimpleQueue()  # a handler may use it in the midst of its own wait
    signal.signal(signal.SIGTERM, lambda *_: stops.put(1))
    writer = Writer(job.directory, job.name)
    handlers = Handlers(writer, job.seconds)
    messages = messages_of(job)
    end = messages.serve(job.name, handlers.methods())
    does: dict[str, Callable[[], None]] = {
        "hang": handlers.hang,
        "go on": handlers.go_on,
        "counts": lambda: write_counts(job, messages.counts()),
    }
    threading.Thread(target=words, args=(lambda word: does[word](),), daemon=True).start()
    print("ready", flush=True)
    with Pendulum(writer):
        stops.get()
        drained = end()
    write_counts(job, {**messages.counts(), "drained": drained})
    messages.close()
    os._exit(0 if drained else NOT_DRAINED)  # standard input is still read, which an ordinary end would wait for


def caller(job: Job) -> None:
    """Call until told to be quiet. Words: ``go``, ``rate N``, ``quiet``."""
    writer = Writer(job.directory, job.name)
    messages = messages_of(job)
    messages.wait_for(job.servers)
    load = Load(job, messages, writer)
    quiet = threading.Event()

    def take(word: str) -> None:
        name, _, value = word.partition(" ")
        if name == "rate":
            load.rate(float(value))
        else:
            {"go": load.go, "quiet": quiet.set}[name]()

    with Pendulum(writer):
        threading.Thread(target=words, args=(take,), daemon=True).start()
        print("ready", flush=True)
        while not quiet.wait(60.0):
            pass
        load.quiet()
    write_counts(job, {**messages.counts(), "behind": load.behind})
    messages.close()
    os._exit(0)


def churn(job: Job) -> None:
    """Peers that come and go, ``rate`` a second: each serves, calls some times, and leaves in order after a while.
    Word: ``go``, ``quiet``."""
    go, quiet = threading.Event(), threading.Event()
    writer = Writer(job.directory, job.name)
    handlers = Handlers(writer, job.seconds)
    numbers = count()
    present: deque[tuple[Messages, Callable[[], bool]]] = deque()
    came = 0

    def leave() -> None:
        messages, end = present.popleft()
        end()
        messages.close()

    does = {"go": go.set, "quiet": quiet.set}
    threading.Thread(target=words, args=(lambda word: does[word](),), daemon=True).start()
    print("ready", flush=True)
    go.wait()
    with Pendulum(writer):
        due = monotonic()
        while not quiet.wait(max(0.0, due - monotonic())):
            due = max(due + 1 / job.rate, monotonic())
            messages = messages_of(job)
            present.append((messages, messages.serve(f"{job.name}-{came}", handlers.methods())))
            came += 1
            for verb in CHURN_CALLS:
                send(messages, writer, next(numbers), verb, job.timeout)
            if len(present) > PRESENT:
                leave()
        while present:
            leave()
    write_counts(job, {"came": came})
    os._exit(0)


def registry(job: Job) -> None:
    """Become the Redis server of the job's URL, which keeps nothing on the disk."""
    words = ("--bind", "127.0.0.1", "--port", str(urlsplit(job.url).port), "--save", "", "--appendonly", "no")
    os.execvp("redis-server", ["redis-server", *words])


def main() -> None:
    """One process: the role, and its :class:`Job` as JSON."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started us, who then closes our input
    roles = {"server": server, "caller": caller, "churn": churn, "registry": registry}
    roles[sys.argv[1]](msgspec.json.decode(sys.argv[2], type=Job))


if __name__ == "__main__":
    main()
