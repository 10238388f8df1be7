"""Serving: workers, inline methods, draining, and requests that are polled."""

from __future__ import annotations

import threading
import time
from collections import Counter

import pytest

import onehop
from onehop import CallTimeout, NodeClosed, NoRoute, PeerLost, Rejected

# Workers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_handlers_run_side_by_side_in_so_many_workers(node, gate, workers) -> None:
    serving = node()
    serving.serve("clock", gate, workers=workers)
    client = node().client("clock")
    calls = [client.start("hold", number) for number in range(workers + 2)]
    gate.wait_entered(workers)
    assert not gate.entered.acquire(timeout=0.1)
    gate.open.set()
    assert [call.result() for call in calls] == list(range(workers + 2))


def test_workers_come_when_needed_and_are_kept(node) -> None:
    node().serve("clock", {"who": threading.get_ident}, workers=50)
    client = node().client("clock")
    assert len({client.call("who") for _ in range(100)}) <= 10  # one, and those that came while it was on its way back


def test_settings_say_how_many_workers(node, gate) -> None:
    node(workers=2).serve("clock", gate)
    client = node().client("clock")
    calls = [client.start("hold") for _ in range(3)]
    gate.wait_entered(2)
    assert not gate.entered.acquire(timeout=0.1)
    gate.open.set()
    for call in calls:
        call.result()


def test_inline_methods_need_no_worker(request, node, gate) -> None:
    handlers = {
        "who": onehop.method(inline=True)(lambda: threading.current_thread().name),
        "hold": gate.hold,
        "worker": lambda: threading.current_thread().name,
    }
    node().serve("clock", handlers, workers=1)
    client = node().client("clock")
    assert client.call("worker") == "onehop-worker"
    held = client.start("hold")
    gate.wait_entered()
    face = request.node.callspec.params["face"]
    assert client.call("who") == ("onehop-receiver" if face == "blocking" else f"{face} loop")
    gate.open.set()
    held.result()


def test_inline_methods_under_load_do_not_nest(node, background) -> None:
    import sys

    def depth() -> int:
        frame, count = sys._getframe(), 0
        while frame is not None:
            frame, count = frame.f_back, count + 1
        return count

    node().serve("clock", {"depth": onehop.method(inline=True)(depth)})
    client = node().client("clock")

    def work() -> int:
        return max(client.call("depth") for _ in range(300))

    assert max(each.result(within=30) for each in [background(work) for _ in range(16)]) < 30


def test_handler_knows_which_request_it_serves(node) -> None:
    seen: list[onehop.Serving | None] = []
    serving = node()
    serving.serve("clock", {"read": lambda: seen.append(onehop.current())}, server="a")
    calling = node()
    calling.client("clock", timeout=10.0).call("read")
    (now,) = seen
    assert now is not None
    assert (now.service, now.server, now.method, now.sender) == ("clock", "a", "read", calling.id)
    remaining = now.remaining()
    assert remaining is not None
    assert 5 < remaining <= 10.1
    assert onehop.current() is None


def test_two_services_of_one_node_do_not_share_workers(node, gate) -> None:
    serving = node()
    serving.serve("slow", gate, workers=1)
    serving.serve("quick", {"read": lambda: 1}, workers=1)
    calling = node()
    held = calling.client("slow").start("hold")
    gate.wait_entered()
    assert calling.call("quick", "read") == 1
    gate.open.set()
    held.result()


# Draining -----------------------------------------------------------------------------------------


def test_drain_finishes_what_was_taken_and_takes_nothing_new(node, gate, background) -> None:
    serving = node()
    server = serving.serve("clock", gate)
    client = node().client("clock", ready_timeout=0.1)
    held = client.start("hold", "done")
    gate.wait_entered()
    draining = background(server.drain, 10.0)

    def call_until_refused() -> None:
        while True:
            client.call("read")

    with pytest.raises((NoRoute, Rejected)) as caught:
        call_until_refused()
    assert caught.value.executed == "no"
    assert not draining.ended
    gate.open.set()
    assert held.result() == "done"
    assert draining.result() is True


