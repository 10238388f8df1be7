"""ZeroMQ sockets: each option is set as the table says, and does what it is there for."""

from __future__ import annotations

import os
import random
import signal
import socket as net
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import zmq

from onehop.errors import ResourceLimit, SettingsError
from onehop.protocol import wire
from onehop.transport.descriptors import check_descriptors
from onehop.transport.sockets import (
    INBOUND_OPTIONS,
    LINK_OPTIONS,
    LOCAL_INBOUND_OPTIONS,
    LOCAL_LINK_OPTIONS,
    Options,
    ZmqCarrier,
)
from onehop.transport.waiting import poll

SOON = 2.0


@pytest.fixture
def carrier() -> Iterator[ZmqCarrier]:
    carrier = ZmqCarrier()
    yield carrier
    carrier.close()


@pytest.fixture
def raw() -> Iterator[Callable[[int], zmq.Socket[bytes]]]:
    """Makes sockets of ZeroMQ's own."""
    context: zmq.Context[Any] = zmq.Context()
    sockets: list[zmq.Socket[bytes]] = []

    def make(kind: int) -> zmq.Socket[bytes]:
        sockets.append(context.socket(kind))
        return sockets[-1]

    yield make
    for socket in sockets:
        socket.disable_monitor()
        socket.close(0)
    context.term()


@pytest.fixture
def endpoint(run_directory: str) -> str:
    return f"ipc://{run_directory}/s"


def arrives(inbound: Any, within: float = SOON) -> tuple[bytes, bytes, Any]:
    return next_of(inbound, within)


def comes_back(link: Any, within: float = SOON) -> tuple[bytes, Any]:
    return next_of(link, within)


def next_of(socket: Any, within: float) -> Any:
    until = time.monotonic() + within
    found: list[Any] = []
    while not socket.drain(1, found) and not found:
        assert time.monotonic() < until, "nothing arrived"
        poll([socket.fd], 0.05)
    [message] = found
    return message


def is_empty(socket: Any) -> bool:
    found: list[Any] = []
    return not socket.drain(1, found) and not found


# Options ------------------------------------------------------------------------------------------


def name_of(option: tuple[int, int, str]) -> str:
    return zmq.SocketOption(option[0]).name


UNTOLD = {zmq.ROUTER_MANDATORY, zmq.ROUTER_HANDOVER}
"""libzmq sets these and does not tell them; their effects have tests of their own."""


def overriding(options: Options, local: Options) -> list[tuple[int, int, str]]:
    """What is set where both ends are on one host."""
    return list({option[0]: option for option in options + local if option[0] not in UNTOLD}.values())


@pytest.mark.parametrize("option", overriding(INBOUND_OPTIONS, LOCAL_INBOUND_OPTIONS), ids=name_of)
def test_inbound_option_is_set(carrier: ZmqCarrier, endpoint: str, option: tuple[int, int, str]) -> None:
    inbound = carrier.bind(endpoint)
    number, value, reason = option
    assert inbound._socket.get(number) == value
    assert len(reason) > 10
    inbound.close(0)


@pytest.mark.parametrize("option", overriding(LINK_OPTIONS, LOCAL_LINK_OPTIONS), ids=name_of)
def test_link_option_is_set(carrier: ZmqCarrier, endpoint: str, option: tuple[int, int, str]) -> None:
    link = carrier.connect(endpoint)
    number, value, reason = option
    assert link._socket.get(number) == value
    assert len(reason) > 10
    link.close(0)


@pytest.mark.parametrize("option", LINK_OPTIONS, ids=name_of)
def test_link_beyond_the_host_is_asked_often(carrier: ZmqCarrier, option: tuple[int, int, str]) -> None:
    link = carrier.connect("tcp://127.0.0.1:9")
    assert link._socket.get(option[0]) == option[1]
    link.close(0)


