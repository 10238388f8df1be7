"""What real Nova and Neutron ask of a driver, one test (or a few) for each need, with programs that do what they do."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import oslo_messaging
import pytest
from oslo_config import cfg
from oslo_messaging.rpc import dispatcher
from oslo_messaging.transport import TransportURL


class Endpoint:
    """Notes what runs."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.release = threading.Event()

    def echo(self, ctxt: Any, value: Any = None) -> Any:
        return value

    def note(self, ctxt: Any, value: Any = None) -> None:
        self.seen.append(value)

    def context(self, ctxt: dict[str, Any]) -> dict[str, Any]:
        return ctxt

    def hold(self, ctxt: Any) -> str:
        self.seen.append("hold")
        self.release.wait(30)
        return "done"

    def blob(self, ctxt: Any, size: int) -> str:
        return "x" * size


def in_thread(function: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Run it beside; the list gets its result or its exception."""
    came: list[Any] = []

    def run() -> None:
        try:
            came.append(function())
        except Exception as error:
            came.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, came


# --- only MessagingTimeout is forgiven --------------------------------------------------------------------------------


def test_a_call_to_nobody_ends_as_messaging_timeout_at_its_deadline(bus: Any) -> None:
    began = time.monotonic()
    with pytest.raises(oslo_messaging.MessagingTimeout) as caught:
        bus.client("conductor", timeout=1).call({}, "ping")
    assert 0.95 < time.monotonic() - began < 2.5
    assert "openstack/conductor" in str(caught.value)


def test_a_call_before_anyone_serves_succeeds_when_a_server_arrives_in_time(bus: Any, start: Any) -> None:
    client = bus.client("compute", timeout=15)
    thread, came = in_thread(lambda: client.call({}, "echo", value="late but there"))
    start("serve").line()
    thread.join(15)
    assert came == ["late but there"]


def test_a_call_to_an_absent_named_server_is_not_given_to_another(bus: Any) -> None:
    here = Endpoint()
    bus.serve("compute", here, server="host-1")
    with pytest.raises(oslo_messaging.MessagingTimeout):
        bus.client("compute", server="host-2", timeout=0.5).call({}, "note", value=1)
    assert here.seen == []


def test_a_cast_to_an_absent_host_neither_raises_nor_blocks_and_arrives_when_it_comes(bus: Any, start: Any) -> None:
    client = bus.client("compute", server="host-7")
    began = time.monotonic()
    for number in range(10):
        client.cast({}, "note", value=number)
    assert time.monotonic() - began < 5
    arriving = start("serve", server="host-7")
    assert [arriving.line().get("ran", "ready") for _ in range(11)].count("ready") == 1
    assert sorted(arriving.ran()) == list(range(10))


def test_casts_wait_while_a_host_restarts(bus: Any, start: Any, eventually: Any) -> None:
    first = start("serve")
    first.line()
    transport = bus.transport()
    client = bus.client("compute", transport, server="host-1")
    client.cast({}, "note", value="before")
    eventually(lambda: first.ran() == ["before"])
    first.tell("stop")
    first.wait()
    # What is sent to who was there a moment ago is as good as lost: it is told, and not sent again.
    eventually(lambda: not transport._driver.core.node.servers("openstack/compute"))
    client.cast({}, "note", value="between")
    again = start("serve")
    eventually(lambda: again.ran() == ["between"])
    assert first.ran() == ["before"]


# --- fork after the transport exists ----------------------------------------------------------------------------------


def test_constructing_makes_no_thread_socket_or_file(start: Any) -> None:
    found = start("construct").line()
    assert found["after"] == found["before"]
    assert found["directory"] == []


@pytest.mark.parametrize("used", ["no", "yes"])
def test_workers_forked_from_one_parent_serve_each_with_a_node_of_its_own(start: Any, bus: Any, used: str) -> None:
    start("serve", topic="warm-up", server="w").line()
    parent = start("fork_workers", used=used)
    assert parent.line() == "ready"
    workers = []
    for _ in range(2):
        parent.tell("fork")
        workers.append(parent.line())
    transport = bus.transport()
    client, node = bus.client("conductor", transport), transport._driver.core.node
    assert node.wait_for("openstack/conductor", count=2, timeout=10)
    answered = {client.call({}, "pid") for _ in range(4)}
    assert answered == {worker["worker"] for worker in workers}
    # After a crash or SIGHUP another one is forked from the same parent.
    parent.tell("fork")
    workers.append(parent.line())
    assert node.wait_for("openstack/conductor", count=3, timeout=10)
    answered = {client.call({}, "pid") for _ in range(6)}
    assert answered == {worker["worker"] for worker in workers}
    assert len({worker["node"] for worker in workers}) == 3
    parent.tell("end")
    if used == "yes":
        assert parent.line() == {"parent still works": 3}
    assert parent.line() == "ended"


# --- all workers of a service share one server name -------------------------------------------------------------------


def test_workers_that_share_a_server_name_get_a_cast_once_and_a_fanout_each(
    bus: Any, start: Any, eventually: Any
) -> None:
    workers = [start("serve", topic="scheduler", server="controller") for _ in range(3)]
    pids = {worker.line()["ready"] for worker in workers}
    topic, named = bus.client("scheduler"), bus.client("scheduler", server="controller")
    everybody = bus.client("scheduler", fanout=True)

    def ran() -> Counter[str]:
        return Counter(what for worker in workers for what in worker.ran())

    for number in range(12):
        topic.cast({}, "note", value=f"topic {number}")
        named.cast({}, "note", value=f"named {number}")
    eventually(lambda: sum(ran().values()) >= 24)
    everybody.cast({}, "note", value="all")
    eventually(lambda: ran()["all"] == 3)
    assert set(ran().values()) == {1, 3}
    assert sum(ran().values()) == 27
    assert {topic.call({}, "pid") for _ in range(3)} == pids
    assert {named.call({}, "pid") for _ in range(3)} == pids


def test_a_fanout_to_nobody_is_no_error(bus: Any) -> None:
    bus.client("scheduler", fanout=True).cast({}, "note", value="all")


# --- several transports per process -----------------------------------------------------------------------------------


def test_transports_to_one_url_share_one_node_and_dropping_one_harms_no_other(start: Any) -> None:
    start("serve").line()
    several = start("transports")
    assert several.line() == [0, 1, 2]
    assert several.line() == "still here"
    found = several.line()
    assert found["nodes"] == 1
    assert found["more"] <= 1


def test_transports_of_two_virtual_hosts_do_not_meet(bus: Any) -> None:
    here = Endpoint()
    bus.serve("compute", here, transport=bus.transport("zmq:///cell1"))
    assert bus.client("compute", bus.transport("zmq:///cell1")).call({}, "echo", value=1) == 1
    with pytest.raises(oslo_messaging.MessagingTimeout):
        bus.client("compute", bus.transport("zmq:///cell2"), timeout=0.3).call({}, "echo", value=1)


def test_a_url_from_the_database_is_plain_and_parses_back() -> None:
    for text in ("zmq:///", "zmq:///cell1", "zmq:///cell1?cast_ttl=5"):
        parsed = TransportURL.parse(cfg.ConfigOpts(), text)
        assert str(TransportURL.parse(cfg.ConfigOpts(), str(parsed))) == str(parsed)
        assert parsed.transport == "zmq"


# --- two servers on one transport -------------------------------------------------------------------------------------


def test_one_server_stops_while_the_other_and_the_clients_go_on(bus: Any, start: Any) -> None:
    start("serve", topic="conductor", server="c").line()
    compute = start("two_servers")
    assert compute.line() == "ready"
    assert bus.client("compute", server="host-1").call({}, "echo", value=1) == 1
    compute.tell("stop the first")
    assert compute.line() == {"client still works": "yes"}
    with pytest.raises(oslo_messaging.MessagingTimeout):
        bus.client("compute", server="host-1", timeout=0.5).call({}, "echo", value=2)
    assert bus.client("compute-alt", server="host-1").call({}, "echo", value=3) == 3
    compute.tell("stop the second")
    assert compute.line() == "stopped"


# --- processes end without clean-up -----------------------------------------------------------------------------------


def test_casts_that_returned_survive_os_exit(start: Any, eventually: Any) -> None:
    compute = start("serve")
    compute.line()
    for _ in range(3):
        assert start("cast_and_vanish", count=20).wait() == 0
    eventually(lambda: len(compute.ran()) == 60)
    assert sorted(compute.ran()) == sorted(list(range(20)) * 3)


# --- call_monitor_timeout ---------------------------------------------------------------------------------------------


def test_a_long_call_lives_by_its_heartbeats(bus: Any, start: Any) -> None:
    start("serve").line()
    client = bus.client("compute", timeout=60, call_monitor_timeout=3)
    assert client.call({}, "sleep", seconds=5) == 5


def test_a_call_that_waits_for_a_worker_lives_by_its_heartbeats(bus: Any, eventually: Any) -> None:
    busy = Endpoint()
    conf = cfg.ConfigOpts()
    transport = bus.transport(conf=conf)
    server = oslo_messaging.get_rpc_server(transport, oslo_messaging.Target(topic="compute", server="h"), [busy])
    server.start(override_pool_size=1)
    holding, _ = in_thread(lambda: bus.client("compute").call({}, "hold"))
    eventually(lambda: busy.seen == ["hold"])
    client = bus.client("compute", timeout=30, call_monitor_timeout=2)
    waiting, came = in_thread(lambda: client.call({}, "echo", value="at last"))
    waiting.join(4.5)
    assert came == []
    busy.release.set()
    waiting.join(10)
    assert came == ["at last"]
    holding.join(10)
    server.stop()
    server.wait()


def test_a_stopped_server_ends_a_monitored_call_as_messaging_timeout(bus: Any, start: Any) -> None:
    compute = start("serve")
    compute.line()
    client = bus.client("compute", timeout=60, call_monitor_timeout=2)
    assert client.call({}, "echo", value=1) == 1
    compute.kill(signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(oslo_messaging.MessagingTimeout):
        client.call({}, "echo", value=2)
    assert 1 < time.monotonic() - began < 4


def test_the_total_timeout_bounds_a_monitored_call(bus: Any) -> None:
    endpoint = Endpoint()
    bus.serve("compute", endpoint)
    began = time.monotonic()
    with pytest.raises(oslo_messaging.MessagingTimeout):
        bus.client("compute", timeout=1, call_monitor_timeout=20).call({}, "hold")
    assert time.monotonic() - began < 10  # the monitor's patience would be 20
    endpoint.release.set()


def test_client_timeout_is_filled_in_for_the_server(bus: Any) -> None:
    listener = bus.transport()._driver.listen(oslo_messaging.Target(topic="compute", server="h"), 1, None)
    caller, came = in_thread(lambda: bus.client("compute", timeout=9, call_monitor_timeout=4).call({}, "x"))
    (message,) = listener._poll_style_listener.poll()
    assert message.client_timeout == 4
    message.acknowledge()
    message.heartbeat()
    message.reply("done")
    caller.join(10)
    assert came == ["done"]
    with pytest.raises(Exception, match="over"):
        message.heartbeat()
    listener.cleanup()


# --- remote errors ----------------------------------------------------------------------------------------------------


class Refused(Exception):
    def __init__(self, code: int = 0, **kwargs: Any) -> None:
        self.code = code
        self.kwargs = kwargs
        super().__init__(f"refused with {code}")


class Unbuildable(Exception):
    """It comes back with its text as its argument, which it does not take."""

    def __init__(self, code: Any) -> None:
        super().__init__(f"code {int(code)}")


class Failing:
    def refuse(self, ctxt: Any) -> None:
        raise Refused(7, reason="full")

    @oslo_messaging.expected_exceptions(Refused)  # type: ignore[untyped-decorator]
    def expected(self, ctxt: Any) -> None:
        raise Refused(8)

    def unserialisable(self, ctxt: Any) -> Any:
        return object()

    def unserialisable_error(self, ctxt: Any) -> None:
        raise ValueError(object())

    def unbuildable(self, ctxt: Any) -> None:
        raise Unbuildable(5)

    def too_large(self, ctxt: Any) -> str:
        return "x" * 9_000_000


def test_an_error_of_an_allowed_module_comes_back_as_a_subclass(bus: Any) -> None:
    bus.serve("compute", Failing())
    client = bus.client("compute", bus.transport(allowed_remote_exmods=[__name__]))
    for method in ("refuse", "expected"):
        with pytest.raises(Refused) as caught:
            client.call({}, method)
        assert type(caught.value).__name__ == "Refused_Remote"
    assert caught.value.code == 0 or caught.value.code == "refused with 8"


def test_an_error_of_another_module_comes_back_as_remote_error(bus: Any) -> None:
    bus.serve("compute", Failing())
    with pytest.raises(oslo_messaging.RemoteError) as caught:
        bus.client("compute").call({}, "refuse")
    assert (caught.value.exc_type, caught.value.value) == ("Refused", "refused with 7")


def test_what_cannot_be_serialised_or_rebuilt_reaches_the_caller_as_an_error_at_once(bus: Any) -> None:
    bus.serve("compute", Failing())
    client = bus.client("compute", bus.transport(allowed_remote_exmods=[__name__]))
    began = time.monotonic()
    with pytest.raises(ValueError, match="Cannot convert"):
        client.call({}, "unserialisable")
    with pytest.raises(ValueError, match="object object at"):
        client.call({}, "unserialisable_error")
    with pytest.raises(oslo_messaging.RemoteError, match="Unbuildable code 5"):
        client.call({}, "unbuildable")
    with pytest.raises(oslo_messaging.RemoteError, match="max_message"):
        client.call({}, "too_large")
    assert time.monotonic() - began < 5


def test_an_unknown_method_is_told_to_the_caller(bus: Any) -> None:
    bus.serve("compute", Endpoint())
    with pytest.raises(oslo_messaging.RemoteError, match=dispatcher.NoSuchMethod.__name__):
        bus.client("compute").call({}, "no_such_method")


# --- opaque messages --------------------------------------------------------------------------------------------------


def test_keys_beside_method_and_args_survive_and_nothing_given_is_changed(bus: Any) -> None:
    driver = bus.transport()._driver
    listener = driver.listen(oslo_messaging.Target(topic="compute", server="h"), 1, None)
    ctxt = {"user": "me", "roles": ("a", "b"), "traceparent": "00-1-2-03", 5: None}
    message = {"method": "m", "args": {"t": (1, 2)}, "namespace": "n", "version": "1.2", "extra": {"a": [1]}}
    before = repr((ctxt, message))
    driver.send(oslo_messaging.Target(topic="compute"), ctxt, message)
    assert repr((ctxt, message)) == before
    (got,) = listener._poll_style_listener.poll()
    assert got.message == message | {"args": {"t": [1, 2]}}
    assert got.ctxt == {"user": "me", "roles": ["a", "b"], "traceparent": "00-1-2-03", "5": None}
    got.ctxt["serialisers"] = "may change it"
    listener.cleanup()


def test_namespace_and_version_choose_the_endpoint(bus: Any) -> None:
    class Baseapi(Endpoint):
        target = oslo_messaging.Target(namespace="baseapi", version="1.1")

    bus.serve("compute", Baseapi())
    client = bus.client("compute", namespace="baseapi").prepare(version="1.1")
    assert client.call({}, "echo", value=1) == 1
    with pytest.raises(oslo_messaging.RemoteError, match="UnsupportedVersion"):
        bus.client("compute").call({}, "echo", value=1)


def test_replies_of_half_a_mebibyte_arrive_whole(bus: Any, start: Any) -> None:
    start("serve").line()
    client = bus.client("compute")
    for _ in range(3):
        assert client.call({}, "blob", size=512 * 1024) == "x" * (512 * 1024)
    assert client.call({}, "echo", value="y" * (512 * 1024)) == "y" * (512 * 1024)


# --- notifications without a listener, and retry ----------------------------------------------------------------------


def test_notifications_without_a_listener_do_not_block_and_arrive_when_one_comes(
    bus: Any, start: Any, eventually: Any
) -> None:
    sender = start("notify_and_time", count=50)
    assert sender.line() < 2
    got: list[int] = []

    class Listening:
        def info(self, ctxt: Any, publisher: str, event: str, payload: Any, metadata: Any) -> None:
            got.append(payload["number"])

    bus.listen(Listening(), "notifications")
    eventually(lambda: sorted(got) == list(range(50)))


def test_retry_0_to_nobody_fails_at_once(bus: Any) -> None:
    began = time.monotonic()
    with pytest.raises(oslo_messaging.MessageDeliveryFailure):
        bus.client("compute", retry=0).call({}, "echo", value=1)
    with pytest.raises(oslo_messaging.MessageDeliveryFailure):
        bus.client("compute", retry=0).cast({}, "note", value=1)
    driver = bus.notification_transport()._driver
    with pytest.raises(oslo_messaging.MessageDeliveryFailure):
        driver.send_notification(oslo_messaging.Target(topic="notifications.info"), {}, {}, 2.0, 0)
    assert time.monotonic() - began < 5


def test_a_counted_retry_finds_a_server_that_comes_meanwhile(bus: Any, start: Any) -> None:
    client = bus.client("compute", retry=100, timeout=20)
    thread, came = in_thread(lambda: client.call({}, "echo", value=1))
    start("serve").line()
    thread.join(20)
    assert came == [1]


# --- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("threads", "calls"), [(64, 50), (150, 10)])
def test_many_threads_share_one_client(start: Any, threads: int, calls: int) -> None:
    start("serve").line()
    found = start("many_threads", threads=threads, calls=calls).line(60)
    assert found["wrong"] == []
    assert found["slowest"] < 5


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("main", ["waits", "calls"])
def test_stop_works_inside_a_signal_handler_on_the_main_thread(
    bus: Any, start: Any, eventually: Any, main: str
) -> None:
    conductor = start("serve", topic="conductor", server="c")
    conductor.line()
    for _ in range(3):
        compute = start("stop_in_signal_handler", main=main)
        compute.line()
        assert bus.client("compute").call({}, "echo", value=1) == 1
        compute.kill(signal.SIGTERM)
        assert compute.line(15) == "stopped"
        assert compute.wait() == 0
    eventually(lambda: conductor.ran() == (["stopped"] * 3 if main == "waits" else []))


# --- eventlet ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["first", "late"])
def test_it_works_under_eventlet(start: Any, when: str) -> None:
    start("serve").line()
    green = start("green", when=when)
    found = green.line()
    assert found["own"] is True
    assert found["sleeps"] == 5
    assert found["seconds"] < 2.4  # five sleeps of half a second went on at the same time
    assert green.line() == "other process"
    assert green.line() == "stopped"
    assert green.wait() == 0


def test_it_works_where_the_import_of_eventlet_fails(start: Any) -> None:
    program = start("poisoned")
    assert program.line() == "native"
    assert program.line() is True


# --- death of a server ------------------------------------------------------------------------------------------------


def test_the_death_of_a_server_in_a_call_is_told_at_once_and_named_unknown(bus: Any, start: Any) -> None:
    compute = start("die_at_once")
    compute.line()
    client = bus.client("compute", timeout=30)
    began = time.monotonic()
    with pytest.raises(oslo_messaging.MessagingTimeout) as caught:
        client.call({}, "die")
    assert time.monotonic() - began < 3
    assert type(caught.value).__name__ == "OutcomeUnknown"
    assert compute.wait() == -signal.SIGKILL


def test_calls_go_on_to_the_other_workers_when_one_dies(bus: Any, start: Any, eventually: Any) -> None:
    workers = [start("serve", topic="conductor", server=f"c{number}") for number in range(3)]
    pids = [worker.line()["ready"] for worker in workers]
    transport = bus.transport()
    client = bus.client("conductor", transport, timeout=10)
    assert {client.call({}, "pid") for _ in range(6)} == set(pids)
    os.kill(pids[0], signal.SIGKILL)
    workers[0].wait()
    # What is sent before the end of the connection was seen may have run: its outcome would be unknown.
    peers = transport._driver.core.node.statistics
    eventually(lambda: [peer.state for peer in peers().peers].count("ready") == 2)
    assert {client.call({}, "pid") for _ in range(10)} == set(pids[1:])
