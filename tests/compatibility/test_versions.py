"""This release and earlier ones understand each other: each wheel here is installed, and run beside the sources.

The programs of either side are those in ``programs.py``.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.protocol.test_vectors import FOLDER, encode, frame_of

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCES = ROOT / "src"
FROZEN = HERE / "wire-1.json"
WHEELS = sorted(HERE.glob("*.whl"))
SCENARIOS = 13

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="session", params=WHEELS, ids=lambda wheel: wheel.name.split("-py3")[0])
def old(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An earlier release, in a directory of its own."""
    target: Path = tmp_path_factory.mktemp("release")
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*install, "--no-compile", "--target", str(target), str(request.param)], check=True)
    return target


@pytest.fixture(params=["old client, new server", "new client, old server"])
def releases(request: pytest.FixtureRequest, old: Path) -> tuple[Path, Path]:
    """Where the client's release is, and the server's."""
    return (old, SOURCES) if request.param.startswith("old") else (SOURCES, old)


@pytest.fixture(params=["ipc", "tcp"])
def places(request: pytest.FixtureRequest, run_directory: str) -> list[dict[str, str]]:
    """The environment of two hosts: one and the same, or two with addresses and directories of their own."""
    if request.param == "ipc":
        return [{"ONEHOP_RUN_DIRECTORY": run_directory}] * 2
    # A pair of loopback addresses that no other process has: of those, each has its own ports.
    network = f"127.{64 + os.getpid() // 250 % 64}.{1 + os.getpid() % 250}"
    addresses = [f"{network}.{number}" for number in (1, 2)]
    return [
        {
            "ONEHOP_REGISTRY": f"hosts://{','.join(addresses)}/",
            "ONEHOP_HOST": f"host-{number}",
            "ONEHOP_ADDRESS": address,
            "ONEHOP_RUN_DIRECTORY": f"{run_directory}/{number}",
            "ONEHOP_CACHE_DIRECTORY": "none",
        }
        for number, address in enumerate(addresses)
    ]


