"""The contract of oslo.messaging's drivers: signatures, options, URLs, batches, pools, what is held, and ends."""

from __future__ import annotations

import importlib.metadata
import inspect
import logging
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import oslo_messaging
import pytest
from oslo_config import cfg
from oslo_messaging._drivers import base
from oslo_messaging.notify import dispatcher as notify_dispatcher
from oslo_messaging.transport import InvalidTransportURL

from onehop.oslo import options, payload
from onehop.oslo.driver import NobodyServes, OutcomeUnknown, SendFailed, ZmqDriver
from onehop.oslo.listener import AHEAD, Notification, PollListener, Request

ROOT = Path(__file__).parent.parent.parent


class Endpoint:
    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.running = threading.Event()
        self.release = threading.Event()

    def echo(self, ctxt: Any, value: Any = None) -> Any:
        return value

    def note(self, ctxt: Any, value: Any = None) -> None:
        self.seen.append(value)

    def hold(self, ctxt: Any) -> None:
        self.seen.append("hold")
        self.running.set()
        self.release.wait(30)


class Listening:
    """Notes the payloads; asks for those in ``again`` once more, once."""

    def __init__(self, *again: Any) -> None:
        self.seen: list[Any] = []
        self.again = list(again)

    def info(self, ctxt: Any, publisher: str, event: str, payload: Any, metadata: Any) -> Any:
        self.seen.append(payload)
        if payload in self.again:
            self.again.remove(payload)
            return notify_dispatcher.NotificationResult.REQUEUE
        return notify_dispatcher.NotificationResult.HANDLED

    def error(self, *arguments: Any) -> Any:
        return self.info(*arguments)


class Batches:
    def __init__(self) -> None:
        self.sizes: list[int] = []

    def info(self, messages: list[Any]) -> None:
        self.sizes.append(len(messages))


