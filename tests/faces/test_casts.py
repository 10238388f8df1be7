"""Casts, fan-outs and gathers: who took it, who ran it, who is named as missing."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import pytest

from onehop import CallTimeout, EncodeError, NoRoute, PeerLost, Rejected, RemoteError


class Ledger:
    """Notes what ran."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.entries: list[Any] = []
        self._changed = threading.Condition()

    def note(self, value: Any = None) -> str:
        with self._changed:
            self.entries.append(value)
            self._changed.notify_all()
        return self.name

    def fail(self) -> None:
        raise ValueError(f"{self.name} will not")

    def wait(self, count: int, within: float = 5.0) -> list[Any]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.entries) >= count, within), self.entries
        return self.entries


@pytest.fixture
def three(node):
    """Three servers, their ledgers, and a node that knows them."""
    ledgers = [Ledger(name) for name in ("a", "b", "c")]
    nodes = [node() for _ in ledgers]
    for each, ledger in zip(nodes, ledgers, strict=True):
        each.serve("clock", ledger, server=ledger.name)
    calling = node()
    assert calling.wait_for("clock", count=3, timeout=5.0)
    return calling, ledgers, nodes


# Casts --------------------------------------------------------------------------------------------


def test_cast_runs_once_and_returns_nothing(node) -> None:
    ledger = Ledger()
    serving = node()
    server = serving.serve("clock", ledger)
    assert node().cast("clock", "note", 5) is None
    assert ledger.wait(1) == [5]
    assert server.drain(5.0)
    assert ledger.entries == [5]


def test_cast_returns_once_it_is_taken_in_before_it_has_run(node, gate) -> None:
    serving = node()
    serving.serve("clock", gate)
    client = node().client("clock")
    client.cast("hold")
    gate.wait_entered()
    assert serving.statistics().taken == 1
    gate.open.set()


def test_cast_that_was_taken_in_runs_however_long_it_waits(node, gate) -> None:
    ledger = Ledger()
    serving = node()
    serving.serve("clock", {"hold": gate.hold, "note": ledger.note}, workers=1)
    calling = node()
    calling.cast("clock", "hold")
    gate.wait_entered()
    client = calling.client("clock", timeout=1.0)
    client.cast("note", 1)
    with pytest.raises(CallTimeout):
        client.call("note", 2)  # which shows that their time has passed
    client.cast("note", 3)
    gate.open.set()
    assert ledger.wait(2) == [1, 3]


def test_calls_made_for_a_cast_have_their_own_time(node, gate) -> None:
    ended = Ledger()
    node().serve("slow", gate)
    relaying = node()

    def relay() -> None:
        ended.note(relaying.call("slow", "hold"))

    relaying.serve("relay", {"relay": relay})
    calling = node()
    calling.client("relay", timeout=20.0).ping()
    calling.client("relay", timeout=1.0).cast("relay")
    gate.wait_entered()
    with pytest.raises(CallTimeout):
        calling.client("slow", timeout=1.1).call("hold")
    gate.open.set()
    assert ended.wait(1) == [None]


def test_casts_of_one_thread_run_in_order_at_one_worker(node) -> None:
    ledger = Ledger()
    node().serve("clock", ledger, workers=1)
    client = node().client("clock")
    for number in range(300):
        client.cast("note", number)
    assert ledger.wait(300) == list(range(300))


def test_casts_go_round_the_servers(three, eventually) -> None:
    calling, ledgers, _nodes = three
    client = calling.client("clock")
    for number in range(30):
        client.cast("note", number)
    for ledger in ledgers:
        ledger.wait(5)  # ten each, or a few less where one was busy
    eventually(lambda: sum(len(ledger.entries) for ledger in ledgers) == 30)
    assert sorted(value for ledger in ledgers for value in ledger.entries) == list(range(30))


def test_cast_to_a_named_server_runs_there(three) -> None:
    calling, ledgers, _nodes = three
    calling.client("clock").at("b").cast("note", 5)
    assert ledgers[1].wait(1) == [5]
    assert ledgers[0].entries == ledgers[2].entries == []


def test_cast_whose_handler_fails_is_logged_and_counted(node, caplog, eventually) -> None:
    serving = node()
    serving.serve("clock", Ledger("a"))
    with caplog.at_level(logging.ERROR, "onehop"):
        node().cast("clock", "fail")
        eventually(lambda: serving.statistics().dropped.get("casts whose handler raised") == 1)
    assert "the handler of cast 'fail' of service 'clock' raised" in caplog.text
    assert "a will not" in caplog.text
    eventually(lambda: serving.statistics().taken == 0)


