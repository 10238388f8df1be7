"""The ledger of a run: what balances, what does not and is named, and that a killed process loses nothing of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.processes import send

from onehop.testing import ledger
from onehop.testing.ledger import Ledger, Outage, Pendulum, Writer, read

Write = Callable[..., Ledger]


@pytest.fixture
def written(tmp_path: Path) -> Write:
    """``written(caller=[...], server=[...])``: a ledger made by hand."""

    def write(**parts: list[str]) -> Ledger:
        for pid, (name, lines) in enumerate(parts.items(), 1):
            (tmp_path / f"{name}.{pid}.ledger").write_text("".join(f"{line}\n" for line in lines))
        return read(tmp_path)

    return write


CALL = "B 7 call - 5 100.0"
AGAIN = "B 7 again - 5 100.0"
CAST = "B 7 cast - 5 100.0"
REPLIED = "E 7 replied yes - server 100.01"
TAKEN = "E 7 taken unknown - - 100.01"
REFUSED = "E 7 failed no Rejected - 100.01"
UNKNOWN = "E 7 failed unknown PeerLost - 100.01"
RAISED = "E 7 failed yes RemoteError - 100.01"
RAN = "R caller:7 100.005"


@pytest.mark.parametrize(
    ("caller", "server"),
    [
        ([CALL, REPLIED], [RAN]),
        ([CALL, REFUSED], []),
        ([CALL, RAISED], [RAN]),
        ([AGAIN, REPLIED], [RAN]),
        ([AGAIN, REPLIED], [RAN, RAN]),
        ([CAST, TAKEN], [RAN]),
        ([CAST, TAKEN], ["R caller:7 130.0"]),
        ([CAST, REFUSED], []),
        ([], []),
    ],
)
def test_what_ended_as_its_outcome_says_balances(written: Write, caller: list[str], server: list[str]) -> None:
    assert written(caller=caller, server=server).breaches() == []


@pytest.mark.parametrize(
    ("caller", "server", "breach"),
    [
        ([CALL], [], "silence"),
        ([CALL], [RAN], "silence"),
        ([CALL, REPLIED, REPLIED], [RAN], "it ended 2 times"),
        ([CALL, "E 7 replied yes - server 105.2"], [RAN], "it ended 0.100 s too late"),
        ([CALL, REPLIED], [RAN, RAN], "it was run 2 times"),
        ([CALL, "E 7 replied yes - server 105.05"], ["R caller:7 105.3"], "it was run 0.200 s after its caller had"),
        ([CAST, TAKEN], [RAN, RAN], "it was run 2 times"),
        ([CALL, UNKNOWN], [RAN, RAN], "it was run 2 times"),
        ([CALL, REFUSED], [RAN], "its caller was told that it did not run, and it ran"),
        ([CAST, REFUSED], [RAN], "its caller was told that it did not run, and it ran"),
        ([AGAIN, REFUSED], [RAN], "its caller was told that it did not run, and it ran"),
        ([CALL, REPLIED], [], "it was answered, and nobody ran it"),
        ([CALL, RAISED], [], "it was answered, and nobody ran it"),
        ([CALL, "E 7 replied yes - another 100.01"], [RAN], "another answered it and did not run it"),
        ([CAST, TAKEN], [], "it was taken in and never ran"),
        ([CALL, UNKNOWN], [], "its outcome is unknown, and nobody"),
        ([CALL, UNKNOWN], [RAN], "its outcome is unknown, and nobody"),
        ([CALL, "E 7 vanished yes - - 100.01"], [], "its outcome is none of those that there are"),
        ([CALL, "E 7 failed perhaps PeerLost - 100.01"], [], "its outcome is none of those that there are"),
        ([], [RAN], "it was run and nobody sent it"),
        ([CALL, REPLIED, CALL], [RAN], "caller sent two requests with the number 7"),
        ([CALL, REPLIED, "X what is this"], [RAN], "caller.1 wrote what is no line of a ledger"),
        ([CALL, REPLIED, "B 8 call 100.0"], [RAN], "caller.1 wrote what is no line of a ledger"),
    ],
)
def test_each_rule_that_is_broken_is_named(
    written: Write, caller: list[str], server: list[str], breach: str
) -> None:  # fmt: skip
    found = written(caller=caller, server=server).breaches()
    assert [each for each in found if each.startswith(breach)], found


def test_a_breach_names_the_request_and_all_that_is_known_of_it(written: Write) -> None:
    (found,) = written(caller=[CALL, REFUSED], server=[RAN]).breaches()
    assert found == (
        "its caller was told that it did not run, and it ran: call caller:7, sent at 100.000 with 5 s, ended after "
        "0.010 s: Rejected, executed 'no'; run by server (pid 2) after 0.005 s"
    )


OUT = Outage("server", 2, 99.5, 100.008)


def test_a_kill_explains_what_is_unknown_and_what_was_taken_in_and_never_ran(written: Write) -> None:
    found = written(caller=[CALL, UNKNOWN, "B 8 cast - 5 100.0", "E 8 taken unknown - - 100.01"], server=[RAN])
    assert found.breaches([OUT]) == []
    assert found.explained([OUT]) == {"unknown": 1, "taken, not run": 1}
    assert found.breaches([OUT._replace(name="", pid=0)]) == []


@pytest.mark.parametrize(
    "other", [OUT._replace(pid=77), OUT._replace(began=50.0, ended=60.0), OUT._replace(began=150.0, ended=160.0)]
)
def test_another_process_and_another_time_explain_nothing(written: Write, other: Outage) -> None:
    assert len(written(caller=[CALL, UNKNOWN], server=[RAN]).breaches([other])) == 1


def test_a_named_server_is_excused_by_its_own_outage_only(written: Write) -> None:
    found = written(caller=["B 7 cast server 5 100.0", TAKEN])
    assert found.breaches([OUT]) == []
    assert len(found.breaches([OUT._replace(name="another")])) == 1


def test_a_kill_excuses_neither_a_second_run_nor_a_false_no_nor_silence(written: Write) -> None:
    assert len(written(caller=[CALL, REPLIED], server=[RAN, RAN]).breaches([OUT])) == 1
    assert len(written(caller=[CALL, REFUSED], server=[RAN]).breaches([OUT])) == 1
    assert len(written(caller=[CALL], server=[RAN]).breaches([OUT])) == 1


def test_a_killed_caller_owes_no_outcome(written: Write) -> None:
    found = written(caller=[CALL], server=[RAN])
    assert found.breaches([Outage("caller", 1, 100.2, 100.2)]) == []
    assert len(found.breaches([Outage("caller", 1, 100.2, 100.2, lethal=False)])) == 1


def test_lateness_that_a_timer_of_the_process_shares_is_not_held_against_it(written: Write) -> None:
    late = [CALL, "E 7 replied yes - server 105.4"]
    assert len(written(caller=late, server=[RAN]).breaches()) == 1
    assert len(written(caller=[*late, "L 0.2 105.3"], server=[RAN]).breaches()) == 1
    assert len(written(caller=[*late, "L 0.5 103.3"], server=[RAN]).breaches()) == 1
    found = written(caller=[*late, "L 0.31 105.35"], server=[RAN])
    assert found.breaches() == []
    assert found.worst_stall() == 0.31


def test_a_request_runs_out_of_time_where_a_process_stood_still_for_long(written: Write) -> None:
    unknown = [CALL, "E 7 failed unknown CallTimeout - 105.01"]
    assert len(written(caller=unknown, server=[RAN]).breaches()) == 1
    assert len(written(caller=unknown, server=[RAN, "L 0.4 103.0"]).breaches()) == 1
    often = [f"L 0.09 {100.1 + number / 5:.2f}" for number in range(20)]  # as where its threads wait for each other
    assert len(written(caller=unknown, server=[RAN, *often]).breaches()) == 1
    found = written(caller=unknown, server=[RAN, "L 0.6 103.0"])
    assert found.breaches() == []
    # Who was stopped on purpose is no measure of the machine.
    assert len(found.breaches([OUT._replace(began=50.0, ended=60.0)])) == 1
    assert found.worst_stall([OUT]) == 0.0


def test_runs_of_an_idempotent_method_are_counted(written: Write) -> None:
    found = written(caller=[AGAIN, REPLIED], server=[RAN], other=["R caller:7 100.001"])
    (entry,) = found.requests
    assert [(run.server, run.pid) for run in entry.runs] == [("other", 3), ("server", 2)]


def test_a_line_that_was_cut_short_is_counted_and_left_out(tmp_path: Path) -> None:
    (tmp_path / "caller.1.ledger").write_text(f"{CALL}\n{REPLIED}\nB 8 call - 5 1")
    (tmp_path / "server.2.ledger").write_text(f"{RAN}\n")
    found = read(tmp_path)
    assert (found.breaches(), found.torn) == ([], 1)


def test_what_a_writer_writes_is_read_again(tmp_path: Path) -> None:
    writer, server = Writer(tmp_path, "caller-1"), Writer(tmp_path, "server-1")
    writer.began(1, ledger.CALL, "", 5.0)
    server.ran("caller-1:1")
    writer.ended(1, ledger.REPLIED, "yes", server="server-1")
    writer.began(2, ledger.CAST, "server-1", 0.5)
    writer.ended(2, ledger.FAILED, "no", "NoRoute")
    writer.late(0.03)
    for each in (writer, server):
        each.close()
    found = read(tmp_path)
    assert found.breaches() == []
    first, second = found.requests
    assert (first.id, first.by, first.well, first.timeout) == ("caller-1:1", "server-1", True, 5.0)
    assert (second.server, second.error, second.executed, second.well) == ("server-1", "NoRoute", "no", False)
    assert 0 <= first.seconds < 5.0
    assert found.worst_stall() == 0.03


def test_a_process_killed_in_the_middle_has_lost_nothing_that_it_ran(tmp_path: Path) -> None:
    program = (
        "import sys; from onehop.testing.ledger import Writer; writer = Writer(sys.argv[1], 'server')\n"
        "for number in range(10**9):\n    writer.ran(f'caller:{number}')\n    print(number, flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(100):
        process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    rest, _ = process.communicate(timeout=20)
    answered = 100 + len(rest.splitlines())
    assert len(read(tmp_path).entries) >= answered


def test_a_pendulum_tells_of_the_time_in_which_its_process_did_not_run(tmp_path: Path) -> None:
    program = (
        "import sys; from onehop.testing.ledger import Pendulum, Writer\n"
        "with Pendulum(Writer(sys.argv[1], 'caller')):\n    print('swings', flush=True); sys.stdin.readline()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "swings\n"
    send(process, signal.SIGSTOP)
    threading.Event().wait(0.3)  # what is measured
    os.kill(process.pid, signal.SIGCONT)
    process.communicate("\n", timeout=20)
    assert read(tmp_path).worst_stall() > 0.25


def test_a_pendulum_ends_with_its_block(tmp_path: Path) -> None:
    def swinging() -> int:
        return [each.name for each in threading.enumerate()].count("pendulum")

    before = swinging()
    with Pendulum(Writer(tmp_path, "caller")):
        assert swinging() == before + 1
    assert swinging() == before
