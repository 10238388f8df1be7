"""The programs of the long runs, interrupted: nothing stays behind, and they do not go on to the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.system.progress import Progress

HERE = Path(__file__).parent
LONG = {
    "stress": [HERE / "stress.py", "--calls", "100000000"],
    "disturbed": [HERE / "disturbed.py", "--requests", "10000000"],
    "forks": [HERE / "forks.py", "--forks", "100000"],
    "flood": [HERE.parent / "fuzz" / "flood.py", "--frames", "100000000", "--seconds", "600"],
}


def started_by(pid: int) -> list[int]:
    """The processes that it has started, and that have become another program since."""
    found = []
    for each in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = each.read_text().rpartition(")")[2].split()
            is_own = (each.parent / "cmdline").read_bytes() == Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z" and not is_own:
            found.append(int(each.parent.name))
    return found


@pytest.mark.parametrize(("name", "number"), [*((each, signal.SIGINT) for each in LONG), ("stress", signal.SIGTERM)])
def test_long_run_ends_soon_when_it_is_interrupted_and_leaves_nothing(
    name: str, number: signal.Signals, eventually: Callable[..., None]
) -> None:
    argv = [sys.executable, *map(str, LONG[name])]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            eventually(lambda: started_by(running.pid) and threads(running.pid) > 8, within=30.0)
            started = started_by(running.pid)
            running.send_signal(number)
            _, told = running.communicate(timeout=30)
        finally:
            running.kill()
    assert (running.returncode, "interrupted; what it had started has been ended\n" in told) == (130, True), told
    # In the midst of what Python does at a fork it is shown and ignored; the program sees to the rest.
    assert told.count("Traceback") == told.count("Exception ignored in"), told
    assert not [each for each in started if os.path.exists(f"/proc/{each}")]


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def test_progress_says_how_far_it_is_and_how_long_it_may_take(capfd: pytest.CaptureFixture[str], eventually) -> None:  # type: ignore[no-untyped-def]
    said: list[str] = []

    def told(line: str) -> bool:
        said.append(capfd.readouterr().err)
        return line in "".join(said)

    with Progress(2_000, "calls", lambda: 1_000, every=0.01):
        eventually(lambda: told("1,000 of 2,000 calls, 0 s left\n"))
    with Progress(0, "s of kills", lambda: 60, every=0.01):
        eventually(lambda: told("60 s of kills\n"))