def test_cast_that_nobody_takes_is_an_error(node) -> None:
    with pytest.raises(NoRoute):
        node().client("clock", ready_timeout=0.05).cast("note")


def test_cast_refused_by_a_full_server_is_an_error(node, gate) -> None:
    node(inbox_messages=1).serve("clock", gate)
    client = node().client("clock")
    client.cast("hold")
    gate.wait_entered()
    with pytest.raises(Rejected, match="full"):
        client.cast("hold")
    gate.open.set()


def test_raw_cast_passes_bytes_through(node) -> None:
    listener = node().listen("clock")
    node().client("clock").cast_raw("note", b"raw")
    (incoming,) = listener.poll(timeout=5.0)
    assert (incoming.kind, incoming.method, bytes(incoming.body)) == ("cast", "note", b"raw")
    incoming.done()


def test_many_casts_run_once_each(node) -> None:
    ledger = Ledger()
    serving = node()
    server = serving.serve("clock", ledger, workers=1)
    client = node().client("clock")
    assert client.cast_many("note", ((number,) for number in range(1000))) is None
    assert sorted(ledger.wait(1000)) == list(range(1000))
    assert server.drain(5.0)
    assert len(ledger.entries) == 1000


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_casts_travel_as_many_do(node, count) -> None:
    ledger = Ledger()
    server = node().serve("clock", ledger)
    node().client("clock").cast_many("note", [{"value": number} for number in range(count)])
    assert sorted(ledger.wait(count)) == list(range(count))
    assert server.drain(5.0)
    assert len(ledger.entries) == count


@pytest.mark.parametrize(("wrong", "named"), [(2, "int"), ("ab", "str"), (b"ab", "bytes"), (None, "NoneType")])
def test_many_casts_of_what_are_no_arguments_are_told_which(node, wrong, named) -> None:
    node().serve("clock", Ledger())
    with pytest.raises(EncodeError, match=rf"^run 1 of cast_many is given a {named}; .* as a tuple or a list"):
        node().client("clock").cast_many("note", [(1,), wrong])


def test_many_casts_of_any_size_arrive(node) -> None:
    ledger = Ledger()
    node().serve("clock", ledger, workers=1)
    sizes = [10, 100_000, 1, 5_000, 0, 70_000] * 5
    node().client("clock").cast_many("note", ((b"x" * size,) for size in sizes))
    assert sorted(len(each) for each in ledger.wait(len(sizes))) == sorted(sizes)


def test_one_of_many_casts_that_raises_keeps_no_other_from_running(node, caplog, eventually) -> None:
    ledger = Ledger()

    def note(value: int) -> None:
        if value % 2:
            raise ValueError("odd")
        ledger.note(value)

    serving = node()
    serving.serve("clock", {"note": note}, workers=1)
    with caplog.at_level(logging.ERROR, "onehop"):
        node().client("clock").cast_many("note", ((number,) for number in range(10)))
        assert ledger.wait(5) == [0, 2, 4, 6, 8]
        eventually(lambda: serving.statistics().dropped.get("casts whose handler raised") == 5)


def test_many_casts_to_nobody_are_refused_as_one_is(node) -> None:
    with pytest.raises(NoRoute):
        node().client("clock", ready_timeout=0.05).cast_many("note", [(1,), (2,)])


def test_many_casts_wait_for_a_server_that_is_full(node, gate, eventually) -> None:
    serving = node(inbox_messages=4)
    ran: list[int] = []

    def note(value: int) -> None:
        gate.open.wait(10.0)
        ran.append(value)

    serving.serve("clock", {"note": note}, workers=1)
    client = node().client("clock", timeout=20.0)
    done = threading.Event()

    def cast() -> None:
        client.cast_many("note", ((number,) for number in range(2000)))
        done.set()

    threading.Thread(target=cast, daemon=True).start()
    eventually(lambda: serving.statistics().refused.get("full", 0) > 0)
    assert not done.is_set()
    gate.open.set()
    assert done.wait(20.0)
    eventually(lambda: len(ran) == 2000)
    assert sorted(ran) == list(range(2000))