def test_host_that_vanished_is_noticed_within_seven_seconds() -> None:
    for table in (INBOUND_OPTIONS, LINK_OPTIONS):
        options = {number: value for number, value, _ in table}
        assert options[zmq.HEARTBEAT_IVL] + options[zmq.HEARTBEAT_TIMEOUT] <= 7_000
        assert options[zmq.HEARTBEAT_TTL] <= 7_000


def test_context_takes_as_many_sockets_as_libzmq_can(carrier: ZmqCarrier) -> None:
    assert carrier._get_context().get(zmq.MAX_SOCKETS) >= 65_000


# Effects ------------------------------------------------------------------------------------------


def test_messages_of_one_and_two_frames_go_both_ways(carrier: ZmqCarrier, endpoint: str) -> None:
    inbound, link = carrier.bind(endpoint), carrier.connect(endpoint)
    assert link.send(b"x" * 16)
    identity, frame, body = arrives(inbound)
    assert (frame, body) == (b"x" * 16, None)
    head, large = b"\x02\x01" + b"\0" * 14, b"y" * 100_000
    assert link.send_large(head, large)
    again, frame, body = arrives(inbound)
    assert (again, frame, bytes(body)) == (identity, head, large)
    assert inbound.send(identity, b"z" * 16)
    assert comes_back(link) == (b"z" * 16, None)
    assert inbound.send_large(identity, head, large)
    frame, body = comes_back(link)
    assert (frame, bytes(body)) == (head, large)
    link.close(0)
    inbound.close(0)


def test_send_to_an_unknown_connection_is_an_error_at_once(carrier: ZmqCarrier, endpoint: str) -> None:
    inbound = carrier.bind(endpoint)
    with pytest.raises(ConnectionResetError):
        inbound.send(b"nobody", b"x")
    with pytest.raises(ConnectionResetError):
        inbound.send_large(b"nobody", b"x", b"y")
    inbound.close(0)


def test_message_that_breaks_off_in_its_midst_takes_nothing_of_the_next(carrier: ZmqCarrier, endpoint: str) -> None:
    inbound, link = carrier.bind(endpoint), carrier.connect(endpoint)
    link.send(b"first")
    identity, _, _ = arrives(inbound)
    head = wire.request(wire.REQUEST, 0, 1, 1.0, None, wire.names("a", "", "b"), b"x" * 100_000)[0]
    with pytest.raises(TypeError):
        link.send_large(head, "no bytes")  # as an interrupt between the two parts
    link.send(b"next")
    broken, following = arrives(inbound), arrives(inbound)
    assert (broken[1], bytes(broken[2])) == (head, b"")
    assert (following[1], following[2]) == (b"next", None)
    with pytest.raises(TypeError):
        inbound.send_large(identity, head, "no bytes")
    inbound.send(identity, b"answer")
    assert comes_back(link)[0] == head
    assert comes_back(link) == (b"answer", None)
    link.close(0)
    inbound.close(0)


def test_send_to_a_connection_that_ended_becomes_an_error(carrier: ZmqCarrier, endpoint: str, eventually) -> None:
    inbound, link = carrier.bind(endpoint), carrier.connect(endpoint)
    link.send(b"x")
    identity, _, _ = arrives(inbound)
    link.close(0)

    def refused() -> bool:
        try:
            inbound.send(identity, b"y")
        except ConnectionResetError:
            return True
        return False

    eventually(refused)
    inbound.close(0)


def test_nobody_takes_over_a_connection_by_its_identity(carrier: ZmqCarrier, raw, endpoint: str) -> None:
    inbound = carrier.bind(endpoint)
    sockets = []
    for name in (b"first", b"second"):
        socket = raw(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, b"same")
        socket.connect(endpoint)
        socket.send(name)
        sockets.append(socket)
        if name == b"first":
            assert arrives(inbound)[:2] == (b"same", b"first")
    assert poll([inbound.fd], 0.3) == [] or is_empty(inbound)
    inbound.send(b"same", b"reply")
    assert sockets[0].poll(2000)
    assert sockets[0].recv() == b"reply"
    assert not sockets[1].poll(0)
    inbound.close(0)


