"""``onehop chaos``: what it reports, that it tells when the ledger does not balance, and that nothing outlives it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from onehop.testing.chaos import plan
from onehop.testing.hosts import Hosts

LIAR = """
from onehop.testing.chaos.programs import Onehop

class Liar(Onehop):
    def executed(self, error):
        return "no"

    def serve(self, name, methods):
        def twice(request):
            methods["call"](request)
            return methods["call"](request)
        return super().serve(name, {**methods, "call": twice})
"""

MIXING = """
from onehop.testing.chaos.programs import Onehop

class Mixing(Onehop):
    first = {}

    def call(self, method, *arguments, timeout):
        return self.first.setdefault(method, super().call(method, *arguments, timeout=timeout))
"""

BAD = """
import os, signal
import onehop
from onehop.testing.chaos.programs import Onehop

class Refusing(Onehop):
    def call(self, method, *arguments, timeout):
        raise onehop.Rejected("there is no room", reason="full")

    cast = call

class Crashing(Onehop):
    def serve(self, name, methods):
        super().serve(name, methods)
        return lambda: os.kill(os.getpid(), signal.SIGSEGV)

class Unfinished(Onehop):
    def serve(self, name, methods):
        super().serve(name, methods)
        return lambda: False

class Fragile(Onehop):
    calls = 0

    def serve(self, name, methods):
        def call(request):
            self.calls += 1
            if self.calls == 20:
                os._exit(7)
            return methods["call"](request)
        return super().serve(name, {**methods, "call": call})