def test_many_casts_to_a_server_that_stays_full_end_at_the_deadline(node, gate) -> None:
    node(inbox_messages=2).serve("clock", gate, workers=1)
    began = time.monotonic()
    with pytest.raises((Rejected, CallTimeout)):
        node().client("clock", timeout=0.5).cast_many("hold", ((number,) for number in range(5000)))
    assert time.monotonic() - began < 10.0
    gate.open.set()


# Fan-outs -----------------------------------------------------------------------------------------


def test_fanout_reaches_every_server_and_gives_a_receipt_for_each(three) -> None:
    calling, ledgers, nodes = three
    receipts = calling.fanout("clock", "note", 7)
    assert {(receipt.server, receipt.node) for receipt in receipts} == {
        (ledger.name, each.id) for ledger, each in zip(ledgers, nodes, strict=True)
    }
    assert {receipt.outcome for receipt in receipts} == {"taken"}
    assert all(0 < receipt.seconds < 5 and receipt.host and not receipt.reason for receipt in receipts)
    assert [ledger.wait(1) for ledger in ledgers] == [[7]] * 3


def test_fanout_to_a_name_reaches_only_those_of_the_name(three) -> None:
    calling, ledgers, _nodes = three
    (receipt,) = calling.client("clock").at("b").fanout("note")
    assert (receipt.server, receipt.outcome) == ("b", "taken")
    assert len(ledgers[1].wait(1)) == 1


def test_fanout_to_nobody_is_an_empty_list(node) -> None:
    assert node().fanout("clock", "note") == []


def test_fanout_reaches_each_of_two_instances_of_one_name_in_one_node(node) -> None:
    ledgers = [Ledger(), Ledger()]
    serving = node()
    for ledger in ledgers:
        serving.serve("clock", ledger, server="same")
    calling = node()
    (receipt,) = calling.fanout("clock", "note", 1)
    assert receipt.outcome == "taken"
    assert [ledger.wait(1) for ledger in ledgers] == [[1], [1]]
    for number in range(4):
        calling.cast("clock", "note", number)
    assert [len(ledger.wait(3)) for ledger in ledgers] == [3, 3]


def test_fanout_names_who_refused_and_why(node, gate) -> None:
    node(inbox_messages=1).serve("clock", gate, server="full")
    node().serve("clock", {"hold": lambda: None}, server="free")
    calling = node()
    assert calling.wait_for("clock", count=2, timeout=5.0)
    held = calling.client("clock").at("full").start("hold")
    gate.wait_entered()
    receipts = {receipt.server: receipt for receipt in calling.fanout("clock", "hold")}
    assert receipts["free"].outcome == "taken"
    assert receipts["full"].outcome == "refused"
    assert "full" in receipts["full"].reason
    gate.open.set()
    held.result()


def test_fanout_names_who_is_unreachable(three) -> None:
    calling, ledgers, nodes = three
    calling.fanout("clock", "note", 0)
    nodes[1].close()
    receipts = {receipt.server: receipt.outcome for receipt in calling.fanout("clock", "note", 1)}
    assert (receipts["a"], receipts["c"]) == ("taken", "taken")
    assert receipts.get("b") in (None, "unreachable")  # forgotten, or tried in vain
    assert sorted(ledgers[0].wait(2)) == sorted(ledgers[2].wait(2)) == [0, 1]


def test_fanout_of_a_large_body_and_of_many_at_once_reach_everybody(three, background) -> None:
    calling, ledgers, _nodes = three
    large = "x" * 200_000
    assert [receipt.outcome for receipt in calling.fanout("clock", "note", large)] == ["taken"] * 3
    for ledger in ledgers:
        ledger.wait(1)  # taken is not run

    def fan_out(first: int) -> list[str]:
        return [each.outcome for number in range(50) for each in calling.fanout("clock", "note", first + number)]

    under_way = [background(fan_out, first) for first in range(0, 400, 50)]
    assert [each.result(30.0) for each in under_way] == [["taken"] * 150] * 8
    for ledger in ledgers:
        noted = ledger.wait(401)
        assert noted[0] == large
        assert sorted(noted[1:]) == list(range(400))


def test_fanout_through_a_full_window_is_refused_for_that_server_alone(node, gate) -> None:
    node().serve("clock", gate, server="slow")
    node().serve("clock", {"read": lambda: None}, server="quick")
    calling = node(window_messages=2)
    assert calling.wait_for("clock", count=2, timeout=5.0)
    held = [calling.client("clock").at("slow").start("hold") for _ in range(2)]
    gate.wait_entered(2)
    receipts = {receipt.server: receipt for receipt in calling.fanout("clock", "read")}
    assert (receipts["slow"].outcome, receipts["quick"].outcome) == ("refused", "taken")
    assert "as many as the window allows" in receipts["slow"].reason
    gate.open.set()
    for call in held:
        call.result()


