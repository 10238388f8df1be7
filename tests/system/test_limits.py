"""What happens at the limits of the machine: descriptors, memory, threads, disk."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import pytest
import zmq
from tests.registry.servers import Redis, free_port

from onehop import CallError, Node, OnehopError
from onehop.protocol import wire
from onehop.registry.view import CACHE_PERIOD

# Descriptors --------------------------------------------------------------------------------------

DESCRIPTORS, STRANGERS = 256, 400
CPU_SHARE, ALERT_WITHIN = 0.2, 5.0
UNAFFECTED = 2.0
"""Seconds that no call of a known peer takes; other tests hold a process up for less."""

LIMITED_SERVER = """
import json, logging, resource
logging.basicConfig(filename=sys.argv[1], format="%(levelname)s %(threadName)s %(message)s")
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]),) * 2)
held = []

def hold():
    "Opens all that is left."
    try:
        while True:
            held.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        return len(held)

def let_go():
    while held:
        os.close(held.pop())

def report():
    now = node.statistics()
    return {"cpu": time.process_time(), "dropped": dict(now.dropped), "threads": sorted(
        thread.name for thread in threading.enumerate() if not thread.name.startswith("onehop-worker"))}

node = onehop.Node(**json.loads(sys.argv[3]))
node.serve("clock", {"echo": lambda value: value, "report": report, "hold": hold, "let_go": let_go}, server="a")
print("serving", flush=True)
node.run()
"""


class Limited:
    """A server that may open few descriptors.

    Attributes:
        log: what it has logged.
        settings: of nodes that call it.
    """

    def __init__(self, start: Callable[..., Any], log: Path, settings: dict[str, Any], own: dict[str, Any]) -> None:
        self.log, self.settings = log, settings
        program = start(LIMITED_SERVER, str(log), str(DESCRIPTORS), json.dumps(own))
        assert program.line() == "serving"


@pytest.fixture(params=["in one host", "beyond it"])
def limited(request: pytest.FixtureRequest, start: Callable[..., Any], tmp_path: Path, run_directory: str) -> Limited:
    if request.param == "in one host":
        return Limited(start, tmp_path / "log", {}, {})
    ports = [free_port(), free_port()]
    shared = {
        "registry": f"hosts://127.0.0.1:{ports[0]},127.0.0.2:{ports[0]}/",
        "ports": f"{ports[1]}",
        "insecure": True,
    }
    own = {"host": "a", "address": "127.0.0.1", "run_directory": f"{run_directory}/a"}
    other = {"host": "b", "address": "127.0.0.2", "run_directory": f"{run_directory}/b"}
    return Limited(start, tmp_path / "log", shared | other, shared | own)


class Callers:
    """Nodes that are connected already and go on calling, and how long the slowest call took."""

    def __init__(self, nodes: list[Node], method: str = "echo") -> None:
        self._arguments = [0] if method == "echo" else []
        self._method = method
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._call, args=(node,)) for node in nodes]
        self.done = 0
        self.slowest = 0.0
        self.failed: list[BaseException] = []
        for node in nodes:
            node.call("clock", method, *self._arguments)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _call(self, node: Node) -> None:
        while not self._stop.wait(0.02):
            began = time.monotonic()
            try:
                node.call("clock", self._method, *self._arguments)
            except BaseException as error:
                self.failed.append(error)
            self.slowest = max(self.slowest, time.monotonic() - began)
            self.done += 1


@contextmanager
def strangers(endpoint: str, count: int = STRANGERS) -> Iterator[list[zmq.Socket[bytes]]]:
    """Sockets that connect, say hello, and come back when their connection ends."""
    with zmq.Context() as context, ExitStack() as stack:
        context.set(zmq.MAX_SOCKETS, 2 * count)
        sockets = [stack.enter_context(context.socket(zmq.DEALER)) for _ in range(count)]
        for number, socket in enumerate(sockets):
            socket.linger = 0
            socket.set(zmq.RECONNECT_IVL, 500)
            socket.set(zmq.RECONNECT_IVL_MAX, 4000)
            socket.connect(endpoint)
            socket.send(wire.hello(wire.Hello(number.to_bytes(16, "big"), bytes(16))))
        yield sockets


def endpoint_of(node: Node) -> str:
    [found] = [each for each in node.nodes() if "clock" in each.services]
    return str(found.endpoints[-1])


def test_more_clients_than_descriptors_are_turned_away_and_harm_nobody(
    limited: Limited, make_node: Callable[..., Node], eventually: Callable[..., None]
) -> None:
    nodes = [make_node(timeout=10.0, **limited.settings) for _ in range(5)]
    with Callers(nodes) as callers:
        before = nodes[0].call("clock", "report")
        began = time.monotonic()
        with strangers(endpoint_of(nodes[0])):
            eventually(lambda: "turned away until descriptors are free" in limited.log.read_text(), within=ALERT_WITHIN)
            alerted = time.monotonic() - began
            eventually(lambda: time.monotonic() - began > 10.0, within=12.0)
            after = nodes[0].call("clock", "report")
            share = (after["cpu"] - before["cpu"]) / (time.monotonic() - began)
            outcome = "served"  # over TCP: whoever was quicker than the look at who came
            try:
                make_node(timeout=2.0, **limited.settings).call("clock", "echo", 1)
            except CallError as error:
                outcome = error.executed
            assert outcome in (("served", "no", "unknown") if limited.settings else ("no",))
        gone = time.monotonic()
        late = make_node(timeout=20.0, **limited.settings)
        eventually(lambda: "accepted again" in limited.log.read_text(), within=10.0)
        assert late.client("clock", ready_timeout=10.0).call("echo", 2) == 2
        recovered = time.monotonic() - gone
    away = after["dropped"].get("connections turned away", 0)
    print(
        f"R14  {STRANGERS} clients at {DESCRIPTORS} descriptors: {share:.1%} of a processor, alert after "
        f"{alerted:.2f} s, {away} turned away, {callers.done} calls of known peers, {len(callers.failed)} failed, "
        f"the slowest {callers.slowest * 1000:.0f} ms; a new client served {recovered:.1f} s after the others left"
    )
    assert callers.failed == []
    assert callers.slowest < UNAFFECTED
    assert share < CPU_SHARE
    assert away > 0 or not limited.settings, "who comes over TCP is seen to be turned away"
    assert limited.log.read_text().count("turned away until") == 1, "logged once"
    assert after["dropped"]["times that listening ended for want of descriptors"] == 1


def test_a_process_that_has_opened_all_its_descriptors_goes_on_with_whom_it_knows(
    limited: Limited, make_node: Callable[..., Node], eventually: Callable[..., None]
) -> None:
    node = make_node(timeout=10.0, **limited.settings)
    with Callers([node]) as callers:
        threads = node.call("clock", "report")["threads"]
        held = node.call("clock", "hold")
        eventually(lambda: "turned away until" in limited.log.read_text(), within=ALERT_WITHIN)
        cpu, began = node.call("clock", "report")["cpu"], time.monotonic()
        fresh = make_node(timeout=1.0, **limited.settings)
        outcome = "refused"
        try:
            fresh.call("clock", "echo", 1)
            outcome = "served"  # over TCP: whoever was quicker than the look at who came
        except OnehopError:
            pass
        assert outcome in (("served", "refused") if limited.settings else ("refused",))
        eventually(lambda: time.monotonic() - began > 5.0, within=7.0)
        share = (node.call("clock", "report")["cpu"] - cpu) / (time.monotonic() - began)
        node.call("clock", "let_go")
        assert make_node(timeout=20.0, **limited.settings).client("clock", ready_timeout=15.0).call("echo", 2) == 2
        assert set(threads) <= set(node.call("clock", "report")["threads"])
    print(
        f"R14  a process that holds {held} descriptors more, and so all: {share:.1%} of a processor, "
        f"{callers.done} calls of a known peer, {len(callers.failed)} failed, the slowest "
        f"{callers.slowest * 1000:.0f} ms"
    )
    assert callers.failed == []
    assert callers.slowest < UNAFFECTED
    assert share < CPU_SHARE
    assert "Traceback" not in limited.log.read_text()


# Threads ------------------------------------------------------------------------------------------

FEW_THREADS = """
import gc, resource, subprocess