def test_link_tells_that_nobody_listens(carrier: ZmqCarrier, endpoint: str, eventually) -> None:
    link = carrier.connect(endpoint)
    eventually(lambda: link.ended() == "nobody listens there")
    link.close(0)


def test_link_tells_that_its_connection_ended_and_does_not_return(
    carrier: ZmqCarrier, endpoint: str, eventually
) -> None:
    inbound, link = carrier.bind(endpoint), carrier.connect(endpoint)
    link.send(b"x")
    arrives(inbound)
    assert link.ended() is None
    inbound.close(0)
    assert poll([link.monitor_fd], SOON) == [link.monitor_fd]
    eventually(lambda: link.ended() == "the connection ended")
    again = carrier.bind(endpoint)
    assert not link.send(b"y") or poll([again.fd], 0.3) == [] or is_empty(again)
    link.close(0)
    again.close(0)


def test_message_that_is_too_large_ends_the_connection(carrier: ZmqCarrier, raw, endpoint: str) -> None:
    inbound = carrier.bind(endpoint)
    socket = raw(zmq.DEALER)
    socket.connect(endpoint)
    monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    socket.send(b"x")
    arrives(inbound)
    socket.send(bytes(64 * 1024 * 1024 + 1))
    assert monitor.poll(5000)
    monitor.close(0)
    assert is_empty(inbound)
    inbound.close(0)


def test_message_of_three_frames_does_not_shift_the_border(carrier: ZmqCarrier, raw, endpoint: str) -> None:
    inbound = carrier.bind(endpoint)
    socket = raw(zmq.DEALER)
    socket.connect(endpoint)
    socket.send_multipart([b"one", b"two", b"three"])
    socket.send(b"next")
    assert arrives(inbound)[1] == b""  # which is no frame of ours
    assert arrives(inbound)[1:] == (b"next", None)
    inbound.close(0)


def test_server_that_lies_about_a_second_frame_harms_only_its_own_link(carrier: ZmqCarrier, raw, endpoint) -> None:
    socket = raw(zmq.ROUTER)
    socket.bind(endpoint)
    link = carrier.connect(endpoint)
    link.send(b"x")
    assert socket.poll(2000)
    identity, _ = socket.recv_multipart()
    flagged, plain = b"\x11\x01" + b"\0" * 14, b"\x11\x00" + b"\0" * 14
    socket.send_multipart([identity, flagged])  # announced and missing
    socket.send_multipart([identity, plain, b"body"])  # there and not announced
    socket.send_multipart([identity, flagged, b"body", b"more"])
    socket.send_multipart([identity, plain])
    found = [comes_back(link)]
    assert found == [(flagged, None)]
    while found[-1] != (plain, None) or len(found) < 4:
        found.append(comes_back(link))  # what was not announced comes as a frame of its own
    assert is_empty(link)
    link.close(0)


@pytest.mark.parametrize(
    "endpoint", ["ipc:///nonexistent/directory/s", "ipc://" + "/tmp/" + "x" * 120, "tcp://1.2.3.4:1"]
)
def test_endpoint_that_cannot_be_used_is_told(carrier: ZmqCarrier, endpoint: str) -> None:
    with pytest.raises(SettingsError, match=f"cannot listen at {endpoint}"):
        carrier.bind(endpoint)


def test_descriptor_is_an_edge_that_returns_after_a_look(carrier: ZmqCarrier, endpoint: str) -> None:
    inbound, link = carrier.bind(endpoint), carrier.connect(endpoint)
    for number in range(20):
        assert is_empty(inbound)
        link.send(b"%d" % number)
        assert poll([inbound.fd], SOON) == [inbound.fd]
        assert arrives(inbound)[1] == b"%d" % number
    link.close(0)
    inbound.close(0)


# The limits of the machine ------------------------------------------------------------------------

LIMITED = """
import os, resource, sys, threading
import onehop

def limit(number):
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, number))

def used():
    return len(os.listdir("/proc/self/fd"))
"""