# Gathers ------------------------------------------------------------------------------------------


def test_gather_gives_the_reply_of_every_server(three) -> None:
    calling, ledgers, nodes = three
    gathered = calling.gather("clock", "note")
    assert gathered.replies == {
        (ledger.name, each.id): ledger.name for ledger, each in zip(ledgers, nodes, strict=True)
    }
    assert (gathered.errors, gathered.missing) == ({}, [])


def test_gather_names_those_that_failed(node) -> None:
    node().serve("clock", {"read": lambda: 1}, server="a")
    bad = node()
    bad.serve("clock", Ledger("b"), server="b")
    calling = node()
    assert calling.wait_for("clock", count=2, timeout=5.0)
    gathered = calling.gather("clock", "read")
    assert list(gathered.replies.values()) == [1]
    assert gathered.missing == [("b", bad.id)]
    assert isinstance(gathered.errors["b", bad.id], RemoteError)


def test_gather_keeps_partial_results_at_the_deadline(node, gate) -> None:
    slow = node()
    slow.serve("clock", {"read": gate.hold}, server="slow")
    node().serve("clock", {"read": lambda: 1}, server="quick")
    calling = node()
    assert calling.wait_for("clock", count=2, timeout=5.0)
    client = calling.client("clock", timeout=0.5)
    client.options(timeout=20.0).ping()
    began = time.monotonic()
    gathered = client.gather("read")
    assert time.monotonic() - began < 5
    assert list(gathered.replies.values()) == [1]
    assert gathered.missing == [("slow", slow.id)]
    assert gathered.errors["slow", slow.id].executed == "unknown"  # type: ignore[attr-defined]


def test_gather_with_a_monitor_hears_that_slow_servers_live(node, gate, stays_alive) -> None:
    for name in ("a", "b"):
        node().serve("clock", gate, server=name)
    calling = node()
    client = calling.client("clock", monitor=0.3, timeout=20.0)
    assert calling.wait_for("clock", count=2, timeout=5.0)
    patient = client.options(monitor=None)
    assert len(patient.ping()) == len(patient.gather("read").replies) == 2
    gathered = stays_alive(lambda: client.gather("hold"), lambda: gate.wait_entered(2), 0.9)
    assert len(gathered.replies) == 2


def test_gather_runs_side_by_side(node, gate) -> None:
    for name in ("a", "b", "c"):
        node().serve("clock", gate, server=name)
    calling = node()
    assert calling.wait_for("clock", count=3, timeout=5.0)
    opener = threading.Thread(target=lambda: (gate.wait_entered(3), gate.open.set()))
    opener.start()
    assert len(calling.gather("clock", "hold").replies) == 3
    opener.join()


def test_server_that_dies_during_a_gather_is_missing(node, gate, background) -> None:
    doomed = node()
    doomed.serve("clock", gate, server="doomed")
    node().serve("clock", {"hold": lambda: 1}, server="well")
    calling = node()
    assert calling.wait_for("clock", count=2, timeout=5.0)
    doomed_id = doomed.id
    gathering = background(calling.gather, "clock", "hold")
    gate.wait_entered()
    doomed.close()
    gathered = gathering.result(within=3.0)
    assert list(gathered.replies.values()) == [1]
    assert gathered.missing == [("doomed", doomed_id)]
    assert isinstance(gathered.errors["doomed", doomed_id], PeerLost)


def test_ping_tells_the_time_to_every_server(three) -> None:
    calling, _ledgers, _nodes = three
    receipts = calling.ping("clock", timeout=10.0)
    assert sorted((receipt.server, receipt.outcome) for receipt in receipts) == [
        ("a", "taken"), ("b", "taken"), ("c", "taken"),
    ]  # fmt: skip
    assert all(0 < receipt.seconds < 10 for receipt in receipts)


def test_ping_is_answered_while_every_worker_is_busy(node, gate) -> None:
    node().serve("clock", gate, workers=1)
    calling = node()
    held = calling.client("clock").start("hold")
    gate.wait_entered()
    assert [receipt.outcome for receipt in calling.ping("clock")] == ["taken"]
    gate.open.set()
    held.result()