def room(size):
    "From now on a stack of `size` is what a thread takes, and there is room for small things only."
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (256 << 20), resource.RLIM_INFINITY))
    threading.stack_size(size)

def scarce():
    room(1 << 30)

def plenty():
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    threading.stack_size(0)

def told(action):
    try:
        action()
    except onehop.ResourceLimit as error:
        assert "the machine gives no thread for onehop-" in str(error) and "ulimit -u" in str(error), error
        assert "\\n" not in str(error)
        return True
    return False
"""


def test_no_thread_is_one_sentence_and_whatever_needs_it_works_later(
    start: Callable[..., Any], serve: Callable[..., Any]
) -> None:
    serve("a")
    program = start(
        FEW_THREADS
        + """
node, other = onehop.Node(timeout=5.0), onehop.Node(timeout=5.0)
scarce()
assert told(lambda: node.call("clock", "name"))
assert told(lambda: node.serve("second", {"read": int}))
assert told(lambda: node.call("clock", "name"))
plenty()
assert node.call("clock", "name") == "a"
scarce()
assert node.call("clock", "name") == "a"                       # a known peer takes no thread
assert told(lambda: node.serve("second", {"read": int}))        # the receiver
plenty()
assert node.servers("second") == []
node.serve("second", {"read": int})
assert other.call("second", "read") == 0
print("recovered", sorted({thread.name for thread in threading.enumerate()}), flush=True)
"""
    )
    assert program.line().startswith("recovered")


def test_server_without_threads_for_workers_refuses_and_serves_again(start: Callable[..., Any], make_node) -> None:  # type: ignore[no-untyped-def]
    program = start(
        FEW_THREADS
        + """