def run(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED + textwrap.dedent(program)],
        capture_output=True, text=True, timeout=60, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_soft_limit_is_raised_where_the_hard_one_allows() -> None:
    told = run("""
        from onehop.transport.descriptors import check_descriptors
        resource.setrlimit(resource.RLIMIT_NOFILE, (80, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        check_descriptors(100)
        print(resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= used() + 164)
    """)
    assert told == "True\n"


def test_enough_descriptors_are_no_error() -> None:
    check_descriptors(5)


def test_descriptor_limit_is_one_sentence_and_known_peers_go_on_and_it_recovers(make_node: Callable[..., Any]) -> None:
    for number in range(12):
        make_node().serve("clock", {"read": lambda number=number: number}, server=f"s{number}")
    told = run("""
        node = onehop.Node(timeout=5.0)
        client = node.client("clock")
        assert client.at("s0").call("read") == 0
        limit(used() + 64 + 5 * 3)
        reached, refused = [], []
        for number in range(1, 12):
            try:
                assert client.at(f"s{number}").call("read") == number
                reached.append(number)
            except onehop.OnehopError as error:
                refused.append(error)
        assert reached and refused, (reached, refused)
        for error in refused:
            assert isinstance(error, (onehop.ResourceLimit, onehop.NoRoute)), repr(error)
            assert "raise the limit (ulimit -n, or LimitNOFILE= in its systemd unit)" in str(error), str(error)
            assert "\\n" not in str(error)
        assert client.at("s0").call("read") == 0
        assert all(client.at(f"s{number}").call("read") == number for number in reached)
        receipts = client.fanout("read")
        assert {each.outcome for each in receipts} == {"taken", "unreachable"}, receipts
        assert sum(each.outcome == "taken" for each in receipts) >= 1 + len(reached)
        # Recovery: what was held by others is given back.
        print("refused", len(refused))
        node.close()
        import gc; gc.collect()
        fresh = onehop.Node(timeout=5.0)
        assert fresh.client("clock").at("s11").call("read") == 11
        print("recovered")
        fresh.close()
    """)
    assert "recovered" in told


def test_no_descriptor_to_serve_is_one_sentence() -> None:
    told = run("""
        node = onehop.Node()
        node.servers()
        limit(used() + 10)
        try:
            node.serve("clock", {"read": int})
        except onehop.OnehopError as error:
            print(type(error).__name__, error)
        node.close()
    """)
    assert told.startswith("ResourceLimit this process has ")
    assert "raise the limit" in told


def test_scanner_and_garbage_on_the_socket_disturb_nobody(carrier: ZmqCarrier, endpoint: str) -> None:
    inbound = carrier.bind(endpoint)
    path = endpoint.removeprefix("ipc://")
    for garbage in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff\0\0\0\0\0\0\0\x01\x7f", os.urandom(1000)):
        with net.socket(net.AF_UNIX) as scanner:
            scanner.connect(path)
            try:
                scanner.sendall(garbage)
            except OSError:
                continue
    link = carrier.connect(endpoint)
    link.send(b"x")
    while arrives(inbound)[1] != b"x":
        pass  # random bytes may pass for a message of ZeroMQ's first protocol
    link.close(0)
    inbound.close(0)


