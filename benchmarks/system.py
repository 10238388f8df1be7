"""What a system under measurement is, and the loops that all of them share.

A system is two classes in a file of ``benchmarks/systems``: a server and a client, each made in a process of its own
with a :class:`Setup` (and the options that its line in ``benchmarks/systems/__init__.py`` gives). The server's
process calls ``start``, then ``serve`` in its main thread and ``received`` in another; the client's process calls
everything in its main thread. Neither may use the processor while it is not asked to.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterable
from itertools import chain
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import msgspec

MOST_LATENCIES = 20_000


class Setup(msgspec.Struct, frozen=True):
    """What a process under measurement is told when it starts."""

    message: str
    """The name of the :class:`~benchmarks.messages.Message`."""
    callers: int
    """Calls that one client will have in flight: what a server may size its pool by."""
    service: str
    """What servers of one kind have in common (a queue group, a topic), and clients are to ask for."""
    name: str
    """This process's own name, unlike any other's of the run."""
    directory: str
    """Private to one system's processes: for sockets, registries and logs."""
    broker: str = ""
    """URL of the system's broker."""
    receivers: int = 1
    """How many receivers the server's process is to hold (fan-out)."""
    cpu: int | None = None
    """The processor that the process is bound to; None where it is free."""


class Sample(msgspec.Struct):
    """What one client measured in one window."""

    calls: int
    """Calls answered, or messages sent."""
    seconds: float
    """What they took, measured."""
    latencies: list[float] = []
    """Seconds, of at most 20,000 calls, taken evenly; none for a stream."""
    lost: int = 0
    """Of calls: without an answer. Messages sent and not received are counted by the parent."""
    note: str = ""

    @classmethod
    def of(cls, latencies: Iterable[list[float]], seconds: float) -> Sample:
        """A sample of all the latencies of some callers."""
        every = list(chain.from_iterable(latencies))
        return cls(len(every), seconds, every[:: -(-len(every) // MOST_LATENCIES) or 1])


class Server(Protocol):
    """The serving end. It answers a message with :func:`benchmarks.messages.answer` of it."""

    def start(self) -> str:
        """Begin, and return the address, in whatever form the system's client reads."""

    def serve(self) -> None:
        """Serve until the process is ended."""

    def received(self) -> int:
        """Casts taken in and decoded so far by all receivers of this process; asked from another thread."""


class Client(Protocol):
    """The calling end."""

    def connect(self, addresses: list[str]) -> None:
        """Make ready to call the servers that gave ``addresses``: spread over them where they are several."""

    def run(self, seconds: float, callers: int) -> Sample:
        """Call for so many seconds with ``callers`` calls in flight: threads or tasks, as is natural for the system."""

    def cast(self, seconds: float) -> Sample:
        """Send without an answer, as fast as it is accepted; return when all is accepted. Only for ``cast``."""

    def fanout(self, seconds: float) -> Sample:
        """Send to all receivers, again and again; return when all is accepted. Only for ``fanout-50``."""


class System(NamedTuple):
    """One line of the table in ``benchmarks/systems/__init__.py``: nothing is imported before a process needs it."""

    name: str
    kind: str
    """``"limit"`` (no RPC: what the machine or the transport gives), ``"peer"`` or ``"onehop"``."""
    server: str
    """``"module:class"``, the module one of ``benchmarks.systems``."""
    client: str
    scenarios: tuple[str, ...]
    """The scenarios that it can do."""
    options: dict[str, Any] = {}
    """Keywords for both classes."""
    broker: str = ""
    """``"nats"``, ``"rabbit"`` or none: started for it, and its processor time counted."""
    environment: dict[str, str] = {}
    """Variables for its processes."""
    needs: str = ""
    """The Python packages that it needs, as pip names them."""


# --- the loops ------------------------------------------------------------------------------------------------------


class WrongAnswer(Exception):
    """A server answered something else than the message's ``args``."""


def check(got: Any, expected: Any) -> None:
    """Raise WrongAnswer unless ``got`` is what was ``expected``."""
    if got != expected:
        raise WrongAnswer(f"the server answered {str(got)[:200]!r}; it must answer {str(expected)[:200]!r}")


def repeat(call: Callable[[], Any], seconds: float, expected: Any) -> list[float]:
    """Call one after another in this thread; returns what each call took, in seconds. The last answer is checked."""
    latencies: list[float] = []
    add, clock = latencies.append, perf_counter
    began = clock()
    end = began + seconds
    while began < end:
        answer = call()
        now = clock()
        add(now - began)
        began = now
    check(answer, expected)
    return latencies


def in_threads(call: Callable[[], Any], seconds: float, callers: int, expected: Any = None) -> Sample:
    """``call`` again and again in ``callers`` threads; in this thread if there is one caller.

    Args:
        expected: what each call must return.

    Raises:
        Exception: the first error of any thread; the others end at their time.
    """
    began = perf_counter()
    if callers == 1:
        return Sample.of([repeat(call, seconds, expected)], perf_counter() - began)
    found: list[list[float]] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            found.append(repeat(call, seconds, expected))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(callers)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    if errors:
        raise errors[0]
    return Sample.of(found, perf_counter() - began)


async def in_tasks(call: Callable[[], Awaitable[Any]], seconds: float, callers: int, expected: Any = None) -> Sample:
    """The same in ``callers`` tasks of the running loop."""
    import asyncio  # not in processes that have no use for it: their memory is measured

    async def run() -> list[float]:
        latencies: list[float] = []
        add, clock = latencies.append, perf_counter
        began = clock()
        end = began + seconds
        while began < end:
            answer = await call()
            now = clock()
            add(now - began)
            began = now
        check(answer, expected)
        return latencies

    began = perf_counter()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(run()) for _ in range(callers)]
    return Sample.of([each.result() for each in tasks], perf_counter() - began)


def stream(send: Callable[[], Any], seconds: float, batch: int = 100) -> tuple[int, float]:
    """Send for so many seconds, looking at the clock once a batch.

    Returns:
        How many were sent, and when it began (perf_counter).
    """
    began = perf_counter()
    end = began + seconds
    sent = 0
    while perf_counter() < end:
        for _ in range(batch):
            send()
        sent += batch
    return sent, began
