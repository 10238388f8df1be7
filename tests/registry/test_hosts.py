"""The registry that needs no service: several hosts on one machine, each with an address of loopback of its own."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from tests.registry.views import Views, eventually, numbers

from onehop.errors import RegistryError, SettingsError
from onehop.interfaces import Record
from onehop.registry import open_registry
from onehop.registry.directory import HELLO_LIMIT, LONGEST_LEASE, SHORTEST_LEASE, WANTS_LIMIT, Directory, join, part
from onehop.registry.hosts import HostsRegistry
from onehop.registry.view import Cache
from onehop.settings import Settings
from onehop.testing.contracts import check_registry

SOURCES = Path(__file__).parents[2] / "src"
SHORT = 2.0  # seconds; a lease so short that a test may wait for some
AT_ONCE = 3.0  # seconds; a takeover, and who was killed, take less than one where the machine is not busy otherwise

_networks = count(random.randrange(200))


def record(number: int, **fields: Any) -> Record:
    return Record(**{"node": f"{number:032x}", "host": f"host-{number // 10}", "services": {"clock": ("a",)}} | fields)


class Process:
    """A forked process that does something and then waits for its end."""

    def __init__(self, work: Callable[[], object]) -> None:
        reading, writing = os.pipe()
        self._alive, hold = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(hold)
                kept = work()
                os.write(writing, b"ready")
                os.read(self._alive, 1)
                del kept
            except BaseException as error:
                os.write(writing, f"{type(error).__name__}: {error}".encode())
            finally:
                os._exit(0)
        os.close(writing)
        self._hold: int | None = hold
        answer = os.read(reading, 4096)
        os.close(reading)
        assert answer == b"ready", answer

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        if self._hold is not None:
            self.send(signal.SIGKILL)
            os.waitpid(self.pid, 0)
            os.close(self._hold)
            os.close(self._alive)
            self._hold = None


class Site:
    """Hosts 1, 2, 3... of one site, each with a run directory and an address of its own."""

    def __init__(self, root: Path, closing: ExitStack) -> None:
        self._root, self._closing = root, closing
        self._network = f"127.{os.getpid() % 200 + 20}.{next(_networks) % 250 + 1}"
        self.port = random.randrange(20_000, 30_000)
        self.listed: tuple[int, ...] = (1, 2)
        self.lease = Settings().lease

    def address(self, host: int) -> str:
        return f"{self._network}.{host}"

    @property
    def url(self) -> str:
        return "hosts://" + ",".join(f"{self.address(host)}:{self.port}" for host in self.listed) + "/"

    def settings(self, host: int, **settings: Any) -> Settings:
        values = {
            "address": self.address(host),
            "host": f"host-{host}",
            "run_directory": str(self._root / str(host)),
            "cache_directory": str(self._root / f"cache-{host}"),
            "lease": self.lease,
        }
        return Settings(**values | settings)

    def make(self, host: int, url: str = "", **settings: Any) -> HostsRegistry:
        return HostsRegistry(self.settings(host, **settings), url or self.url)

    def open(self, host: int, url: str = "", **settings: Any) -> HostsRegistry:
        registry = self.make(host, url, **settings)
        self._closing.callback(registry.close)
        return registry

    def watch(self, host: int, *services: str, **settings: Any) -> Views:
        """What a node of this process that stands for ``host`` is delivered."""
        views, registry = Views(), self.open(host, **settings)
        registry.watch(views)
        for service in services or ("",):
            registry.want(service, 1.0)
        return views

    def start(self, host: int, *records: int | Record, **settings: Any) -> Process:
        """A process of ``host`` with a node for each record, or with one that has none."""

        def announce() -> list[HostsRegistry]:
            nodes = [self.make(host, **settings) for _ in records or (0,)]
            for node, each in zip(nodes, records, strict=False):
                node.announce(record(each) if isinstance(each, int) else each)
            nodes[0].watch(Views())
            return nodes

        process = Process(announce)
        self._closing.callback(process.kill)
        return process

    def start_holder(self, host: int, *records: int, **settings: Any) -> Process:
        process = self.start(host, *records, **settings)
        assert eventually(lambda: self.is_held(host))
        return process

    def connect(self, host: int) -> socket.socket:
        connection = socket.create_connection((self.address(host), self.port), 5.0)
        self._closing.callback(connection.close)
        return connection

    def is_held(self, host: int) -> bool:
        """Whether a directory answers there."""
        with suppress(OSError), self.connect(host) as connection:
            connection.sendall(hello(None))
            return connection.recv(100) == b'{"type":"told"}\n'
        return False

    def tells_of(self, host: int) -> list[int]:
        """Whom the directory of that host knows."""
        with self.connect(host) as connection:
            connection.sendall(hello("", services=[""]))
            told = json.loads(connection.makefile("rb").readline())
        return sorted(int(each["node"], 16) for each in told.get("here", []) + told.get("announced", []))

    def directory(self, host: int) -> Directory:
        """The directory of this process for that host."""
        directory = join(self.settings(host), lambda: [(self.address(each), self.port) for each in self.listed])
        self._closing.callback(part, directory)
        return directory


def hello(realm: str | None, **fields: Any) -> bytes:
    said = {"type": "hello", "version": 1, "host": "raw", "lease": 60.0, "realm": realm} | fields
    return json.dumps(said).encode() + b"\n"


@pytest.fixture
def site(run_directory: str) -> Iterator[Site]:
    with ExitStack() as closing:
        yield Site(Path(run_directory), closing)


# --- the contract ---


def test_nodes_of_one_host_keep_the_contract(site: Site) -> None:
    site.listed = (1,)
    check_registry(lambda: site.make(1), within=AT_ONCE, joins=100)


def test_nodes_of_several_hosts_keep_the_contract(site: Site) -> None:
    hosts = count()
    assert all(eventually(lambda each=each: site.directory(each).is_held) for each in site.listed)
    check_registry(lambda: site.make(next(hosts) % 3 + 1), within=AT_ONCE, joins=60)


def test_a_host_with_an_address_of_ipv6_alone_keeps_the_contract(site: Site) -> None:
    url = f"hosts://[::1]:{site.port}/"
    check_registry(lambda: site.make(1, url, address="::1"), within=AT_ONCE, joins=20)


def test_construction_touches_nothing(site: Site) -> None:
    threads, descriptors = threading.active_count(), os.listdir("/proc/self/fd")
    registry = open_registry(site.url, site.settings(1))
    assert registry.addresses == ((site.address(1), site.port), (site.address(2), site.port))
    assert (threading.active_count(), os.listdir("/proc/self/fd")) == (threads, descriptors)


def test_what_was_opened_is_given_back_at_close(site: Site) -> None:
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for number in range(5):
        registry = site.make(1)
        registry.announce(record(number))
        registry.watch(Views())
        registry.want("", 1.0)
        registry.close()
        with pytest.raises(RegistryError, match="was closed"):
            registry.announce(record(1))
    assert eventually(lambda: threading.active_count() == threads)
    assert len(os.listdir("/proc/self/fd")) == descriptors


# --- who dies ---


@pytest.mark.parametrize("listed", [(1,), (1, 2), (1, 2, 3)])
def test_another_process_takes_the_directory_over_and_no_living_record_leaves_a_view(
    site: Site, listed: tuple[int, ...]
) -> None:
    site.listed = listed
    holder = site.start_holder(1, 11)
    site.start(1, 12)
    site.start(1, 13)
    stranger = site.start(4, 41)
    views = [site.watch(host) for host in (2, 5)]
    for each in views:
        assert each.become(11, 12, 13, 41)
    since = [len(each.all) - 1 for each in views]
    holder.kill()
    assert eventually(lambda: site.is_held(1), AT_ONCE)
    for each, begin in zip(views, since, strict=True):
        assert each.become(12, 13, 41, within=AT_ONCE)
        assert eventually(lambda: site.tells_of(1) == [12, 13, 41]), "the successor knows what its predecessor knew"
        assert all(each.always_had(number, begin) for number in (12, 13, 41))
    stranger.kill()
    for each in views:
        assert each.become(12, 13, within=AT_ONCE)


def test_the_directory_is_taken_over_again_and_again(site: Site) -> None:
    site.listed = (1,)
    living = [site.start_holder(1, 1)]
    living += [site.start(1, number) for number in range(2, 6)]
    views = site.watch(2)
    assert views.become(1, 2, 3, 4, 5)
    while living:
        # Whoever holds it: the one that listens.
        holders = [each for each in living if listens(each.pid, site.port)]
        assert len(holders) == 1
        living.remove(holders[0])
        holders[0].kill()
        if living:
            assert eventually(lambda: site.is_held(1), AT_ONCE)
            assert eventually(lambda: len(views.nodes) == len(living), AT_ONCE)


def listens(pid: int, port: int) -> bool:
    inodes = set()
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            inodes.add(os.readlink(each))
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    listening = [fields for line in lines if (fields := line.split())[3] == "0A" and fields[1].endswith(f":{port:04X}")]
    return any(f"socket:[{fields[9]}]" in inodes for fields in listening)


def test_who_is_killed_leaves_all_views_at_once(site: Site) -> None:
    site.start_holder(1, 11)
    victim, alone, stranger = site.start(1, 12), site.start_holder(2, 21), site.start(4, 41)
    views = [site.watch(host) for host in (1, 5)]
    for each in views:
        assert each.become(11, 12, 21, 41)
    victim.kill()
    for each in views:
        assert each.become(11, 21, 41, within=AT_ONCE)
    stranger.kill()
    for each in views:
        assert each.become(11, 21, within=AT_ONCE)
    alone.kill()  # with it goes the last of a listed host, and its directory
    for each in views:
        assert each.become(11, within=AT_ONCE)


def test_a_directory_that_is_closed_is_taken_over(site: Site) -> None:
    site.listed = (1,)
    first = site.open(1)
    first.announce(record(11))
    assert eventually(lambda: site.is_held(1))
    site.start(1, 12)
    watcher = site.start(4, 41)
    assert watcher.pid
    views = Views()
    other = site.open(5)
    other.watch(views)
    other.want("", 1.0)
    assert views.become(11, 12, 41)
    first.close()
    assert views.become(12, 41, within=AT_ONCE)
    assert eventually(lambda: site.is_held(1), AT_ONCE)
    assert eventually(lambda: site.tells_of(1) == [12, 41])
    assert views.nodes == [12, 41]


def test_a_forked_child_that_knows_nothing_does_not_keep_the_port(site: Site) -> None:
    site.listed = (1,)
    lives_on, end = os.pipe()

    def announce_and_fork() -> HostsRegistry:
        node = site.make(1)
        node.announce(record(11))
        views = Views()
        node.watch(views)
        node.want("", 5.0)
        if os.fork() == 0:
            os.close(end)
            os.read(lives_on, 1)
            os._exit(0)
        os.close(end)
        return node

    holder = Process(announce_and_fork)
    try:
        assert eventually(lambda: site.is_held(1))
        site.start(1, 12)
        views = site.watch(2)
        assert views.become(11, 12)
        holder.kill()
        assert eventually(lambda: site.is_held(1), AT_ONCE)
        assert views.become(12, within=AT_ONCE)
    finally:
        holder.kill()
        os.close(end)
        os.close(lives_on)


def test_a_holder_that_is_stopped_takes_nobody_with_it(site: Site) -> None:
    site.lease = SHORT
    holder = site.start_holder(1, 11)
    site.start(1, 12)
    views = site.watch(2)
    assert views.become(11, 12)
    since = len(views.all) - 1
    holder.send(signal.SIGSTOP)
    try:
        assert views.become(12, within=SHORT + AT_ONCE), "who is silent for a lease is gone"
        assert views.remain(12, seconds=2 * SHORT)
    finally:
        holder.send(signal.SIGCONT)
    assert views.become(11, 12)
    assert views.always_had(12, since)


# --- who is away ---


def test_everything_stays_while_all_directories_are_away(site: Site) -> None:
    site.listed, site.lease = (1,), SHORT
    holder = site.start_holder(1, 11)
    site.start(4, 41)
    views = site.watch(5)
    assert views.become(11, 41)
    since = len(views.all)
    holder.kill()
    assert views.remain(11, 41, seconds=3 * SHORT)
    site.start(1, 12)
    assert views.become(12, 41)
    assert views.remain(12, 41, seconds=2 * SHORT)
    assert views.always_had(41, since - 1)


def test_everything_stays_while_all_directories_are_silent(site: Site) -> None:
    site.listed, site.lease = (1, 2, 3), SHORT
    holders = [site.start_holder(host, 10 * host + 1) for host in site.listed]
    views = site.watch(5)
    assert views.become(11, 21, 31)
    for each in holders:
        each.send(signal.SIGSTOP)
    try:
        assert views.remain(11, 21, 31, seconds=2 * SHORT)
    finally:
        for each in holders:
            each.send(signal.SIGCONT)
    assert views.remain(11, 21, 31, seconds=2 * SHORT)


class FakeDirectory:
    """Listens for one host, tells what it is given to whoever comes, and says nothing more."""

    def __init__(self, site: Site, host: int, tells: bytes) -> None:
        self._listener = socket.create_server((site.address(host), site.port))
        self.tells = tells
        self._connections: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                self._connections.append(self._listener.accept()[0])
                self._connections[-1].sendall(self.tells)

    @property
    def came(self) -> int:
        return len(self._connections)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for each in (self._listener, *self._connections):
            each.close()


def test_a_host_that_vanishes_without_a_word_is_gone_after_a_lease(site: Site) -> None:
    site.start_holder(2, 21)
    tells = b'{"type":"told","here":[{"node":"%032x","host":"host-1","services":{"clock":["a"]}}]}\n' % 11
    vanishes = FakeDirectory(site, 1, tells)
    try:
        views = site.watch(5, lease=3.0)
        assert views.become(11, 21)
        vanishes.tells = b""
        assert views.remain(11, 21, seconds=0.5)
        assert views.become(21, within=2.5 + AT_ONCE)
    finally:
        vanishes.close()


def test_a_node_that_vanishes_without_a_word_is_gone_after_a_lease(site: Site) -> None:
    site.start_holder(1, 11)
    views, vanishes = site.watch(5), site.connect(1)
    said = {"type": "announce", "record": {"node": record(41).node, "host": "raw", "services": {"clock": ["a"]}}}
    vanishes.sendall(hello("", lease=3.0) + json.dumps(said).encode() + b"\n")
    assert views.become(11, 41)
    for _ in range(4):
        assert views.remain(11, 41, seconds=0.9)
        vanishes.sendall(b"\n")
    assert views.become(11, within=3.0 + AT_ONCE)


def test_a_directory_that_speaks_something_else_is_named(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.start_holder(2, 21)
    other = FakeDirectory(site, 1, b"220 mail.example.org ESMTP\r\n")
    try:
        views = site.watch(5)
        assert views.become(21)
        said = f"directory of {site.address(1)}, port {site.port}, is away, and will be tried again: it sent no message"
        assert eventually(lambda: said in caplog.text)
    finally:
        other.close()


def test_a_listed_host_that_is_away_takes_nobody_with_it(site: Site) -> None:
    site.listed = (1, 2, 3)
    site.start_holder(1, 11)
    views = site.watch(5)
    assert views.become(11)
    began = time.monotonic()
    site.start(4, 41)
    assert views.become(11, 41, within=AT_ONCE)
    assert time.monotonic() - began < AT_ONCE
    site.start(2, 21)
    assert views.become(11, 21, 41)


def test_a_name_that_means_nothing_does_not_hold_the_others_up(site: Site) -> None:
    site.start_holder(1, 11)
    registry, views = site.open(5, site.url.replace("://", f"://nobody.invalid:{site.port},")), Views()
    registry.watch(views)
    assert registry.want("clock", 5.0)
    assert views.become(11, within=AT_ONCE)


def test_a_process_starts_from_the_disk_while_all_directories_are_away(site: Site) -> None:
    site.listed = (1,)
    holder = site.start_holder(1, 11, 12)
    early, before = site.open(5), Views()
    early.watch(before)
    assert early.want("clock", 5.0)
    assert before.become(11, 12)
    assert eventually(lambda: list((Path(site.settings(5).cache_directory)).glob("clock-*.json")))
    early.close()
    holder.kill()
    registry, views = site.open(5), Views()
    registry.watch(views)
    assert registry.want("clock", AT_ONCE)
    assert views.nodes == [11, 12]
    site.start(1, 13)
    assert views.become(13)


def test_however_many_the_disk_knows_they_are_delivered_before_want_returns(site: Site) -> None:
    Cache(site.settings(5), site.url).save("clock", [record(number) for number in range(5000)])
    registry, views = site.open(5), Views()
    registry.watch(views)
    assert registry.want("clock", 10.0)
    assert len(views.last) == 5000


def test_who_does_not_wait_is_told_what_is_known(site: Site) -> None:
    site.listed = (1,)
    registry, views = site.open(1), Views()
    assert not registry.want("clock", 0.0)
    registry.watch(views)
    assert not registry.want("clock", 0.0)
    assert registry.want("clock", 5.0)
    registry.announce(record(11))
    registry.refresh()
    assert views.nodes == [11]


# --- what is told ---


def test_a_record_lives_as_long_as_the_connection_that_told_of_it(site: Site) -> None:
    site.start_holder(1)
    views = site.watch(1)
    connection = site.connect(1)
    said = {"type": "announce", "record": {"node": record(41).node, "host": "raw", "services": {"clock": ["a"]}}}
    connection.sendall(hello("") + json.dumps(said).encode() + b"\n")
    assert views.become(41, within=AT_ONCE)
    newer = site.connect(1)  # the same node comes again before its end was noticed
    newer.sendall(hello("") + json.dumps(said).encode() + b"\n")
    assert eventually(lambda: newer.recv(65_536))
    connection.close()
    assert views.remain(41, seconds=0.3)
    newer.sendall(b'{"type":"withdraw"}\n')
    assert views.become(within=AT_ONCE)
    newer.sendall(json.dumps(said).encode() + b"\n")
    assert views.become(41, within=AT_ONCE)
    newer.close()
    assert views.become(within=AT_ONCE)


def test_only_what_is_wanted_is_told(site: Site) -> None:
    site.start_holder(1)
    connection = site.connect(1)
    connection.sendall(hello("", services=["clock"]))
    told = connection.makefile("rb")
    first = json.loads(told.readline())
    assert first.pop("place")
    assert first == {"type": "told"}
    assert json.loads(told.readline())["crowd"] >= 1
    other = site.open(1)
    other.announce(record(11, services={"compute": ("a",), "volume": ("a",)}))
    other.announce(record(11, services={"compute": ("a",), "clock": ("b",)}))
    while "here" not in (change := json.loads(told.readline())):
        assert change["type"] == "told"
    assert change["here"][0]["services"] == {"clock": ["b"]}
    connection.sendall(b'{"type":"want","service":"compute"}\n')
    answer = json.loads(told.readline())
    assert answer["service"] == "compute"
    assert answer["here"][0]["services"] == {"clock": ["b"], "compute": ["a"]}
    other.announce(record(11, services={"volume": ("a",)}))
    assert json.loads(told.readline()) == {"type": "told", "withdrawn": [record(11).node]}


def test_who_asks_for_the_first_time_is_told_of_all_hosts(site: Site) -> None:
    site.start_holder(1, 11)
    site.start_holder(2, 21)
    site.start(4, 41)
    assert site.watch(5).become(11, 21, 41)
    for _ in range(20):
        registry, views = site.make(4), Views()
        registry.watch(views)
        assert registry.want("clock", 5.0)
        assert views.nodes == [11, 21, 41]
        registry.close()


def test_realms_do_not_see_each_other(site: Site) -> None:
    site.start_holder(1, 11, realm="north")
    site.start(4, 41, realm="north")
    south = site.watch(5, realm="south")
    site.start(1, 12, realm="south")
    site.start(4, 42, realm="south")
    assert south.become(12, 42)
    assert site.watch(5, realm="north").become(11, 41)
    assert site.watch(5).nodes == []
    assert all(set(numbers(each)) <= {12, 42} for each in south.all)


def test_the_realm_without_a_name_is_the_default(site: Site) -> None:
    site.start_holder(1, 11)
    site.start(4, 41)
    assert site.watch(5, realm="default").become(11, 41)
    site.start(4, 42, realm="default")
    assert site.watch(5).become(11, 41, 42)


def test_two_sites_on_one_host_have_a_port_each(site: Site, tmp_path: Path) -> None:
    first, second = site.watch(1), Views()
    url = f"hosts://{site.address(1)}:{site.port + 1}/"
    registry = site.open(1, url, run_directory=str(tmp_path))
    registry.watch(second)
    registry.want("", 1.0)
    registry.announce(record(2))
    site.start(1, 1)
    assert first.become(1)
    assert second.become(2)
    assert (numbers(first.all[-1]), numbers(second.all[-1])) == ([1], [2])


def test_two_hundred_nodes_join_and_leave(site: Site) -> None:
    views = [site.watch(host) for host in (1, 5)]
    processes = [site.start(host, *range(100 * host, 100 * host + 50)) for host in (1, 2, 3, 4)]
    everybody = [number for host in (1, 2, 3, 4) for number in range(100 * host, 100 * host + 50)]
    for each in views:
        assert each.become(*everybody, within=20.0)
    for process in processes[1:]:
        process.kill()
    for each in views:
        assert each.become(*everybody[:50], within=20.0)


@pytest.fixture
def apart(site: Site, run_directory: str) -> dict[str, str]:
    """The settings of another user of host 1."""
    return {"run_directory": str(Path(run_directory) / "apart")}


def test_two_users_of_one_host_see_each_others_nodes(site: Site, apart: dict[str, str]) -> None:
    site.listed = (1,)
    site.start_holder(1, 11)
    site.start(1, 12, **apart)
    for views in (site.watch(1), site.watch(1, **apart), site.watch(2)):
        assert views.become(11, 12, within=AT_ONCE)


def test_another_user_of_a_host_takes_its_directory_over_and_no_living_record_leaves_a_view(
    site: Site, apart: dict[str, str]
) -> None:
    site.listed = (1,)
    holder = site.start_holder(1, 11)
    site.start(1, 12)
    others = [site.start(1, number, **apart) for number in (13, 14)]
    views = site.watch(2)
    assert views.become(11, 12, 13, 14)
    since = len(views.all) - 1
    holder.kill()
    assert views.become(12, 13, 14, within=AT_ONCE)
    assert eventually(lambda: site.is_held(1) and site.tells_of(1) == [12, 13, 14])
    others[0].kill()
    assert views.become(12, 14, within=AT_ONCE)
    assert all(views.always_had(number, since) for number in (12, 14))


# --- strangers at the port ---

GARBAGE = {
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "bytes": bytes(range(256)) + b"\n",
    "other": b"{}\n",
    "deep": b"[" * 50_000 + b"\n",
    "endless": b"x" * (HELLO_LIMIT + 2),
    "early": b'{"type":"withdraw"}\n',
    "twice": hello("") + hello(""),
    "version": hello("", version=99),
    "lease": hello("", lease=0.0),
    "realm": hello("x" * 300),
    "wants": hello("", services=[str(each) for each in range(WANTS_LIMIT + 1)]),
    "realm that is no name of a directory": hello("/" * 250),
    "record": hello("") + b'{"type":"announce","record":{"node":"../../etc/passwd","host":"x"}}\n',
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_counted_and_its_sender_cut(site: Site, garbage: bytes) -> None:
    directory, views = site.directory(1), site.watch(1)
    assert eventually(lambda: directory.is_held)
    with site.connect(1) as connection:
        with suppress(OSError):  # it may end while we are sending
            connection.sendall(garbage)
        with suppress(ConnectionResetError):
            while connection.recv(65_536):
                pass
    assert eventually(lambda: sum(directory.refused.values()) == 1)
    site.start(1, 11)
    assert views.become(11, within=AT_ONCE)


def wants(*services: str) -> bytes:
    return b"".join(json.dumps({"type": "want", "service": each}).encode() + b"\n" for each in services)


def test_a_client_may_want_so_many_services_and_no_more(site: Site) -> None:
    site.start_holder(1, 11)
    connection = site.connect(1)
    told = connection.makefile("rb")
    connection.sendall(hello("", services=[str(each) for each in range(WANTS_LIMIT - 1)]) + wants("clock"))

    def answer(to: str) -> dict[str, Any]:  # changes may be told in between
        while (found := json.loads(told.readline())).get("service") != to and found["type"] == "told":
            pass
        return dict(found)

    answer("clock")
    connection.sendall(wants("clock"))
    assert answer("clock") == {"type": "told", "service": "clock"}
    connection.sendall(wants("another"))
    assert answer("another")["type"] == "refusal"
    assert told.readline() == b""


def test_who_wants_all_has_been_told_of_each(site: Site) -> None:
    site.start_holder(1, 11)
    connection = site.connect(1)
    told = connection.makefile("rb")
    connection.sendall(hello("", services=[""]) + wants("clock"))
    assert "here" in json.loads(told.readline())
    assert "crowd" in json.loads(told.readline())
    assert json.loads(told.readline()) == {"type": "told", "service": "clock"}


def test_who_is_impersonated_is_himself_again_at_once(site: Site) -> None:
    site.listed = (1,)
    site.start_holder(1)
    site.start(4, 41)
    views = site.watch(1)
    assert views.become(41)
    stranger = site.connect(1)
    forged = {"type": "announce", "record": {"node": record(41).node, "host": "forged", "services": {"clock": ["a"]}}}
    stranger.sendall(hello("") + json.dumps(forged).encode() + b"\n")
    with suppress(ConnectionResetError):  # it ends when he has come back; both may be seen in one view
        while stranger.recv(65_536):
            pass
    assert eventually(lambda: views.all[-1] and views.all[-1][0].host == "host-4", AT_ONCE)
    with suppress(OSError):
        stranger.sendall(b'{"type":"withdraw"}\n')
    stranger.close()
    assert views.remain(41, seconds=0.5)


class Interrupted(BaseException):
    """As a green thread's timeout: no error of who is interrupted."""