def test_carrier_gives_everything_back(run_directory: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        carrier = ZmqCarrier()
        inbound, link = carrier.bind(f"ipc://{run_directory}/s"), carrier.connect(f"ipc://{run_directory}/s")
        link.close(0)
        inbound.close(0)
        carrier.close()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_carrier_closes_what_is_left_open(endpoint: str) -> None:
    program = f"""
        from onehop.transport.sockets import ZmqCarrier
        carrier = ZmqCarrier()
        inbound, link = carrier.bind({endpoint!r}), carrier.connect({endpoint!r})
        link.send(b"x")
        carrier.close()
        print("closed")
    """
    assert run(program) == "closed\n"


def test_carriers_of_a_process_share_one_io_thread_until_the_last_of_them_closes(endpoint: str) -> None:
    program = f"""
        from onehop.transport.sockets import ZmqCarrier

        def io_threads():
            names = [open(f"/proc/self/task/{{task}}/comm").read() for task in os.listdir("/proc/self/task")]
            return sum(name.startswith("ZMQbg/IO") for name in names)

        carriers = [ZmqCarrier() for _ in range(5)]
        inbound = carriers[0].bind({endpoint!r})
        links = [carrier.connect({endpoint!r}) for carrier in carriers]
        into = []
        for link in links:
            link.send(b"hello")
        while len(into) < 5:  # then each thread has named itself
            inbound.drain(5, into)
        print(io_threads())
        for carrier, link in zip(carriers[1:], links[1:]):
            link.close(0.0)
            carrier.close()
            carrier.close()
        links[0].send(b"hello")
        while len(into) < 6:
            inbound.drain(1, into)
        print(io_threads())
        links[0].close(0.0)
        inbound.close(0.0)
        carriers[0].close()
        print(io_threads())
    """
    assert run(program) == "1\n1\n0\n"


def test_carrier_that_made_no_socket_ends_nothing_of_others(carrier: ZmqCarrier, endpoint: str) -> None:
    inbound = carrier.bind(endpoint)
    ZmqCarrier().close()
    link = carrier.connect(endpoint)
    assert link.send(b"hello")
    link.close(0.0)
    inbound.close(0.0)


def test_carriers_of_many_threads_begin_and_end_side_by_side(run_directory: str) -> None:
    def begin_and_end(number: int) -> None:
        for again in range(20):
            carrier = ZmqCarrier()
            endpoint = f"ipc://{run_directory}/{number}-{again}.sock"
            inbound, link = carrier.bind(endpoint), carrier.connect(endpoint)
            assert link.send(b"hello")
            link.close(0.0)
            inbound.close(0.0)
            carrier.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(begin_and_end, range(8)))


def test_forked_child_has_a_context_of_its_own_and_leaves_that_of_the_parent_alone() -> None:
    told = run("""
        import multiprocessing
        from onehop import Node
        serving, calling = Node(), Node()
        serving.serve("clock", {"read": lambda: 1})
        assert calling.call("clock", "read") == 1

        def child():
            with Node() as node, Node() as other:
                node.serve("child", {"read": lambda: 2})
                assert node.call("clock", "read") == 1
                assert other.call("child", "read") == 2
            calling.close()
            serving.close()

        for _ in range(3):
            process = multiprocessing.get_context("fork").Process(target=child)
            process.start()
            process.join(20)
            assert process.exitcode == 0, process.exitcode
            assert calling.call("clock", "read") == 1
        calling.close()
        serving.close()
        print("well")
    """)
    assert told.endswith("well\n")


