"""What a caller sees of servers that hang, of connections that end under its calls, and of others who ask too much."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

import onehop
from onehop import Node
from onehop.errors import CallError, CallTimeout, PeerLost, Rejected, RemoteError
from onehop.protocol.liveness import SHORTEST, TIMEOUTS
from onehop.testing.memory import Network

SOON = 6.0
"""Seconds within which a server whose workers hang is avoided."""


def state_of(calling: Any, serving: Any) -> str:
    return next((peer.state for peer in calling.statistics().peers if peer.node == serving.id), "")


# Each test takes seconds, since what it is about does: the threads over ZeroMQ, the loop over memory.
@pytest.fixture(params=["blocking", "asyncio"])
def face(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    if request.param == "blocking":
        yield Node
        return
    with request.getfixturevalue("open_portal")("asyncio") as portal:
        yield portal.node


@pytest.fixture
def node(face: Any, make_node: Callable[..., Any], network: Network) -> Callable[..., Any]:
    """Makes nodes that know each other."""
    return make_node if face is Node else lambda **settings: make_node(network=network, **settings)


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
def in_memory(make_node: Callable[..., Any], network: Network) -> Callable[..., Any]:
    """Makes nodes on ``network``, whose connections can be cut."""
    return lambda **settings: make_node(network=network, **settings)


@pytest.fixture
def closing() -> Iterator[Callable[[Any], Any]]:
    """``closing(x)`` is ``x``, which is closed when the test is over."""
    with ExitStack() as stack:
        yield lambda one: stack.enter_context(contextlib.closing(one))


def cut(network: Network, serving: Any) -> None:
    network.carrier.cut(network.endpoint(bytes.fromhex(serving.id)))


# Who hangs ----------------------------------------------------------------------------------------


def test_a_server_whose_workers_hang_is_not_asked_until_they_move_again(
    node, gate, background, eventually, caplog
) -> None:
    caplog.set_level("INFO", "onehop")
    hung, well, calling = node(), node(), node()
    hung.serve("clock", {"hold": gate.hold, "read": lambda: "hung"}, server="hung", workers=2)
    well.serve("clock", {"read": lambda: "well"}, server="well")
    client = calling.client("clock", timeout=60.0)
    held = [background(client.at("hung").call, "hold", number) for number in range(2)]
    gate.wait_entered(2)
    eventually(lambda: state_of(calling, hung) == "stalled", SOON)
    assert [client.call("read") for _ in range(20)] == ["well"] * 20
    named = background(client.at("hung").call, "read")  # nobody else is asked in its place
    gate.open.set()
    assert named.result() == "hung"
    assert sorted(each.result() for each in held) == [0, 1], "what it had taken it still answers"
    eventually(lambda: state_of(calling, hung) == "ready", 5.0)
    assert {client.call("read") for _ in range(20)} == {"hung", "well"}

    def said() -> list[str]:
        return [each.getMessage() for each in caplog.records if hung.id[:8] in each.getMessage()]

    eventually(lambda: len(said()) == 2, 2.0)
    assert "is stalled: it has not answered" in said()[0], "each change is told once"
    assert "answers again" in said()[1]


def test_where_everybody_hangs_they_are_asked_all_the_same(node, gate, background, eventually) -> None:
    hung, calling = node(), node()
    hung.serve("clock", {"hold": gate.hold, "read": lambda: "late"}, workers=1)
    client = calling.client("clock", timeout=60.0)
    held = background(client.call, "hold", 1)
    gate.wait_entered()
    eventually(lambda: state_of(calling, hung) == "stalled", SOON)
    late = background(client.call, "read")
    gate.open.set()
    assert (held.result(), late.result()) == (1, "late")


def test_a_long_call_does_not_make_a_server_stalled_that_has_a_worker_left(node, gate, background, eventually) -> None:
    serving, calling = node(), node()
    serving.serve("clock", {"hold": gate.hold}, workers=2)
    client = calling.client("clock", timeout=60.0)
    held = background(client.call, "hold", 1)
    gate.wait_entered()
    probed = calling.statistics().peers[0].sent
    eventually(lambda: calling.statistics().peers[0].sent >= probed + 4, 10.0)  # two rounds of questions
    eventually(lambda: calling.statistics().peers[0].in_flight == 1, 5.0)  # both were answered
    assert state_of(calling, serving) == "ready"
    gate.open.set()
    assert held.result() == 1


def test_a_listener_that_is_not_polled_is_stalled_and_one_that_is_polled_is_not(node, background, eventually) -> None:
    serving, calling = node(), node()
    listener = serving.listen("clock")
    answer = background(calling.client("clock", timeout=60.0).call, "read")
    eventually(lambda: state_of(calling, serving) == "stalled", SOON)
    [incoming] = listener.poll(timeout=5.0)
    waiting = background(listener.poll, 1, 5.0)  # in which the echo is answered
    eventually(lambda: state_of(calling, serving) == "ready", 5.0)
    incoming.reply_raw(b"\xc0")
    assert answer.result() is None
    assert waiting.result() == []


def test_who_lets_one_call_after_the_other_time_out_is_not_asked_for_a_while(node, gate, eventually) -> None:
    slow, well, calling = node(), node(), node()
    slow.serve("clock", {"read": gate.hold}, server="slow", workers=16)
    well.serve("clock", {"read": lambda: "well"}, server="well")
    client = calling.client("clock", timeout=0.5)
    calling.wait_for("clock", count=2)
    assert len(client.options(timeout=20.0).ping()) == 2
    outcomes: Counter[str] = Counter()
    while outcomes["unknown"] + outcomes["well"] < 40:
        with contextlib.suppress(Rejected):  # where the machine held a call up, it expired before it ran
            try:
                outcomes[client.call("read")] += 1
            except CallTimeout as error:
                outcomes[error.executed] += 1
    assert outcomes["unknown"] == 5
    assert outcomes["well"] == 35
    assert state_of(calling, slow) == "stalled"


def test_calls_made_in_handlers_with_little_time_left_do_not_make_a_server_stalled(node, gate) -> None:
    behind, between, calling = node(), node(), node()
    behind.serve("clock", {"hold": gate.hold, "read": lambda: "well"}, workers=16)
    client = between.client("clock", timeout=60.0)
    between.serve("desk", {"ask": lambda method: client.call(method)}, workers=16)
    asking = calling.client("desk", timeout=5.0)
    assert asking.call("ask", "read") == "well"
    for _ in range(2 * TIMEOUTS):
        with pytest.raises((CallTimeout, RemoteError, Rejected)):  # whichever is told first; or it was not begun
            asking.options(timeout=SHORTEST / 2).call("ask", "hold")
    assert state_of(between, behind) == "ready"
    gate.open.set()


def test_streams_that_reach_their_deadline_while_items_come_do_not_make_a_server_stalled(node, background) -> None:
    serving, calling = node(), node()

    def ticks() -> Iterator[int]:
        number = 0
        while True:
            yield (number := number + 1)

    serving.serve("clock", {"ticks": ticks}, workers=16)
    client = calling.client("clock", timeout=2 * SHORTEST)
    client.options(timeout=20.0).ping()

    def read() -> None:
        with pytest.raises(CallTimeout):
            for _ in client.stream("ticks"):
                pass

    reading = [background(read) for _ in range(TIMEOUTS + 1)]
    for each in reading:
        each.result()
    assert state_of(calling, serving) == "ready"


def test_answers_that_nobody_reads_are_taken_in_and_their_peer_is_not_blamed(node, eventually) -> None:
    serving, calling = node(), node()
    serving.serve("clock", {"read": lambda number: number}, workers=1)
    client = calling.client("clock", timeout=60.0)
    calls = [client.start("read", number) for number in range(1_500)]
    eventually(lambda: [peer.in_flight for peer in calling.statistics().peers] == [0], 3.0)
    assert state_of(calling, serving) == "ready"
    assert [each.result() for each in calls] == list(range(1_500))


def test_each_thread_that_waits_for_one_call_has_its_result_when_it_comes(node, gate, background, eventually) -> None:
    serving, calling = node(), node()
    held, short = gate, type(gate)()
    serving.serve("clock", {"long": held.hold, "short": short.hold}, workers=4)
    client = calling.client("clock", timeout=60.0)
    leading = background(client.call, "long", 1)
    held.wait_entered()
    call = client.start("short", 2)
    waiting = [background(call.result) for _ in range(3)]
    short.wait_entered()
    short.open.set()
    assert [each.result(5.0) for each in waiting] == [2, 2, 2]
    held.open.set()
    assert leading.result() == 1


def test_stream_cut_by_its_deadline_while_its_server_drains_is_not_told_that_it_did_not_run(
    in_memory, background, eventually
) -> None:
    serving, calling = in_memory(), in_memory()
    serving.serve("clock", {"count": lambda: iter(range(1_000))})
    client = calling.client("clock", timeout=0.5)
    client.options(timeout=20.0).ping()
    stream = iter(client.stream("count"))
    assert next(stream) == 0
    assert background(serving.drain, 20.0).result(10.0)
    with pytest.raises(CallError) as caught:
        list(stream)
    assert caught.value.executed == "unknown"


# Connections that end under calls -----------------------------------------------------------------


def test_a_connection_that_could_not_be_begun_is_begun_at_the_next_call(
    closing: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    closing(Node()).serve("clock", {"read": lambda: 1})
    calling = closing(Node())
    assert calling.wait_for("clock", timeout=5.0)
    gives, full = os.eventfd, [True]

    def eventfd(*arguments: int) -> int:
        if full:
            full.pop()
            raise OSError(errno.ENFILE, "Too many open files in system")
        return gives(*arguments)

    monkeypatch.setattr(os, "eventfd", eventfd)
    with pytest.raises(onehop.ResourceLimit, match=r"no connection to node .* could be begun: .* in system"):
        calling.call("clock", "read")
    assert calling.call("clock", "read") == 1


def test_a_server_that_is_full_and_alone_costs_no_budget_of_retries(in_memory, gate, eventually) -> None:
    serving, calling = in_memory(inbox_messages=1), in_memory()
    serving.serve("clock", gate)
    client = calling.client("clock", timeout=5.0)
    client.cast("hold")
    gate.wait_entered()
    for _ in range(20):
        with pytest.raises(Rejected):
            client.call("read")
    counted = calling.statistics()
    assert (counted.retried, counted.outcomes) == (0, {"Rejected": 20})


def test_a_call_goes_on_over_a_new_connection_and_runs_once(in_memory, network, gate, background) -> None:
    serving, calling = in_memory(), in_memory()
    serving.serve("clock", {"hold": gate.hold})
    call = background(calling.client("clock", timeout=20.0).call, "hold", "four")
    gate.wait_entered()
    cut(network, serving)
    for _ in range(2):
        assert not gate.entered.acquire(timeout=0.5), "it ran a second time"
    gate.open.set()
    assert call.result() == "four"
    assert gate.runs == 1
    assert serving.statistics().received["resumed"] == 1
    assert calling.statistics().outcomes["resumed"] == 1


def test_a_call_whose_next_connection_ends_at_once_too_is_not_sent_a_third_time(
    in_memory, network, gate, background, eventually
) -> None:
    serving, calling = in_memory(), in_memory()
    serving.serve("clock", {"hold": gate.hold})
    call = background(calling.client("clock", timeout=20.0).call, "hold", "four")
    gate.wait_entered()
    cut(network, serving)
    eventually(lambda: serving.statistics().received.get("resumed") == 1)
    cut(network, serving)  # it may be this call that ends them
    with pytest.raises(PeerLost) as caught:
        call.result(within=5.0)
    assert (caught.value.executed, gate.runs) == ("unknown", 1)
    assert calling.statistics().outcomes["resumed"] == 1


def test_a_call_that_was_taken_out_of_its_table_and_got_no_outcome_ends_with_its_deadline(
    in_memory, gate, background
) -> None:
    serving, calling = in_memory(), in_memory()
    serving.serve("clock", {"hold": gate.hold})
    began = time.monotonic()
    call = background(calling.client("clock", timeout=2.0).call, "hold")
    gate.wait_entered()
    inner = calling._core()
    (link,) = getattr(inner, "_inner", inner)._links.values()
    link.calls.pending.popitem()  # as by a thread that was interrupted before it wrote the outcome
    with pytest.raises(CallError) as caught:
        call.result(within=5.0)
    assert caught.value.executed == "unknown"
    assert 2.0 <= time.monotonic() - began < 5.0


def test_many_calls_and_casts_go_on_over_one_new_connection(in_memory, network, gate, background, eventually) -> None:
    serving, calling = in_memory(), in_memory()
    serving.serve("clock", {"hold": gate.hold}, workers=4)
    client = calling.client("clock", timeout=20.0)
    calls = [background(client.call, "hold", number) for number in range(12)]
    gate.wait_entered(4)
    eventually(lambda: serving.statistics().taken == 12)
    cut(network, serving)
    eventually(lambda: serving.statistics().received.get("resumed") == 12)
    gate.open.set()
    assert [each.result() for each in calls] == list(range(12))
    assert gate.runs == 12


def test_a_call_that_was_answered_into_a_connection_that_ended_is_unknown(in_memory, network) -> None:
    serving, calling = in_memory(), in_memory()
    runs, endpoint = [], network.endpoint(bytes.fromhex(serving.id))

    def read() -> str:
        runs.append(1)
        network.carrier.cut(endpoint)
        return "lost"

    serving.serve("clock", {"read": onehop.method(inline=True)(read)})
    with pytest.raises((PeerLost, Rejected)) as caught:
        calling.client("clock", timeout=5.0).call("read")
    assert (caught.value.executed, len(runs)) == ("unknown", 1)


def test_a_call_to_a_server_that_is_gone_is_lost_at_once(in_memory, gate, background) -> None:
    serving, calling = in_memory(), in_memory()
    serving.serve("clock", {"hold": gate.hold})
    call = background(calling.client("clock", timeout=60.0).call, "hold")
    gate.wait_entered()
    serving.close()
    with pytest.raises(PeerLost) as caught:
        call.result(2.0)
    assert caught.value.executed == "unknown"


def test_an_idempotent_call_is_asked_of_another_although_the_record_went_first(in_memory, gate, background) -> None:
    doomed, other, calling = in_memory(), in_memory(), in_memory()
    doomed.serve("clock", {"hold": onehop.method(idempotent=True)(lambda value: gate.hold(value))}, server="doomed")
    client = calling.client("clock", timeout=20.0)
    call = background(client.call, "hold", "four")
    gate.wait_entered()
    other.serve("clock", {"hold": onehop.method(idempotent=True)(lambda value: value)}, server="other")
    doomed.close()  # withdraws its record, then ends its connections
    assert call.result() == "four"
    assert calling.statistics().retried == 1


# Others who ask too much --------------------------------------------------------------------------


def test_one_who_asks_a_thousand_times_does_not_keep_another_waiting(node, background, eventually) -> None:
    serving, flooding, calling = node(), node(), node()
    order: list[str] = []
    gate = threading.Event()

    def work(who: str) -> None:
        assert gate.wait(30.0)
        order.append(who)

    serving.serve("clock", {"work": work}, workers=1)
    flood = [background(flooding.client("clock", timeout=60.0).call, "work", "flood") for _ in range(300)]
    eventually(lambda: serving.statistics().taken == 300, 20.0)
    quiet = background(calling.client("clock", timeout=60.0).call, "work", "quiet")
    eventually(lambda: serving.statistics().taken == 301, 20.0)
    # Taken in, and in its queue a moment later; with an echo or two, where all of this has taken a second.
    eventually(lambda: serving.statistics().waiting >= 300)
    gate.set()
    quiet.result()
    for each in flood:
        each.result(30.0)
    assert order.index("quiet") <= 20
    assert len(order) == 301


def test_casts_of_one_sender_stay_in_their_order_however_many_they_are(node, eventually) -> None:
    serving, calling = node(), node()
    seen: list[int] = []
    serving.serve("clock", {"note": seen.append}, workers=1)
    client = calling.client("clock")
    for number in range(500):
        client.cast("note", number)
    eventually(lambda: len(seen) == 500, 10.0)
    assert seen == list(range(500))


def test_when_all_servers_are_full_retries_stay_within_the_budget(node, gate, background, eventually) -> None:
    servers = [node(inbox_messages=1) for _ in range(3)]
    for number, serving in enumerate(servers):
        serving.serve("clock", {"hold": gate.hold}, server=f"s{number}", workers=1)
    calling = node()
    calling.wait_for("clock", count=3)
    client = calling.client("clock", timeout=60.0)
    held = [background(client.at(f"s{number}").call, "hold") for number in range(3)]
    gate.wait_entered(3)
    refused, began = 0, time.monotonic()
    for _ in range(1_000):
        with pytest.raises(Rejected):
            client.call("hold")
        refused += 1
    statistics, took = calling.statistics(), time.monotonic() - began
    assert statistics.retried < 0.2 * refused + 10 * took + 110, "ten seconds' worth may be used at once"
    assert statistics.outcomes["not retried, beyond the budget"] > 500
    gate.open.set()
    for each in held:
        each.result()
