"""The pytest plug-in, used as a user of onehop uses it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

TESTS = """
def test_world(world):
    world.nodes(3, service="echo")
    calls = world.call_randomly(rate=50)
    world.run(until=2.0)
    world.settle()
    assert all(call.outcome == "replied" for call in calls)

def test_memory(memory_network):
    from onehop import Node
    with Node(network=memory_network) as server, Node(network=memory_network) as client:
        server.serve("echo", {"say": lambda word: word})
        assert client.call("echo", "say", "hello") == "hello"

def test_that_fails(world):
    assert world.random.random() > 2, world.seed
"""


def pytest_of(path: Path, *arguments: str) -> str:
    path.joinpath("test_it.py").write_text(TESTS)
    is_installed = bool(entry_points(group="pytest11", name="onehop"))
    plugin = [] if is_installed else ["-p", "onehop.testing.plugin"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--rootdir",
            str(path),
            *plugin,
            *arguments,
            str(path),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(each for each in sys.path if each)},
        cwd=path,
        check=False,
    )
    return done.stdout + done.stderr


def test_fixtures_work_and_a_failure_prints_its_seed(tmp_path: Path) -> None:
    told = pytest_of(tmp_path)
    assert "2 passed" in told
    assert "1 failed" in told
    assert "seed of the simulated world:" in told


def test_the_seed_can_be_given(tmp_path: Path) -> None:
    told = pytest_of(tmp_path, "--onehop-seed", "4711")
    assert "seed of the simulated world: 4711; once more with --onehop-seed=4711" in told


def test_the_plugin_imports_nothing_heavy_before_it_is_used() -> None:
    heavy = "zmq", "msgspec", "onehop.protocol"
    program = f"import sys, onehop.testing.plugin; print([name for name in {heavy} if name in sys.modules])"
    path = os.pathsep.join(each for each in sys.path if each)
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.stdout.strip() == "[]"
