"""The comparison with RabbitMQ in a short form: ours has to hold, RabbitMQ's has to be counted in full."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.system import compared
from tests.system.compared import (
    CLOSING,
    MIDDLE,
    OPENING,
    RABBIT,
    SERVER,
    SERVERS,
    SPAN,
    ZMQ,
    Load,
    Part,
    back,
    replaced,
)
from tests.system.rows import BACK

from onehop.testing.ledger import CALL, REPLIED, Ledger, read

ROOT = Path(__file__).parent.parent.parent
SHORT = Load(seconds=9.0, timeout=5.0, rate=60.0, callers=1)
NAME, PID = "caller-1", 1


@pytest.mark.timeout(240)
def test_kills_that_rabbitmq_and_we_have_in_common_cost_our_callers_nothing_unsaid(
    background: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # where the processes find this package
    parts = (([ZMQ], (SERVER, MIDDLE)), ([RABBIT], (SERVER,)), ([RABBIT], (MIDDLE,)))  # side by side, for want of time
    running = [background(compared.compare, SHORT, 1, sides, faults, print) for sides, faults in parts]
    found = {key: value for each in running for key, value in each.result(230.0).items()}
    print(compared.table(found))
    assert compared.faulty(found) == []
    for (side, fault), (part,) in found.items():
        assert part.calls == part.answered + part.lost + part.told, f"{side.name}, {fault}"
        assert part.answered > part.calls / 4
        if side.ours:
            assert (part.lost, part.twice) == (0, 0)
            assert part.back is not None
            assert part.back < BACK + part.stall
            assert part.worst < SHORT.timeout
    # The kill has struck the broker: somebody had to wait until it was there again.
    (broker,) = found[RABBIT, MIDDLE]
    assert broker.away is not None
    assert broker.worst > broker.away - compared.AWAY - 1.0


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def runs(pid: int) -> bool:
    """Whether there is such a process; one that has only not been collected by its parent is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_ends_what_it_started_when_it_is_ended(
    eventually: Callable[..., None], number: signal.Signals
) -> None:
    program = [sys.executable, "-m", "tests.system.compared", "--seconds", "12"]
    running = subprocess.Popen(program, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        eventually(lambda: len(children(running.pid)) > SERVERS, within=60.0)  # the registry, and the servers
        started = children(running.pid)
        running.send_signal(number)
        _, told = running.communicate(timeout=60.0)
    finally:
        running.kill()
    assert running.returncode == 1
    assert "interrupted" in told
    eventually(lambda: not any(map(runs, started)))


# What the figures are made of -----------------------------------------------------------------------


def written(directory: Path, lines: list[str]) -> Ledger:
    (directory / f"{NAME}.{PID}.ledger").write_text("".join(f"{line}\n" for line in [f"P {NAME} {PID} 0.0", *lines]))
    return read(directory)


def calls(times: list[float]) -> list[str]:
    """Of calls that are answered at these times."""
    lines = []
    for number, at in enumerate(times):
        lines += [f"B {number} {CALL} - 5 {at - 0.01:.6f}", f"E {number} {REPLIED} yes - server-1 {at:.6f}"]
    return lines


def every(pause: float, since: float, until: float) -> list[float]:
    return [since + number * pause for number in range(round((until - since) / pause))]


def test_the_rate_is_back_when_calls_are_answered_as_before_and_stay_so(tmp_path: Path) -> None:
    ledger = written(tmp_path, calls(every(0.01, 1, 10) + every(0.01, 13, 30)))
    after = back(ledger, 1.0, 10.0, 30.0)
    assert after == pytest.approx(3.0, abs=0.2)


def test_a_rate_that_falls_again_was_not_back(tmp_path: Path) -> None:
    ledger = written(tmp_path, calls(every(0.01, 1, 10) + every(0.01, 13, 16) + every(0.01, 19, 30)))
    assert back(ledger, 1.0, 10.0, 30.0) == pytest.approx(9.0, abs=0.2)


def test_a_burst_of_late_answers_does_not_bring_the_rate_back_before_it_comes(tmp_path: Path) -> None:
    ledger = written(tmp_path, calls(every(0.01, 1, 10) + every(0.001, 13, 13.5) + every(0.01, 13.5, 30)))
    assert back(ledger, 1.0, 10.0, 30.0) == pytest.approx(3.0, abs=0.2)


def test_a_rate_that_stays_low_is_never_back(tmp_path: Path) -> None:
    ledger = written(tmp_path, calls(every(0.01, 1, 10) + every(0.02, 10, 30)))
    assert back(ledger, 1.0, 10.0, 30.0) is None


def test_where_nothing_is_missing_there_is_nothing_to_recover_from(tmp_path: Path) -> None:
    assert back(written(tmp_path, calls(every(0.01, 1, 30))), 1.0, 10.0, 30.0) == 0.0


def test_what_the_machine_held_up_is_no_fall_of_the_rate(tmp_path: Path) -> None:
    times = every(0.01, 1, 20) + every(0.01, 20.5, 30)
    assert back(written(tmp_path, [*calls(times), "L 0.5 20.5"]), 1.0, 10.0, 30.0) == 0.0
    assert back(written(tmp_path, calls(times)), 1.0, 10.0, 30.0) == pytest.approx(10.4, abs=SPAN)


@pytest.mark.parametrize(
    "line", ["B 7 call - 5 3.0", "E 0 replied yes - server-1 3.0"], ids=["no outcome", "two outcomes"]
)
def test_a_call_without_one_outcome_unbalances_the_account(tmp_path: Path, line: str) -> None:
    assert compared.unbalanced(written(tmp_path, calls([1.0, 2.0]))) == []
    (wrong,) = compared.unbalanced(written(tmp_path, [*calls([1.0, 2.0]), line]))
    assert "one outcome" in wrong


# The page -------------------------------------------------------------------------------------------

PART = Part(
    calls=1000, answered=990, lost=8, ran=3, told=2, twice=1, kept_back=50, worst=60.0, away=6.5, back=9.0, p99=0.07,
    stall=0.01, wrong=[], breaches=["something"],
)  # fmt: skip


def test_rounds_are_added_up_and_of_times_the_worst_counts() -> None:
    later = PART._replace(worst=61.5, back=12.0, p99=0.08)
    row = compared.table({(RABBIT, MIDDLE): [PART, later]}).splitlines()[-1]
    assert row == "| the broker | `rabbit://` | 2,000 | 1,980 | 16 | 6 | 4 | 2 | 100 | 61.50 | 6.5 | 12.0 | 75 |"
    never = compared.table({(RABBIT, MIDDLE): [PART, PART._replace(back=None)]})
    assert "not within the run" in never


def test_promises_are_ours_and_the_account_is_everybodys() -> None:
    assert compared.faulty({(RABBIT, SERVER): [PART]}) == []
    assert len(compared.faulty({(ZMQ, SERVER): [PART]})) == 1
    assert len(compared.faulty({(RABBIT, SERVER): [PART._replace(wrong=["a call without an outcome"])]})) == 1


def test_the_table_takes_the_place_of_the_one_between_the_marks() -> None:
    page = f"before\n\n{OPENING}\n\nold\n\n{CLOSING}\n\nafter\n"
    assert replaced(page, "new") == page.replace("old", "new")
    for wrong in ("no marks", OPENING, CLOSING + OPENING, page + OPENING, page + CLOSING):
        with pytest.raises(ValueError, match="one line"):
            replaced(wrong, "new")


def test_the_page_that_opens_with_the_comparison_has_its_marks() -> None:
    page = (ROOT / "docs" / "reliability" / "index.md").read_text()
    assert "`zmq+redis://`" in replaced(page, "`zmq+redis://`")
