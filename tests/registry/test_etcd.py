"""The registry on etcd, against real servers: alone, and as a cluster of three."""

from __future__ import annotations

import os
import select
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.registry.etcd_server import Etcd, EtcdCluster, encoded
from tests.registry.outages import Outages, record
from tests.registry.views import Views

from onehop.errors import RegistryError, SettingsError
from onehop.registry import open_registry
from onehop.registry.etcd import OPTIONS, PAGE, PORT, EtcdStore
from onehop.registry.leased import LeaseLost, StoreAway, quoted
from onehop.registry.urls import parse
from onehop.settings import Settings

LEASE = 1.0  # seconds; etcd gives none that are shorter
SHORT = 3.0  # seconds; a lease that outlasts a machine which is busy otherwise
WITHIN = 20.0  # seconds: longer than anything takes on a busy machine

Eventually = Callable[..., None]


class Change(NamedTuple):
    service: str
    node: str
    value: bytes | None
    withdrawn: bool = False


class Heard:
    """What a store told, in order."""

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.broken: list[str] = []

    def changed(self, service: str, node: str, value: bytes | None, *, withdrawn: bool = False) -> None:
        self.changes.append(Change(service, node, value, withdrawn))

    def broke(self, why: str) -> None:
        self.broken.append(why)


@pytest.fixture(scope="module")
def one_server() -> Iterator[Etcd]:
    with Etcd() as server:
        yield server


@pytest.fixture
def etcd(one_server: Etcd) -> Etcd:
    """A server that runs, whatever the test before did to it."""
    if one_server.process is None:
        one_server.start()
    return one_server


@pytest.fixture(scope="module")
def one_cluster() -> Iterator[EtcdCluster]:
    with EtcdCluster() as cluster:
        yield cluster


@pytest.fixture
def three(one_cluster: EtcdCluster) -> EtcdCluster:
    """A cluster of three that run, whatever the test before did to them."""
    return one_cluster.start()


class Following(EtcdStore):
    """As it is used where one service is followed at a time."""

    def follow(self, service: str) -> Mapping[tuple[str, str], bytes]:
        found = super().follow(service)
        self.followed()
        return found


class Stores:
    """Opens stores, each connected and with what it tells; closes them at the end. Each test has its own realm."""

    def __init__(self, realm: str) -> None:
        self.realm = realm
        self._all: list[EtcdStore] = []

    def open(self, url: str, realm: str = "", lease: float = 60.0) -> EtcdStore:
        store = Following(Settings(realm=realm or self.realm, lease=lease), parse(url, PORT, OPTIONS))
        self._all.append(store)
        return store

    def connected(self, url: str, realm: str = "", lease: float = 60.0) -> tuple[EtcdStore, Heard]:
        store, heard = self.open(url, realm, lease), Heard()
        store.connect(heard)
        return store, heard

    def close(self) -> None:
        for each in self._all:
            each.close()


@pytest.fixture
def stores(request: pytest.FixtureRequest) -> Iterator[Stores]:
    before = {each for each in threading.enumerate() if each.name == "onehop-etcd"}
    made = Stores(f"test {request.node.name}")
    yield made
    made.close()
    assert {each for each in threading.enumerate() if each.name == "onehop-etcd"} <= before


def key(stores: Stores, rest: str) -> str:
    """A key of this test's realm; ``rest`` is what follows ``services/``."""
    return f"/onehop/{quoted(stores.realm)}/services/{rest}"


def keys(etcd: Etcd, stores: Stores) -> list[str]:
    """The keys of this test's realm, from the service on."""
    return etcd.keys(key(stores, ""))


def connections(*ports: int) -> list[socket.socket]:
    """What this process has open to servers at these ports; each is a twin, to be closed."""
    paths = [f"/proc/self/fd/{each}" for each in os.listdir("/proc/self/fd")]
    descriptors = {os.readlink(each): int(Path(each).name) for each in paths if os.path.lexists(each)}
    found = []
    for name, descriptor in descriptors.items():
        if name.startswith("socket:"):
            twin = socket.socket(fileno=os.dup(descriptor))
            if port_of(twin) in ports:
                found.append(twin)
            else:
                twin.close()
    return found


def port_of(connected: socket.socket) -> int:
    try:
        return int(connected.getpeername()[1])
    except (OSError, IndexError):  # it is not connected, or to no port
        return 0


