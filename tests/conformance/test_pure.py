"""What is promised of ZeroMQ holds without the compiled functions too: the same tests, where pyzmq does it all."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from onehop.transport.native import VARIABLE

HERE = Path(__file__).parent
SUITES = {
    HERE / "test_carriers.py": 20,
    HERE / "test_nodes.py": 20,
    HERE.parent / "transport" / "test_sockets.py": 20,
    HERE.parent / "test_budget.py": 2,
}
"""And how many tests each has at least."""

COMPILED = "from onehop.transport.native import native; print(native is not None)"


def environment(pure: bool) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != VARIABLE} | ({VARIABLE: "1"} if pure else {})


def test_compiled_functions_are_used_where_they_are_built_and_not_where_they_are_unwanted() -> None:
    built = any(HERE.parents[1].glob("src/onehop/transport/_native*.so"))
    for pure, expected in ((False, built), (True, False)):
        told = subprocess.run(
            [sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=60, env=environment(pure)
        )
        assert told.stdout == f"{expected}\n", told.stderr


@pytest.mark.parametrize("suite", SUITES, ids=lambda path: path.stem)
def test_suite_holds_without_the_compiled_functions(suite: Path) -> None:
    only = [] if suite.stem == "test_sockets" else ["-k", "zmq"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *only, str(suite)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment(True), cwd=HERE.parents[1]
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= SUITES[suite], "they were found"
