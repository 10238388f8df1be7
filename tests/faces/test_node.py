"""A node: lazy, looked at, closed; and what it says when it cannot be."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import onehop
from onehop import (
    CallTimeout,
    Node,
    NodeClosed,
    NoRoute,
    OnehopError,
    PeerLost,
    RegistryError,
    Rejected,
    Settings,
    SettingsError,
)

# Lazy ---------------------------------------------------------------------------------------------


def test_constructors_do_nothing(node, run_directory: str) -> None:
    gc.collect()  # what earlier tests left is not to go meanwhile
    threads, descriptors = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    files = os.listdir(run_directory)

    def check() -> None:
        assert set(threading.enumerate()) <= threads
        assert len(os.listdir("/proc/self/fd")) <= descriptors
        assert os.listdir(run_directory) == files

    one = node()
    client = one.client("clock", timeout=5.0).at("a")
    assert client.proxy is not None
    assert "clock" in repr(client)
    one.on_change(lambda: None)
    check()
    assert repr(one).endswith("not used yet>")
    one.close()
    check()


def test_import_loads_nothing_heavy() -> None:
    program = (
        "import sys, onehop; onehop.NoRoute; print([m for m in ('zmq', 'msgspec', 'threading') if m in sys.modules])"
    )
    # Without site, which may import threading by itself; so the package's place is told.
    place = {**os.environ, "PYTHONPATH": str(Path(onehop.__file__).parent.parent)}
    told = subprocess.run(
        [sys.executable, "-S", "-c", program], capture_output=True, text=True, timeout=30, check=True, env=place
    )
    assert told.stdout.strip() == "[]"


def test_everything_is_given_back_at_close(face, run_directory: str, eventually) -> None:
    def use() -> None:
        with face() as serving, face() as calling:
            serving.serve("clock", {"read": time.time})
            calling.call("clock", "read")

    use()
    gc.collect()
    threads, open_files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        use()
    eventually(lambda: threading.active_count() <= threads)
    gc.collect()
    eventually(lambda: len(os.listdir("/proc/self/fd")) <= open_files)
    assert [name for name in os.listdir(run_directory) if name.endswith(".sock")] == []


# Looking ------------------------------------------------------------------------------------------


def test_servers_and_nodes_are_seen(node) -> None:
    serving, calling = node(host="h1"), node(host="h2")
    assert calling.servers() == []
    serving.serve("clock", {"read": lambda: 1}, server="a")
    serving.serve("alarm", {"ring": lambda: 1})
    calling.serve("clock", {"read": lambda: 1}, server="b")
    seen = calling.servers("clock")
    assert {(each.server, each.node, each.host, each.pid, each.state, each.local) for each in seen} == {
        ("a", serving.id, "h1", os.getpid(), "serving", False),
        ("b", calling.id, "h2", os.getpid(), "serving", True),
    }
    assert {(each.service, each.server) for each in calling.servers()} == {
        ("clock", "a"),
        ("alarm", "h1"),
        ("clock", "b"),
    }
    assert {record.node for record in calling.nodes()} == {serving.id, calling.id}


def test_wait_for_waits_until_enough_servers_are_there(node, background) -> None:
    calling = node()
    assert calling.wait_for("clock", timeout=0.05) is False
    waiting = background(calling.wait_for, "clock")
    both = background(lambda: calling.wait_for("clock", count=2, timeout=10.0))
    named = background(lambda: calling.wait_for("clock", server="b", timeout=10.0))
    node().serve("clock", {"read": lambda: 1}, server="a")
    assert waiting.result(within=2.0) is True
    assert not both.ended
    node().serve("clock", {"read": lambda: 1}, server="b")
    assert both.result(within=2.0) is True
    assert named.result(within=2.0) is True


def test_changes_are_told(node, eventually) -> None:
    calling = node()
    changes: list[int] = []
    calling.on_change(lambda: changes.append(len(changes)))
    calling.servers()
    before = len(changes)
    serving = node()
    serving.serve("clock", {"read": lambda: 1})
    eventually(lambda: len(changes) > before)
    before = len(changes)
    calling.on_change(lambda: changes.append(-1))
    serving.close()
    eventually(lambda: -1 in changes)


def test_realms_do_not_see_each_other(make_node) -> None:
    make_node(realm="one").serve("clock", {"read": lambda: 1})
    assert make_node(realm="one").call("clock", "read") == 1
    assert make_node(realm="two").servers() == []
    with pytest.raises(NoRoute, match=r"realm \('two'\)"):
        make_node(realm="two").client("clock", ready_timeout=0.05).call("read")


def test_node_has_one_id_of_its_own(node) -> None:
    one, two = node(), node()
    assert re.fullmatch("[0-9a-f]{32}", one.id)
    assert one.id == one.id != two.id


def test_statistics_tell_what_happened(node, gate) -> None:
    serving, calling = node(host="h1"), node(host="h2")
    serving.serve("clock", gate)
    client = calling.client("clock")
    client.call("read")
    held = client.start("hold", b"x" * 1000)
    gate.wait_entered()
    with pytest.raises(NoRoute):
        calling.client("nothing", ready_timeout=0).call("read")
    now, there = calling.statistics(), serving.statistics()
    assert (now.node, now.host, now.registry, now.records) == (calling.id, "h2", "local", 1)
    assert now.outcomes == {"NoRoute": 1}
    (peer,) = now.peers
    assert (peer.node, peer.host, peer.state, peer.in_flight, peer.sent) == (serving.id, "h1", "ready", 1, 2)
    assert (there.taken, there.waiting) == (1, 0)
    assert there.taken_bytes > 1000
    assert repr(calling) == f"<Node {calling.id[:8]} on h2: 1 peers (1 ready) | 1 requests under way, 0 taken>"
    gate.open.set()
    held.result()
    assert calling.statistics().peers[0].in_flight == 0


# Closing ------------------------------------------------------------------------------------------


def test_closed_node_says_so(node) -> None:
    one = node()
    one.serve("clock", {"read": lambda: 1})
    client = one.client("clock")
    assert client.call("read") == 1
    one.close()
    one.close()
    for use in (
        lambda: client.call("read"),
        lambda: client.cast("read"),
        lambda: client.fanout("read"),
        lambda: client.start("read"),
        lambda: one.call("clock", "read"),
        lambda: one.serve("clock", {"read": lambda: 1}),
        lambda: one.listen("clock"),
        lambda: one.servers(),
        lambda: one.id,
        lambda: one.statistics(),
    ):
        with pytest.raises(NodeClosed, match="make a new one"):
            use()
    assert repr(one).endswith("closed>")


def test_node_closes_at_the_end_of_with(node) -> None:
    with node() as one:
        one.servers()
    with pytest.raises(NodeClosed):
        one.servers()


def test_close_ends_the_calls_of_other_threads_at_once(node, gate, background) -> None:
    node().serve("clock", gate)
    calling = node()
    calls = [background(calling.client("clock").call, "hold") for _ in range(6)]
    streams = [background(next, calling.stream("clock", "hold"))]
    gate.wait_entered(7)
    began = time.monotonic()
    calling.close()
    for each in (*calls, *streams):
        with pytest.raises(PeerLost, match="this node was closed"):
            each.result(within=5.0)
    assert time.monotonic() - began < 5.0


def test_close_ends_who_waits_for_a_server(node, background, eventually) -> None:
    calling = node()
    calling.servers()
    call = background(calling.client("clock", timeout=30.0, ready_timeout=30.0).call, "read")
    waiting = background(lambda: calling.wait_for("clock", timeout=30.0))
    calling.close()
    with pytest.raises(NodeClosed):
        call.result(within=2.0)
    with pytest.raises((NodeClosed, AssertionError)):
        assert waiting.result(within=2.0)


def test_close_during_calls_gives_every_caller_an_outcome(node, background) -> None:
    for _ in range(5):
        serving, calling = node(), node()
        serving.serve("clock", {"read": lambda: 1})
        client = calling.client("clock", timeout=5.0)
        client.call("read")

        def work(client: onehop.Client = client) -> str:
            try:
                while True:
                    client.call("read")
            except (PeerLost, NodeClosed, Rejected) as error:
                return type(error).__name__

        workers = [background(work) for _ in range(4)]
        calling.close()
        assert {each.result(within=3.0) for each in workers} <= {"PeerLost", "NodeClosed"}


def test_both_sides_may_close_at_once(node, background) -> None:
    for _ in range(20):
        serving, calling = node(), node()
        serving.serve("clock", {"read": lambda: 1})
        calling.call("clock", "read")
        closing = background(serving.close)
        calling.close()
        closing.result()


# What cannot be -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"timeout": 0.0}, "timeout is 0.0; it must be a number of seconds above 0"),
        ({"timeout": "5"}, "setting timeout is '5'; it must be of type float"),
        ({"workers": 0}, "workers is 0; it must be 1 or more"),
        ({"workers": True}, "setting workers is True; it must be of type int"),
        ({"tiemout": 5.0}, "no setting is called 'tiemout'; there are: address, .*drain_timeout"),
        ({"realm": "x" * 256}, "realm is longer than 255 bytes"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(settings, told) -> None:
    with pytest.raises(SettingsError, match=told):
        Node(**settings)


def test_settings_object_is_taken_and_overridden(node) -> None:
    settings = Settings(timeout=5.0, workers=3)
    one = Node(settings, workers=4)
    assert (one.settings.timeout, one.settings.workers) == (5.0, 4)


def test_environment_sets_what_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEHOP_TIMEOUT", "7.5")
    monkeypatch.setenv("ONEHOP_WORKERS", "3")
    one = Node(workers=4)
    assert (one.settings.timeout, one.settings.workers) == (7.5, 4)


@pytest.mark.parametrize("registry", ["nowhere", "nowhere://host", "://", "local://elsewhere:99999999"])
def test_unknown_registry_is_one_sentence_at_the_first_use(make_node, registry) -> None:
    one = make_node(registry=registry)
    with pytest.raises((SettingsError, RegistryError)) as caught:
        one.servers()
    assert "\n" not in str(caught.value)
    assert registry in str(caught.value) or registry.partition(":")[0] in str(caught.value)


def test_check_says_what_is_wrong_with_the_registry_and_touches_nothing(make_node, run_directory: str) -> None:
    before = set(threading.enumerate())
    for right in ("local", "redis://127.0.0.1:1/"):
        make_node(registry=right).check()
    for wrong, problem in (("nowhere://host", "it must be"), ("redis://", "no server"), ("redis://h/?db=x", "db is")):
        with pytest.raises(SettingsError, match=problem):
            make_node(registry=wrong).check()
    assert set(threading.enumerate()) <= before
    assert not list(Path(run_directory).iterdir())


def test_run_directory_that_cannot_be_made_is_told(make_node, run_directory: str) -> None:
    blocked = Path(run_directory) / "file"
    blocked.write_text("")
    one = make_node(run_directory=str(blocked / "onehop"))
    with pytest.raises(OnehopError, match=re.escape(str(blocked))):
        one.serve("clock", {"read": lambda: 1})


def test_run_directory_that_is_too_long_is_told(make_node, run_directory: str) -> None:
    with pytest.raises(SettingsError, match="shorter"):
        make_node(run_directory=run_directory + "/long" * 25).serve("clock", {"read": lambda: 1})


def test_failed_serve_leaves_the_node_usable(node) -> None:
    serving = node()
    with pytest.raises(SettingsError):
        serving.serve("clock", object())
    with pytest.raises(SettingsError):
        serving.serve("clock", {"read": lambda: 1}, workers=-1)
    serving.serve("clock", {"read": lambda: 1})
    assert node().call("clock", "read") == 1


LONG = "ü" * 128  # 256 bytes


def test_names_beyond_255_bytes_are_refused_where_they_are_served(node) -> None:
    serving = node()
    for service, server in ((LONG, ""), ("clock", LONG)):
        with pytest.raises(SettingsError, match="255"):
            serving.serve(service, {"read": lambda: 1}, server=server)
    serving.serve("clock", {"read": lambda: 1})
    assert node().call("clock", "read") == 1


def test_method_name_beyond_255_bytes_is_refused_and_leaves_nothing_behind(node) -> None:
    node().serve("clock", {"read": lambda: 1})
    calling = node()
    client = calling.client("clock")
    for verb in (client.call, client.cast, client.start, client.stream):
        with pytest.raises(OnehopError, match="255"):
            verb(LONG)
    assert client.call("read") == 1
    assert [peer.in_flight for peer in calling.statistics().peers] == [0]


def test_names_of_any_characters_work(node) -> None:
    serving = node()
    serving.serve("exchange/topic ü\n", {"läs": lambda: 1}, server="host-7.example.org:ü/..")
    calling = node()
    assert calling.client("exchange/topic ü\n", server="host-7.example.org:ü/..").call("läs") == 1


def test_deadline_below_a_millisecond_is_kept(node, gate) -> None:
    node().serve("clock", gate)
    client = node().client("clock")
    client.call("read")
    for _ in range(20):
        with pytest.raises((CallTimeout, Rejected)):
            client.options(timeout=0.0005).call("hold")
    gate.open.set()
    assert client.call("read") <= 20


# Of the blocking face alone ------------------------------------------------------------------------


# In a loop a signal handler interrupts nobody who waits: it runs between two callbacks.
def test_close_inside_a_signal_handler_ends_the_call_that_it_interrupted(run_directory: str) -> None:
    program = """
import signal, threading, time
import onehop

entered = threading.Event()
serving, calling = onehop.Node(), onehop.Node()
serving.serve("slow", {"hold": lambda: (signal.setitimer(signal.ITIMER_REAL, 0.3), entered.wait(30))})
signal.signal(signal.SIGALRM, lambda *_: calling.close())
began = time.monotonic()
try:
    calling.call("slow", "hold")
except onehop.PeerLost as error:
    print(error.executed, time.monotonic() - began < 15)
entered.set()
serving.close()
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (told.returncode, told.stdout) == (0, "unknown True\n"), told.stdout + told.stderr


# A node of the asyncio face keeps no list of them.
def test_closed_servers_and_listeners_are_not_kept(run_directory: str) -> None:
    with Node() as node:
        for number in range(20):
            node.serve(f"clock-{number}", {"read": lambda: 1}).close()
            node.listen(f"polled-{number}").close()
        gc.collect()
        assert len(node._servers) < 5