def test_a_delivery_that_is_interrupted_is_made_again(site: Site) -> None:
    site.listed = (1,)
    registry, views, interrupted = site.open(1), Views(), [True]

    def deliver(records: Sequence[Record]) -> None:
        if interrupted:
            interrupted.clear()
            raise Interrupted
        views(records)

    registry.watch(Views())
    registry.want("", 1.0)
    with pytest.raises(Interrupted):
        registry.watch(deliver)
    registry.announce(record(11))
    assert eventually(lambda: bool(views.all) and views.nodes == [11])


def test_strangers_are_counted_by_reason(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    directory = site.directory(1)
    assert eventually(lambda: directory.is_held)
    for each in range(3):
        with site.connect(1) as connection:
            connection.sendall(b"hello, number %d?\r\n" % each)
            assert connection.recv(100) == b""
    assert eventually(lambda: list(directory.refused.values()) == [3])
    assert len([each for each in caplog.records if each.levelno == logging.WARNING]) == 1


def test_a_reader_that_is_too_slow_is_cut_and_holds_nobody_up(site: Site) -> None:
    site.start_holder(1)
    slow = site.connect(1)
    slow.sendall(hello("", services=[""]))
    registry, views = site.open(1), site.watch(5)
    for number in range(60):
        registry.announce(record(11, zone=f"{number}-" + "z" * 400_000))
        assert eventually(lambda number=number: views.all[-1] and views.all[-1][0].zone.startswith(f"{number}-"))
    with suppress(ConnectionResetError):
        while slow.recv(1 << 20):
            pass  # until it ends, as it was cut; a timeout otherwise


def test_a_port_that_is_held_by_something_else_is_named_and_taken_when_it_is_free(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.listed = (1,)
    other = FakeDirectory(site, 1, b"SSH-2.0-Other\r\n")
    site.watch(1)
    where = f"port {site.port} at {site.address(1)} is held by something that is no directory"
    assert eventually(lambda: where in caplog.text)
    before = other.came
    assert eventually(lambda: other.came > before)  # another attempt; the next one comes a while after it
    other.close()
    assert eventually(lambda: site.is_held(1))
    assert caplog.text.count(where) == 1


# --- the list ---


def write_hosts(path: Path, content: str) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(textwrap.dedent(content))
    temporary.rename(path)


def test_the_list_may_be_a_file_that_changes(site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "peers of ours.toml"
    url = f"file://{tmp_path}/peers%20of%20ours.toml"
    one = f'[[hosts]]\nname = "ctl1"\naddress = "{site.address(1)}"\nport = {site.port}\n'
    two = one.replace("ctl1", "ctl2").replace(site.address(1), site.address(2))
    write_hosts(path, one)
    site.start_holder(1, 11)
    site.start_holder(2, 21)
    registry, views = site.open(5, url), Views()
    assert registry.addresses == ((site.address(1), site.port),)
    registry.watch(views)
    registry.want("", 1.0)
    assert eventually(lambda: 11 in views.nodes)
    write_hosts(path, one + two)
    assert views.become(11, 21)
    write_hosts(path, one + two.replace(f"port = {site.port}", 'port = "high"'))
    assert eventually(lambda: f"{path}, line 8: the port is 'high'" in caplog.text)
    assert "a number from 1 to 65535" in caplog.text
    assert views.remain(11, 21, seconds=1.5)
    assert caplog.text.count("line 8") == 1
    write_hosts(path, two)
    assert eventually(lambda: registry.addresses == ((site.address(2), site.port),))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "must hold tables"),
        ('hosts = ["ctl1"]', "line 1: 'ctl1' is no table"),
        ('[[hosts]]\nname = "a b"', "line 2: the name is 'a b'"),
        ('[[hosts]]\nname = "a"\n\n[[hosts]]\nadress = "10.0.0.1"\nname = "b"', "line 5: a host has no 'adress'"),
        ('[[hosts]]\nname = "a"\naddress = "ctl1"', "line 3: the address is 'ctl1'"),
        ('[[hosts]]\naddress = "10.0.0.1"', "line 1: the name is None"),
        ("[[hosts]]\nname = a", "line 2"),
    ],
)
def test_what_is_wrong_in_the_file_is_named_with_its_line(
    site: Site, tmp_path: Path, content: str, problem: str
) -> None:
    path = tmp_path / "peers.toml"
    path.write_text(content)
    registry = site.make(1, f"file://{path}")
    for use in (lambda: registry.addresses, lambda: registry.watch(Views())):
        with pytest.raises(SettingsError, match=r"hosts") as raised:
            use()
        assert problem in str(raised.value)
        assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("hosts:", "names no server"),
        ("hosts://ctl1:port/", "is no port"),
        ("file://etc/peers.toml", "must look like file:///etc"),
        ("file:///etc/peers.toml?x=1", "must look like file:///etc"),
    ],
)
def test_a_wrong_url_is_explained(url: str, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        open_registry(url, Settings())


@pytest.mark.parametrize("lease", [SHORTEST_LEASE / 2, LONGEST_LEASE + 1])
def test_a_lease_that_no_directory_takes_is_refused_at_once(site: Site, lease: float) -> None:
    with pytest.raises(SettingsError, match=r"lease is .* it must be 0\.1 to 3600 seconds"):
        site.make(1, lease=lease)
    for good in (SHORTEST_LEASE, LONGEST_LEASE):
        site.make(1, lease=good)


def test_a_file_that_is_missing_is_named(site: Site) -> None:
    registry = site.make(1, "file:///nowhere/peers.toml")
    with pytest.raises(SettingsError, match=r"/nowhere/peers\.toml cannot be read: No such file"):
        registry.watch(Views())


def test_nothing_listens_beyond_this_host_unless_it_may(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    registry = site.open(1, f"hosts://192.0.2.77:{site.port}/", address="192.0.2.2")
    registry.watch(Views())
    assert eventually(lambda: "does not keep the directory of its host" in caplog.text)
    assert "insecure=True" in caplog.text
    assert "192.0.2.2" in caplog.text


# --- green threads ---

GREEN = """
import sys
{early}
from onehop.interfaces import Record
from onehop.registry.hosts import HostsRegistry
from onehop.settings import Settings
import json, time, threading
settings = [Settings(**each) for each in json.loads(sys.argv[2])]
nodes = [HostsRegistry(each, sys.argv[1]) for each in settings]
{late}
views, beats = [], []
def beat():
    while True:
        beats.append(time.monotonic())
        time.sleep(0.01)
threading.Thread(target=beat, daemon=True).start()
nodes[1].watch(views.append)
assert nodes[1].want("clock", 10.0)
nodes[0].announce(Record(node="1" * 32, host="a", services={{"clock": ("a",)}}))
until = time.monotonic() + 10.0
while not (views[-1] and views[-1][0].host == "a"):
    assert time.monotonic() < until, views
    time.sleep(0.01)
time.sleep(0.5)
assert max(b - a for a, b in zip(beats, beats[1:])) < 0.4, "something held up all green threads"
for node in nodes:
    node.close()
print("done")
"""


@pytest.mark.alone
@pytest.mark.parametrize("patched", ["early", "late"])
def test_it_works_under_green_threads(site: Site, patched: str) -> None:
    pytest.importorskip("eventlet")
    patch = {"early": "", "late": ""} | {patched: "import eventlet; eventlet.monkey_patch()"}
    fields = ("address", "host", "run_directory", "cache_directory", "lease")
    both = [{name: getattr(site.settings(host), name) for name in fields} for host in (1, 2)]
    program = [sys.executable, "-W", "ignore", "-c", GREEN.format(**patch), site.url, json.dumps(both)]
    ended = subprocess.run(
        program, env=os.environ | {"PYTHONPATH": str(SOURCES)}, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.stdout == "done\n", ended.stderr
