"""Calls: what arrives, who answers, when it ends."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections import Counter
from typing import Any

import pytest

import onehop
from onehop import CallTimeout, NoRoute, NoSuchMethod, PeerLost, Rejected, SettingsError

LATENESS = 0.1  # seconds: what the promise allows beyond a deadline


def echo(*arguments: Any, **keywords: Any) -> list[Any]:
    return [list(arguments), keywords]


def lateness(call: Any, deadline: float, times: int = 3) -> float:
    """By how much a call that must time out overran; the best of a few, since the machine may be busy."""
    best = float("inf")
    for _ in range(times):
        began = time.monotonic()
        with pytest.raises((CallTimeout, Rejected)) as caught:
            call()
        # Where the machine held a short call up, it expired at the server before it ran, which may be heard first.
        assert getattr(caught.value, "reason", "expired") == "expired"
        best = min(best, time.monotonic() - began - deadline)
    return best


def quickest(call: Any, times: int = 3) -> float:
    """Seconds that it takes; the least of a few, since the machine may be busy."""
    took = []
    for _ in range(times):
        began = time.monotonic()
        call()
        took.append(time.monotonic() - began)
    return min(took)


# What arrives -------------------------------------------------------------------------------------


def test_three_lines_make_a_server_and_three_a_client(run_directory: str) -> None:
    server = "import onehop, time\nnode = onehop.Node()\nnode.serve('clock', {'read': time.time}); input()"
    client = "import onehop\nnode = onehop.Node()\nprint(node.call('clock', 'read'))"
    with subprocess.Popen([sys.executable, "-c", server], stdin=subprocess.PIPE) as process:
        with onehop.Node() as looking:
            assert looking.wait_for("clock", timeout=20.0)
        answer = subprocess.run([sys.executable, "-c", client], capture_output=True, text=True, timeout=30, check=True)
        process.communicate(b"\n", timeout=10)
    assert abs(float(answer.stdout) - time.time()) < 30
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "keywords"),
    [
        ((), {}),
        ((1, "two", None, 3.5), {}),
        ((), {"zone": "utc", "method": 1, "self": 2, "timeout": 3}),
        (([{"a": [1]}],), {"b": b"\x00\xff"}),
    ],
)
def test_arguments_arrive_as_they_were_given(node, arguments, keywords) -> None:
    node().serve("clock", {"echo": echo})
    assert node().call("clock", "echo", *arguments, **keywords) == [list(arguments), keywords]


def test_node_calls_a_service_of_its_own(node) -> None:
    own = node()
    own.serve("clock", {"echo": echo})
    assert own.call("clock", "echo", 1) == [[1], {}]


def test_proxy_calls_by_attribute(node) -> None:
    node().serve("clock", {"echo": echo})
    proxy = node().client("clock").proxy
    assert proxy.echo(1, zone="utc") == [[1], {"zone": "utc"}]
    with pytest.raises(AttributeError):
        proxy.__wrapped__  # noqa: B018


def test_object_module_dict_and_function_can_be_served(node) -> None:
    import string

    class Clock:
        zone = "utc"

        def read(self) -> str:
            return self.zone

        def _hidden(self) -> None: ...

    serving = node()
    serving.serve("object", Clock())
    serving.serve("module", string)
    serving.serve("dict", {"echo": echo})
    serving.serve("function", echo)
    client = node()
    assert client.call("object", "read") == "utc"
    assert client.call("module", "capwords", "a b") == "A B"
    assert client.call("dict", "echo", 1) == client.call("function", "echo", 1) == [[1], {}]
    with pytest.raises(NoSuchMethod):
        client.call("object", "_hidden")


def test_raw_calls_pass_bytes_through(node, background) -> None:
    listener = node().listen("clock")
    answered = background(lambda: listener.poll(timeout=10)[0].reply_raw(b"out"))
    client = node()
    assert client.client("clock").call_raw("read", b"in") == b"out"
    answered.result()


# Begun calls --------------------------------------------------------------------------------------


def test_started_calls_run_side_by_side(node, gate) -> None:
    node().serve("clock", gate)
    client = node().client("clock")
    calls = [client.start("hold", number) for number in range(4)]
    gate.wait_entered(4)
    assert not any(call.done for call in calls)
    gate.open.set()
    assert [call.result() for call in calls] == [0, 1, 2, 3]
    assert all(call.done for call in calls)
    assert calls[0].result() == 0


def test_started_call_becomes_done_without_being_waited_for(node, eventually) -> None:
    node().serve("clock", {"echo": echo})
    call = node().client("clock").start("echo")
    eventually(lambda: call.done)
    assert call.result() == [[], {}]


def test_cancelled_call_raises_and_the_server_hears_of_it(node, gate, background, eventually) -> None:
    heard: list[Any] = []

    def work() -> None:
        heard.append(onehop.current())
        gate.hold()

    node().serve("clock", {"work": work})
    call = node().client("clock").start("work")
    waiting = background(call.result)
    gate.wait_entered()
    assert call.cancel() is True
    assert call.cancel() is False
    with pytest.raises(onehop.CallCancelled):
        waiting.result(within=2.0)
    with pytest.raises(onehop.CallCancelled):
        call.result()
    eventually(lambda: heard[0].cancelled)


def test_cancelled_call_that_waits_in_the_queue_does_not_run(node, gate, eventually) -> None:
    serving = node()
    serving.serve("clock", gate, workers=1)
    client = node().client("clock")
    first = client.start("hold")
    gate.wait_entered()
    second = client.start("hold")
    eventually(lambda: serving.statistics().waiting == 1)
    assert second.cancel()
    eventually(lambda: serving.statistics().received.get("cancelled") == 1)
    gate.open.set()
    first.result()
    assert client.call("read") == 1


def test_cancel_after_the_reply_changes_nothing(node, eventually) -> None:
    node().serve("clock", {"echo": echo})
    call = node().client("clock").start("echo")
    eventually(lambda: call.done)
    assert call.cancel() is False
    assert call.result() == [[], {}]


# Deadlines ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("deadline", [0.02, 0.3])
def test_call_ends_at_its_deadline(node, gate, deadline) -> None:
    node().serve("clock", gate)
    client = node().client("clock", timeout=deadline)
    client.options(timeout=10.0).call("read")
    assert -0.001 <= lateness(lambda: client.call("hold"), deadline) < LATENESS


def test_timed_out_call_says_that_it_may_have_run(node, gate) -> None:
    node().serve("clock", gate)
    client = node().client("clock", timeout=0.3)
    client.options(timeout=10.0).call("read")
    with pytest.raises(CallTimeout, match=r"'hold' of service 'clock'.*did not answer within") as caught:
        client.call("hold")
    assert caught.value.executed == "unknown"
    assert isinstance(caught.value, TimeoutError)


def test_reply_after_the_deadline_is_dropped_and_counted(node, gate, eventually) -> None:
    node().serve("clock", gate)
    calling = node()
    client = calling.client("clock", timeout=0.5)
    client.options(timeout=10.0).call("read")
    call = client.start("hold", "late")
    gate.wait_entered()
    with pytest.raises(CallTimeout):
        call.result()
    gate.open.set()
    eventually(lambda: sum(peer.late for peer in calling.statistics().peers) == 1)
    assert client.options(timeout=10.0).call("read") == 1


def test_nested_call_inherits_the_deadline(node, gate) -> None:
    node().serve("slow", gate)
    middle = node()
    took: list[float] = []

    def relay() -> None:
        began = time.monotonic()
        try:
            middle.client("slow", timeout=30.0).call("hold")
        finally:
            took.append(time.monotonic() - began)

    server = middle.serve("middle", {"relay": relay})
    client = node().client("middle", timeout=0.3)
    client.options(timeout=20.0).ping()
    middle.client("slow", timeout=20.0).ping()
    for _ in range(10):
        with pytest.raises((CallTimeout, onehop.RemoteError, Rejected)):  # its own, the nested one's, or not begun
            client.call("relay")
        if len(took) == 3:
            break
    assert server.drain(5.0)
    assert min(took) < 0.3 + LATENESS


def test_deadline_is_not_inherited_by_what_comes_after(node, gate) -> None:
    serving = node()
    serving.serve("clock", gate, workers=1)
    held = node().client("clock", timeout=0.5).start("hold")
    gate.wait_entered()
    with pytest.raises(CallTimeout):
        held.result()
    gate.open.set()
    assert node().client("clock", timeout=10.0).call("read") == 1
    assert onehop.current() is None


def test_shorter_deadline_of_the_nested_call_holds(node, gate) -> None:
    node().serve("slow", gate)
    middle = node()
    middle.serve("middle", {"relay": lambda: middle.client("slow", timeout=0.1).call("hold")})
    with pytest.raises(onehop.RemoteError) as caught:
        node().client("middle", timeout=10.0).call("relay")
    assert caught.value.type == "CallTimeout"


def test_expired_request_is_not_run(node, gate, eventually) -> None:
    serving = node()
    serving.serve("clock", gate, workers=1)
    client = node().client("clock", timeout=20.0)
    first = client.start("hold")
    gate.wait_entered()
    with pytest.raises(CallTimeout):
        client.options(timeout=0.3).call("hold")
    eventually(lambda: serving.statistics().received.get("cancelled") == 1)  # its caller's word, or its own deadline
    gate.open.set()
    first.result()
    assert client.call("read") == 1
    eventually(lambda: serving.statistics().refused.get("expired") == 1)


# Signs of life ------------------------------------------------------------------------------------


def test_heartbeats_keep_a_monitored_call_alive(node, gate, stays_alive) -> None:
    node().serve("clock", gate)
    client = node().client("clock", timeout=30.0, monitor=0.4)
    assert stays_alive(lambda: client.call("hold", "done"), gate.wait_entered, 1.5) == "done"


def test_heartbeats_cover_the_time_in_the_queue(node, gate, stays_alive, eventually) -> None:
    serving = node()
    serving.serve("clock", gate, workers=1)
    client = node().client("clock", timeout=30.0)
    first = client.start("hold")
    gate.wait_entered()
    monitored = client.options(monitor=0.4)

    def waits() -> None:
        eventually(lambda: serving.statistics().waiting > 0)

    assert stays_alive(lambda: monitored.call("hold", "second"), waits, 1.2) == "second"
    first.result()


def test_monitored_gather_hears_heartbeats_too(node, gate, stays_alive) -> None:
    node().serve("clock", gate)
    client = node().client("clock", timeout=30.0, monitor=0.4)
    client.options(monitor=None).call("read")
    gathered = stays_alive(lambda: client.gather("hold", 7), gate.wait_entered, 1.0)
    assert list(gathered.replies.values()) == [7]


# Which server -------------------------------------------------------------------------------------


def names_of(client: Any, calls: int) -> list[str]:
    return [client.call("name") for _ in range(calls)]


@pytest.mark.parametrize("servers", [2, 3, 5])
def test_calls_go_round_the_servers_strictly(node, servers) -> None:
    for number in range(servers):
        node().serve("clock", {"name": lambda number=number: f"s{number}"}, server=f"s{number}")
    calling = node()
    assert calling.wait_for("clock", count=servers, timeout=5.0)
    client = calling.client("clock")
    names_of(client, servers)  # connects
    told = names_of(client, 6 * servers)
    assert told[:servers] * 6 == told
    assert len(set(told)) == servers


def test_calls_go_round_the_instances_inside_one_node(node) -> None:
    serving = node()
    for name in ("a", "b", "b"):
        serving.serve("clock", {"name": lambda name=name: name}, server=name)
    client = node().client("clock")
    names_of(client, 3)
    assert Counter(names_of(client, 30)) == {"a": 10, "b": 20}


def test_busy_server_is_passed_over(node, gate) -> None:
    node().serve("clock", {"name": lambda: "busy", "hold": gate.hold}, server="busy")
    node().serve("clock", {"name": lambda: "free"}, server="free")
    calling = node()
    assert calling.wait_for("clock", count=2, timeout=5.0)
    client = calling.client("clock")
    names_of(client, 4)
    held = client.at("busy").start("hold")
    gate.wait_entered()
    assert set(names_of(client, 10)) == {"free"}
    gate.open.set()
    held.result()
    assert set(names_of(client, 10)) == {"busy", "free"}


def test_named_server_answers_and_no_other(node) -> None:
    for name in ("a", "b", "c"):
        node().serve("clock", {"name": lambda name=name: name}, server=name)
    calling = node()
    assert calling.wait_for("clock", count=3, timeout=5.0)
    client = calling.client("clock")
    for name in ("a", "b", "c"):
        assert set(names_of(client.at(name), 5)) == {name}


def test_named_server_that_is_away_is_never_replaced(node) -> None:
    node().serve("clock", {"name": lambda: "a"}, server="a")
    gone = node()
    gone.serve("clock", {"name": lambda: "b"}, server="b")
    calling = node()
    assert calling.wait_for("clock", count=2, timeout=5.0)
    client = calling.client("clock", ready_timeout=0.1)
    assert client.at("b").call("name") == "b"
    gone.close()
    with pytest.raises((NoRoute, PeerLost)):
        client.at("b").call("name")
    with pytest.raises(NoRoute, match=r"service 'clock' at server 'b'.*known servers: 'a'") as caught:
        client.at("b").call("name")
    assert caught.value.executed == "no"


# Nobody there -------------------------------------------------------------------------------------


def test_unknown_service_is_one_clear_sentence_at_once(node) -> None:
    node().serve("clock", {"echo": echo})
    calling = node()
    assert calling.wait_for("clock", timeout=5.0)

    def call() -> None:
        with pytest.raises(NoRoute):
            calling.client("clocks", ready_timeout=0).call("read")

    assert quickest(call) < 0.5
    with pytest.raises(NoRoute) as caught:
        calling.client("clocks", ready_timeout=0).call("read")
    assert caught.value.executed == "no"
    assert "nobody offers service 'clocks'" in str(caught.value)
    assert "known services: 'clock'" in str(caught.value)
    assert "registry ('local') and realm ('')" in str(caught.value)


def test_ready_timeout_bounds_the_wait_for_a_server(node) -> None:
    calling = node()

    def call() -> None:
        with pytest.raises(NoRoute, match="known services: none at all"):
            calling.client("clock", ready_timeout=0.3).call("read")

    assert 0.29 < quickest(call) < 0.9


def test_ready_timeout_is_a_second_by_default(node) -> None:
    began = time.monotonic()
    with pytest.raises(NoRoute, match=r"waited 1 s"):
        node().call("clock", "read")
    assert 0.99 < time.monotonic() - began < 5


def test_call_waits_for_a_server_that_comes(node, background) -> None:
    calling = node()
    looking = threading.Event()
    calling.on_change(looking.set)
    call = background(calling.client("clock", ready_timeout=10.0).call, "echo", 1)
    assert looking.wait(5.0)
    node().serve("clock", {"echo": echo})
    assert call.result(within=3.0) == [[1], {}]


def test_deadline_ends_the_wait_for_a_server(node) -> None:
    calling = node()
    calling.servers()
    began = time.monotonic()
    with pytest.raises(CallTimeout, match="nobody offered service 'clock' before the deadline") as caught:
        calling.client("clock", timeout=0.2, ready_timeout=float("inf")).call("read")
    assert caught.value.executed == "no"
    assert 0.19 < time.monotonic() - began < 5


# Trying again -------------------------------------------------------------------------------------


def test_methods_declared_idempotent_are_sent_again_after_a_loss(node, gate, background) -> None:
    declared = onehop.method(idempotent=True)
    doomed = node()
    doomed.serve("clock", {"hold": declared(lambda: gate.hold())}, server="doomed")
    calling = node()
    call = background(calling.client("clock").call, "hold")
    gate.wait_entered()
    node().serve("clock", {"hold": declared(lambda: "second")}, server="second")
    assert calling.wait_for("clock", count=2, timeout=5.0)
    doomed.close()
    assert call.result() == "second"
    assert calling.statistics().retried == 1


def test_other_methods_are_not_sent_again(node, gate, background) -> None:
    doomed = node()
    doomed.serve("clock", gate, server="doomed")
    calling = node()
    call = background(calling.client("clock").call, "hold")
    gate.wait_entered()
    node().serve("clock", {"hold": lambda: "second"}, server="second")
    assert calling.wait_for("clock", count=2, timeout=5.0)
    doomed.close()
    with pytest.raises(PeerLost, match="it is unknown whether it ran") as caught:
        call.result(within=2.0)
    assert caught.value.executed == "unknown"
    assert calling.statistics().outcomes == {"PeerLost": 1}


def test_client_may_declare_methods_idempotent(node, gate, background) -> None:
    doomed = node()
    doomed.serve("clock", gate, server="doomed")
    calling = node()
    call = background(calling.client("clock", idempotent=True).call, "hold")
    gate.wait_entered()
    node().serve("clock", {"hold": lambda: "second"}, server="second")
    assert calling.wait_for("clock", count=2, timeout=5.0)
    doomed.close()
    assert call.result() == "second"


def test_client_may_forbid_what_the_server_declared(node, gate, background) -> None:
    doomed = node()
    doomed.serve("clock", {"hold": onehop.method(idempotent=True)(lambda: gate.hold())})
    calling = node()
    call = background(calling.client("clock", idempotent=False).call, "hold")
    gate.wait_entered()
    doomed.close()
    with pytest.raises(PeerLost):
        call.result()


# Full ---------------------------------------------------------------------------------------------


def test_full_inbox_refuses_and_says_so(node, gate) -> None:
    serving = node(inbox_messages=2)
    serving.serve("clock", gate, workers=1)
    client = node().client("clock")
    held = [client.start("hold", number) for number in range(2)]
    gate.wait_entered()
    began = time.monotonic()
    with pytest.raises(Rejected, match="2 requests are taken in and not answered") as caught:
        client.call("hold")
    assert (caught.value.reason, caught.value.executed) == ("full", "no")
    assert time.monotonic() - began < 5
    gate.open.set()
    assert [call.result() for call in held] == [0, 1]
    assert client.call("read") == 2
    assert serving.statistics().refused == {"full": 1}


def test_full_inbox_counts_bytes_too(node, gate) -> None:
    node(inbox_bytes=100_000).serve("clock", gate)
    client = node().client("clock")
    held = client.start("hold", b"x" * 90_000)
    gate.wait_entered()
    with pytest.raises(Rejected, match="full"):
        client.call("hold", b"x" * 20_000)
    gate.open.set()
    assert len(held.result()) == 90_000


def test_full_server_is_replaced_by_one_with_room(node, gate) -> None:
    node(inbox_messages=1).serve("clock", gate, server="full")
    calling = node()
    held = calling.client("clock").start("hold")
    gate.wait_entered()
    node().serve("clock", {"read": lambda: "room"}, server="room")
    assert calling.wait_for("clock", count=2, timeout=5.0)
    assert [calling.call("clock", "read") for _ in range(4)] == ["room"] * 4
    gate.open.set()
    held.result()


def test_full_window_refuses_before_sending(node, gate) -> None:
    node().serve("clock", gate)
    client = node(window_messages=3).client("clock")
    client.call("read")
    held = [client.start("hold") for _ in range(3)]
    with pytest.raises(Rejected, match="as many as the window allows; slow down, or raise window_messages") as caught:
        client.call("hold")
    assert (caught.value.reason, caught.value.executed) == ("full", "no")
    gate.open.set()
    for call in held:
        call.result()
    assert client.call("read") == 3


# Options ------------------------------------------------------------------------------------------


def test_options_make_another_client(node) -> None:
    client = node().client("clock", timeout=5.0)
    other = client.options(server="a", timeout=1.0)
    assert (client.server, other.server, other.service) == ("", "a", "clock")
    assert repr(other) == "<Client of service 'clock' at server 'a'>"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"timeout": 0}, "timeout is 0; it must be a number of seconds above 0"),
        ({"timeout": float("nan")}, "timeout is nan"),
        ({"monitor": -1}, "monitor is -1; it must be a number of seconds above 0"),
        ({"ready_timeout": -1}, "ready_timeout is -1; it must be 0 or more seconds"),
    ],
)
def test_options_that_cannot_be_are_refused(node, options, told) -> None:
    with pytest.raises(SettingsError, match=told):
        node().client("clock", **options)


def test_unknown_option_is_named_with_those_there_are(node) -> None:
    with pytest.raises(SettingsError, match="no option is called 'tiemout'; there are: server, timeout"):
        node().client("clock").options(tiemout=1.0)


@pytest.mark.parametrize("service", ["", None, 5])
def test_service_must_be_a_name(node, service) -> None:
    with pytest.raises(SettingsError, match="it must be a name, such as 'clock'"):
        node().client(service)


# Many at once -------------------------------------------------------------------------------------


def test_threads_on_one_client_get_each_its_own_reply(node, background) -> None:
    node().serve("clock", {"echo": lambda thread, number: [thread, number]})
    client = node().client("clock")

    def work(thread: int) -> int:
        return sum(client.call("echo", thread, number) == [thread, number] for number in range(200))

    assert [each.result(within=60) for each in [background(work, thread) for thread in range(16)]] == [200] * 16


def test_result_asked_for_again_after_a_timeout_ends_at_once(node, gate) -> None:
    node().serve("slow", gate)
    client = node().client("slow", timeout=0.2)
    client.options(timeout=10.0).call("read")  # a connection takes its time
    call = client.start("hold")
    with pytest.raises(CallTimeout):
        call.result()
    with pytest.raises(onehop.CallError):
        call.result()
    gate.open.set()


def test_calls_that_nobody_asks_the_result_of_leave_the_table_after_their_deadline(node, gate, eventually) -> None:
    node().serve("slow", gate)
    calling = node()
    calling.call("slow", "read")  # a connection takes its time
    for _ in range(5):
        calling.client("slow", timeout=0.2).start("hold")
    eventually(lambda: [each.in_flight for each in calling.statistics().peers] == [0], 10.0)
    gate.open.set()


def test_registry_that_fails_keeps_no_service_half_withdrawn(node, caplog) -> None:
    serving = node()
    server = serving.serve("clock", {"read": lambda: 1})
    client = node().client("clock", timeout=2.0, ready_timeout=0.0)
    assert client.call("read") == 1
    registry = serving._engine.registry
    withdraw = registry.withdraw

    def fail() -> None:
        raise onehop.RegistryError("it is away")

    registry.withdraw = fail  # the interface allows it to fail so
    with caplog.at_level(logging.WARNING, "onehop"):
        server.close()
    assert "the registry lists 'clock' at " in caplog.text
    with pytest.raises(onehop.CallError) as caught:
        client.call("read")
    assert caught.value.executed == "no"
    registry.withdraw = withdraw


def test_call_after_a_broken_connection_to_a_living_server_waits_for_it_and_succeeds(node) -> None:
    serving = node()
    serving.serve("clock", {"read": lambda: 1}, server="a")
    calling = node()
    client = calling.client("clock", server="a")
    assert client.call("read") == 1
    for _ in range(3):
        inner = calling._core()
        engine = getattr(inner, "_inner", inner)
        (link,) = list(engine._links.values())
        engine._lost(link.peer, link, "broken for this test")
        assert client.call("read") == 1