def test_interrupted_gather_leaves_nothing_under_way(make_node: Callable[..., Any]) -> None:
    class Interrupt(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupt

    entered, release = threading.Semaphore(0), threading.Event()

    def hold() -> None:
        entered.release()
        assert release.wait(30.0)

    for name in ("a", "b"):
        make_node().serve("clock", {"hold": hold, "read": lambda: None}, server=name)
    calling, main = make_node(), threading.get_ident()
    assert calling.wait_for("clock", count=2, timeout=5.0)

    def disturb() -> None:
        assert entered.acquire(timeout=10.0)
        assert entered.acquire(timeout=10.0)
        signal.pthread_kill(main, signal.SIGUSR1)

    disturber, before = threading.Thread(target=disturb), signal.signal(signal.SIGUSR1, interrupt)
    try:
        disturber.start()
        with pytest.raises(Interrupt):
            calling.gather("clock", "hold")
    finally:
        disturber.join()
        signal.signal(signal.SIGUSR1, before)
        release.set()
    assert sum(peer.in_flight for peer in calling.statistics().peers) == 0
    assert [receipt.outcome for receipt in calling.fanout("clock", "read")] == ["taken"] * 2


def test_descriptors_that_others_open_are_counted_at_once() -> None:
    told = run("""
        from onehop.errors import ResourceLimit
        from onehop.transport.descriptors import check_descriptors
        limit(1000)
        check_descriptors(5)
        held = [os.open("/dev/null", os.O_RDONLY) for _ in range(1000 - used() + 1 - 64 - 5)]
        check_descriptors(5)
        held.append(os.open("/dev/null", os.O_RDONLY))
        try:
            check_descriptors(5)
            print("not refused")
        except ResourceLimit as error:
            os.close(held.pop())
            check_descriptors(5)
            print("refused, then not")
    """)
    assert told == "refused, then not\n"


def test_checking_descriptors_costs_the_same_where_many_are_open() -> None:
    told = run("""
        import time
        from onehop.transport.descriptors import check_descriptors
        def cost():
            began = time.process_time()
            for _ in range(100):
                check_descriptors(5)
            return time.process_time() - began
        few = min(cost() for _ in range(5))
        check_descriptors(5000)
        held = [os.open("/dev/null", os.O_RDONLY) for _ in range(5000)]
        many = min(cost() for _ in range(5))
        print(many < 10 * few, few, many)
    """)
    assert told.startswith("True"), told


def test_resource_limit_is_an_error_of_ours() -> None:
    with pytest.raises(ResourceLimit, match="descriptors open"):
        check_descriptors(2**31)


# Beyond the host ----------------------------------------------------------------------------------


@pytest.fixture
def ports() -> tuple[int, int]:
    """Two ports that nobody listens at."""
    while True:
        first = random.randrange(10_000, 15_000)
        with net.socket() as one, net.socket() as other, suppress(OSError):
            one.bind(("127.0.0.1", first))
            other.bind(("127.0.0.1", first + 1))
            return first, first + 1


def test_the_first_free_port_is_taken_and_told(carrier, ports) -> None:
    first, second = bound = [carrier.bind(f"tcp://127.0.0.1:{ports[0]},{ports[1]}") for _ in range(2)]
    assert first.endpoints == (f"tcp://127.0.0.1:{ports[0]}",)
    assert second.endpoints == (f"tcp://127.0.0.1:{ports[1]}",)
    with pytest.raises(SettingsError, match=r"takes one: give more \(ports, ONEHOP_PORTS\)"):
        carrier.bind(f"tcp://127.0.0.1:{ports[0]},{ports[1]}")
    for each in bound:
        each.close(0.0)


def test_one_socket_listens_on_the_host_and_beyond_it(carrier, run_directory, ports) -> None:
    inbound = carrier.bind(f"ipc://{run_directory}/s", f"tcp://127.0.0.1:{ports[0]}")
    assert inbound.endpoints == (f"ipc://{run_directory}/s", f"tcp://127.0.0.1:{ports[0]}")
    links = [carrier.connect(each) for each in inbound.endpoints]
    for endpoint, link in zip(inbound.endpoints, links, strict=True):
        assert link.send(b"to " + endpoint.encode())
    found: list[Any] = []
    until = time.monotonic() + 5.0
    while len(found) < 2 and time.monotonic() < until:
        inbound.drain(2, found)
    assert {frame for _identity, frame, _body in found} == {b"to " + each.encode() for each in inbound.endpoints}
    for socket in (inbound, *links):
        socket.close(0.0)


def test_a_node_of_this_host_is_reached_without_leaving_it(run_directory) -> None:
    here, path = "tcp://10.0.0.5:9502", f"{run_directory}/s"
    carrier = ZmqCarrier(directory=run_directory)
    assert carrier.nearest((f"ipc://{path}", here)) == here, "its socket is not here: it is in a container, or far away"
    open(path, "w").close()
    assert carrier.nearest((f"ipc://{path}", here)) == f"ipc://{path}"
    assert ZmqCarrier(directory="/run/other").nearest((f"ipc://{path}", here)) == here
    assert carrier.nearest((f"ipc://{run_directory}/gone",)) == f"ipc://{run_directory}/gone", "there is no other"