node = onehop.Node()
node.serve("control", {"plenty": onehop.method(inline=True)(plenty)})
node.serve("clock", {"read": time.monotonic})
scarce()
print("serving", flush=True)
sys.stdin.read()
"""
    )
    assert program.line() == "serving"
    node = make_node(timeout=5.0)
    with pytest.raises(CallError) as refused:
        node.call("clock", "read")
    assert (getattr(refused.value, "reason", ""), refused.value.executed) == ("full", "no")
    node.call("control", "plenty")
    assert node.call("clock", "read") > 0


def test_cast_that_is_to_be_held_fails_without_a_thread_and_the_next_one_is_held_and_sent(
    start: Callable[..., Any],
) -> None:
    program = start(
        FEW_THREADS
        + """
import warnings
warnings.simplefilter("ignore")  # eventlet, where it is installed, warns of itself
import oslo_messaging
from oslo_config import cfg
from oslo_messaging.rpc.client import ClientSendError

def transport():
    return oslo_messaging.get_rpc_transport(cfg.ConfigOpts(), "zmq://")

taken = []

class Endpoint:
    def note(self, ctxt, value):
        taken.append(value)

target = oslo_messaging.Target(topic="compute", server="host-1")
sending = transport()
client = oslo_messaging.get_rpc_client(sending, target)
client.cast({}, "note", value=0)  # the node's own threads; then the one of the outbox has to end
server = oslo_messaging.get_rpc_server(transport(), target, [Endpoint()])
server.start()
until = time.monotonic() + 20.0
while "onehop-outbox" in [each.name for each in threading.enumerate()] and time.monotonic() < until:
    time.sleep(0.01)
server.stop()
server.wait()
while sending._driver.core.node.servers() and time.monotonic() < until:
    time.sleep(0.01)
scarce()
for value in (1, 2):
    try:
        client.cast({}, "note", value=value)
    except ClientSendError as error:
        assert "the machine gives no thread for onehop-outbox" in str(error) and "ulimit -u" in str(error), error
    else:
        raise AssertionError("it is held, and nobody will send it")
assert not sending._driver.core.held
plenty()
client.cast({}, "note", value=3)
server = oslo_messaging.get_rpc_server(transport(), target, [Endpoint()])
server.start()
while len(taken) < 2 and time.monotonic() < until:
    time.sleep(0.01)
print("taken", *taken, flush=True)
"""
    )
    assert program.line() == "taken 0 3"


# Memory -------------------------------------------------------------------------------------------

FEW_BYTES = """
import logging, resource
logging.basicConfig(filename=sys.argv[1])

def limit(size):
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + size, resource.RLIM_INFINITY))

def eat(size):
    return len(bytearray(size))

def report():
    return sorted(thread.name for thread in threading.enumerate() if not thread.name.startswith("onehop-worker"))