"""


def test_same_arguments_give_the_same_plan_and_others_another() -> None:
    kinds = list(plan.FAULTS)
    assert plan.draw(7, 60.0, 3, kinds) == plan.draw(7, 60.0, 3, kinds)
    assert plan.draw(7, 60.0, 3, kinds) != plan.draw(8, 60.0, 3, kinds)


@pytest.mark.parametrize("seed", range(50))
def test_a_plan_leaves_one_server_alone_at_any_time_and_is_over_before_the_end(seed: int) -> None:
    faults = plan.draw(seed, 60.0, 3, list(plan.FAULTS))
    assert len(faults) > 5
    for fault in faults:
        assert fault.at >= plan.CALM
        assert fault.at + fault.seconds <= 60.0 - plan.CALM
        assert (fault.server == plan.NO_SERVER) == (fault.kind == plan.REGISTRY)
    outages = [fault for fault in faults if fault.kind == plan.REGISTRY]
    for each, after in pairwise(outages):
        assert each.at + each.seconds <= after.at
    for index, fault in enumerate(faults):
        # Who is started again while the registry is out is not known before it is back.
        ends = [fault.at + fault.seconds]
        if fault.kind in plan.RESTARTS:
            ends += [
                each.at + each.seconds for each in outages if each.at < ends[0] and fault.at < each.at + each.seconds
            ]
        faults[index] = fault._replace(seconds=max(ends) - fault.at)
    for fault in faults:
        out = [each.server for each in faults if each.at <= fault.at < each.at + each.seconds and each.server >= 0]
        assert len(out) == len(set(out)) < 3


def test_chaos_reports_its_plan_its_figures_and_a_ledger_that_balances(run: Callable[..., Any], tmp_path: Path) -> None:
    place = tmp_path / "ledger"
    options = ("--fault", "kill", "--fault", "roll", "--ledger", place)
    ended = run("chaos", "--seconds", 6, "--rate", 200, "--seed", 3, "--json", *options)
    assert (ended.code, ended.json["breaches"]) == (0, []), ended
    assert {each["kind"] for each in ended.json["plan"]} <= {"kill", "roll"}
    assert ended.json["plan"] != []
    lines = ended.json["ledger"].values()
    assert ended.json["requests"] == sum(line["sent"] for line in lines) > 800
    assert sum(line["silent"] for line in lines) == 0
    assert ended.json["latency_ms"]["p50"] > 0
    assert len(list(place.glob("*.ledger"))) >= 4


def test_chaos_shows_people_what_happens_and_what_came_of_it(run: Callable[..., Any]) -> None:
    ended = run("chaos", "--seconds", 4, "--rate", 100, "--fault", "hang", "--servers", 2)
    assert ended.code == 0
    assert "starting 2 servers" in ended.err
    assert "The ledger balances." in ended.out


def test_a_ledger_that_does_not_balance_is_told_and_fails(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "liar.py").write_text(LIAR)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    process = start("chaos", "--seconds", 4, "--rate", 50, "--over", "liar:Liar", "--seed", 3, cwd=tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "The ledger does not balance" in out
    assert "it was run 2 times: call caller-1:" in err.splitlines()[-1]
    assert "run it again with --seed 3" in err.splitlines()[-1]


def test_a_reply_to_another_request_does_not_balance(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mixing.py").write_text(MIXING)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    process = start("chaos", "--seconds", 4, "--rate", 50, "--over", "mixing:Mixing", "--fault", "hang", cwd=tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.search(r"server-\d\(caller-1:\d+\) answered it and did not run it: ", err.splitlines()[-1])


def test_a_process_that_ends_by_itself_fails_the_run_and_is_named(
    start: Callable[..., subprocess.Popen[str]], eventually: Callable[..., None]
) -> None:
    process = start("chaos", "--seconds", 6, "--rate", 50, "--fault", "roll", "--servers", 1)
    assert process.stderr is not None
    while "SIGTERM" not in (line := process.stderr.readline()):
        assert line
    (caller,) = [each for each in descendants(process.pid) if b"caller-1" in Path(f"/proc/{each}/cmdline").read_bytes()]
    os.kill(caller, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"caller-1 (pid {caller}) has ended by itself" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("engine", "faults", "words"),
    [
        ("Refusing", ("--fault", "kill"), r"the ledger does not balance: 0 of \d+ requests came to what was wanted; "),
        ("Crashing", ("--fault", "roll"), r"server-\d \(pid \d+\) ended with -11, and nobody struck it"),
        ("Unfinished", ("--fault", "roll"), r"server-\d \(pid \d+\) ended without having answered everything"),
        ("Fragile", ("--fault", "kill"), r"server-\d \(pid \d+\) ended with 7, and nobody struck it"),
    ],
)
def test_an_engine_that_does_not_do_what_it_must_fails_the_run(
    start: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    faults: tuple[str, ...],
    words: str,
) -> None:
    (tmp_path / "bad.py").write_text(BAD)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    process = start("chaos", "--seconds", 5, "--rate", 40, "--over", f"bad:{engine}", *faults, cwd=tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert re.search(words, err.splitlines()[-1]), err


def test_settings_of_other_nodes_are_none_of_a_run(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEHOP_REGISTRY", "redis://127.0.0.1:1/")
    ended = run("chaos", "--seconds", 4, "--rate", 20, "--fault", "hang", "--json")
    assert (ended.code, ended.json["breaches"]) == (0, []), ended
    ended = run("chaos", "--registry", "redis://127.0.0.1:1/")
    assert (ended.code, ended.sentence.partition(":")[0]) == (2, "--registry")


def test_outage_of_the_registry_fails_nothing_in_either_face(run: Callable[..., Any]) -> None:
    options = ("--fault", "registry", "--seed", 3, "--seconds", 8, "--callers", 2, "--asyncio", 1)
    ended = run("chaos", *options, "--rate", 100, "--json")
    assert (ended.code, ended.json["breaches"], ended.json["errors"]) == (0, [], {}), ended
    assert [each["kind"] for each in ended.json["plan"]] == ["registry"]
    assert ended.json["plan"][0]["seconds"] >= 1.0
    assert ended.json["asyncio"] == ["caller-1"]
    assert ended.json["requests"] > 400


def test_servers_that_die_while_the_registry_is_out_are_found_again(run: Callable[..., Any]) -> None:
    options = ("--fault", "registry", "--fault", "kill", "--fault", "roll", "--seed", 4, "--seconds", 12)
    ended = run("chaos", *options, "--rate", 100, "--callers", 2, "--asyncio", 2, "--json")
    assert (ended.code, ended.json["breaches"]) == (0, []), ended
    assert {"registry", "kill"} <= {each["kind"] for each in ended.json["plan"]}


def test_callers_in_a_loop_are_drawn_from_the_seed_and_no_more_than_there_are(run: Callable[..., Any]) -> None:
    assert plan.in_a_loop(7, 10, 4) == plan.in_a_loop(7, 10, 4) != plan.in_a_loop(8, 10, 4)
    assert plan.in_a_loop(7, 3, 3) == [0, 1, 2]
    ended = run("chaos", "--asyncio", 2)
    assert (ended.code, ended.sentence) == (2, "--asyncio 2: there are 1 callers; give more (--callers)")
    ended = run("chaos", "--asyncio", 1, "--over", "other:Messages")
    assert (ended.code, ended.sentence.partition(":")[0]) == (2, "--asyncio and --over do not go together")


def test_outage_of_the_registry_is_for_one_host_with_redis(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "do not go together" in run("chaos", "--hosts", "--fault", "registry").sentence
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "needs redis-server" in run("chaos", "--fault", "registry").sentence


def test_faults_between_hosts_need_hosts(run: Callable[..., Any]) -> None:
    ended = run("chaos", "--fault", "cut")
    assert (ended.code, ended.sentence) == (2, "--fault cut needs --hosts; without there are kill, pause, hang, roll")


def test_the_directory_of_the_ledger_must_be_new(run: Callable[..., Any], tmp_path: Path) -> None:
    ended = run("chaos", "--ledger", tmp_path)
    assert ended.code == 2
    assert "it exists" in ended.sentence


def test_chaos_on_hosts_balances(run: Callable[..., Any], onehop_hosts: Callable[..., Hosts]) -> None:
    onehop_hosts(1)  # skips where there can be none
    options = ("--fault", "power", "--fault", "one-way", "--seed", 2, "--rate", 100)
    ended = run("chaos", "--hosts", "--seconds", 10, "--json", *options)
    assert (ended.code, ended.json["breaches"]) == (0, []), ended
    assert {each["kind"] for each in ended.json["plan"]} == {"power", "one-way"}


def descendants(pid: int) -> list[int]:
    found = []
    for each in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = each.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(each.parent.name))
    return found


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_chaos_not_even_what_is_stopped(
    start: Callable[..., subprocess.Popen[str]], eventually: Callable[..., None], number: signal.Signals
) -> None:
    process = start("chaos", "--seconds", 60, "--fault", "pause", "--rate", 50)
    assert process.stderr is not None
    while "pause" not in process.stderr.readline():
        assert process.poll() is None
    children = descendants(process.pid)
    assert len(children) == 4
    told = [Path(f"/proc/{each}/cmdline").read_bytes().split(b"\0") for each in children]
    (place,) = {Path(json.loads(words[-2])["directory"]).parent for words in told}
    assert place.exists()
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == (-9 if number == signal.SIGKILL else 130)
    eventually(lambda: all(map(gone, children)))
    if number == signal.SIGKILL:
        shutil.rmtree(place)
    assert not place.exists()