def connected_ports(*ports: int) -> list[int]:
    found = []
    for each in connections(*ports):
        with each:
            found.append(port_of(each))
    return found


def used(cluster: EtcdCluster) -> Etcd:
    """The member with which this process is connected."""
    ports = set(connected_ports(*(each.port for each in cluster.members)))
    (member,) = [each for each in cluster.members if each.port in ports]
    return member


class Relay:
    """Passes connections on to a port of this host, which can be changed.

    Args:
        target: that port.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._ended, self._end = socket.socketpair()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._end.close()
        self._thread.join()
        for each in (self._ended, self._listener, *(side for pair in self._pairs for side in pair)):
            each.close()

    def cut_first(self) -> None:
        """End the connection that was opened first."""
        for side in self._pairs[0]:
            with suppress(OSError):  # the end of the first may have come here already
                side.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        other: dict[socket.socket, socket.socket] = {}
        while True:
            ready, _, _ = select.select([self._listener, self._ended, *other], [], [])
            if self._ended in ready:
                return
            if self._listener in ready:
                near, far = self._listener.accept()[0], socket.create_connection(("127.0.0.1", self.target))
                self._pairs.append((near, far))
                other |= {near: far, far: near}
            for each in ready:
                if each in other and not self._pass_on(each, other[each]):
                    del other[each]

    def _pass_on(self, source: socket.socket, drain: socket.socket) -> bool:
        try:
            data = source.recv(65_536)
            drain.sendall(data)
            if not data:
                drain.shutdown(socket.SHUT_WR)
            return bool(data)
        except OSError:
            return False


class TestEtcd(Outages):
    server_class = Etcd


# --- what is told ---


def test_who_follows_hears_of_every_change_in_order(etcd: Etcd, stores: Stores, eventually: Eventually) -> None:
    server, _ = stores.connected(etcd.url())
    client, heard = stores.connected(etcd.url())
    server.publish("n0", {"clock": b"0"})
    assert client.follow("clock") == {("clock", "n0"): b"0"}
    for number in range(1, 50):
        server.publish("n0", {"clock": b"%d" % number})
    eventually(lambda: len(heard.changes) == 49, WITHIN)
    assert heard.changes == [Change("clock", "n0", b"%d" % number) for number in range(1, 50)]
    assert not heard.broken


def test_a_service_is_never_taken_for_another_that_begins_like_it(
    etcd: Etcd, stores: Stores, eventually: Eventually
) -> None:
    services = ["a", "ab", "a/b", "a0", "a%2Fb", "a.", ".", "..", "ä", "a b", "A", "a/"]
    server, _ = stores.connected(etcd.url(), lease=60.0)
    other, _ = stores.connected(etcd.url(), realm=stores.realm + "/services", lease=60.0)
    longer, _ = stores.connected(etcd.url(), realm=stores.realm + "0", lease=60.0)
    client, heard = stores.connected(etcd.url())
    for each in (server, other, longer):
        each.publish("n0", {service: service.encode() for service in services})
    for service in services:
        assert client.follow(service) == {(service, "n0"): service.encode()}
    for each in (other, longer, server):
        each.publish("n0", dict.fromkeys(services, b"changed"))
    eventually(lambda: len(heard.changes) >= len(services), WITHIN)
    assert sorted(heard.changes) == sorted(Change(service, "n0", b"changed") for service in services)


def test_each_of_many_services_is_told_of(etcd: Etcd, stores: Stores, eventually: Eventually) -> None:
    server, _ = stores.connected(etcd.url(), lease=60.0)
    client, heard = stores.connected(etcd.url())
    services = [f"service {number:02}" for number in range(40)]
    for service in services:  # each time one question more is asked of the same stream
        client.follow(service)
    server.publish("n0", dict.fromkeys(services, b"1"))
    eventually(lambda: len(heard.changes) == len(services), WITHIN)
    assert sorted(heard.changes) == [Change(service, "n0", b"1") for service in services]


def test_whoever_follows_all_services_hears_of_all_once(etcd: Etcd, stores: Stores, eventually: Eventually) -> None:
    server, _ = stores.connected(etcd.url())
    client, heard = stores.connected(etcd.url())
    server.publish("n0", {"a": b"1", "b": b"1"})
    assert client.follow("a") == {("a", "n0"): b"1"}
    assert client.follow("") == {("a", "n0"): b"1", ("b", "n0"): b"1"}
    server.publish("n0", {"a": b"2", "b": b"2"})
    assert client.follow("b") == {("b", "n0"): b"2"}
    server.publish("n0", {"a": b"3", "b": b"3"})
    eventually(lambda: heard.changes[-1:] == [Change("b", "n0", b"3")], WITHIN)
    assert [each for each in heard.changes if each.service == "a"] == [Change("a", "n0", b"2"), Change("a", "n0", b"3")]
    assert [each for each in heard.changes if each.service == "b"][-1] == Change("b", "n0", b"3")


def test_a_withdrawal_is_told_as_one_and_once(etcd: Etcd, stores: Stores, eventually: Eventually) -> None:
    server, _ = stores.connected(etcd.url())
    client, heard = stores.connected(etcd.url())
    client.follow("a")
    client.follow("b")
    client.follow("c")
    server.publish("n0", {"a": b"1", "b": b"1"})
    server.publish("n0", {"a": b"1"})
    server.publish("n0", {"c": b"1"})
    assert keys(etcd, stores) == ["c/n0"]
    server.publish("n1", {"c": b"1"})
    assert keys(etcd, stores) == ["c/n1"]
    server.withdraw()
    assert keys(etcd, stores) == []
    server.publish("n2", {"c": b"last"})
    eventually(lambda: heard.changes[-1:] == [Change("c", "n2", b"last")], WITHIN)
    assert [each for each in heard.changes if each.value is None] == [
        Change("b", "n0", None, withdrawn=True),
        Change("a", "n0", None, withdrawn=True),
        Change("c", "n0", None, withdrawn=True),
        Change("c", "n1", None, withdrawn=True),
    ]
    assert not client.follow("a")


def test_the_end_of_a_lease_is_not_told_as_a_withdrawal(etcd: Etcd, stores: Stores, eventually: Eventually) -> None:
    server, _ = stores.connected(etcd.url(), lease=LEASE)
    client, heard = stores.connected(etcd.url(), lease=LEASE)
    client.follow("a")
    server.publish("n0", {"a": b"1"})
    server.forget()  # as if the process were killed
    eventually(lambda: len(heard.changes) == 2, LEASE + WITHIN)
    assert heard.changes == [Change("a", "n0", b"1"), Change("a", "n0", None)]


def test_what_is_none_of_ours_is_told_as_it_is(etcd: Etcd, stores: Stores, eventually: Eventually) -> None:
    client, heard = stores.connected(etcd.url())
    etcd.put(key(stores, "a/before"), "no record")
    assert client.follow("a") == {("a", "before"): b"no record"}
    for rest in ("a/b/c", "a/", "a/nü", "a/%ff%"):
        etcd.put(key(stores, rest), "garbage")
    etcd.delete(key(stores, "a/before"))
    eventually(lambda: len(heard.changes) == 5, WITHIN)
    assert heard.changes == [
        Change("a", "b/c", b"garbage"),
        Change("a", "", b"garbage"),
        Change("a", "nü", b"garbage"),
        Change("a", heard.changes[3].node, b"garbage"),  # no text stands for it: any name will do
        Change("a", "before", None),
    ]
    assert not heard.broken


def test_nothing_is_missed_or_told_twice_while_the_stream_is_opened_again(
    etcd: Etcd, stores: Stores, eventually: Eventually
) -> None:
    services = 20
    client, heard = stores.connected(etcd.url())
    client.follow("busy")
    is_enough, written = threading.Event(), count()

    def write() -> None:
        writer, _ = stores.connected(etcd.url(), lease=60.0)
        while not is_enough.is_set():
            writer.publish("n0", {"busy": b"%d" % next(written)})

    thread = threading.Thread(target=write)
    thread.start()
    try:
        eventually(lambda: len(heard.changes) > 0, WITHIN)
        for number in range(services):
            client.follow(f"more {number}")
            heard_before = len(heard.changes)
            eventually(lambda before=heard_before: len(heard.changes) > before, WITHIN)
    finally:
        is_enough.set()
        thread.join()
    changes = next(written)
    eventually(lambda: len(heard.changes) >= changes, WITHIN)
    assert [int(each.value or b"-1") for each in heard.changes] == list(range(changes))
    assert not heard.broken


def test_many_services_are_followed_over_one_stream_that_is_opened_once(stores: Stores, eventually: Eventually) -> None:
    services = [f"service {number:02}" for number in range(40)]
    with Etcd() as etcd, ExitStack() as closing:
        settings, views = Settings(realm=stores.realm, lease=LEASE, cache_directory="none"), Views()
        for each in (client := open_registry(etcd.url(), settings), server := open_registry(etcd.url(), settings)):
            closing.callback(each.close)
        client.watch(views)
        assert all(client.want(service, WITHIN) for service in services)
        etcd.restart()
        server.announce(record(1, services=dict.fromkeys(services, ("a",))))
        eventually(lambda: views.nodes == [1] and len(views.last[0].services) == len(services), WITHIN)
        server.announce(record(1, version="new", services=dict.fromkeys(services, ("a",))))
        eventually(lambda: views.last[0].version == "new", WITHIN)
        assert 0 < etcd.watches() <= 5, "as often as the connection broke while the server started"


def test_what_changes_between_the_reading_of_two_services_is_told(
    etcd: Etcd, stores: Stores, eventually: Eventually
) -> None:
    server, _ = stores.connected(etcd.url())
    client, heard = stores.connected(etcd.url())
    EtcdStore.follow(client, "a")
    server.publish("n0", {"a": b"1"})
    EtcdStore.follow(client, "b")
    server.publish("n0", {"a": b"2", "b": b"2"})
    assert not heard.changes
    client.followed()
    eventually(lambda: len(heard.changes) == 3, WITHIN)
    assert sorted(heard.changes) == [Change("a", "n0", b"1"), Change("a", "n0", b"2"), Change("b", "n0", b"2")]


def test_many_values_are_read_as_of_one_moment(etcd: Etcd, stores: Stores, eventually: Eventually) -> None:
    writer, _ = stores.connected(etcd.url())
    client, heard = stores.connected(etcd.url())
    count = 2 * PAGE + 1
    for first in range(0, count, 100):
        puts = [
            {"request_put": {"key": encoded(key(stores, f"a/{number:05}")), "value": "MA=="}}
            for number in range(first, min(first + 100, count))
        ]
        etcd.call("kv/txn", success=puts)
    assert len(client.follow("a")) == count
    writer.publish("last", {"a": b"1"})
    eventually(lambda: heard.changes == [Change("a", "last", b"1")], WITHIN)


def test_a_node_of_many_services_is_published_whole(etcd: Etcd, stores: Stores) -> None:
    server, _ = stores.connected(etcd.url())
    server.publish("n0", {f"s{number}": b"1" for number in range(250)})
    server.keep()
    assert len(keys(etcd, stores)) == 250
    server.publish("n0", {"s0": b"1"})
    assert keys(etcd, stores) == ["s0/n0"]


# --- leases ---


def test_a_lease_lasts_as_long_as_it_is_kept(etcd: Etcd, stores: Stores, eventually: Eventually) -> None:
    server, _ = stores.connected(etcd.url(), lease=SHORT)
    server.publish("n0", {"a": b"1"})
    end = time.monotonic() + 2.5 * SHORT
    eventually(lambda: server.keep() or time.monotonic() > end, WITHIN)
    assert keys(etcd, stores) == ["a/n0"]


def test_what_an_earlier_lease_left_does_not_end_with_it(etcd: Etcd, stores: Stores, eventually: Eventually) -> None:
    client, heard = stores.connected(etcd.url(), lease=SHORT)
    client.follow("a")
    before, _ = stores.connected(etcd.url(), lease=SHORT)
    before.publish("n0", {"a": b"1", "old": b"1"})
    before.forget()
    after, _ = stores.connected(etcd.url(), lease=SHORT)
    after.publish("n0", {"a": b"2"})
    eventually(lambda: after.keep() or keys(etcd, stores) == ["a/n0"], SHORT + WITHIN)  # "old" went with its lease
    eventually(lambda: len(heard.changes) == 2)
    assert heard.changes == [Change("a", "n0", b"1"), Change("a", "n0", b"2")]


def test_a_revoked_lease_is_lost_and_another_is_taken(etcd: Etcd, stores: Stores, eventually: Eventually) -> None:
    server, _ = stores.connected(etcd.url())
    client, heard = stores.connected(etcd.url())
    client.follow("a")
    for number in range(2):
        server.publish("n0", {"a": b"1"})
        for each in etcd.call("lease/leases")["leases"]:
            etcd.call("lease/revoke", ID=each["ID"])
        with pytest.raises(LeaseLost):
            server.keep() if number else server.publish("n0", {"a": b"2"})
    server.publish("n0", {"a": b"3"})
    server.keep()
    eventually(lambda: heard.changes[-1:] == [Change("a", "n0", b"3")], WITHIN)


def test_a_key_that_somebody_deleted_is_missed_and_put_again(etcd: Etcd, stores: Stores) -> None:
    server, _ = stores.connected(etcd.url())
    server.publish("n0", {"a": b"1", "b": b"1"})
    server.keep()
    etcd.delete(key(stores, "b/n0"))
    with pytest.raises(LeaseLost, match="a key of ours is gone"):
        server.keep()
    server.publish("n0", {"a": b"1", "b": b"1"})
    server.keep()
    assert keys(etcd, stores) == ["a/n0", "b/n0"]


def test_what_stands_there_already_is_not_written_again(etcd: Etcd, stores: Stores) -> None:
    server, heard = stores.connected(etcd.url())
    server.publish("n0", {"a": b"1"})
    before = etcd.revision()
    server.connect(heard)
    server.publish("n0", {"a": b"1"})
    assert etcd.revision() == before


# --- the server ends, hangs, loses its history or its data ---


def test_a_killed_server_is_noticed_at_once_and_found_again(etcd: Etcd, stores: Stores, eventually: Eventually) -> None:
    server, _ = stores.connected(etcd.url(), lease=60.0)
    client, heard = stores.connected(etcd.url())
    server.publish("n0", {"a": b"1"})
    client.follow("a")
    etcd.stop()
    eventually(lambda: heard.broken, WITHIN)
    with pytest.raises(StoreAway, match=rf"etcd at 127.0.0.1:{etcd.port}.*refused"):
        client.connect(heard)
    with pytest.raises(StoreAway):
        server.keep()
    etcd.start()
    client.connect(heard)
    assert client.follow("a") == {("a", "n0"): b"1"}
    server.keep()
    assert len(heard.broken) == 1


def test_a_server_that_hangs_is_noticed_by_keep(etcd: Etcd, stores: Stores, eventually: Eventually) -> None:
    client, heard = stores.connected(etcd.url(), lease=LEASE)
    client.follow("a")
    etcd.pause()
    try:
        began = time.monotonic()
        with pytest.raises(StoreAway, match="in time"):
            client.keep()
        assert time.monotonic() - began < 4.0
        eventually(lambda: heard.broken, WITHIN)
        with pytest.raises(StoreAway):
            client.connect(heard)
        client.close()
    finally:
        etcd.resume()


def test_history_that_is_gone_breaks_the_stream_and_a_new_one_has_it_all(
    etcd: Etcd, stores: Stores, eventually: Eventually
) -> None:
    server, _ = stores.connected(etcd.url())
    client, heard = stores.connected(etcd.url())
    client.follow("quiet")
    for number in range(20):
        server.publish("n0", {"a": b"%d" % number})
    etcd.compact()
    client.follow("another")  # the stream is opened again, "quiet" from before what is left
    eventually(lambda: heard.broken, WITHIN)
    assert "compacted" in heard.broken[0]
    client.connect(heard)
    assert client.follow("a") == {("a", "n0"): b"19"}
    server.publish("n0", {"a": b"20"})
    eventually(lambda: heard.changes[-1:] == [Change("a", "n0", b"20")], WITHIN)


def test_a_compaction_does_not_touch_an_open_stream(etcd: Etcd, stores: Stores, eventually: Eventually) -> None:
    server, _ = stores.connected(etcd.url())
    client, heard = stores.connected(etcd.url())
    client.follow("a")
    server.publish("n0", {"b": b"1"})
    etcd.compact()
    server.publish("n0", {"a": b"1"})
    eventually(lambda: heard.changes == [Change("a", "n0", b"1")], WITHIN)
    assert not heard.broken


def test_lost_data_is_put_again(etcd: Etcd, stores: Stores, eventually: Eventually) -> None:
    server, _ = stores.connected(etcd.url())
    client, heard = stores.connected(etcd.url())
    server.publish("n0", {"a": b"1"})
    client.follow("a")
    etcd.wipe()
    eventually(lambda: heard.broken, WITHIN)
    client.connect(heard)
    assert client.follow("a") == {}
    with pytest.raises(LeaseLost):
        server.keep()
    server.publish("n0", {"a": b"1"})
    eventually(lambda: heard.changes[-1:] == [Change("a", "n0", b"1")], WITHIN)


def test_another_cluster_at_the_same_address_is_not_taken_for_the_first(stores: Stores, eventually: Eventually) -> None:
    with Etcd() as first, Etcd() as second, closing(Relay(first.port)) as switch:
        client, heard = stores.connected(f"etcd://127.0.0.1:{switch.port}/")
        client.follow("a")
        switch.target = second.port
        switch.cut_first()  # that of the requests
        with pytest.raises(StoreAway, match="another cluster"):
            client.keep()
        eventually(lambda: heard.broken, WITHIN)
        client.connect(heard)
        client.keep()
        client.close()


def test_a_full_database_is_away_for_writing_until_it_is_mended(stores: Stores) -> None:
    with Etcd("--quota-backend-bytes", str(1024 * 1024)) as etcd:
        server, _ = stores.connected(etcd.url(), lease=60.0)
        client, heard = stores.connected(etcd.url())
        server.publish("n0", {"a": b"1"})
        while "NOSPACE" not in str(etcd.call("maintenance/alarm", action="GET")):
            try:
                etcd.put("fill", "x" * 300_000)
            except OSError:
                break
        with pytest.raises(StoreAway, match=r"space exceeded.*etcdctl alarm disarm"):
            server.publish("n0", {"a": b"2"})
        server.keep()
        assert client.follow("a") == {("a", "n0"): b"1"}
        etcd.delete("fill")
        etcd.delete("fill")
        etcd.compact()
        etcd.call("maintenance/defragment")
        for each in etcd.call("maintenance/alarm", action="GET")["alarms"]:
            etcd.call("maintenance/alarm", action="DEACTIVATE", **each)
        server.publish("n0", {"a": b"2"})
        assert client.follow("a") == {("a", "n0"): b"2"}
        assert not heard.broken


# --- a cluster ---


@pytest.mark.parametrize("hang", [False, True])
def test_a_member_that_goes_is_left_for_another_and_the_lease_lives(
    three: EtcdCluster, stores: Stores, eventually: Eventually, hang: bool
) -> None:
    client, heard = stores.connected(three.url(), lease=10.0)
    client.publish("n0", {"a": b"1"})
    client.follow("a")
    member = used(three)
    other = next(each for each in three.members if each is not member)
    member.pause() if hang else member.stop()
    try:
        began = time.monotonic()
        eventually_kept(client, began + WITHIN)
        eventually(lambda: heard.broken, WITHIN)
        assert f"127.0.0.1:{member.port}" in heard.broken[0]
        client.connect(heard)
        assert client.follow("a") == {("a", "n0"): b"1"}
        client.publish("n0", {"a": b"2"})
        eventually(lambda: heard.changes[-1:] == [Change("a", "n0", b"2")], WITHIN)
        assert used(three) is not member
        other.call("kv/range", key="x")
    finally:
        if hang:
            member.resume()
        three.start()


def test_nobody_is_dropped_when_a_member_dies(three: EtcdCluster, stores: Stores) -> None:
    settings = Settings(lease=2.0, realm=stores.realm, cache_directory="none")
    with ExitStack() as stack:
        registries = [stack.enter_context(closing(open_registry(three.url(), settings))) for _ in range(6)]
        views = Views()
        registries[0].watch(views)
        for number, each in enumerate(registries[:5]):
            each.announce(record(number))
        assert registries[0].want("clock", WITHIN)
        assert views.become(0, 1, 2, 3, 4, within=WITHIN)
        mark = len(views.all)
        three.members[0].stop()
        registries[5].announce(record(5))
        assert views.become(0, 1, 2, 3, 4, 5, within=WITHIN)
        assert views.fewest_since(mark) == 5
    three.start()


def eventually_kept(store: EtcdStore, deadline: float) -> None:
    """Keep the lease as a keeper would: the rest of a cluster may have to choose a leader first."""
    while True:
        try:
            store.keep()
            return
        except StoreAway:
            assert time.monotonic() < deadline


def test_a_member_cut_off_from_its_cluster_counts_as_away(
    three: EtcdCluster, stores: Stores, eventually: Eventually
) -> None:
    client, heard = stores.connected(three.url(), lease=60.0)
    client.publish("n0", {"a": b"1"})
    client.follow("a")
    member = used(three)
    for each in three.members:
        if each is not member:
            each.stop()
    try:
        eventually(lambda: heard.broken, WITHIN)
        with pytest.raises(StoreAway):
            client.connect(heard)
        with pytest.raises(StoreAway):
            client.follow("a")
    finally:
        three.start()
    client.connect(heard)
    assert client.follow("a") == {("a", "n0"): b"1"}


# --- what no waiting would mend ---


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("etcd://host/?tls=yes", "tls is 'yes'; it must be 0 or 1"),
        ("etcd://host/?ca=/ca.pem", "ca has no meaning without tls"),
        ("etcd://host/?tls=0&cert=/c.pem", "cert has no meaning without tls"),
        ("etcd://host/?tls=1&key=/k.pem", "key has no meaning without cert"),
        ("etcd://host/?zone=1", "no option 'zone'"),
        ("etcd:///", "names no server"),
    ],
)
def test_a_wrong_url_is_explained(url: str, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem.replace("?", r"\?")):
        open_registry(url, Settings())


def test_users_passwords_and_permissions_are_asked_for_by_name(stores: Stores, eventually: Eventually) -> None:
    with Etcd() as etcd:
        port = etcd.port
        with pytest.raises(RegistryError, match="take the user out of the registry's URL"):
            stores.open(f"etcd://nova:secret@127.0.0.1:{port}/").connect(Heard())
        for user in ("root", "nova"):
            etcd.call("auth/user/add", name=user, password="secret")
        etcd.call("auth/role/add", name="root")
        etcd.call("auth/role/add", name="onehop")
        etcd.call("auth/user/grant", user="root", role="root")
        etcd.call("auth/user/grant", user="nova", role="onehop")
        etcd.call("auth/enable")
        token = etcd.call("auth/authenticate", name="root", password="secret")["token"]
        for login, problem in (
            ("", "write a user into the registry's URL"),
            ("nova:wrong@", "correct the user and the password"),
            ("nobody:secret@", "correct the user and the password"),
            ("nova:secret@", "grant the user's role readwrite on all keys that begin with /onehop/"),
        ):
            with pytest.raises(RegistryError, match=problem) as raised:
                stores.open(f"etcd://{login}127.0.0.1:{port}/").connect(Heard())
            assert "secret" not in str(raised.value)

        def grant(kind: str) -> None:
            everything = {"key": encoded("/onehop/"), "range_end": encoded("/onehop0"), "permType": kind}
            etcd.call("auth/role/grant", token, name="onehop", perm=everything)

        grant("READ")
        client, heard = stores.connected(f"etcd://nova:secret@127.0.0.1:{port}/")
        assert client.follow("a") == {}
        with pytest.raises(RegistryError, match="permission denied"):
            client.publish("n0", {"a": b"1"})
        grant("READWRITE")  # which outdates the token
        client.publish("n0", {"a": b"1"})
        eventually(lambda: heard.changes == [Change("a", "n0", b"1")], WITHIN)
        etcd.restart()  # which forgets it
        eventually(lambda: heard.broken, WITHIN)
        client.connect(heard)
        assert client.follow("a") == {("a", "n0"): b"1"}
        client.keep()
        client.withdraw()


class Page(BaseHTTPRequestHandler):
    """Some web server."""

    status = 200

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(self.status)
        self.send_header("Content-Length", "6")
        self.end_headers()
        self.wfile.write(b"<html>")

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(("status", "error"), [(200, RegistryError), (404, RegistryError), (503, StoreAway)])
def test_a_server_that_is_not_etcd_is_called_so(stores: Stores, status: int, error: type[Exception]) -> None:
    handler = type("Handler", (Page,), {"status": status})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            with pytest.raises(error, match=f"127.0.0.1:{server.server_port} answers"):
                stores.open(f"etcd://127.0.0.1:{server.server_port}/").connect(Heard())
        finally:
            server.shutdown()


def test_a_good_server_is_found_beside_one_that_is_none(etcd: Etcd, stores: Stores) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            for _ in range(8):  # whichever it begins with
                stores.connected(f"etcd://127.0.0.1:{server.server_port},127.0.0.1:{etcd.port}/")
        finally:
            server.shutdown()


# --- TLS, forks, and what is given back ---


def certificates(directory: Path) -> None:
    """An authority, a server's certificate for 127.0.0.1 and a client's, as PEM files."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    authority = ("-addext", "keyUsage=critical,keyCertSign")
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=ca", *authority)
    for name in ("server", "client"):
        names = ("-addext", "subjectAltName=IP:127.0.0.1", "-addext", "extendedKeyUsage=serverAuth,clientAuth")
        openssl("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}", *names)
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-copy_extensions", "copy", "-days", "2")
        openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *signed)