# --- signatures and options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (ZmqDriver, base.BaseDriver),
        (PollListener, base.PollStyleListener),
        (Request, base.RpcIncomingMessage),
        (Notification, base.IncomingMessage),
    ],
)
def test_every_method_takes_what_oslo_messaging_may_pass(ours: type, theirs: type) -> None:
    assert issubclass(ours, theirs)
    for name, method in inspect.getmembers(theirs, inspect.isfunction):
        if name.startswith("__"):
            continue
        wanted = inspect.signature(method).parameters
        got = inspect.signature(getattr(ours, name)).parameters
        named = [each for each in got.values() if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        assert [each.name for each in named][: len(wanted)] == list(wanted), name
        for each in wanted.values():
            if each.default is not inspect.Parameter.empty:
                assert got[each.name].default is not inspect.Parameter.empty, f"{name}({each.name})"


def test_the_constructor_takes_what_oslo_messaging_passes() -> None:
    assert list(inspect.signature(ZmqDriver).parameters) == list(inspect.signature(base.BaseDriver).parameters)


def test_arguments_of_a_later_release_are_taken(bus: Any) -> None:
    endpoint = Endpoint()
    bus.serve("compute", endpoint)
    driver = bus.transport()._driver
    target = oslo_messaging.Target(topic="compute")
    message = {"method": "echo", "args": {"value": 1}}
    assert driver.send(target, {}, message, wait_for_reply=True, timeout=5, a_later_argument=True) == 1
    driver.send_notification(oslo_messaging.Target(topic="n.info"), {}, {}, 2.0, retry=None, a_later_argument=True)
    driver.listen(oslo_messaging.Target(topic="t", server="s"), 1, None, a_later_argument=True).cleanup()


def test_the_entry_points_are_those_that_oslo_looks_for() -> None:
    scripts = {each.name: each.value for each in importlib.metadata.entry_points(group="oslo.messaging.drivers")}
    assert scripts["zmq"] == "onehop.oslo.driver:ZmqDriver"
    listed = {each.name: each.value for each in importlib.metadata.entry_points(group="oslo.config.opts")}
    assert listed["onehop"] == "onehop.oslo.options:list_opts"


def test_options_are_few_explained_and_documented() -> None:
    ((group, listed),) = options.list_opts()
    page = (ROOT / "docs" / "reference" / "oslo-options.md").read_text().partition("## `[oslo_messaging_zmq]`")[2]
    assert group == "oslo_messaging_zmq"
    assert len(listed) < 25
    for each in listed:
        assert each.help.endswith("."), each.dest
        assert re.search(rf"^\| `{each.dest}` \|", page, re.MULTILINE), f"{each.dest} is not on the page"
    documented = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert documented == [each.dest for each in listed]


def test_the_tested_range_is_the_one_that_is_installed() -> None:
    assert importlib.metadata.version("oslo.messaging").startswith("18.")


def test_private_options_of_a_program_have_what_oslo_messaging_reads() -> None:
    conf = cfg.ConfigOpts()
    transport = oslo_messaging.get_rpc_transport(conf, "zmq://")
    assert transport.conf is conf
    assert conf.oslo_messaging_metrics.metrics_enabled is False
    assert conf.oslo_messaging_tracing.tracing_enabled is False
    assert conf.oslo_messaging_zmq.cast_ttl == 60.0


def test_a_private_and_the_global_configuration_work_side_by_side(bus: Any) -> None:
    bus.serve("compute", Endpoint(), transport=bus.transport(conf=cfg.ConfigOpts()))
    for conf in (cfg.ConfigOpts(), cfg.CONF):
        assert bus.client("compute", bus.transport(conf=conf)).call({}, "echo", value=1) == 1


# --- URLs -----------------------------------------------------------------------------------------------------------


def driver_of(url: str, conf: cfg.ConfigOpts | None = None) -> Any:
    return oslo_messaging.get_rpc_transport(conf or cfg.ConfigOpts(), url)._driver


def test_a_value_in_the_query_replaces_that_of_the_configuration() -> None:
    conf = cfg.ConfigOpts()
    first = driver_of("zmq:///?cast_ttl=5&zone=a", conf)
    second = driver_of("zmq://", conf)
    conf.set_override("zone", "b", "oslo_messaging_zmq")
    assert (first.core.options["cast_ttl"], first.core.options["zone"]) == (5.0, "a")
    assert (second.core.options["cast_ttl"], second.core.options["zone"]) == (60.0, "b")
    assert first.core is not second.core
    first.cleanup()
    second.cleanup()


def test_an_option_is_read_anew_at_the_first_use_and_what_cannot_work_is_told_then_too(bus: Any) -> None:
    conf = cfg.ConfigOpts()
    transport = bus.transport(conf=conf)
    conf.set_override("registry", "nowhere://", "oslo_messaging_zmq")
    with pytest.raises(InvalidTransportURL, match="nowhere"):
        bus.client("compute", transport, timeout=1).call({}, "echo")


# --- failing and waiting ----------------------------------------------------------------------------------------------


def test_at_least_once_to_nobody_fails_at_once_in_both_families(bus: Any) -> None:
    wanted = oslo_messaging.TransportOptions(at_least_once=True)
    client = bus.client("compute", timeout=60, transport_options=wanted)
    everybody = bus.client("compute", fanout=True, transport_options=wanted)
    began = time.monotonic()
    for send in (client.call, client.cast, everybody.cast):
        with pytest.raises(oslo_messaging.MessageUndeliverable) as caught:
            send({}, "note")
        assert isinstance(caught.value, oslo_messaging.MessageDeliveryFailure)
        assert isinstance(caught.value, NobodyServes)
        assert "compute" in str(caught.value)
    assert time.monotonic() - began < 5
    endpoint = Endpoint()
    bus.serve("compute", endpoint)
    assert client.call({}, "echo", value=1) == 1
    everybody.cast({}, "note", value=1)


def test_a_timeout_of_0_is_a_timeout(bus: Any) -> None:
    endpoint = Endpoint()
    bus.serve("compute", endpoint)
    with pytest.raises(oslo_messaging.MessagingTimeout):
        bus.client("compute").prepare(timeout=0).call({}, "hold")
    endpoint.release.set()


def test_what_cannot_be_sent_is_told_as_a_send_error(bus: Any) -> None:
    bus.serve("compute", Endpoint())
    client = bus.client("compute")
    for send in (client.call, client.cast):
        with pytest.raises(oslo_messaging.ClientSendError, match="Cannot convert"):
            send({}, "echo", value=object())
        with pytest.raises(oslo_messaging.ClientSendError, match="max_message"):
            send({}, "echo", value="x" * 9_000_000)


def test_a_cast_that_was_taken_in_runs_however_long_it_waits(bus: Any, eventually: Callable[..., Any]) -> None:
    endpoint = Endpoint()
    server = oslo_messaging.get_rpc_server(
        bus.transport(), oslo_messaging.Target(topic="compute", server="h"), [endpoint]
    )
    server.start(override_pool_size=1)
    client = bus.client("compute", bus.transport("zmq:///?cast_timeout=0.5&zone=client"), timeout=1)
    client.cast({}, "hold")
    assert endpoint.running.wait(10)
    for number in range(2 * AHEAD):
        client.cast({}, "note", value=number)
    with pytest.raises(oslo_messaging.MessagingTimeout):
        client.call({}, "note", value="too late")
    endpoint.release.set()
    eventually(lambda: endpoint.seen == ["hold", *range(2 * AHEAD)])
    server.stop()
    server.wait()


def test_one_of_two_servers_stops_and_finishes_though_its_registry_cannot_be_written(
    bus: Any, run_directory: str, caplog: pytest.LogCaptureFixture
) -> None:
    transport, endpoint = bus.transport(), Endpoint()
    server = bus.serve("compute", endpoint, transport=transport)
    bus.serve("compute-alt", Endpoint(), transport=transport)
    client = bus.client("compute", transport)
    with ThreadPoolExecutor(1) as calling:
        under_way = calling.submit(client.call, {}, "hold")
        assert endpoint.running.wait(10)
        Path(run_directory).rename(f"{run_directory}-away")
        Path(run_directory).write_text("")
        with caplog.at_level(logging.WARNING, "onehop"):
            server.stop()
        assert "the registry lists 'openstack/compute' at 'host-1' on" in caplog.text
        endpoint.release.set()
        server.wait()
        assert under_way.result(10) is None
    Path(run_directory).unlink()
    shutil.rmtree(f"{run_directory}-away")


def test_what_cannot_listen_is_told_as_an_error_of_oslo_messaging(bus: Any, run_directory: str) -> None:
    shutil.rmtree(run_directory)
    Path(run_directory).write_text("")
    with pytest.raises(oslo_messaging.MessagingException, match=f"cannot listen for .*compute: .*{run_directory}"):
        bus.serve("compute", Endpoint())
    Path(run_directory).unlink()
    closed = bus.transport()
    closed.cleanup()
    with pytest.raises(oslo_messaging.MessagingException, match=r"cannot listen for .*compute: .*was cleaned up"):
        bus.serve("compute", Endpoint(), transport=closed)


def test_a_request_whose_caller_gave_up_is_not_run(bus: Any, eventually: Callable[..., Any]) -> None:
    endpoint = Endpoint()
    transport = bus.transport()
    server = oslo_messaging.get_rpc_server(transport, oslo_messaging.Target(topic="compute", server="h"), [endpoint])
    server.start(override_pool_size=1)
    client = bus.client("compute", timeout=1)
    client.cast({}, "hold")
    assert endpoint.running.wait(10)
    with pytest.raises(oslo_messaging.MessagingTimeout):
        client.call({}, "note", value="too late")
    eventually(lambda: transport._driver.core.node.statistics().received.get("cancelled") == 1)
    endpoint.release.set()
    assert client.prepare(timeout=10).call({}, "echo", value=1) == 1
    server.stop()
    server.wait()
    assert endpoint.seen == ["hold"]


def test_a_full_server_is_tried_again_until_it_has_room(bus: Any, eventually: Callable[..., Any]) -> None:
    endpoint = Endpoint()
    transport = bus.transport("zmq:///?inbox_messages=2")
    server = oslo_messaging.get_rpc_server(transport, oslo_messaging.Target(topic="compute", server="h"), [endpoint])
    server.start(override_pool_size=1)
    client = bus.client("compute", bus.transport("zmq:///?zone=client"), timeout=10)
    client.cast({}, "hold")
    assert endpoint.running.wait(10)
    client.cast({}, "note", value="second")
    began = time.monotonic()
    threading.Timer(0.5, endpoint.release.set).start()
    assert client.call({}, "echo", value="third") == "third"
    assert time.monotonic() - began < 3
    server.stop()
    server.wait()
    assert endpoint.seen == ["hold", "second"]


# --- what is held ---------------------------------------------------------------------------------------------------


def test_casts_to_one_receiver_keep_their_order_through_the_outbox(bus: Any, eventually: Callable[..., Any]) -> None:
    transport = bus.transport()
    client = bus.client("compute", transport, server="host-1")
    for number in range(50):
        client.cast({}, "note", value=number)
    core = transport._driver.core
    assert sum(map(len, core.held.values())) == 50
    listener = bus.transport()._driver.listen(oslo_messaging.Target(topic="compute", server="host-1"), 1, None)
    eventually(lambda: not core.held)
    taken = [message.message["args"]["value"] for message in listener._poll_style_listener.poll(batch_size=50)]
    assert taken == list(range(50))
    listener.cleanup()


def test_a_cast_queues_behind_those_that_are_held_for_the_same_receiver_only(bus: Any) -> None:
    transport = bus.transport()
    bus.serve("compute", Endpoint(), server="here")
    bus.client("compute", transport, server="away").cast({}, "note", value=1)
    bus.client("compute", transport, server="here").cast({}, "note", value=2)
    held = transport._driver.core.held
    assert list(held) == [("openstack/compute", "away")]


def test_what_nobody_takes_in_time_is_dropped_loudly(
    bus: Any, caplog: pytest.LogCaptureFixture, eventually: Callable[..., Any]
) -> None:
    transport = bus.transport("zmq:///?cast_ttl=0.2")
    client = bus.client("compute", transport)
    with caplog.at_level(logging.ERROR, "onehop.oslo"):
        for number in range(5):
            client.cast({}, "note", value=number)
        core = transport._driver.core
        eventually(lambda: core.dropped == 5 and not core.held)
    (record,) = [each for each in caplog.records if each.name.startswith("onehop.oslo")]
    assert "'note' to openstack/compute: nobody took it in time" in record.getMessage()


SHORT_OF_DESCRIPTORS = """
import os, resource, sys, time
import oslo_messaging
from oslo_config import cfg

transport = oslo_messaging.get_rpc_transport(cfg.ConfigOpts(), "zmq://")
client = oslo_messaging.get_rpc_client(transport, oslo_messaging.Target(topic="compute"))
for number in range(3):
    client.cast({}, "note", value=number)
core = transport._driver.core
taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(100)]
resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30,) * 2)
print("held", flush=True)
sys.stdin.readline()  # somebody is there
print(core._deliver_first(("openstack/compute", ""), present=True), core._messages, core.dropped, flush=True)
for each in taken:
    os.close(each)
sys.stdin.readline()  # all was received
while core._messages:  # taken out of the outbox behind that
    time.sleep(0.01)
print(core._messages, core.dropped, flush=True)
os._exit(0)
"""


def test_what_is_held_waits_for_descriptors_too(bus: Any, eventually: Callable[..., Any]) -> None:
    command = [sys.executable, "-W", "ignore", "-c", SHORT_OF_DESCRIPTORS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as sender:
        assert sender.stdin is not None
        assert sender.stdout is not None
        try:
            assert sender.stdout.readline() == "held\n"
            endpoint = Endpoint()
            bus.serve("compute", endpoint)
            sender.stdin.write("\n")
            sender.stdin.flush()
            assert sender.stdout.readline() == "False 3 0\n"
            eventually(lambda: endpoint.seen == [0, 1, 2])
            sender.stdin.write("\n")
            sender.stdin.flush()
            assert sender.stdout.readline() == "0 0\n"
        finally:
            sender.kill()


@pytest.mark.parametrize("bound", ["outbox_messages=3", "outbox_bytes=150"])
def test_the_outbox_is_bounded(bus: Any, caplog: pytest.LogCaptureFixture, bound: str) -> None:
    transport = bus.transport(f"zmq:///?{bound}")
    client = bus.client("compute", transport)
    with caplog.at_level(logging.ERROR, "onehop.oslo"):
        for number in range(10):
            client.cast({}, "note", value=number)
    core = transport._driver.core
    assert sum(map(len, core.held.values())) == 3
    assert core.dropped == 7
    assert "3 messages" in caplog.text


def test_the_thread_of_the_outbox_ends_when_it_is_empty(bus: Any, eventually: Callable[..., Any]) -> None:
    def running() -> bool:
        return any(each.name == "onehop-outbox" for each in threading.enumerate())

    eventually(lambda: not running())  # nor that of a driver that another test has closed
    endpoint = Endpoint()
    client = bus.client("compute")
    for number in range(2):
        assert not running()
        client.cast({}, "note", value=number)
        assert running()
        server = bus.serve("compute", endpoint)
        eventually(lambda number=number: endpoint.seen == list(range(number + 1)))
        eventually(lambda: not running())
        server.stop()
        server.wait()


# --- notifications --------------------------------------------------------------------------------------------------


def test_each_notification_goes_to_one_of_the_listeners(bus: Any, eventually: Callable[..., Any]) -> None:
    several = [Listening() for _ in range(3)]
    for each in several:
        bus.listen(each, "notifications")
    notifier = bus.notifier("notifications")
    for number in range(30):
        notifier.info({}, "event", number)
    eventually(lambda: sorted(number for each in several for number in each.seen) == list(range(30)))
    assert all(each.seen for each in several)


def test_each_pool_gets_a_copy(bus: Any, eventually: Callable[..., Any]) -> None:
    alone, audit, billing = Listening(), [Listening(), Listening()], Listening()
    bus.listen(alone, "notifications")
    for each in audit:
        bus.listen(each, "notifications", pool="audit")
    bus.listen(billing, "notifications", pool="billing")
    notifier = bus.notifier("notifications")
    for number in range(10):
        notifier.info({}, "event", number)
    for group in ([alone], audit, [billing]):
        eventually(lambda group=group: sorted(n for each in group for n in each.seen) == list(range(10)))
    assert all(each.seen for each in audit)


def test_priorities_and_topics_are_kept_apart(bus: Any, eventually: Callable[..., Any]) -> None:
    class Info:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def info(self, ctxt: Any, publisher: str, event: str, payload: Any, metadata: Any) -> None:
            self.seen.append(payload)

    only_info, both = Info(), Listening()
    bus.listen(only_info, "a")
    bus.listen(both, "b", "c")
    notifier = bus.notifier("a", "b")
    notifier.error({}, "event", "bad")
    notifier.info({}, "event", "good")
    bus.notifier("c").info({}, "event", "other topic")
    eventually(lambda: sorted(both.seen) == ["bad", "good", "other topic"])
    eventually(lambda: only_info.seen == ["good"])


def test_rpc_and_notifications_of_one_name_do_not_mix(bus: Any, eventually: Callable[..., Any]) -> None:
    endpoint, listening = Endpoint(), Listening()
    bus.serve("same.info", endpoint)
    bus.listen(listening, "same")
    bus.notifier("same").info({}, "event", "a notification")
    bus.client("same.info").cast({}, "note", value="a request")
    eventually(lambda: listening.seen == ["a notification"] and endpoint.seen == ["a request"])


def test_a_notification_that_is_requeued_comes_again(bus: Any, eventually: Callable[..., Any]) -> None:
    listening = Listening("once more")
    bus.listen(listening, "notifications", allow_requeue=True)
    bus.notifier("notifications", driver="messagingv2").info({}, "event", "once more")
    eventually(lambda: listening.seen == ["once more", "once more"])


def test_a_batch_is_full_or_its_time_since_the_first_message_is_over(bus: Any, eventually: Callable[..., Any]) -> None:
    batches = Batches()
    bus.listen(batches, "notifications", batch={"batch_size": 100, "batch_timeout": 3})
    notifier = bus.notifier("notifications")
    for number in range(205):
        notifier.info({}, "event", number)
    eventually(lambda: sum(batches.sizes) == 205, 10.0)  # and not for ever
    assert batches.sizes == [100, 100, 5]


def test_a_batch_without_a_time_waits_until_it_is_full(bus: Any, eventually: Callable[..., Any]) -> None:
    batches = Batches()
    bus.listen(batches, "notifications", batch={"batch_size": 5})
    notifier = bus.notifier("notifications")
    for number in range(10):
        notifier.info({}, "event", number)
    eventually(lambda: batches.sizes == [5, 5])


# --- polling and ends -----------------------------------------------------------------------------------------------


def test_after_stop_poll_gives_the_rest_and_never_waits(bus: Any, eventually: Callable[..., Any]) -> None:
    adapter = bus.transport()._driver.listen(oslo_messaging.Target(topic="compute", server="h"), 1, None)
    listener = adapter._poll_style_listener
    client = bus.client("compute")
    for number in range(3):
        client.cast({}, "note", value=number)
    listener.stop()
    began = time.monotonic()
    found: list[Any] = []
    # The last cast was confirmed a moment before it stood in the queue.
    eventually(lambda: found.extend(listener.poll(batch_size=2, batch_timeout=60)) or len(found) == 3)
    assert listener.poll(batch_size=100, batch_timeout=60) == []
    assert listener.poll() == []
    assert listener.poll(batch_size=10, batch_timeout=60) == []
    assert time.monotonic() - began < 5
    listener.stop()
    listener.cleanup()
    listener.cleanup()
    assert listener.poll() == []


def test_stop_wakes_a_waiting_poll(bus: Any) -> None:
    listener = bus.transport()._driver.listen(oslo_messaging.Target(topic="t", server="h"), 1, None)
    listener.start(lambda incoming: None)
    began = time.monotonic()
    listener.stop()
    assert time.monotonic() - began < 5
    listener.cleanup()


def test_a_poll_with_a_timeout_ends(bus: Any) -> None:
    listener = bus.transport()._driver.listen(oslo_messaging.Target(topic="t", server="h"), 1, None)
    began = time.monotonic()
    assert listener._poll_style_listener.poll(timeout=0.2) == []
    assert 0.15 < time.monotonic() - began < 5
    listener.cleanup()


def test_a_request_that_is_not_of_oslo_messaging_is_answered_and_harms_nothing(bus: Any) -> None:
    transport = bus.transport()
    bus.serve("compute", Endpoint(), transport=transport)
    raw = transport._driver.core.node.client("openstack/compute", timeout=5)
    for body in (b"\xff\xfe", b"[1]", b'["a", "b"]', b'{"a": 1}'):
        nothing, failure = payload.decode(raw.call_raw("garbage", body))
        assert nothing is None
        assert isinstance(payload.rebuild_failure(failure, []), ValueError | oslo_messaging.RemoteError)
    assert bus.client("compute", transport).call({}, "echo", value=1) == 1


def test_requests_that_cannot_be_read_take_nobody_s_place(bus: Any) -> None:
    transport = bus.transport()
    bus.serve("compute", Endpoint(), transport=transport)
    raw = transport._driver.core.node.client("openstack/compute", timeout=20)
    for _ in range(AHEAD + 6):
        raw.cast_raw("deep", b"[" * 5_000 + b"]" * 5_000)
    assert bus.client("compute", transport).call({}, "echo", value=1) == 1


def test_cleanup_works_twice_and_in_any_order_with_stop(bus: Any) -> None:
    first, second = (oslo_messaging.get_rpc_transport(cfg.ConfigOpts(), "zmq://") for _ in range(2))
    server = oslo_messaging.get_rpc_server(first, oslo_messaging.Target(topic="t", server="h"), [Endpoint()])
    server.start()
    assert bus.client("t", second).call({}, "echo", value=1) == 1
    first.cleanup()
    first.cleanup()
    second.cleanup()
    server.stop()
    server.wait()
    first.cleanup()


def test_a_server_that_outlives_its_transport_is_idle_until_it_is_stopped() -> None:
    transport = oslo_messaging.get_rpc_transport(cfg.ConfigOpts(), "zmq://")
    server = oslo_messaging.get_rpc_server(transport, oslo_messaging.Target(topic="t", server="h"), [Endpoint()])
    server.start()
    transport.cleanup()
    used = time.process_time()
    threading.Event().wait(0.5)
    assert time.process_time() - used < 0.2
    server.stop()
    server.wait()


def test_a_send_after_cleanup_says_so(bus: Any) -> None:
    transport = oslo_messaging.get_rpc_transport(cfg.ConfigOpts(), "zmq://")
    client = bus.client("t", transport, timeout=1)
    transport.cleanup()
    for send in (client.call, client.cast):
        with pytest.raises(oslo_messaging.ClientSendError, match="was cleaned up"):
            send({}, "echo")


def test_the_last_cleanup_closes_the_node(bus: Any) -> None:
    drivers = [oslo_messaging.get_rpc_transport(cfg.ConfigOpts(), "zmq://")._driver for _ in range(3)]
    (node,) = {driver.core.node for driver in drivers}
    for driver in drivers[:-1]:
        driver.cleanup()
        node.nodes()
    drivers[-1].cleanup()
    with pytest.raises(Exception, match="closed"):
        node.nodes()


def test_threads_that_use_a_transport_first_at_the_same_time_leave_nothing_open_after_its_cleanup(bus: Any) -> None:
    for _ in range(20):
        driver = oslo_messaging.get_rpc_transport(cfg.ConfigOpts(), "zmq://")._driver
        together = threading.Barrier(16)

        def use(driver: Any = driver, together: threading.Barrier = together) -> Any:
            together.wait()
            return driver.core.node

        with ThreadPoolExecutor(16) as threads:
            (node,) = {each.result() for each in [threads.submit(use) for _ in range(16)]}
        driver.cleanup()
        with pytest.raises(Exception, match="closed"):
            node.nodes()


def test_names_with_signs_are_kept_apart(bus: Any) -> None:
    for number, server in enumerate(("host@lvm#pool", "host@lvm", "host")):
        bus.serve("cinder-volume", type("E", (), {"who": lambda self, ctxt, number=number: number})(), server=server)
    for number, server in enumerate(("host@lvm#pool", "host@lvm", "host")):
        assert bus.client("cinder-volume", server=server).call({}, "who") == number


def test_exchanges_are_kept_apart(bus: Any, eventually: Callable[..., Any]) -> None:
    nova, cinder = Endpoint(), Endpoint()
    bus.serve("scheduler", nova, exchange="nova")
    bus.serve("scheduler", cinder, exchange="cinder")
    bus.client("scheduler", exchange="nova", fanout=True).cast({}, "note", value="to nova")
    bus.client("scheduler", exchange="cinder").call({}, "note", value="to cinder")
    bus.client("scheduler", exchange="nova").call({}, "note", value="to nova again")
    eventually(lambda: sorted(nova.seen) == ["to nova", "to nova again"])
    assert cinder.seen == ["to cinder"]


def test_the_errors_stand_where_services_look_for_them() -> None:
    assert issubclass(OutcomeUnknown, oslo_messaging.MessagingTimeout)
    assert issubclass(SendFailed, base.TransportDriverError)
