"""``onehop demo``: that it runs and cleans up, and that its ledger would tell if something were lost."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onehop.cli.demo import without_warnings
from onehop.cli.demo_ledger import Ledger, Outage, Writer, percentile
from onehop.testing.hosts import Hosts


def processes_of_the_demo(parent: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(status.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(status.parent.name))
        except OSError:
            continue
    return found


def directory_of(child: int) -> Path:
    """The demo's own directory."""
    environment = Path(f"/proc/{child}/environ").read_bytes().decode()
    return Path(environment.split("ONEHOP_RUN_DIRECTORY=")[-1].split("\0")[0]).parent


def arguments_of(child: int) -> list[str]:
    return Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0")


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def report_of(*arguments: str) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "onehop", "demo", "--seconds", "3", "--json", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=110, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    return dict(json.loads(ended.stdout))


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """What a short run of the real demo says."""
    return report_of()


def test_demo_sends_of_every_kind_and_adds_up(report: dict[str, Any]) -> None:
    assert report["problems"] == []
    assert report["ledger"].keys() == {"call", "long", "cast", "fanout"}
    for line in report["ledger"].values():
        assert line["sent"] > 10
        assert line["sent"] == line["answered"] + line["refused"] + line["unknown"]
        assert line["twice"] == 0
    assert report["ledger"]["cast"]["executed"] == report["ledger"]["cast"]["answered"]


def test_demo_kills_two_and_brings_one_back(report: dict[str, Any]) -> None:
    conductor, compute = report["killed"]
    assert (conductor["host"], conductor["back_after_seconds"]) == ("conductor-2", None)
    assert compute["host"] == "compute-3"
    assert conductor["without_power"] is compute["without_power"] is None
    assert 0 < compute["back_after_seconds"] < 20
    assert report["processes"] == 11


def test_demo_on_hosts_adds_up_though_one_loses_its_power(onehop_hosts: Callable[..., Hosts]) -> None:
    onehop_hosts(1)  # skips where there can be none
    report = report_of("--hosts", "5")
    assert report["problems"] == []
    assert report["url"] == "zmq+hosts://10.1.0.1,10.1.0.2,10.1.0.3/demo"
    assert all(line["answered"] > 10 and line["twice"] == 0 for line in report["ledger"].values())
    assert [(each["host"], each["without_power"]) for each in report["killed"]] == [
        ("conductor-2", None), ("compute-3", None), ("conductor-1", "host-1"), ("compute-1", "host-1"),
    ]  # fmt: skip
    assert report["killed"][0]["back_after_seconds"] is None
    assert all(0 < each["back_after_seconds"] < 20 for each in report["killed"][1:])
    assert report["processes"] == 13


def test_demo_tells_latencies(report: dict[str, Any]) -> None:
    assert report["latency_ms"].keys() == report["ledger"].keys()
    for each in report["latency_ms"].values():
        assert 0 < each["p50"] <= each["p95"] <= each["p99"] <= each["max"]
    assert report["url"] == "zmq:///demo"
    assert report["messages_per_second"] > 0
    assert report["cpu_ms_per_message"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--hosts", 2), "it must be 3 or more"),
        (("--hosts", 401), "there may be 1 to 400"),
        (("--hosts", 3, "--compare", "rabbit:///"), "no broker is reached from a test host"),
    ],
)
def test_hosts_that_cannot_be_had_are_refused(
    run: Callable[..., Any], arguments: tuple[object, ...], words: str
) -> None:
    ended = run("demo", *arguments)
    assert ended.code == 2
    assert words in ended.sentence


def test_who_must_not_have_hosts_is_told_what_is_missing(start: Callable[..., subprocess.Popen[str]]) -> None:
    drop = ("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin") if os.geteuid() == 0 else ()
    process = start("demo", "--hosts", 3, command=(*drop, sys.executable, "-m", "onehop"))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert "--hosts 3 cannot be had: test hosts need Linux, root" in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_interrupted_demo_leaves_nothing_behind(
    start: Callable[..., subprocess.Popen[str]], eventually: Callable[..., None], number: int, code: int
) -> None:
    process = start("demo", "--seconds", "30")
    assert process.stdout is not None
    assert "starting 10 processes" in process.stdout.readline()
    children: list[int] = []

    def all_there() -> bool:
        children[:] = processes_of_the_demo(process.pid)
        return len(children) == 10

    eventually(all_there, 20)
    # A child that has not begun its own program yet shows the environment of its parent.
    directories = {place for place in map(directory_of, children) if place.name.startswith("oh-demo-")}
    assert directories
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == code
    eventually(lambda: all(map(gone, children)))
    assert [each for each in directories if each.exists()] == []


