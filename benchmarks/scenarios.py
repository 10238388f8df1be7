"""What is measured. Which systems take part is said by each system, in ``benchmarks/systems/__init__.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple

from benchmarks.measure import Case, Options, Row, Say, interleave
from benchmarks.system import System


class Scenario(NamedTuple):
    """One table of the report."""

    name: str
    title: str
    cases: tuple[Case, ...] = ()
    quick: tuple[Case, ...] = ()
    """The cases of the short form; all where empty."""
    verb: str = "run"
    """What the clients do: ``run``, ``cast`` or ``fanout``."""
    unit: str = "calls"
    """What is counted."""
    pinned: bool = False
    """Whether client and server share one processor, a broker being free."""
    measured_by: str = ""
    """``"module:function"`` of benchmarks that measures it in a way of its own: called with the systems, the
    :class:`~benchmarks.measure.Options` and a function to say how far it is, it returns the rows."""

    def measure(self, systems: Sequence[System], options: Options, say: Say) -> list[Row]:
        """The rows of its table."""
        if self.measured_by:
            module, _, name = self.measured_by.partition(":")
            function: Callable[[Sequence[System], Options, Say], list[Row]] = getattr(
                import_module(f"benchmarks.{module}"), name
            )
            return function(systems, options, say)
        rows = []
        for case in (options.quick and self.quick) or self.cases:
            say(f"{self.name}, {case.name}: {', '.join(each.name for each in systems)}")
            rows += interleave(systems, case, self.verb, self.pinned, options, say)
        return rows


SEQUENTIAL = (Case("real"), Case("small", "small"))
SIZES = {"16 KiB": 2**14, "256 KiB": 2**18, "1 MiB": 2**20, "4 MiB": 2**22, "16 MiB": 2**24}

_TABLE = (
    Scenario("one-caller", "One caller, client and server on one processor", SEQUENTIAL, pinned=True),
    Scenario("one-caller-free", "One caller, client and server where the system puts them", SEQUENTIAL),
    Scenario("asyncio-32", "32 calls in flight from one asyncio client", (Case("real", callers=32),)),
    Scenario("threads-32", "32 threads call through one client", (Case("real", callers=32),)),
    Scenario(
        "quad",
        "Four clients of eight callers, four servers of one service",
        (Case("real", clients=4, servers=4, callers=8),),
    ),
    Scenario(
        "pairs",
        "Pairs of a client with four callers and a server",
        tuple(Case(str(n), clients=n, servers=n, callers=4, paired=True) for n in (1, 2, 4, 8, 16)),
        tuple(Case(str(n), clients=n, servers=n, callers=4, paired=True) for n in (1, 4)),
    ),
    Scenario(
        "cast",
        "A stream of messages without an answer, decoded by the receiver",
        (Case("real"),),
        verb="cast",
        unit="messages",
    ),
    Scenario(
        "fanout-50",
        "To 50 receivers in five processes, again and again",
        (Case("real", servers=5, receivers=10),),
        verb="fanout",
        unit="deliveries",
    ),
    Scenario("fanout-1000", "To 1,000 receivers at once", measured_by="many:fanout_1000"),
    Scenario(
        "large",
        "Large messages there and back, one caller",
        tuple(Case(name, str(size)) for name, size in SIZES.items()),
        tuple(Case(name, str(SIZES[name])) for name in ("16 KiB", "4 MiB")),
    ),
    Scenario(
        "oslo",
        "oslo.messaging's RPC over its drivers, client and server on one processor",
        (Case("one caller"), Case("32 callers", callers=32)),
        pinned=True,
    ),
    Scenario("memory", "Resident memory with 32 callers", measured_by="many:memory"),
    Scenario("links", "1,200 open links in one process", measured_by="many:links"),
    Scenario("scale", "How far one pays for more hosts", measured_by="scale:measure"),
)

SCENARIOS = {each.name: each for each in _TABLE}
