"""The registry on ZooKeeper, against the real server."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from kazoo.security import make_digest_acl
from tests.registry.outages import Outages
from tests.registry.servers import free_port
from tests.registry.zookeeper_server import ZooKeeper, client, ensemble

from onehop.errors import RegistryError, SettingsError
from onehop.interfaces import Record
from onehop.registry.leased import LeasedRegistry, LeaseLost, StoreAway
from onehop.registry.urls import parse
from onehop.registry.zookeeper import LIMIT, ZooKeeperStore, open_registry
from onehop.registry.zookeeper_connection import CONNECT_PATIENCE
from onehop.settings import Settings

LEASE = 1.0
SHORT = 3.0  # seconds; a lease that outlasts a machine which is busy otherwise
Eventually = Callable[..., None]


@pytest.fixture(scope="module")
def server() -> Iterator[ZooKeeper]:
    with ZooKeeper() as running:
        yield running


@pytest.fixture
def realm() -> str:
    return f"realm-{random.getrandbits(64):x}"


class Told:
    """What a store told."""

    def __init__(self) -> None:
        self.changes: list[tuple[str, str, bytes | None, bool]] = []
        self.broken: list[str] = []

    def changed(self, service: str, node: str, value: bytes | None, *, withdrawn: bool = False) -> None:
        self.changes.append((service, node, value, withdrawn))

    def broke(self, why: str) -> None:
        self.broken.append(why)

    @property
    def last(self) -> tuple[str, str, bytes | None, bool] | None:
        return self.changes[-1] if self.changes else None


class Stores:
    """Stores of one realm; all are closed at the end."""

    def __init__(self, server: ZooKeeper, realm: str) -> None:
        self.server, self.realm = server, realm
        self.all: list[ZooKeeperStore] = []

    def make(self, url: str = "", lease: float = 30.0) -> ZooKeeperStore:
        place = parse(url or self.server.url(), 2181, ("prefix", "tls", "ca", "cert", "key"))
        self.all.append(ZooKeeperStore(Settings(lease=lease, realm=self.realm), place))
        return self.all[-1]

    def connected(self, url: str = "", lease: float = 30.0) -> tuple[ZooKeeperStore, Told]:
        store, told = self.make(url, lease), Told()
        store.connect(told)
        return store, told

    def path(self, service: str, node: str) -> str:
        return f"/onehop/{self.realm}/services/{service}/{node}"


@pytest.fixture
def stores(server: ZooKeeper, realm: str) -> Iterator[Stores]:
    """In a realm of their own, on a server that is as it was for the next test."""
    made = Stores(server, realm)
    yield made
    if server.process is None:
        server.start()
    server.resume()
    for each in made.all:
        each.close()


class TestZooKeeper(Outages):
    server_class = ZooKeeper


# --- what is followed ---


def test_a_follower_gets_what_stands_and_then_the_changes_alone(stores: Stores, eventually: Eventually) -> None:
    follower, told = stores.connected()
    publisher, _ = stores.connected()
    publisher.publish("n1", {"clock": b"1", "mail": b"1"})
    assert follower.follow("clock") == {("clock", "n1"): b"1"}
    publisher.publish("n1", {"clock": b"2", "mail": b"2"})
    eventually(lambda: told.changes)
    assert told.changes == [("clock", "n1", b"2", False)]
    assert follower.follow("") == {("clock", "n1"): b"2", ("mail", "n1"): b"2"}
    publisher.publish("n1", {"clock": b"2", "mail": b"3"})
    eventually(lambda: told.last == ("mail", "n1", b"3", False))


def test_following_what_nobody_offers_yet_is_empty_and_hears_of_the_first(
    stores: Stores, eventually: Eventually
) -> None:
    follower, told = stores.connected()
    assert follower.follow("clock") == {}
    publisher, _ = stores.connected()
    publisher.publish("n1", {"clock": b"1"})
    eventually(lambda: told.changes == [("clock", "n1", b"1", False)])


def test_nothing_is_lost_between_the_snapshot_and_the_changes(stores: Stores, eventually: Eventually) -> None:
    follower, told = stores.connected()
    publishers = [stores.connected()[0] for _ in range(4)]

    def publish(number: int) -> None:
        for value in range(25):
            publishers[number].publish(f"n{number}", {"clock": b"%d" % value})

    threads = [threading.Thread(target=publish, args=[number]) for number in range(4)]
    for each in threads:
        each.start()
    known = dict(follower.follow("clock"))
    for each in threads:
        each.join()

    def view() -> dict[tuple[str, str], bytes]:
        changes = {(service, node): value for service, node, value, _ in list(told.changes) if value is not None}
        return known | changes

    eventually(lambda: view() == {("clock", f"n{number}"): b"24" for number in range(4)})
    for number in range(4):
        values = [int(value) for _, node, value, _ in told.changes if node == f"n{number}" and value is not None]
        assert values == sorted(values), "an older value was told after a newer one"


def test_a_snapshot_larger_than_one_read_is_whole(stores: Stores) -> None:
    follower, _ = stores.connected()
    with client(stores.server) as other:
        other.ensure_path(f"/onehop/{stores.realm}/services/clock")
        for number in range(300):
            other.create_async(stores.path("clock", f"n{number}"), b"%d" % number)
        assert other.get_children(f"/onehop/{stores.realm}/services/clock")
    assert follower.follow("clock") == {("clock", f"n{number}"): b"%d" % number for number in range(300)}


def test_a_change_costs_one_read_and_no_list(stores: Stores, eventually: Eventually) -> None:
    follower, told = stores.connected(lease=30)
    publisher, _ = stores.connected(lease=30)
    with client(stores.server) as other:
        other.ensure_path(f"/onehop/{stores.realm}/services/clock")
        for number in range(1_000):
            other.create_async(stores.path("clock", f"{number:0100}"))
        assert other.get_children(f"/onehop/{stores.realm}/services/clock")
    publisher.publish("n1", {"clock": b"0"})
    follower.follow("clock")
    sent = stores.server.figure("zk_packets_sent")
    received = _bytes_received(follower)
    for value in range(1, 21):
        publisher.publish("n1", {"clock": b"%d" % value})
        eventually(lambda value=value: told.last == ("clock", "n1", b"%d" % value, False))
    # Each: the publisher's look, its transaction, the follower's event and its read; and what asking this costs.
    assert stores.server.figure("zk_packets_sent") - sent <= 20 * 4 + 10
    assert _bytes_received(follower) - received < 20 * 500


def _bytes_received(store: ZooKeeperStore) -> int:
    """What came on its connection, as the kernel counts it."""
    assert store._connection is not None
    port = store._connection.handler._socket.getsockname()[1]
    lines = subprocess.run(["ss", "-tinH", f"sport = :{port}"], capture_output=True, text=True, check=True).stdout
    return int(lines.split("bytes_received:")[1].split()[0])


def test_realms_and_prefixes_see_nothing_of_each_other(stores: Stores) -> None:
    publisher, _ = stores.connected()
    publisher.publish("n1", {"clock": b"1"})
    elsewhere, _ = stores.connected(stores.server.url(prefix="infra/messages"))
    elsewhere.publish("n2", {"clock": b"2"})
    other = Stores(stores.server, f"{stores.realm}/services")
    follower, _ = other.connected()
    assert follower.follow("") == {}
    follower.close()
    assert publisher.follow("") == {("clock", "n1"): b"1"}
    assert elsewhere.follow("") == {("clock", "n2"): b"2"}


@pytest.mark.parametrize("name", ["a/b", "..", ".", "ü ñ", "%2F", "zookeeper", "!x", "\x00\x1f", "\ue000", "x" * 250])
def test_any_name_is_a_service(stores: Stores, name: str, eventually: Eventually) -> None:
    follower, told = stores.connected()
    publisher, _ = stores.connected()
    publisher.publish("n1", {name: b"1"})
    assert follower.follow(name) == {(name, "n1"): b"1"}
    publisher.publish("n1", {name: b"2"})
    eventually(lambda: told.changes == [(name, "n1", b"2", False)])


def test_garbage_is_told_as_it_is_and_disturbs_nobody(stores: Stores, eventually: Eventually) -> None:
    follower, told = stores.connected()
    publisher, _ = stores.connected()
    publisher.publish("n1", {"clock": b"1"})
    follower.follow("")
    with client(stores.server) as other:
        for name in ("%FF", "%", "!", "n1!", "UPPER"):
            other.create(stores.path("clock", name), b"\xff\x00")
        other.create(stores.path("clock", "UPPER/below"), b"deeper")
        secret = [make_digest_acl("somebody", "else", all=True)]
        other.create(stores.path("clock", "secret"), b"not for us", acl=secret)
    publisher.publish("n1", {"clock": b"2"})
    eventually(lambda: told.last == ("clock", "n1", b"2", False))
    garbage = {("clock", name): b"\xff\x00" for name in ("%FF", "%", "n1!", "UPPER")}
    assert {(service, node): value for service, node, value, _ in told.changes if node != "n1"} == garbage
    found = dict(follower.follow("clock"))
    assert found.pop(("clock", "secret")) == b"", "what may not be read is told as empty: the reader names the key"
    assert {key: value for key, value in found.items() if key[1] != "!"} == garbage | {("clock", "n1"): b"2"}
    assert not told.broken


# --- what is published ---


def test_a_withdrawal_is_told_from_a_lease_that_ended(stores: Stores, eventually: Eventually) -> None:
    follower, told = stores.connected()
    publisher, _ = stores.connected()
    publisher.publish("n1", {"clock": b"1", "mail": b"1"})
    follower.follow("")
    publisher.publish("n1", {"clock": b"1"})
    eventually(lambda: told.last == ("mail", "n1", None, True))
    publisher.publish("n1", {"clock": b"1", "mail": b"2"})
    eventually(lambda: told.last == ("mail", "n1", b"2", False))
    publisher.close()
    eventually(lambda: len(told.changes) == 4)
    assert sorted(told.changes[2:]) == [("clock", "n1", None, False), ("mail", "n1", None, False)]


def test_a_withdrawal_leaves_nothing_behind(stores: Stores) -> None:
    publisher, _ = stores.connected()
    publisher.publish("n1", {"clock": b"1"})
    publisher.withdraw()
    publisher.withdraw()
    with client(stores.server) as other:
        assert other.get_children(f"/onehop/{stores.realm}/services/clock") == []


def test_a_node_may_offer_very_many_services(stores: Stores, eventually: Eventually) -> None:
    follower, told = stores.connected()
    publisher, _ = stores.connected()
    publisher.follow("")
    follower.follow("")
    services = [f"s{number}" for number in range(700)]
    publisher.publish("n1", dict.fromkeys(services, b"1"))
    eventually(lambda: len({service for service, *_ in told.changes}) == 700, 20)
    assert follower.follow("") == {(service, "n1"): b"1" for service in services}
    publisher.withdraw()
    assert follower.follow("") == {}


def test_what_a_node_no_longer_is_goes(stores: Stores) -> None:
    publisher, _ = stores.connected()
    publisher.publish("n1", {"clock": b"1"})
    publisher.publish("n2", {"clock": b"2"})
    assert publisher.follow("") == {("clock", "n2"): b"2"}


def test_services_that_nobody_offers_vanish(realm: str, eventually: Eventually) -> None:
    with ZooKeeper(java=["-Dznode.container.checkIntervalMs=50"]) as tidy, client(tidy) as other:
        stores = Stores(tidy, realm)
        publisher, _ = stores.connected(lease=10)
        follower, told = stores.connected(lease=10)
        follower.follow("clock")
        publisher.publish("n1", {"clock": b"1"})
        publisher.withdraw()
        eventually(lambda: other.exists("/onehop") is None)
        publisher.publish("n1", {"clock": b"2"})
        eventually(lambda: told.last == ("clock", "n1", b"2", False))
        publisher.close()
        follower.close()


def test_parents_that_vanish_are_made_again(stores: Stores) -> None:
    publisher, _ = stores.connected()
    publisher.publish("n1", {"clock": b"1"})
    with client(stores.server) as other:
        other.delete(f"/onehop/{stores.realm}", recursive=True)
    with pytest.raises(LeaseLost, match="clock/n1 is no longer ours"):
        publisher.keep()
    publisher.publish("n1", {"clock": b"1"})
    publisher.keep()
    assert publisher.follow("clock") == {("clock", "n1"): b"1"}


def test_a_value_that_zookeeper_would_hang_up_on_is_refused(stores: Stores) -> None:
    publisher, _ = stores.connected()
    publisher.publish("n1", {"clock": b"x" * LIMIT})
    with pytest.raises(RegistryError, match="1000001 bytes"):
        publisher.publish("n1", {"clock": b"x" * (LIMIT + 1)})


def test_a_value_that_somebody_else_changed_is_put_again(stores: Stores) -> None:
    publisher, _ = stores.connected()
    publisher.publish("n1", {"clock": b"1", "compute": b"2"})
    publisher.keep()
    with client(stores.server) as other:
        other.set(stores.path("compute", "n1"), b"not ours")
        with pytest.raises(LeaseLost, match="not as we put it"):
            publisher.keep()
        publisher.publish("n1", {"clock": b"1", "compute": b"2"})
        publisher.keep()
        assert other.get(stores.path("compute", "n1"))[0] == b"2"


# --- sessions ---


def test_a_node_of_our_last_session_is_replaced_and_its_end_takes_nothing_away(
    stores: Stores, eventually: Eventually
) -> None:
    follower, told = stores.connected()
    publisher, _ = stores.connected(lease=SHORT)
    publisher.publish("n1", {"clock": b"1"})
    follower.follow("clock")
    publisher._connection.handler.cut()  # type: ignore[union-attr]
    last, publisher._session = publisher._session, None  # as after a quick start
    publisher.connect(Told())
    publisher.publish("n1", {"clock": b"1"})
    owner = publisher._session
    assert last is not None
    assert owner is not None
    assert owner[0] != last[0]
    with client(stores.server) as other:
        eventually(lambda: f"{last[0]:#x}" not in stores.server.ask("cons") + stores.server.ask("dump"), 10 * SHORT)
        assert other.exists(stores.path("clock", "n1")).ephemeralOwner == owner[0]
    publisher.keep()
    assert all(value == b"1" for _, _, value, _ in told.changes), "it looked as if it had gone"


def test_a_connection_that_breaks_goes_on_with_its_session(stores: Stores, eventually: Eventually) -> None:
    publisher, told = stores.connected(lease=SHORT)
    publisher.publish("n1", {"clock": b"1"})
    with client(stores.server) as other:
        before = other.exists(stores.path("clock", "n1"))
        _hang_up(publisher)
        eventually(lambda: told.broken)
        with pytest.raises(StoreAway):
            publisher.keep()
        publisher.connect(Told())
        publisher.publish("n1", {"clock": b"1"})
        time.sleep(2 * SHORT)  # its session would have ended by now
        publisher.keep()
        assert other.exists(stores.path("clock", "n1")) == before
    assert len(told.broken) == 1


def test_a_session_that_was_ended_is_noticed_and_followed_by_another(stores: Stores, eventually: Eventually) -> None:
    publisher, told = stores.connected()
    publisher.publish("n1", {"clock": b"1"})
    with client(stores.server, client_id=publisher._session):
        pass  # it takes the session over, and ends it
    eventually(lambda: told.broken)
    ended = publisher._session
    publisher.connect(Told())
    assert publisher._session != ended
    publisher.keep()  # nothing is put yet that could be lost
    publisher.publish("n1", {"clock": b"1"})
    publisher.keep()


def test_a_registry_comes_back_with_another_session(stores: Stores, eventually: Eventually) -> None:
    settings = Settings(lease=LEASE, realm=stores.realm, cache_directory="none")
    registry, follower = (open_registry(settings, stores.server.url()) for _ in range(2))
    record = Record(node="0" * 31 + "1", host="h", services={"clock": ("a",)})
    try:
        registry.announce(record)
        assert follower.want("clock", 5)
        with client(stores.server) as other:
            before = other.exists(stores.path("clock", record.node)).ephemeralOwner
            with client(stores.server, client_id=_store(registry)._session):
                pass

            def is_back() -> bool:
                stat = other.exists(stores.path("clock", record.node))
                return stat is not None and stat.ephemeralOwner != before

            eventually(is_back, 10)
    finally:
        registry.close()
        follower.close()


def _store(registry: LeasedRegistry) -> ZooKeeperStore:
    store = registry._keeper()._store
    assert isinstance(store, ZooKeeperStore)
    return store


def _hang_up(store: ZooKeeperStore) -> None:
    """Break the connection, as a network would."""
    assert store._connection is not None
    with contextlib.suppress(OSError):
        store._connection.handler._socket.shutdown(2)


# --- a server that is away ---


@pytest.mark.alone
def test_a_server_that_stands_still_is_noticed_within_a_lease(stores: Stores, eventually: Eventually) -> None:
    store, told = stores.connected(lease=LEASE)
    stores.server.pause()
    try:
        eventually(lambda: told.broken, LEASE + 0.5)
        began = time.monotonic()
        with pytest.raises(StoreAway, match=f"{stores.server.address} .does not answer"):
            store.connect(Told())
        assert time.monotonic() - began < CONNECT_PATIENCE + 1
    finally:
        stores.server.resume()


@pytest.mark.alone
@pytest.mark.parametrize("away", ["pause", "stop"])
def test_closing_waits_a_second_at_most_and_leaves_no_thread(stores: Stores, away: str, eventually: Eventually) -> None:
    store, _ = stores.connected(lease=10)
    getattr(stores.server, away)()
    began = time.monotonic()
    store.close()
    assert time.monotonic() - began < 1.5
    eventually(lambda: "onehop-zookeeper" not in [each.name for each in threading.enumerate()])
    if away == "pause":
        stores.server.resume()


def test_an_address_that_never_answers_is_given_up(stores: Stores) -> None:
    store = stores.make("zookeeper://192.0.2.1:2181/")  # reserved for documentation: nobody is there
    began = time.monotonic()
    with pytest.raises(StoreAway, match=r"192\.0\.2\.1"):
        store.connect(Told())
    store.close()
    assert time.monotonic() - began < CONNECT_PATIENCE + 5


def test_who_does_not_answer_is_named_with_the_reason(stores: Stores) -> None:
    free = [free_port(), free_port()]
    store = stores.make(f"zookeeper://127.0.0.1:{free[0]},Localhost:{free[1]},nowhere.invalid/")
    refused = rf"127.0.0.1:{free[0]} \(Connection refused\), Localhost:{free[1]} \(Connection refused\), "
    with pytest.raises(StoreAway, match=rf"{refused}nowhere.invalid:2181 \(there is no address of that name\)"):
        store.connect(Told())


def test_a_server_that_takes_no_more_connections_is_named_with_the_option_to_change(realm: str) -> None:
    with ZooKeeper(["maxClientCnxns=1"]) as few:
        stores = Stores(few, realm)
        first, _ = stores.connected()
        with pytest.raises(StoreAway, match="maxClientCnxns"):
            stores.connected()
        first.close()


def test_what_kazoo_says_of_every_attempt_is_kept_out_of_logs(
    stores: Stores, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    store, told = stores.connected()
    stores.server.stop()
    eventually(lambda: told.broken)
    for _ in range(3):
        with pytest.raises(StoreAway):
            store.connect(Told())
    assert caplog.messages == []


def test_a_lease_longer_than_asked_for_is_warned_of_once(realm: str, caplog: pytest.LogCaptureFixture) -> None:
    with ZooKeeper(["minSessionTimeout=5000"]) as slow:
        store, _ = Stores(slow, realm).connected(lease=LEASE)
        store.connect(Told())
        store.close()
    (warning,) = caplog.messages
    assert "records for 5 s, not for the 1 s of the setting lease: see its minSessionTimeout" in warning


def test_a_restart_of_the_server_keeps_sessions_and_records(stores: Stores, eventually: Eventually) -> None:
    publisher, told = stores.connected(lease=10)
    publisher.publish("n1", {"clock": b"1"})
    stores.server.restart()
    eventually(lambda: told.broken)
    session = publisher._session
    publisher.connect(Told())
    assert publisher._session == session
    assert publisher.follow("clock") == {("clock", "n1"): b"1"}


def test_a_server_that_lost_everything_is_filled_again(stores: Stores, eventually: Eventually) -> None:
    publisher, told = stores.connected(lease=10)
    publisher.publish("n1", {"clock": b"1"})
    stores.server.wipe()
    eventually(lambda: told.broken)
    publisher.connect(Told())
    assert publisher.follow("clock") == {}
    publisher.publish("n1", {"clock": b"1"})
    assert publisher.follow("clock") == {("clock", "n1"): b"1"}


def test_of_an_ensemble_one_server_may_go(realm: str, eventually: Eventually) -> None:
    with ensemble() as servers:
        stores = Stores(servers[0], realm)
        url = f"zookeeper://{','.join(each.address for each in servers)}/"
        publisher, told = stores.connected(url, lease=5)
        follower, heard = stores.connected(url, lease=5)
        publisher.publish("n1", {"clock": b"1"})
        follower.follow("clock")
        session = publisher._session
        serving = publisher._connection.server  # type: ignore[union-attr]
        next(each for each in servers if each.address == serving).stop()
        eventually(lambda: told.broken)
        _until_answered(lambda: publisher.connect(Told()))
        assert publisher._session == session
        _until_answered(lambda: follower.connect(heard))
        assert follower.follow("clock") == {("clock", "n1"): b"1"}
        publisher.publish("n1", {"clock": b"2"})
        eventually(lambda: heard.last == ("clock", "n1", b"2", False))
        publisher.close()
        follower.close()


def _until_answered(call: Callable[[], Any], within: float = 20) -> None:
    deadline = time.monotonic() + within
    while True:
        try:
            return call()
        except StoreAway:
            assert time.monotonic() < deadline


# --- permissions ---


def test_with_a_login_only_that_user_may_write_and_all_may_read(stores: Stores) -> None:
    address = stores.server.address
    url = f"zookeeper://us:{quote('pa/ss:w@rd', safe='')}@{address}/?prefix={stores.realm}-closed"
    publisher, _ = stores.connected(url)
    publisher.publish("n1", {"clock": b"1"})
    again, _ = stores.connected(url)
    again.publish("n2", {"clock": b"2"})
    for wrong in ("", "us:wrong@", "them:pa@"):
        stranger, _ = stores.connected(f"zookeeper://{wrong}{address}/?prefix={stores.realm}-closed")
        assert stranger.follow("clock") == {("clock", "n1"): b"1", ("clock", "n2"): b"2"}
        with pytest.raises(RegistryError, match="name a user that may"):
            stranger.publish("n3", {"clock": b"3"})
        with pytest.raises(RegistryError, match=r"refuses .* what is needed below"):
            stranger.publish("n3", {"mail": b"3"})


def test_a_place_that_may_not_be_read_is_an_error_and_not_empty(stores: Stores) -> None:
    with client(stores.server) as other:
        other.ensure_path(f"/onehop/{stores.realm}/services")
        other.create(f"/onehop/{stores.realm}/services/clock", acl=[make_digest_acl("somebody", "else", all=True)])
    follower, _ = stores.connected()
    for service in ("clock", ""):
        with pytest.raises(RegistryError, match="refuses a client without a login what is needed below"):
            follower.follow(service)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("zookeeper://us@h/", "user:password"),
        ("zookeeper://h/?tls=yes", "tls is 'yes'"),
        ("zookeeper://h/?timeout=3", "no option 'timeout'"),
        ("zookeeper:h", "names no server"),
    ],
)
def test_urls_that_are_wrong_are_explained(url: str, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        open_registry(Settings(), url)


def test_files_for_tls_that_are_missing_are_named(stores: Stores) -> None:
    with pytest.raises(RegistryError, match=r"ca=/nowhere cannot be used: .*No such file"):
        stores.connected("zookeeper://h/?ca=/nowhere")


def listens(port: int) -> bool:
    """Whether somebody listens at ``port`` of this host."""
    with socket.socket() as asking:
        return asking.connect_ex(("127.0.0.1", port)) == 0


def test_it_speaks_tls_with_servers_that_it_can_trust(realm: str, tmp_path: Path, eventually: Eventually) -> None:
    store = ["-keystore", str(tmp_path / "store"), "-storetype", "PKCS12", "-storepass", "secret", "-alias", "server"]
    names = ["-dname", "CN=localhost", "-ext", "san=dns:localhost"]
    for verb in (["-genkeypair", "-keyalg", "EC", *names], ["-exportcert", "-rfc", "-file", str(tmp_path / "ca")]):
        subprocess.run(["keytool", *verb, *store], check=True, capture_output=True)
    port = free_port()
    options = {
        "serverCnxnFactory": "org.apache.zookeeper.server.NettyServerCnxnFactory",
        "secureClientPort": port,
        "ssl.keyStore.location": tmp_path / "store",
        "ssl.keyStore.password": "secret",
        "ssl.keyStore.type": "PKCS12",
        "ssl.clientAuth": "none",
    }
    with ZooKeeper([f"{name}={value}" for name, value in options.items()]) as secure:
        eventually(lambda: listens(port))  # a moment after it answers at the other
        stores = Stores(secure, realm)
        publisher, _ = stores.connected(f"zookeeper://localhost:{port}/?ca={tmp_path}/ca")
        publisher.publish("n1", {"clock": b"1"})
        plain, _ = stores.connected()
        assert plain.follow("clock") == {("clock", "n1"): b"1"}
        with pytest.raises(RegistryError, match="certificate verify failed: self-signed certificate"):
            stores.connected(f"zookeeper://localhost:{port}/?tls=1")
        with pytest.raises(RegistryError, match=r"certificate is not valid for '127.0.0.1'"):
            stores.connected(f"zookeeper://127.0.0.1:{port}/?ca={tmp_path}/ca")
        with pytest.raises(StoreAway, match="speaks TLS only"):
            stores.connected(f"zookeeper://localhost:{port}/")
        publisher.close()
        plain.close()


# --- processes ---


def test_a_forked_child_lets_go_without_a_word(stores: Stores) -> None:
    publisher, told = stores.connected(lease=SHORT)
    publisher.publish("n1", {"clock": b"1"})
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            publisher.forget()
            other, _ = stores.connected()
            other.publish("n2", {"clock": b"2"})
            other.close()
            os.write(writer, b"1")
        finally:
            os._exit(0)
    assert select.select([reader], [], [], 20)[0]
    os.waitpid(child, 0)
    os.close(reader)
    os.close(writer)
    time.sleep(2 * SHORT)  # a session that the child had disturbed would have ended by now
    publisher.keep()
    assert not told.broken
    assert publisher.follow("clock") == {("clock", "n1"): b"1"}


GREEN = """
import eventlet
eventlet.monkey_patch()
import sys, time
from onehop.interfaces import Record
from onehop.registry.zookeeper import LIMIT, ZooKeeperStore, open_registry
from onehop.registry.zookeeper_connection import CONNECT_PATIENCE
from onehop.settings import Settings

settings = Settings(lease=1.0, realm=sys.argv[2], cache_directory="none")
first, second = open_registry(settings, sys.argv[1]), open_registry(settings, sys.argv[1])
views = []
second.watch(views.append)
assert second.want("clock", 5)
first.announce(Record(node="0" * 31 + "1", host="h", services={"clock": ("a",)}))
gap, last, end = 0.0, time.monotonic(), time.monotonic() + 2
while time.monotonic() < end:
    time.sleep(0.01)
    gap, last = max(gap, time.monotonic() - last), time.monotonic()
assert [each.node[-1] for each in views[-1]] == ["1"], views
first.close()
second.close()
print("longest held up:", gap)
assert gap < 0.5
"""


@pytest.mark.alone
def test_it_works_under_the_patch_of_eventlet(stores: Stores) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", GREEN, stores.server.url(), stores.realm],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stdout + run.stderr
