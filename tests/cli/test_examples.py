"""Each example runs and says what it is there to show."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
Start = Callable[..., subprocess.Popen[str]]


def output(start: Start, name: str) -> list[str]:
    process = start(command=(sys.executable, str(EXAMPLES / name)))
    out, err = process.communicate(timeout=40)
    assert process.returncode == 0, err
    return out.splitlines()


def test_clock_is_served_and_called(start: Start) -> None:
    server = start(command=(sys.executable, str(EXAMPLES / "clock_server.py")))
    assert server.stdout is not None
    assert server.stdout.readline().startswith("serving clock as ")
    lines = output(start, "clock_client.py")
    for line, words in zip(
        lines,
        (
            "call: {'text'", "with an argument: {'text': '00:00:00'", "by attribute: pong", "'taken')]",
            "asked every server: ['pong']", "given up: True", "deadline: CallTimeout, executed=unknown",
            "no such method: NoSuchMethod, executed=no", "wrong argument: BadArguments, executed=no",
            "nobody there: NoRoute, executed=no",
        ),
        strict=True,
    ):  # fmt: skip
        assert words in line
    server.send_signal(signal.SIGTERM)
    out, _ = server.communicate(timeout=20)
    assert (server.returncode, sorted(out.splitlines())) == (0, ["set to midnight", "set to noon"])


def test_stream_holds_its_writer_and_notices_that_the_reader_left(start: Start) -> None:
    assert output(start, "stream.py") == [
        "line 7", "line 8", "line 9", "the reader left", "never more than the credit ahead: True",
    ]  # fmt: skip


def test_asyncio_clock_calls_streams_and_gives_up(start: Start) -> None:
    assert output(start, "asyncio_clock.py") == [
        "side by side: [0.0, 0.01, 0.02]", "ticks: [0, 1, 2]", "given up", "the caller of sleep gave up",
    ]  # fmt: skip


def test_oslo_program_runs_without_a_broker(start: Start) -> None:
    lines = output(start, "oslo_rpc.py")
    assert lines[0] == "host-2 is up for 5 days, says demo"
    assert sorted(lines[1:]) == ["host-1 refreshes", "host-1 refreshes", "host-2 refreshes"]


def test_every_example_is_run_here() -> None:
    here = Path(__file__).read_text()
    assert [path.name for path in EXAMPLES.glob("*.py") if f'"{path.name}"' not in here] == []