def test_processes_end_when_the_demo_is_killed(
    start: Callable[..., subprocess.Popen[str]], eventually: Callable[..., None]
) -> None:
    process = start("demo", "--seconds", "30")
    assert process.stdout is not None
    process.stdout.readline()
    assert "all are ready" in process.stdout.readline()
    children = processes_of_the_demo(process.pid)
    directory = directory_of(children[0])
    process.kill()
    eventually(lambda: all(map(gone, children)), 30)
    shutil.rmtree(directory)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_demo_on_hosts_leaves_nothing_behind(
    start: Callable[..., subprocess.Popen[str]],
    eventually: Callable[..., None],
    onehop_hosts: Callable[..., Hosts],
    number: int,
) -> None:
    onehop_hosts(1)  # skips where there can be none
    process = start("demo", "--hosts", 3, "--seconds", 30, "--url", "zmq:///demo")
    assert process.stdout is not None
    assert "starting 10 processes" in process.stdout.readline()
    children: list[int] = []
    places: list[Path] = []

    def all_there() -> bool:
        children[:] = processes_of_the_demo(process.pid)
        places[:] = {place for place in map(directory_of, children) if place.name.startswith("host-")}
        return len(children) == 11 and len(places) == 3  # ten, and the switch between the hosts

    eventually(all_there, 30)
    (directory,) = {place.parent for place in places}
    (ledger,) = {each for child in children for each in arguments_of(child) if "/oh-demo-" in each}
    process.send_signal(number)
    process.communicate(timeout=20)
    eventually(lambda: all(map(gone, children)), 30)
    assert not directory.exists()
    if number == signal.SIGINT:
        assert not Path(ledger).exists()
    else:
        shutil.rmtree(ledger)


def test_messages_are_as_large_as_novas() -> None:
    with without_warnings():
        from onehop.cli.demo_roles import context, instance

    assert len(context("x")) == 30
    assert 800 < len(json.dumps([context("0" * 32), instance(1)])) < 2000


# The ledger ---------------------------------------------------------------------------------------