def test_over_tls_with_certificates_of_both_sides(stores: Stores, tmp_path: Path, eventually: Eventually) -> None:
    certificates(tmp_path)
    ours = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    ours.load_cert_chain(tmp_path / "client.pem", tmp_path / "client.key")
    files = {"cert-file": "server.pem", "key-file": "server.key", "trusted-ca-file": "ca.pem"}
    options = [part for name, file in files.items() for part in (f"--{name}", str(tmp_path / file))]
    with Etcd(*options, "--client-cert-auth", context=ours) as etcd:
        place = f"etcd://127.0.0.1:{etcd.port}/"
        known, own = f"ca={tmp_path}/ca.pem", f"cert={tmp_path}/client.pem&key={tmp_path}/client.key"
        client, heard = stores.connected(f"{place}?tls=1&{known}&{own}")
        client.follow("a")
        client.publish("n0", {"a": b"1"})
        client.follow("b")  # the stream is ended and opened again
        client.publish("n0", {"a": b"2"})
        eventually(lambda: heard.changes == [Change("a", "n0", b"1"), Change("a", "n0", b"2")], WITHIN)
        for query, problem in (
            (f"tls=1&{own}", "CERTIFICATE_VERIFY_FAILED"),
            (f"tls=1&{known}&cert=/nowhere.pem", "/nowhere.pem cannot be used for TLS"),
        ):
            with pytest.raises(RegistryError, match=problem):
                stores.open(f"{place}?{query}").connect(Heard())
        for query in ("", f"tls=1&{known}"):  # it hangs up, or says why: whichever comes first
            with pytest.raises((StoreAway, RegistryError), match=r"tls.*, cert.* key"):
                stores.open(f"{place}?{query}").connect(Heard())
        child = os.fork()
        if child == 0:
            client.forget()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        client.publish("n0", {"a": b"3"})
        eventually(lambda: heard.changes[-1:] == [Change("a", "n0", b"3")], WITHIN)
        assert not heard.broken