node = onehop.Node(max_message=1 << 26)
node.serve("clock", {"echo": len, "limit": limit, "eat": eat, "report": report, "read": time.monotonic}, workers=4)
print("serving", flush=True)
node.run()
"""


def test_no_memory_for_a_handler_or_a_message_is_an_error_of_that_call_alone(
    start: Callable[..., Any], make_node: Callable[..., Node], tmp_path: Path
) -> None:
    program = start(FEW_BYTES, str(tmp_path / "log"))
    assert program.line() == "serving"
    node, other = make_node(timeout=3.0, max_message=1 << 26), make_node(timeout=10.0)
    outcomes: Counter[str] = Counter()
    assert node.call("clock", "echo", b"x") == 1
    threads = other.call("clock", "report")
    other.call("clock", "limit", 16 << 20)
    with Callers([other], "read") as callers:
        for _ in range(5):
            for method, argument in (("eat", 1 << 30), ("echo", b"x" * (40 << 20))):
                try:
                    node.client("clock", ready_timeout=5.0).call(method, argument)
                    outcomes[f"{method}: answered"] += 1
                except CallError as error:
                    outcomes[f"{method}: {type(error).__name__}, executed {error.executed}"] += 1
    assert other.call("clock", "report") == threads
    print(f"memory: {dict(outcomes)}, {callers.done} other calls, {len(callers.failed)} failed")
    assert outcomes["eat: RemoteError, executed yes"] == 5
    assert callers.failed == []
    assert program.process.poll() is None


# Disk ---------------------------------------------------------------------------------------------

FULL_DISK = """
import ctypes, logging
logging.basicConfig(filename=sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)

def checked(result):
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

def small_disk(path):
    "A file system of 64 KiB at `path`, which only this process sees."
    os.makedirs(path, exist_ok=True)
    checked(libc.unshare(0x00020000))
    checked(libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None))
    checked(libc.mount(b"none", path.encode(), b"tmpfs", 0, b"size=64k,mode=700"))

def fill(path):
    with open(f"{path}/full", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass

def told(action, error, words):
    try:
        action()
    except error as raised:
        assert words in str(raised) and "\\n" not in str(raised), raised
        return True
    return False
"""


@pytest.fixture
def is_root() -> None:
    assert os.geteuid() == 0, "a file system of one's own takes root"


def test_full_run_directory_is_one_sentence_and_calls_go_on(
    is_root: None, start: Callable[..., Any], tmp_path: Path, run_directory: str
) -> None:
    program = start(
        FULL_DISK
        + """
place = os.environ["ONEHOP_RUN_DIRECTORY"]
small_disk(place)
first, calling, late = onehop.Node(timeout=5.0), onehop.Node(timeout=5.0), onehop.Node(timeout=5.0)
first.serve("clock", {"read": lambda: 1})
assert calling.call("clock", "read") == 1
fill(place)
assert told(lambda: late.serve("late", {"read": lambda: 2}), onehop.OnehopError, "No space left on device")
assert told(lambda: first.serve("second", {"read": lambda: 3}), onehop.RegistryError, "No space left on device")
until = time.monotonic() + 4.0  # two looks at everything
while time.monotonic() < until:
    assert calling.call("clock", "read") == 1
    time.sleep(0.01)
os.unlink(place + "/full")
first.serve("second", {"read": lambda: 3})
late.serve("late", {"read": lambda: 2})
assert calling.client("second", ready_timeout=5.0).call("read") == 3
assert calling.client("late", ready_timeout=5.0).call("read") == 2
assert calling.call("clock", "read") == 1
print("recovered", flush=True)
[each.close() for each in (calling, late, first)]
""",
        str(tmp_path / "log"),
    )
    assert program.line() == "recovered"
    assert program.wait() == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_full_cache_directory_is_logged_once_and_calls_go_on(
    is_root: None, start: Callable[..., Any], tmp_path: Path
) -> None:
    with Redis() as server:
        program = start(
            FULL_DISK
            + """
place, port = sys.argv[2], sys.argv[4]
small_disk(place)
fill(place)
settings = {"registry": sys.argv[3], "insecure": True, "address": "127.0.0.1", "ports": port, "cache_directory": place}
node, calling = onehop.Node(**settings), onehop.Node(**settings)
for number in range(2):
    node.serve(f"clock-{number}", {"read": lambda: 1})
    assert calling.client(f"clock-{number}", ready_timeout=5.0).call("read") == 1
    time.sleep(float(sys.argv[5]))
print("called", flush=True)
[each.close() for each in (calling, node)]
""",
            str(tmp_path / "log"), str(tmp_path / "cache"), server.url(), str(free_port()), str(CACHE_PERIOD + 0.2),
        )  # fmt: skip
        assert program.line() == "called"
        assert program.wait() == 0
    log = (tmp_path / "log").read_text()
    assert log.count("No space left on device") == 1
    assert "Traceback" not in log
