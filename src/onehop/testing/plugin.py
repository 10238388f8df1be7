"""The pytest plug-in: a simulated world and a network in memory as fixtures.

Loaded by pytest wherever onehop is installed, so nothing is imported before a fixture is used.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from onehop.testing.memory import Network
    from onehop.testing.simulation import World

_OPTION = "--onehop-seed"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option that brings a failed run back."""
    parser.getgroup("onehop").addoption(
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