def test_a_forked_child_lets_go_and_the_parent_hears_on(etcd: Etcd, stores: Stores, eventually: Eventually) -> None:
    client, heard = stores.connected(etcd.url())
    client.follow("a")
    client.publish("n0", {"a": b"1"})
    eventually(lambda: len(heard.changes) == 1, WITHIN)
    child = os.fork()
    if child == 0:
        client.forget()
        client.close()  # which has nothing left to end
        os._exit(len(connected_ports(etcd.port)))
    assert os.waitpid(child, 0)[1] == 0
    client.keep()
    client.publish("n0", {"a": b"2"})
    eventually(lambda: heard.changes[-1:] == [Change("a", "n0", b"2")], WITHIN)
    assert not heard.broken


def test_a_store_has_two_connections_and_gives_both_back(etcd: Etcd, stores: Stores) -> None:
    port = etcd.port
    client = stores.open(etcd.url())
    assert connected_ports(etcd.port) == []
    client.connect(Heard())
    assert connected_ports(etcd.port) == [port]
    for number in range(20):
        client.follow(f"s{number}")
        client.publish("n0", {"a": b"%d" % number})
    assert connected_ports(etcd.port) == [port, port]
    client.close()
    client.close()
    assert connected_ports(etcd.port) == []
    assert keys(etcd, stores) == []


def test_a_dead_network_under_the_stream_is_noticed_within_a_lease(etcd: Etcd, stores: Stores) -> None:
    client, _ = stores.connected(etcd.url(), lease=6.0)
    client.follow("a")
    noticed_after = []
    for each in connections(etcd.port):
        with each:
            if each.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE):
                idle, between, probes = (
                    each.getsockopt(socket.IPPROTO_TCP, option)
                    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
                )
                noticed_after.append(idle + between * probes)
    assert noticed_after == [6]