class Program:
    """A process of one release, which says one JSON value a line."""

    def __init__(self, release: Path, place: dict[str, str], words: list[str], name: str) -> None:
        self.release, self.name = release, name
        environment = {**os.environ, **place, "PYTHONPATH": str(release)}
        self.process = subprocess.Popen(
            words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        line = self.process.stdout.readline()
        assert line, f"{self.name} ended with {self.process.wait(10)}: {self.process.stderr.read()[-2000:]}"
        said: dict[str, Any] = json.loads(line)
        if "release" in said:  # that the release which is meant was run
            assert Path(said["release"]).is_relative_to(self.release), said
        return said

    def ask(self, line: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.hear()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.fixture
def start() -> Iterator[Callable[..., Program]]:
    """``start(release, place, name, *arguments)`` runs a program; all are ended when the test is over."""
    programs: list[Program] = []

    def begin(release: Path, place: dict[str, str], name: str, *arguments: str) -> Program:
        words = [sys.executable, "-W", "ignore", str(HERE / "programs.py"), name, *arguments]
        programs.append(Program(release, place, words, name))
        return programs[-1]

    yield begin
    for each in programs:
        each.end()


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[str], None]:
    def show(text: str) -> None:
        print(f"R26  {request.node.name}: {text}")

    return show


def check(client: Program) -> int:
    """That each scenario of a client has ended well; how many there were."""
    outcomes: dict[str, str] = {}
    while (said := client.hear())["scenario"]:
        outcomes[said["scenario"]] = said["outcome"]
    assert {name: text for name, text in outcomes.items() if text != "ok"} == {}
    assert len(outcomes) == SCENARIOS
    return len(outcomes)


@pytest.mark.parametrize("face", ["blocking", "asyncio"])
def test_each_verb_does_the_same_between_two_releases(start, releases, places, face, report) -> None:
    client, server = releases
    for name, place in zip(("first", "second"), places, strict=True):
        start(server, place, "serve", face, name).hear()
    report(f"{check(start(client, places[1], 'client', face))} scenarios")


def test_two_releases_serve_one_service_beside_each_other(start, old, places) -> None:
    for release, name, place in ((old, "first", places[0]), (SOURCES, "second", places[1])):
        start(release, place, "serve", "blocking", name).hear()
    for release in (old, SOURCES):
        check(start(release, places[0], "client", "blocking"))


def test_server_that_drains_finishes_what_it_took_and_is_left_alone(start, releases, places) -> None:
    client, server = releases
    serving = start(server, places[0], "serve", "blocking", "first")
    serving.hear()
    calling = start(client, places[1], "caller")
    calling.hear()
    calling.ask("begin 1.5 drained")
    while calling.ask("ran drained") == {"ran": 0}:
        pass
    serving.process.send_signal(signal.SIGTERM)
    refused: dict[str, Any] = {}
    while "error" not in refused:  # the signal is under way
        refused = calling.ask("call")
    assert refused["executed"] == "no", refused
    assert calling.ask("end") == {"result": "slept"}
    assert serving.hear() == {"drained": True}
    assert serving.process.wait(10) == 0
    assert calling.ask("call") == {"error": "NoRoute", "executed": "no"}


def test_duplicates_and_what_a_later_release_says_are_met_by_either(start, releases, places) -> None:
    client, server = releases
    start(server, places[0], "serve", "blocking", "first").hear()
    found = start(client, places[0], "strange").hear()
    assert found == {
        "mismatched": [1, 1],
        "refused": "hello first",
        "later": 0,
        "agreed": [1, 1],
        "acks": [[1], [1]],
        "twice": 1,
    }


def test_driver_of_oslo_messaging_does_the_same_between_two_releases(start, releases, places) -> None:
    client, server = releases
    serving = [
        start(server, place, "oslo_serve", name) for name, place in zip(("first", "second"), places, strict=True)
    ]
    for each in serving:
        each.hear()
    found = start(client, places[1], "oslo_client").hear()
    assert found == {
        "echo": {"list": [1, "ü"], "none": None},
        "large": 2_000_000,
        "first": "first",
        "second": "second",
        "ran": [1, 1, 1],
        "error": "ValueError",
        "late": True,
        "monitored": "slept",
    }
    for each in serving:
        assert each.ask("") == {"stopped": True}


def test_command_line_of_either_release_sees_and_calls_servers_of_the_other(start, releases, places) -> None:
    client, server = releases
    start(server, places[0], "serve", "blocking", "first").hear()

    def command(*words: str) -> Any:
        environment = {**os.environ, **places[1], "PYTHONPATH": str(client)}
        done = subprocess.run(
            [sys.executable, "-m", "onehop", *words], env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout) if "--json" in words else done.stdout

    assert command("call", "clock", "name") == "first\n"
    assert command("call", "clock", "items", "3", "--stream").split() == ["0", "1", "2"]
    assert [each["server"] for each in command("ls", "--json")] == ["first"]
    assert "first" in command("ping", "clock", "--timeout", "10")
    command("cast", "clock", "note", "key")


def test_record_with_fields_of_a_later_release_is_read_by_either(start, releases, run_directory: str) -> None:
    client, server = releases
    place = {"ONEHOP_RUN_DIRECTORY": run_directory}
    start(server, place, "serve", "blocking", "first").hear()
    changed = 0
    for path in Path(run_directory).rglob("*"):
        if path.is_file() and (text := path.read_bytes()).startswith(b'{"node"'):
            path.write_bytes(text.replace(b'{"node"', b'{"a later field":{"of":[1]},"node"', 1))
            changed += 1
    assert changed == 1
    calling = start(client, place, "caller")
    calling.hear()
    assert calling.ask("call") == {"result": "first"}


# The frozen vectors -------------------------------------------------------------------------------------------


def plain(vector: dict[str, Any]) -> dict[str, Any]:
    """A vector without the layout of its bytes."""
    return vector | {"hex": re.sub(r"\s", "", re.sub(r"#.*", "", vector["hex"]))}


def test_no_frozen_vector_has_changed() -> None:
    now = {
        (path.stem, vector["name"]): plain({"file": path.stem, **vector})
        for path in FOLDER.glob("*.toml")
        for vector in tomllib.loads(path.read_text())["vector"]
    }
    frozen = {(vector["file"], vector["name"]): vector for vector in json.loads(FROZEN.read_text())}
    assert len(frozen) >= 53
    assert {key: now.get(key) for key in frozen} == frozen
    missing = sorted(name for _, name in now.keys() - frozen.keys())
    assert not missing, f"freeze these too, at the end of {FROZEN.name}: {missing}"


@pytest.mark.parametrize("release", ["sources", "earlier"])
def test_frozen_bytes_are_made_and_read_by_each_release(old: Path, release: str) -> None:
    """So that who changes the frozen file and the sources alike is found out by the earlier release."""
    where = old if release == "earlier" else SOURCES
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.compatibility.frozen", str(FROZEN)],
        env={**os.environ, "PYTHONPATH": f"{where}{os.pathsep}{ROOT}"}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert Path(found["release"]).is_relative_to(where)
    assert found["different"] == []
    assert found["vectors"] >= 29


def test_a_changed_vector_is_noticed() -> None:
    [vector] = [each for each in json.loads(FROZEN.read_text()) if each["name"] == "the server is full"]
    assert encode(vector) == frame_of(vector)
    assert encode({**vector, "reason": "draining"}) != frame_of(vector)
