"""Every error that a user can cause by hand is one sentence that names the next step, with its exit code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onehop import BadArguments, EncodeError, Node, NoRoute, NoSuchMethod, SettingsError, TooLarge


def told(run: Callable[..., Any], code: int, *arguments: object) -> str:
    ended = run(*arguments)
    assert ended.code == code, ended
    assert ended.out == ""
    return str(ended.sentence)


def test_unknown_service(run: Callable[..., Any], clock: Any) -> None:
    sentence = told(run, 3, "call", "clok", "read")
    assert "'clok'" in sentence
    assert "known services: 'clock'" in sentence
    assert "Is it started" in sentence


def test_unknown_server(run: Callable[..., Any], clock: Any) -> None:
    sentence = told(run, 3, "call", "clock", "read", "--server", "church")
    assert "'church'" in sentence
    assert "known servers: 'tower'" in sentence


def test_nobody_serves_at_all(make_node: Callable[..., Node]) -> None:
    with pytest.raises(NoRoute, match=r"known services: none at all\. Is it started") as caught:
        make_node(ready_timeout=0.0).call("clock", "read")
    assert caught.value.executed == "no"


def test_wrong_method(run: Callable[..., Any], clock: Any, make_node: Callable[..., Node]) -> None:
    sentence = told(run, 1, "call", "clock", "reed")
    assert "'reed' of service 'clock'" in sentence
    assert "it has bad, count, odd, read" in sentence
    with pytest.raises(NoSuchMethod):
        make_node().call("clock", "reed")


def test_wrong_argument(run: Callable[..., Any], clock: Any, make_node: Callable[..., Node]) -> None:
    assert "unexpected keyword argument 'zome'" in told(run, 1, "call", "clock", "read", "zome=utc")
    assert "takes from 1 to 2 positional arguments" in told(run, 1, "call", "clock", "read", "a", "b")
    assert "zone: Expected `str`, got `int`" in told(run, 1, "call", "clock", "read", "zone=1")
    with pytest.raises(BadArguments) as caught:
        make_node().call("clock", "read", zone=1)
    assert caught.value.executed == "no"


def test_handler_that_raises(run: Callable[..., Any], clock: Any) -> None:
    assert "raised ValueError: the clock stands" in told(run, 1, "call", "clock", "bad")


def test_deadline(run: Callable[..., Any], clock: Any) -> None:
    sentence = told(run, 4, "call", "clock", "slow", "20", "--timeout", "1")
    assert re.search(r"did not answer within \d", sentence)


def test_oversize_payload(
    run: Callable[..., Any], clock: Any, make_node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TooLarge, match=r"max_message allows 1000.*raise the setting"):
        make_node(max_message=1000).call("clock", "set", "x" * 1000)
    monkeypatch.setenv("ONEHOP_MAX_MESSAGE", "1000")
    assert "max_message allows 1000" in told(run, 1, "cast", "clock", "set", "x" * 1000)


def test_unserialisable_value(clock: Any, make_node: Callable[..., Node]) -> None:
    with pytest.raises(EncodeError, match=r"type _thread.lock has no form.*send plain values"):
        make_node().call("clock", "set", __import__("threading").Lock())


def test_unserialisable_reply(run: Callable[..., Any], make_node: Callable[..., Node]) -> None:
    make_node().serve("odd", {"get": lambda: object()})
    assert "has no form on the wire; send plain values" in told(run, 1, "call", "odd", "get")


@pytest.mark.parametrize("url", ["zookeper://host", "", "://", "local:///tmp/x", "host:2181"])
def test_bad_registry_url(run: Callable[..., Any], url: str) -> None:
    sentence = told(run, 2, "ls", "--registry", url)
    assert repr(url) in sentence
    assert "it must be" in sentence


@pytest.mark.parametrize("url", ["zmk://", "zmq://host", "nonsense", "zmq:///?max_message=many"])
def test_bad_transport_url(run: Callable[..., Any], url: str) -> None:
    sentence = told(run, 2, "demo", "--url", url)
    assert repr(url) in sentence
    assert "an example is zmq:///demo" in sentence


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("TIMEOUT", "soon", "type float"),
        ("TIMEOUT", "0", "above 0"),
        ("WORKERS", "0", "1 or more"),
        ("WORKERS", "1.5", "type int"),
        ("MAX_MESSAGE", "8M", "type int"),
        ("READY_TIMEOUT", "-1", "0 or more"),
        ("GROUP", "no-such-group", "name one of /etc/group"),
        ("RUN_DIRECTORY", "/tmp/" + "long/" * 30, "choose a shorter run_directory"),
    ],
)
def test_bad_setting(
    start: Callable[..., subprocess.Popen[str]], here: Any, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch,
    name: str, value: str, right: str,
) -> None:  # fmt: skip
    monkeypatch.setenv(f"ONEHOP_{name}", value)
    ended = run("ls")
    assert ended.code == 2, ended
    assert right in ended.sentence


def test_unknown_setting() -> None:
    with pytest.raises(SettingsError, match=r"no setting is called 'timout'; there are: .*timeout"):
        Node(timout=1)


def test_setting_of_the_wrong_type() -> None:
    with pytest.raises(SettingsError, match="setting workers is '8'; it must be of type int"):
        Node(workers="8")


def test_bad_timeout_on_the_command_line(run: Callable[..., Any]) -> None:
    assert "it must be a number of seconds above 0" in told(run, 2, "call", "clock", "read", "--timeout", "-1")


def test_run_directory_that_is_not_ours(run: Callable[..., Any], tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir(mode=0o500)
    if os.geteuid() == 0:  # whom modes do not stop
        os.chown(directory, 65534, 65534)
    sentence = told(run, 1, "ls", "--run-directory", directory)
    assert str(directory) in sentence
    assert "ONEHOP_RUN_DIRECTORY" in sentence


def test_run_directory_that_is_a_file(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    sentence = told(run, 1, "ls", "--run-directory", tmp_path / "file")
    assert "is not a directory" in sentence
    assert "ONEHOP_RUN_DIRECTORY" in sentence


def test_descriptor_limit(start: Callable[..., subprocess.Popen[str]], here: Any) -> None:
    limited = ("sh", "-c", 'ulimit -n 48; exec "$@"', "sh", sys.executable, "-m", "onehop")
    process = start("serve", "watch:Clock", cwd=here, command=limited)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    (line,) = err.splitlines()
    assert "of 48 descriptors open" in line
    assert "ulimit -n" in line


@pytest.mark.parametrize(
    ("target", "right"),
    [
        ("nowhere:Clock", "there is no module 'nowhere'"),
        ("watch:Clok", "has no attribute 'Clok'"),
        ("watch:Needy", "a class that needs no arguments"),
        ("watch:empty", "has no public method to serve"),
        ("broken", "raised ZeroDivisionError"),
        (":Clock", "write MODULE:OBJECT"),
        ("watch.py:Clock", "write MODULE:OBJECT"),
    ],
)
def test_bad_target_to_serve(
    run: Callable[..., Any], here: Any, monkeypatch: pytest.MonkeyPatch, target: str, right: str
) -> None:
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(here)
    assert right in told(run, 2, "serve", target)


def test_bad_number_of_workers(run: Callable[..., Any], here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(here)
    assert "workers is 0; it must be 1 or more" in told(run, 2, "serve", "watch:Clock", "--workers", "0")