def test_a_node_says_whether_it_serves_drains_or_does_neither(node, gate, background, eventually) -> None:
    serving, calling = node(), node()
    assert serving.statistics().state == "not serving"
    serving.serve("clock", {"hold": gate.hold})
    assert serving.statistics().state == "serving"
    held = background(calling.client("clock").call, "hold")
    gate.wait_entered()
    draining = background(serving.drain)
    eventually(lambda: serving.statistics().state == "draining")
    gate.open.set()
    held.result()
    assert draining.result()
    assert serving.statistics().state == "not serving"
    assert calling.statistics().state == "not serving"


@pytest.mark.parametrize("timeout", [0, 0.1])
def test_drain_that_takes_too_long_says_so(node, gate, timeout) -> None:
    serving = node()
    server = serving.serve("clock", gate)
    held = node().client("clock").start("hold", "done")
    gate.wait_entered()
    began = time.monotonic()
    assert server.drain(timeout) is False
    assert time.monotonic() - began < 5
    gate.open.set()
    assert held.result() == "done"


def test_drained_node_refuses_and_serves_no_more(node) -> None:
    serving = node()
    serving.serve("clock", {"read": lambda: 1})
    client = node().client("clock", ready_timeout=0.05)
    assert client.call("read") == 1
    assert serving.drain() is True
    assert serving.drain() is True
    with pytest.raises((NoRoute, Rejected)):
        client.call("read")
    with pytest.raises(NodeClosed, match="make a new one to serve"):
        serving.serve("other", {"read": lambda: 1})


def test_node_that_was_never_used_drains_at_once(node) -> None:
    assert node().drain() is True


def test_calls_during_a_drain_go_to_another_server_and_none_fails(node, background, eventually) -> None:
    servers = [node() for _ in range(3)]
    runs = Counter()
    lock = threading.Lock()

    def run(number: int) -> int:
        with lock:
            runs[number] += 1
        return number

    for number, each in enumerate(servers):
        each.serve("clock", {"run": run}, server=f"s{number}")
    calling = node()
    assert calling.wait_for("clock", count=3, timeout=5.0)
    client = calling.client("clock")
    stop = threading.Event()

    def work(thread: int) -> int:
        done = 0
        while not stop.is_set():
            number = thread * 1_000_000 + done
            assert client.call("run", number) == number
            done += 1
        return done

    workers = [background(work, thread) for thread in range(6)]
    eventually(lambda: runs)
    for each in servers[:2]:
        each.drain(10.0)
        each.close()
    stop.set()
    done = sum(each.result() for each in workers)
    assert done > 0
    assert len(runs) == done
    assert set(runs.values()) == {1}


def test_closing_with_drain_answers_what_was_taken(node, gate, background) -> None:
    serving = node()
    serving.serve("clock", gate)
    held = node().client("clock").start("hold", 1)
    gate.wait_entered()
    closing = background(lambda: serving.close(drain=True))
    gate.open.set()
    assert held.result() == 1
    closing.result()


def test_closed_server_leaves_the_others_of_its_node(node) -> None:
    serving = node()
    with serving.serve("clock", {"read": lambda: 1}):
        serving.serve("other", {"read": lambda: 2})
        calling = node()
        assert calling.call("clock", "read") == 1
    with pytest.raises((NoRoute, Rejected)):
        calling.client("clock", ready_timeout=0.05).call("read")
    assert calling.call("other", "read") == 2


def test_service_served_again_by_the_same_node_is_found_again(node) -> None:
    serving, calling = node(), node()
    for number in range(3):
        with serving.serve("clock", {"read": lambda number=number: number}):
            assert [calling.call("clock", "read") for _ in range(3)] == [number] * 3
            calling.cast("clock", "read")


# Polling ------------------------------------------------------------------------------------------


def test_polled_request_tells_what_it_is(node) -> None:
    listener = node().listen("clock", server="a")
    calling = node()
    call = calling.client("clock", timeout=10.0, monitor=5.0).start("read", 1)
    (incoming,) = listener.poll(timeout=5.0)
    assert (incoming.kind, incoming.service, incoming.method) == ("call", "clock", "read")
    assert incoming.sender == calling.id
    assert incoming.monitor == 5.0
    assert 5 < incoming.remaining() <= 10.1
    assert (incoming.answered, incoming.cancelled) == (False, False)
    incoming.reply_raw(b"\x05")
    assert incoming.answered
    incoming.reply_raw(b"\x06")
    assert call.result() == 5


