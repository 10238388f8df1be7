"""``onehop serve``: what it serves, and how it ends."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest

from onehop import Node, PeerLost


def ready(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    return line


@pytest.mark.parametrize(
    ("target", "service", "method", "reply"),
    [
        ("watch:Clock", "clock", "read", "utc"),
        ("watch:clock", "clock", "read", "utc"),
        ("watch:now", "now", "now", 12),
        ("watch", "watch", "now", 12),
    ],
)
def test_classes_objects_functions_and_modules_are_served(
    start: Callable[..., Any], here: Any, make_node: Callable[..., Node],
    target: str, service: str, method: str, reply: Any,
) -> None:  # fmt: skip
    assert f"serving {service!r}" in ready(start("serve", target, cwd=here))
    assert make_node().call(service, method) == reply


def test_names_are_taken_over(start: Callable[..., Any], here: Any, make_node: Callable[..., Node]) -> None:
    options = ("--name", "bells", "--server", "tower", "--workers", "2", "--json")
    process = start("serve", "watch:Clock", *options, cwd=here)
    told = json.loads(ready(process))
    (view,) = make_node().servers("bells")
    assert told == {"service": "bells", "server": "tower", "node": view.node, "pid": process.pid}
    assert view.server == "tower"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_lets_the_request_in_flight_be_answered(
    start: Callable[..., Any], here: Any, make_node: Callable[..., Node], background: Any, eventually: Any,
    number: signal.Signals,
) -> None:  # fmt: skip
    process = start("serve", "watch:Clock", cwd=here)
    ready(process)
    node = make_node(ready_timeout=0.0)
    call = background(node.call, "clock", "slow", 3.0)
    assert ready(process) == "entered\n"
    process.send_signal(number)
    eventually(lambda: not [view for view in node.servers("clock") if view.state == "serving"])
    assert not call.done()
    assert call.result() == "done"
    assert process.wait(10) == 0
    assert process.stderr.read() == "onehop: draining; a second Ctrl-C ends it at once\n"


def test_second_signal_ends_at_once(
    start: Callable[..., Any], here: Any, make_node: Callable[..., Node], background: Any, eventually: Any
) -> None:
    process = start("serve", "watch:Clock", cwd=here)
    ready(process)
    node = make_node(ready_timeout=0.0)
    call = background(node.call, "clock", "slow", 30)
    assert ready(process) == "entered\n"
    process.send_signal(signal.SIGTERM)
    eventually(lambda: not [view for view in node.servers("clock") if view.state == "serving"])
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 128 + signal.SIGTERM
    with pytest.raises(PeerLost):
        call.result()


@pytest.mark.alone
def test_serve_ends_within_ten_seconds_of_sigterm_whatever_its_handlers_do(
    start: Callable[..., Any], here: Any, make_node: Callable[..., Node], background: Any
) -> None:
    process = start("serve", "watch:Clock", cwd=here)
    ready(process)
    call = background(make_node().call, "clock", "slow", 60)
    assert ready(process) == "entered\n"
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) == 1
    assert process.stderr.readline() == "onehop: draining; a second Ctrl-C ends it at once\n"
    assert 8.0 < time.monotonic() - began < 10.0
    with pytest.raises(PeerLost):
        call.result()


def test_drain_that_takes_too_long_is_told(
    start: Callable[..., Any], here: Any, make_node: Callable[..., Node], background: Any, eventually: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("ONEHOP_DRAIN_TIMEOUT", "0.2")
    process = start("serve", "watch:Clock", cwd=here)
    ready(process)
    node = make_node(ready_timeout=0.0)
    call = background(node.call, "clock", "slow", 3)
    assert ready(process) == "entered\n"
    process.send_signal(signal.SIGTERM)
    with pytest.raises(PeerLost):
        call.result()
    assert process.wait(10) == 1
    assert "drain_timeout (0.2 s)" in process.stderr.read()
