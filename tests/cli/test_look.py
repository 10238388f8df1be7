"""``onehop ls``, ``ping`` and ``version``, help, and what stands around the commands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from tests.processes import send

import onehop
from onehop import Node


def test_servers_are_listed(run: Callable[..., Any], clock: Any) -> None:
    (row,) = run("ls", "--json").json
    assert row.keys() == {"service", "server", "node", "host", "pid", "state"}
    assert (row["service"], row["server"], row["pid"], row["state"]) == ("clock", "tower", os.getpid(), "serving")
    assert "tower" in run("ls").out


def test_services_are_listed(run: Callable[..., Any], clock: Any, make_node: Callable[..., Node]) -> None:
    make_node().serve("clock", clock, server="church")
    (row,) = run("ls", "services", "--json").json
    assert row.keys() == {"service", "instances", "nodes", "servers"}
    assert (row["service"], row["instances"], sorted(row["servers"])) == ("clock", 2, ["church", "tower"])
    assert "church" in run("ls", "services").out


def test_nodes_are_listed(run: Callable[..., Any], clock: Any) -> None:
    (row,) = run("ls", "nodes", "--json").json
    assert row.keys() == {"node", "host", "pid", "state", "services", "endpoints", "zone", "version"}
    assert row["services"] == {"clock": ["tower"]}
    assert row["node"] in run("ls", "nodes").out


@pytest.mark.parametrize("what", ["servers", "services", "nodes"])
def test_empty_list_is_no_failure_and_says_what_to_do(run: Callable[..., Any], what: str) -> None:
    ended = run("ls", what)
    assert (ended.code, ended.out) == (0, "")
    assert f"no {what} are known" in ended.sentence
    assert "onehop serve" in ended.sentence
    assert run("ls", what, "--json").json == []


def test_ping_reaches_each_server(run: Callable[..., Any], clock: Any, make_node: Callable[..., Node]) -> None:
    make_node().serve("clock", clock, server="church")
    patient = ("--timeout", "10")
    ended = run("ping", "clock", "--json", *patient)
    assert ended.code == 0
    assert sorted(each["server"] for each in ended.json) == ["church", "tower"]
    assert all(each["outcome"] == "taken" and 0 < each["seconds"] < 10 for each in ended.json)
    assert [each["server"] for each in run("ping", "clock", "--server", "tower", "--json", *patient).json] == ["tower"]
    assert "alive" in run("ping", "clock", *patient).out


def test_ping_of_a_process_that_hangs_fails(
    run: Callable[..., Any], start: Callable[..., subprocess.Popen[str]], here: Any
) -> None:
    process = start("serve", "watch:clock", cwd=here)
    assert process.stdout is not None
    process.stdout.readline()
    send(process, signal.SIGSTOP)
    ended = run("ping", "clock", "--timeout", "0.3", "--json")
    assert ended.code == 1
    assert [each["outcome"] for each in ended.json] == ["unreachable"]


def test_ping_of_nobody_has_its_exit_code(run: Callable[..., Any], clock: Any) -> None:
    assert run("ping", "nobody").code == 3
    ended = run("ping", "clock", "--server", "nobody")
    assert ended.code == 3
    assert "server 'nobody' of service 'clock'" in ended.sentence


def test_versions_are_shown(run: Callable[..., Any]) -> None:
    found = run("version", "--json").json
    assert found.keys() == {"onehop", "python", "pyzmq", "msgspec", "oslo.messaging", "compiled functions"}
    assert found["compiled functions"] == ("in use" if onehop.compiled else "not in use")
    assert found["onehop"] == onehop.__version__
    assert run("version").out.splitlines()[0] == f"onehop {onehop.__version__}"


COMMANDS = ["demo", "ls", "ping", "call", "cast", "serve", "bench", "simulate", "version"]


def test_help_names_all_commands_and_exit_codes(run: Callable[..., Any]) -> None:
    ended = run("--help")
    assert ended.code == 0
    assert [name for name in COMMANDS if f"  {name} " not in ended.out] == []
    assert "Exit codes" in ended.out


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(run: Callable[..., Any], command: str) -> None:
    ended = run(command, "--help")
    assert ended.code == 0
    assert f"Usage: onehop {command}" in ended.out


@pytest.mark.parametrize(
    "arguments", [["frobnicate"], ["ls", "everything"], ["call"], ["ls", "--timeout", "soon"], ["--x"]]
)
def test_wrong_command_line_is_a_usage_error(run: Callable[..., Any], arguments: list[str]) -> None:
    ended = run(*arguments)
    assert ended.code == 2
    assert "Traceback" not in ended.err


def test_module_is_the_command(start: Callable[..., subprocess.Popen[str]]) -> None:
    out, _ = start("version").communicate(timeout=20)
    assert out.startswith(f"onehop {onehop.__version__}\n")


def test_missing_package_is_one_sentence(start: Callable[..., subprocess.Popen[str]]) -> None:
    program = "import sys; sys.modules['typer'] = None\nfrom onehop.cli import main\nmain()"
    process = start(command=(sys.executable, "-c", program))
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert err == "onehop: the command needs typer; pip install 'onehop[cli]'\n"


def test_reader_that_has_seen_enough_is_no_error(start: Callable[..., subprocess.Popen[str]], clock: Any) -> None:
    process = start("call", "clock", "count", "100000", "--stream")
    assert process.stdout is not None
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")


def test_interrupt_ends_a_call(start: Callable[..., subprocess.Popen[str]], clock: Any) -> None:
    process = start("call", "clock", "slow", "2")
    assert clock.entered.wait(20)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err == ""