def test_poll_returns_as_many_as_are_there_up_to_the_limit(node, eventually) -> None:
    serving = node()
    listener = serving.listen("clock")
    client = node().client("clock")
    calls = [client.start("read") for _ in range(5)]
    found = listener.poll(limit=1, timeout=5.0)
    eventually(lambda: serving.statistics().waiting == 4)
    found += listener.poll(limit=3, timeout=5.0)
    found += listener.poll(limit=10, timeout=5.0)
    assert len(found) == 5
    for number, incoming in enumerate(found):
        incoming.reply_raw(bytes([number]))
    assert [call.result() for call in calls] == [0, 1, 2, 3, 4]


def test_poll_that_finds_nothing_returns_nothing_in_time(node) -> None:
    listener = node().listen("clock")
    began = time.monotonic()
    assert listener.poll(timeout=0.2) == []
    assert 0.19 < time.monotonic() - began < 5
    assert listener.poll(timeout=0) == []


def test_kinds_are_told_apart(node) -> None:
    listener = node().listen("clock")
    calling = node()
    client = calling.client("clock", timeout=5.0)
    client.cast("a")
    client.fanout("b")
    client.start("c")
    stream = client.stream("d")
    found = [listener.poll(timeout=5.0)[0] for _ in range(4)]
    assert [(each.kind, each.method) for each in found] == [
        ("cast", "a"), ("fanout", "b"), ("call", "c"), ("stream", "d"),
    ]  # fmt: skip
    assert repr(found[0]) == "<Incoming cast 'a' of 'clock'>"
    stream.close()


def test_cast_holds_its_room_until_done(node, eventually) -> None:
    serving = node(inbox_messages=1)
    listener = serving.listen("clock")
    client = node().client("clock")
    client.cast("a")
    (incoming,) = listener.poll(timeout=5.0)
    with pytest.raises(Rejected, match="full"):
        client.cast("b")
    incoming.done()
    incoming.done()
    eventually(lambda: serving.statistics().taken == 0)
    client.cast("c")
    assert listener.poll(timeout=5.0)[0].method == "c"


def test_request_that_is_requeued_when_nobody_polls_any_more_is_refused(node) -> None:
    listener = node().listen("clock")
    call = node().client("clock", timeout=20.0).start("read")
    (incoming,) = listener.poll(timeout=5.0)
    listener.close()
    incoming.requeue()
    with pytest.raises(Rejected) as caught:
        call.result()
    assert (caught.value.reason, caught.value.executed) == ("draining", "no")


def test_requeued_request_comes_last(node, eventually) -> None:
    serving = node()
    listener = serving.listen("clock")
    client = node().client("clock")
    client.cast("a")
    client.cast("b")
    (first,) = listener.poll(timeout=5.0)
    eventually(lambda: serving.statistics().waiting == 1)
    first.requeue()
    assert [listener.poll(timeout=5.0)[0].method for _ in range(2)] == ["b", "a"]


def test_stop_wakes_who_polls_and_leaves_what_was_taken(node, background, eventually) -> None:
    serving = node()
    listener = serving.listen("clock")
    other = serving.listen("other")
    polling = background(listener.poll, 1, None)
    second = background(other.poll, 1, None)
    listener.stop()
    assert polling.result(within=2.0) == []
    other.stop()
    assert second.result(within=2.0) == []


def test_what_was_taken_before_stop_stays_to_be_polled(node, eventually) -> None:
    serving = node()
    listener = serving.listen("clock")
    call = node().client("clock").start("read")
    eventually(lambda: serving.statistics().waiting == 1)
    listener.stop()
    listener.stop()
    (incoming,) = listener.poll()
    incoming.reply_raw(b"\x05")
    assert call.result() == 5
    assert listener.poll() == []


