"""The pytest plug-in: a simulated world, a network in memory, and test hosts as fixtures.

Loaded by pytest wherever onehop is installed, so nothing is imported before a fixture is used.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from onehop.testing.hosts import Hosts
    from onehop.testing.memory import Network
    from onehop.testing.simulation import World

_OPTION = "--onehop-seed"
_REQUIRE_HOSTS = "--onehop-require-hosts"
_NOT_RUN = "NOT RUN: "


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option that brings a failed run back, and the one that lets no test be left out."""
    group = parser.getgroup("onehop")
    group.addoption(
        _REQUIRE_HOSTS,
        action="store_true",
        help="fail the tests that use onehop_hosts, rather than skip them, where there can be no test hosts",
    )
    group.addoption(
        _OPTION,
        type=int,
        default=None,
        metavar="SEED",
        help="the seed of simulated worlds; one for each test by default",
    )


@pytest.fixture
def world(request: pytest.FixtureRequest) -> World:
    """A simulated world (:class:`onehop.testing.simulation.World`) with a seed of this test's own.

    The seed is the same at each run, unless ``--onehop-seed`` gives another; it is printed where the test fails.
    """
    from onehop.testing.simulation import World

    seed = request.config.getoption(_OPTION, None)
    if seed is None:
        seed = zlib.crc32(request.node.nodeid.encode())
    print(f"seed of the simulated world: {seed}; once more with {_OPTION}={seed}")
    return World(seed)


@pytest.fixture
def memory_network() -> Network:
    """A network inside this process: nodes made with ``Node(network=memory_network)`` know each other."""
    from onehop.testing.memory import Network

    return Network()


@pytest.fixture
def onehop_hosts(request: pytest.FixtureRequest) -> Iterator[Callable[..., Hosts]]:
    """``onehop_hosts(3)``: test hosts (:class:`onehop.testing.hosts.Hosts`, its arguments) until the test is over.

    Where this machine or user cannot have them the test is skipped, and the end of the run says so; with
    ``--onehop-require-hosts`` it fails.
    """
    from onehop.testing.hosts import Hosts, HostsUnavailable

    with ExitStack() as end:

        def begin(count: int, *, networks: int = 1, seed: int = 0) -> Hosts:
            try:
                return end.enter_context(Hosts(count, networks=networks, seed=seed))
            except HostsUnavailable as error:
                if request.config.getoption(_REQUIRE_HOSTS, False):
                    raise
                pytest.skip(f"{_NOT_RUN}{error}")

        yield begin


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say loudly what was left out: a skip is one letter, and is not seen."""
    skipped = [
        str(each.longrepr) for each in terminalreporter.stats.get("skipped", []) if _NOT_RUN in str(each.longrepr)
    ]
    if skipped:
        reason = skipped[0].partition(_NOT_RUN)[2].rstrip("')")
        terminalreporter.section("onehop_hosts", red=True)
        terminalreporter.line(f"{_NOT_RUN}{len(skipped)} tests between hosts: {reason}", red=True)