class Book:
    """Writes lines as processes would."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ledger = Ledger(directory)

    def write(self, lines: str, pid: int = 1) -> None:
        with open(self.directory / f"host.{pid}.ledger", "a") as file:
            file.write("".join("\t".join(line.split()) + "\n" for line in lines.splitlines() if line.strip()))
        self.ledger.read()


@pytest.fixture
def book(tmp_path: Path) -> Book:
    return Book(tmp_path)


def problem(book: Book, outages: list[Outage] | None = None) -> str:
    (only,) = book.ledger.problems(outages or [])
    return only


CALL = "S a call compute compute-1 10.0\n"
CAST = "S a cast compute compute-1 10.0\nE a answered 10.1\n"
FANOUT = "S a fanout scheduler scheduler-1 10.0\nE a answered 10.1\n"


def test_good_ledger_has_no_problem(book: Book) -> None:
    book.write(f"{CALL} E a answered 10.1\n S b cast compute compute-1 10.0\n E b answered 10.1\n R b compute-1 10.2\n")
    book.write("R a compute-1 10.05\n", pid=2)
    assert book.ledger.problems([]) == []
    call, _, cast, _ = book.ledger.lines([])
    assert (call.sent, call.answered, call.executed, cast.sent, cast.answered) == (1, 1, 1, 1, 1)
    assert book.ledger.latencies("call") == [pytest.approx(0.1)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (CALL, "has no outcome: silence"),
        (CALL + "E a answered 10.1", "was answered and nobody ran it"),
        (CALL + "R a compute-1 10.1\n E a refused 10.2", "was said not to have run, and compute-1 ran it"),
        (CALL + "R a compute-1 10.1\n R a compute-1 10.2\n E a answered 10.3", "ran 2 times"),
        (CALL + "R a compute-1 10.1\n R a compute-2 10.2\n E a answered 10.3", "ran 2 times"),
        (CALL + "R a compute-1 10.1\n E a answered 19.0", "ended after 9.0 s; 5 are allowed"),
        (CALL + "E a unknown 10.1", "has an unknown outcome though nobody was killed"),
        (CALL + "E a TypeError 10.1", "could not be sent: TypeError"),
        (CAST, "was accepted and compute-1 never ran it"),
        (CAST + "R a compute-1 10.1\n R a compute-1 10.2", "ran 2 times"),
        (FANOUT, "was accepted and scheduler-1 never ran it"),
        (FANOUT + "R a scheduler-1 10.1\n R a scheduler-1 10.1", "ran 2 times"),
        ("R a compute-1 10.1", "never sent"),
    ],
)
def test_each_way_of_not_adding_up_is_found(book: Book, text: str, words: str) -> None:
    book.write(text)
    assert words in problem(book)


@pytest.mark.parametrize("text", [CALL + "E a unknown 10.6", CAST, FANOUT.replace("scheduler", "compute")])
def test_what_was_with_a_killed_process_is_explained(book: Book, text: str) -> None:
    book.write(text + "\n" + "".join(f"R a compute-{number} 10.2\n" for number in (2, 3, 4, 5) if "fanout" in text))
    assert book.ledger.problems([Outage("compute-1", 9, 10.5, 12.0)]) == []
    for other in (Outage("compute-1", 9, 20.0, 22.0), Outage("conductor-1", 9, 10.5, 12.0)):
        assert len(book.ledger.problems([other])) == 1


def test_a_host_without_power_may_go_unnoticed_for_a_while(book: Book) -> None:
    silent = Outage("compute-1", 9, 10.5, 13.0, unnoticed=8.0)
    book.write("S a cast compute compute-1 18.0\nE a answered 18.1\nS b call compute compute-1 18.0\nE b unknown 23.0")
    assert book.ledger.problems([silent]) == []
    assert len(book.ledger.problems([silent._replace(unnoticed=0.5)])) == 2
    book.write("S c cast compute compute-1 18.6\nE c answered 18.7")
    assert "was accepted and compute-1 never ran it" in problem(book, [silent])


def test_what_a_killed_process_was_sending_has_no_outcome_and_needs_none(book: Book) -> None:
    book.write(CALL, pid=7)
    assert book.ledger.problems([Outage("conductor-1", 7, 10.5)]) == []
    assert book.ledger.lines([])[0].unknown == 1


def test_fanout_copy_for_an_absent_receiver_is_refused(book: Book) -> None:
    book.write("S a fanout compute compute-9 10.0\n E a answered 10.1\n")
    book.write("".join(f"R a compute-{number} 10.1\n" for number in (1, 2, 4, 5)))
    outages = [Outage("compute-3", 9, 8.0, 12.0)]
    assert book.ledger.problems(outages) == []
    line = book.ledger.lines(outages)[3]
    assert (line.sent, line.answered, line.refused, line.unknown) == (5, 4, 1, 0)


def test_callers_of_a_killed_process_are_counted(book: Book) -> None:
    book.write(CALL + "E a unknown 10.8")
    assert book.ledger.heard(Outage("compute-1", 9, 10.5)) == (1, pytest.approx(0.3))
    assert book.ledger.heard(Outage("compute-2", 9, 10.5)) == (0, 0.0)


def test_half_a_line_is_read_when_it_is_whole(book: Book) -> None:
    path = book.directory / "host.1.ledger"
    path.write_text("S\ta\tcall\tcompute\tcompute-1\t10.0\nE\ta\tans")
    book.ledger.read()
    assert book.ledger.entries["a"].outcome == ""
    with open(path, "a") as file:
        file.write("wered\t10.5\n")
    book.ledger.read()
    assert book.ledger.entries["a"].outcome == "answered"


def test_writer_and_ledger_understand_each_other(tmp_path: Path) -> None:
    writer = Writer(tmp_path, "api-1")
    before = time.monotonic()
    writer.write("S", "a", "call", "conductor", "")
    writer.write("E", "a", "answered")
    ledger = Ledger(tmp_path)
    ledger.read()
    entry = ledger.entries["a"]
    assert (entry.verb, entry.topic, entry.host, entry.outcome, entry.sender) == (
        "call", "conductor", "", "answered", os.getpid(),
    )  # fmt: skip
    assert before - 0.001 <= entry.sent <= entry.ended


def test_percentiles() -> None:
    values = [float(each) for each in range(100)]
    assert [percentile(values, part) for part in (0.5, 0.99, 1.0)] == [50.0, 99.0, 99.0]
    assert percentile([], 0.5) == 0
    assert not math.isnan(percentile([1.0], 0.99))