def test_close_refuses_what_was_not_polled(node, eventually) -> None:
    serving = node()
    listener = serving.listen("clock")
    call = node().client("clock", ready_timeout=0.05).start("read")
    eventually(lambda: serving.statistics().waiting == 1)
    listener.close()
    listener.close()
    with pytest.raises(Rejected, match="draining") as caught:
        call.result()
    assert caught.value.executed == "no"
    assert listener.poll() == []


def test_stopped_listener_is_no_server_any_more(node) -> None:
    listener = node().listen("clock")
    calling = node()
    assert calling.wait_for("clock", timeout=5.0)
    listener.stop()
    with pytest.raises((NoRoute, Rejected)) as caught:
        calling.client("clock", ready_timeout=0.05).call("read")
    assert caught.value.executed == "no"


def test_request_that_expired_before_it_was_polled_is_passed_over(node, eventually) -> None:
    serving = node()
    listener = serving.listen("clock")
    client = node().client("clock")
    client.options(timeout=20.0).ping()
    late = client.options(timeout=1.0).start("late")
    eventually(lambda: serving.statistics().waiting == 1)
    with pytest.raises(CallTimeout):
        late.result()
    client.cast("prompt")
    assert listener.poll(timeout=5.0)[0].method == "prompt"
    eventually(lambda: serving.statistics().refused.get("expired") == 1)


def test_two_listeners_on_one_name_share_the_calls(node, background) -> None:
    serving = node()
    listeners = [serving.listen("clock", server="a") for _ in range(2)]

    def answer(listener, number: int) -> int:
        count = 0
        while found := listener.poll(timeout=None):
            found[0].reply_raw(bytes([number]))
            count += 1
        return count

    answering = [background(answer, listener, number) for number, listener in enumerate(listeners)]
    client = node().client("clock")
    assert Counter(client.call("read") for _ in range(40)) == {0: 20, 1: 20}
    for listener in listeners:
        listener.stop()
    assert [each.result() for each in answering] == [20, 20]


def test_one_listener_may_offer_several_services(node) -> None:
    listener = node().listen(("clock", "alarm"), server="a")
    calling = node()
    for service in ("clock", "alarm"):
        calling.cast(service, "set")
        (incoming,) = listener.poll(timeout=5.0)
        assert (incoming.service, incoming.server) == (service, "a")
        incoming.done()


def test_many_threads_may_poll_one_listener(node, background) -> None:
    listener = node().listen("clock")

    def answer() -> int:
        count = 0
        while found := listener.poll(timeout=None):
            for incoming in found:
                incoming.reply_raw(bytes(incoming.body))
                count += 1
        return count

    answering = [background(answer) for _ in range(4)]
    client = node().client("clock")

    def call(thread: int) -> int:
        bodies = [bytes([thread, number]) for number in range(200)]
        return sum(bytes(client.call_raw("read", body)) == body for body in bodies)

    assert [each.result(within=60) for each in [background(call, thread) for thread in range(8)]] == [200] * 8
    listener.stop()
    assert sum(each.result() for each in answering) == 1600


def test_caller_that_gives_up_is_seen_in_the_request(node, eventually) -> None:
    listener = node().listen("clock")
    calling = node()
    call = calling.client("clock").start("read")
    (incoming,) = listener.poll(timeout=5.0)
    call.cancel()

    def seen() -> bool:
        listener.poll(timeout=0)
        return incoming.cancelled

    eventually(seen)
    incoming.reply_raw(b"\x05")


def test_listener_of_a_closed_node_polls_nothing(node, background) -> None:
    serving = node()
    listener = serving.listen("clock")
    polling = background(listener.poll, 1, None)
    serving.close()
    assert polling.result(within=2.0) == []
    assert listener.poll() == []
    listener.stop()
    listener.close()


def test_node_that_closes_lets_its_callers_know(node, gate) -> None:
    serving = node()
    serving.serve("clock", gate)
    call = node().client("clock").start("hold")
    gate.wait_entered()
    began = time.monotonic()
    serving.close()
    with pytest.raises(PeerLost):
        call.result()
    assert time.monotonic() - began < 3.0
