"""The registry on Redis, with real servers."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
from tests.registry.outages import Cluster, Outages, record
from tests.registry.servers import Redis, Sentinel, Sentinels, free_port
from tests.registry.views import Views, eventually

from onehop.errors import RegistryError, SettingsError
from onehop.registry import open_registry
from onehop.registry.leased import RETURN_DELAY, LeasedRegistry, LeaseLost, StoreAway
from onehop.registry.redis import PORT, SENTINEL_PORT, RedisStore
from onehop.registry.urls import parse
from onehop.settings import Settings, revise

LEASE = 1.0
SETTINGS = Settings(lease=LEASE, cache_directory="none")


class TestRedis(Outages):
    server_class = Redis

    def test_after_a_flush_everybody_is_listed_again_and_nobody_was_missed(
        self, server: Redis, cluster: Cluster
    ) -> None:
        views = cluster.watched()
        numbers = range(1, 21)
        cluster.announced(*map(record, numbers))
        assert views.become(*numbers)
        mark = len(views.all)
        server.flush()
        assert cluster.watched().become(*numbers, within=self.expired + self.lease)
        time.sleep(self.hold)  # who was held would go now
        assert views.nodes == list(numbers)
        assert views.fewest_since(mark) == len(numbers)


@pytest.fixture(scope="module")
def one_server() -> Iterator[Redis]:
    with Redis() as server:
        yield server


@pytest.fixture
def server(one_server: Redis) -> Redis:
    one_server.flush()
    return one_server


@pytest.fixture
def opened() -> Iterator[Callable[..., LeasedRegistry]]:
    with ExitStack() as closing:

        def open_(url: str, lease: float = LEASE) -> LeasedRegistry:
            registry = open_registry(url, revise(SETTINGS, lease=lease))
            assert isinstance(registry, LeasedRegistry)
            closing.callback(registry.close)
            return registry

        yield open_


def watched(registry: LeasedRegistry, service: str = "clock") -> Views:
    views = Views()
    registry.watch(views)
    assert registry.want(service, 10.0)
    return views


# --- what the URL says ---


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("redis://ctl1/?db=x", "db is 'x'; it must be a database's number"),
        ("redis://ctl1/?db=-1", "db is '-1'"),
        ("redis://ctl1/?tls=yes", "tls is 'yes'; it must be 0 or 1"),
        ("redis://ctl1/?ca=/etc/ca.pem", "ca has a meaning with tls=1 only"),
        ("redis://ctl1/?sentinel=", "the name of a primary"),
        ("redis://ctl1/?sentinal=main", "no option 'sentinal'"),
        ("redis://", "names no server"),
        ("redis://u:secret@ctl1/3", "path"),
    ],
)
def test_a_wrong_url_is_explained(url: str, problem: str) -> None:
    with pytest.raises(SettingsError) as caught:
        open_registry(url, SETTINGS)
    assert problem in str(caught.value)
    assert "secret" not in str(caught.value)


def test_the_port_is_that_of_redis_or_of_a_sentinel() -> None:
    assert open_registry("redis://ctl1,ctl2:1/", SETTINGS).addresses == (("ctl1", PORT), ("ctl2", 1))
    assert open_registry("redis://ctl1/?sentinel=main", SETTINGS).addresses == (("ctl1", SENTINEL_PORT),)


def test_a_missing_package_is_named_with_the_command_that_brings_it() -> None:
    program = """
        import sys
        sys.modules["redis"] = None
        from onehop.registry import open_registry
        from onehop.settings import Settings
        try:
            open_registry("redis://ctl1/", Settings())
        except Exception as error:
            print(type(error).__name__, error)
    """
    output = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    assert output.stdout.startswith("SettingsError ")
    assert "pip install 'onehop[redis]'" in output.stdout


# --- servers that refuse ---


def test_a_wrong_password_is_said_at_once_and_not_shown(opened: Callable[..., LeasedRegistry]) -> None:
    with Redis("--requirepass", "right") as server:
        for login in ("", ":wrong@", "user:wrong@"):
            began = time.monotonic()
            with pytest.raises(RegistryError, match="refuses the user or the password") as caught:
                opened(server.url().replace("//", f"//{login}")).announce(record(1))
            assert f":{server.port}" in str(caught.value)
            assert "wrong" not in str(caught.value)
            assert time.monotonic() - began < 2.0
        registry = opened(server.url().replace("//", "//:right@"))
        registry.announce(record(1))
        assert watched(registry).nodes == [1]


def test_a_missing_permission_is_said_at_once(server: Redis, opened: Callable[..., LeasedRegistry]) -> None:
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "weak", "on", ">pw", "~*", "&*", "+@all", "-@scripting")
        client.execute_command("ACL", "SETUSER", "strong", "on", ">pw", "~onehop:*", "&onehop:*", "-@all")
        client.execute_command(
            "ACL", "SETUSER", "strong", "+@read", "+@write", "+@pubsub", "+@scripting", "+@connection", "+role", "+time"
        )
    with pytest.raises(RegistryError, match="does not permit what a registry needs"):
        opened(server.url().replace("//", "//weak:pw@")).announce(record(1))
    strong = opened(server.url().replace("//", "//strong:pw@"))
    strong.announce(record(1))
    assert watched(strong).nodes == [1]


def test_a_cluster_is_refused_with_what_to_use_instead(opened: Callable[..., LeasedRegistry]) -> None:
    with (
        Redis("--cluster-enabled", "yes", "--cluster-port", str(free_port())) as server,
        pytest.raises(RegistryError, match="cluster") as caught,
    ):
        opened(server.url()).announce(record(1))
    assert "sentinel=NAME" in str(caught.value)


def test_a_replica_is_passed_by_for_a_primary(
    server: Redis, opened: Callable[..., LeasedRegistry], caplog: pytest.LogCaptureFixture
) -> None:
    with Redis("--replicaof", "127.0.0.1", str(server.port)) as replica:
        with caplog.at_level(logging.WARNING):
            alone = opened(replica.url())
            announcing = threading.Thread(target=alone.announce, args=(record(1),))
            announcing.start()
            assert eventually(lambda: "is a read-only replica" in caplog.text, 10.0)
        both = opened(f"redis://127.0.0.1:{replica.port},127.0.0.1:{server.port}/")
        both.announce(record(2))
        assert watched(both).nodes == [2]
        with replica.client() as client:
            client.execute_command("REPLICAOF", "NO", "ONE")
            assert eventually(lambda: record(1).node in str(client.keys("onehop:*")), 20.0)
        announcing.join()


def test_a_server_without_memory_is_away_until_it_has_some(
    opened: Callable[..., LeasedRegistry], caplog: pytest.LogCaptureFixture
) -> None:
    with Redis("--maxmemory", "1", "--maxmemory-policy", "noeviction") as server:
        with caplog.at_level(logging.WARNING):
            registry = opened(server.url())
            registry.announce(record(1))
        assert "has no memory left for a record (its setting maxmemory)" in caplog.text
        with server.client() as client:
            client.config_set("maxmemory", 0)
        assert watched(registry).become(1, within=20.0)


def test_who_was_announced_stays_where_memory_runs_out_and_connections_break(
    opened: Callable[..., LeasedRegistry], caplog: pytest.LogCaptureFixture
) -> None:
    lease = 5 * RETURN_DELAY  # a third of it may be over when the connection breaks, and the way back takes so long
    with Redis("--maxmemory-policy", "noeviction") as server, server.client() as client:
        registry = opened(server.url(), lease)
        registry.announce(record(1))
        client.config_set("maxmemory", 1)
        with caplog.at_level(logging.INFO):
            client.client_kill_filter(_type="normal", skipme=True)
            assert eventually(lambda: " is back " in caplog.text, 10.0)
        until = time.monotonic() + 2 * lease  # several leases are the subject
        while time.monotonic() < until:
            assert client.exists(f"onehop:default:record:clock:{record(1).node}")
            time.sleep(0.05)
        assert "no memory" not in caplog.text


def test_other_peoples_data_under_our_keys_is_named(server: Redis, opened: Callable[..., LeasedRegistry]) -> None:
    with server.client() as client:
        client.set("onehop:default:nodes:clock", "not a sorted set")
    with pytest.raises(RegistryError, match="holds something else under a key onehop"):
        opened(server.url()).announce(record(1))


@pytest.mark.parametrize("key", ["nodes:aaa", "count:aaa"])
def test_other_peoples_data_under_one_services_keys_hides_no_other_service(
    server: Redis, opened: Callable[..., LeasedRegistry], caplog: pytest.LogCaptureFixture, key: str
) -> None:
    with server.client() as client:
        client.set(f"onehop:default:{key}", "not ours")
        registry = opened(server.url())
        views = watched(registry, "aaa")
        for service in ("bbb", ""):
            assert registry.want(service, 10.0)
        opened(server.url()).announce(record(1, services={"bbb": ("a",)}))
        assert views.become(1, within=5.0)
        client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        opened(server.url()).announce(record(2, services={"bbb": ("a",)}))
        assert views.become(1, 2, within=10.0)
        (warning,) = [each for each in caplog.records if "has to be removed" in each.getMessage()]
        assert f"onehop:default:{key}," in warning.getMessage()
        client.delete(f"onehop:default:{key}")
        opened(server.url()).announce(record(3, services={"aaa": ("a",)}))
        assert views.become(1, 2, 3, within=10.0)


def test_names_that_are_none_of_ours_are_passed_by(server: Redis, opened: Callable[..., LeasedRegistry]) -> None:
    with server.client() as client:
        strange = ("%FF", "%", "", "\xff", "%41", "a/b")
        client.zadd("onehop:default:services", dict.fromkeys(strange, 1e15))
        views = watched(opened(server.url()), "")
        for name in strange:
            client.publish(f"onehop:default:0:change:{name}", f"5 put {record(7).node} x")
        opened(server.url()).announce(record(1))
        assert views.become(1, within=5.0)
        assert client.dbsize() == 4, "a record, its node, its service and the count of its changes"


# --- where it goes on ---


def test_sentinels_name_the_new_primary_and_nobody_is_dropped(
    opened: Callable[..., LeasedRegistry], caplog: pytest.LogCaptureFixture
) -> None:
    with Sentinels() as cluster:
        assert not opened(cluster.url().replace("main", "mian")).want("clock", 0.5)
        assert eventually(lambda: "knows no primary called 'mian'" in caplog.text)
        views = watched(opened(cluster.url()))
        numbers = range(1, 6)
        for number in numbers:
            opened(cluster.url()).announce(record(number))
        assert views.become(*numbers, within=5.0)
        mark = len(views.all)
        failed = cluster.primary()
        failed.pause()  # a primary that hangs is worse than one that is gone: its connections stay
        try:
            assert eventually(lambda: cluster.primary() is not failed, 30.0)
            opened(cluster.url()).announce(record(6))
            assert views.become(*numbers, 6, within=30.0)
            assert watched(opened(cluster.url())).become(*numbers, 6, within=20.0)
        finally:
            failed.resume()
        time.sleep(2.5 * LEASE)  # who was held would go now
        assert views.nodes == [*numbers, 6]
        assert views.fewest_since(mark) == 5


def test_a_sentinel_without_a_login_leads_to_servers_that_have_one(opened: Callable[..., LeasedRegistry]) -> None:
    with Redis("--requirepass", "right") as server, Sentinel(server.port, "right") as sentinel:
        registry = opened(sentinel.url(sentinel="main").replace("//", "//:right@"))
        registry.announce(record(1))
        assert watched(registry).nodes == [1]
        with pytest.raises(RegistryError, match=f"{server.port} refuses the user or the password"):
            opened(sentinel.url(sentinel="main").replace("//", "//:wrong@")).announce(record(2))


def test_tls_with_a_certificate_of_ones_own(tmp_path: Path, opened: Callable[..., LeasedRegistry]) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    words = ("-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1")
    names = ("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert))
    subprocess.run(["openssl", "req", *words, *names], check=True, capture_output=True)
    with Redis() as server:
        plain = server.port
        with server.client() as client:
            for name, file in (("tls-cert-file", cert), ("tls-key-file", key), ("tls-ca-cert-file", cert)):
                client.config_set(name, str(file))
            tls = Redis().port
            client.config_set("tls-port", tls)
        assert plain != tls
        registry = opened(server.url(port=tls, tls="1", ca=str(cert), cert=str(cert), key=str(key)))
        registry.announce(record(1))
        assert watched(registry).nodes == [1]
        assert watched(opened(server.url())).nodes == [1]
        stranger = opened(server.url(port=tls, tls="1"))
        assert not stranger.want("clock", 1.0), "its certificate is signed by nobody whom this machine trusts"


def test_two_databases_are_two_places(server: Redis, opened: Callable[..., LeasedRegistry]) -> None:
    first, second = watched(opened(server.url(db="0"))), watched(opened(server.url(db="1")))
    opened(server.url(db="0")).announce(record(1))
    opened(server.url(db="1")).announce(record(2))
    assert first.become(1, within=5.0)
    assert second.become(2, within=5.0)
    assert all(2 not in [int(each.node, 16) for each in view] for view in first.all)


# --- what it costs, and what is missed ---


def commands(server: Redis) -> dict[str, int]:
    with server.client() as client:
        found = client.info("commandstats")
    return {name.removeprefix("cmdstat_"): each["calls"] for name, each in found.items()}


def test_nothing_scans_the_database_and_what_is_known_is_not_read_again(
    server: Redis, opened: Callable[..., LeasedRegistry]
) -> None:
    opened(server.url()).announce(record(1))
    followers = [watched(opened(server.url())) for _ in range(3)]
    everything = watched(opened(server.url()), "")
    before = commands(server)
    time.sleep(3 * LEASE)  # the quiet time is the subject
    after = commands(server)
    assert not after.keys() & {"keys", "scan", "sscan", "hscan", "zscan"}
    assert after.get("mget", 0) == before["mget"]
    assert all(each.nodes == [1] for each in (*followers, everything))


def test_a_lost_message_is_noticed(server: Redis, opened: Callable[..., LeasedRegistry]) -> None:
    views = watched(opened(server.url()))
    one = opened(server.url())
    one.announce(record(1))
    assert views.become(1, within=5.0)
    server.garble("default", "clock", record(2).node, msgspec.json.encode(record(2)))  # counted, and told to nobody
    assert views.become(1, 2)


def test_a_lost_message_is_noticed_by_the_next_one(server: Redis, opened: Callable[..., LeasedRegistry]) -> None:
    views = watched(opened(server.url()))
    one = opened(server.url())
    one.announce(record(1))
    assert views.become(1, within=5.0)
    server.garble("default", "clock", record(2).node, msgspec.json.encode(record(2)))
    one.announce(record(1, version="new"))
    assert views.become(1, 2)
    assert eventually(lambda: views.last[0].version == "new")


def test_subscriptions_that_are_cut_are_made_again(server: Redis, opened: Callable[..., LeasedRegistry]) -> None:
    views = watched(opened(server.url()))
    with server.client() as client:
        for number in range(1, 4):
            client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            opened(server.url()).announce(record(number))
            assert views.become(*range(1, number + 1), within=10.0)


def test_rubbish_in_the_channel_is_no_change(server: Redis, opened: Callable[..., LeasedRegistry]) -> None:
    views = watched(opened(server.url()))
    opened(server.url()).announce(record(1))
    assert views.become(1, within=5.0)
    with server.client() as client:
        for rubbish in ("", "x", "1", "9999999999999999999 put", f"5 boil {record(7).node} x", "\xff\xff"):
            client.publish("onehop:default:0:change:clock", rubbish)
    opened(server.url()).announce(record(2))
    assert views.become(1, 2, within=5.0)


def test_who_wants_everything_hears_of_services_that_come_later(
    server: Redis, opened: Callable[..., LeasedRegistry]
) -> None:
    views = watched(opened(server.url()), "")
    opened(server.url()).announce(record(1, services={"a new one": ("x",), "exchange/topic": ("y",)}))
    assert views.become(1, within=5.0)
    assert eventually(lambda: set(views.last[0].services) == {"a new one", "exchange/topic"}, 5.0)


def test_nothing_is_left_of_a_service_that_is_gone_for_long(
    server: Redis, opened: Callable[..., LeasedRegistry]
) -> None:
    registry = opened(server.url(), lease=0.3)
    registry.announce(record(1))
    registry.close()
    with server.client() as client:
        assert client.keys("*")
        assert eventually(lambda: not client.keys("*"), 10.0)


# --- the store itself ---


class Told:
    """A Tell that keeps what it hears."""

    def __init__(self) -> None:
        self.changes: list[tuple[str, str, bytes | None, bool]] = []
        self.broken: list[str] = []

    def changed(self, service: str, node: str, value: bytes | None, *, withdrawn: bool = False) -> None:
        self.changes.append((service, node, value, withdrawn))

    def broke(self, why: str) -> None:
        self.broken.append(why)


Make = Callable[..., tuple[RedisStore, Told]]
NODE = record(1).node


@pytest.fixture
def store(server: Redis) -> Iterator[Make]:
    with ExitStack() as closing:

        def make(lease: float = 30.0) -> tuple[RedisStore, Told]:
            store, told = RedisStore(revise(SETTINGS, lease=lease), parse(server.url(), PORT)), Told()
            store.connect(told)
            closing.callback(store.close)
            return store, told

        yield make


def test_a_change_says_what_happened(store: Make) -> None:
    (one, _), (other, told) = store(), store()
    assert other.follow("clock") == {}
    one.publish(NODE, {"clock": b"first"})
    one.publish(NODE, {"clock": b"first"})
    one.publish(NODE, {"clock": b"second", "compute": b"other"})
    assert other.follow("compute") == {("compute", NODE): b"other"}
    one.publish(NODE, {"compute": b"other"})
    one.withdraw()
    assert eventually(lambda: len(told.changes) == 4, 5.0)
    assert told.changes == [
        ("clock", NODE, b"first", False),
        ("clock", NODE, b"second", False),
        ("clock", NODE, None, True),
        ("compute", NODE, None, True),
    ]


def test_an_expiry_is_told_as_one_and_in_time(store: Make) -> None:
    (one, _), (other, told) = store(LEASE), store(LEASE)
    other.follow("clock")
    published = time.monotonic()
    one.publish(NODE, {"clock": b"value"})
    assert eventually(lambda: ("clock", NODE, None, False) in told.changes)
    assert LEASE * 0.9 < time.monotonic() - published < LEASE * 1.3 + 2.0
    with pytest.raises(LeaseLost):
        one.keep()


def test_a_node_that_takes_another_id_leaves_nothing_of_the_first(store: Make) -> None:
    (one, _), (other, told) = store(), store()
    other.follow("clock")
    one.publish(NODE, {"clock": b"value"})
    one.publish(record(2).node, {"clock": b"value"})
    assert eventually(lambda: ("clock", NODE, None, True) in told.changes, 5.0)
    assert set(other.follow("clock")) == {("clock", record(2).node)}


def test_what_was_long_on_its_way_takes_nothing_newer_away(store: Make) -> None:
    """A command that a hung server reads after those of a later connection."""
    (late, _), (new, _), (other, told) = store(), store(), store()
    late.publish(NODE, {"clock": b"old"})
    new.publish(NODE, {"clock": b"new"})
    assert other.follow("clock") == {("clock", NODE): b"new"}
    connection = late._connected()
    numbers = late._ours["clock", NODE]
    assert connection.ask(late._keys.remove("clock", NODE, numbers)) == [0]
    assert connection.ask(late._keys.put("clock", NODE, numbers, b"old")) == [0]
    assert connection.ask(late._keys.renew("clock", NODE, numbers)) == [0]
    assert other.follow("clock") == {("clock", NODE): b"new"}
    assert told.changes == []


def test_between_reading_and_following_nothing_is_missed(store: Make) -> None:
    one, _ = store()
    one.publish(NODE, {"clock": b"0"})
    ended, last = threading.Event(), [0]

    def publish() -> None:
        while not ended.is_set():
            last[0] += 1
            one.publish(NODE, {"clock": b"%d" % last[0]})

    publishing = threading.Thread(target=publish)
    publishing.start()
    try:
        for _ in range(20):
            other, told = store()
            (value,) = other.follow("clock").values()
            assert eventually(lambda told=told: len(told.changes) >= 5, 5.0)
            heard = [int(each[2] or 0) for each in list(told.changes)]
            assert heard == list(range(int(value) + 1, int(value) + 1 + len(heard)))
            other.close()
    finally:
        ended.set()
        publishing.join()


def test_a_connection_that_ends_is_told_and_raises(server: Redis, store: Make) -> None:
    one, told = store()
    one.follow("clock")
    one.publish(NODE, {"clock": b"value"})
    with server.client() as client:
        client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        assert eventually(lambda: told.broken, 5.0)
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    for _ in range(2):  # and not again by itself: what happened meanwhile would be missed
        with pytest.raises(StoreAway, match=str(server.port)):
            one.keep()
    one.connect(told)
    one.keep()
    assert len(told.broken) == 1


def test_a_dead_network_under_the_subscription_is_noticed_within_a_lease(store: Make) -> None:
    one, _ = store(lease=6.0)
    one.follow("clock")
    assert one._listener is not None
    wire = one._listener._subscription._connection._sock
    assert wire.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    idle, between, probes = (wire.getsockopt(socket.IPPROTO_TCP, each) for each in options)
    assert idle + between * probes == 6


def test_what_is_closed_gives_threads_and_descriptors_back(server: Redis, store: Make) -> None:
    def listeners() -> list[str]:
        return [each.name for each in threading.enumerate() if each.name == "onehop-redis"]

    assert eventually(lambda: not listeners(), 5.0)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        one, _ = store()
        one.follow("clock")
        one.close()
    assert eventually(lambda: not listeners() and len(os.listdir("/proc/self/fd")) == before, 2.0), "long before a look"


# --- green threads ---


@pytest.mark.alone
def test_it_works_where_threads_are_green(server: Redis, opened: Callable[..., LeasedRegistry]) -> None:
    pytest.importorskip("eventlet")
    opened(server.url()).announce(record(1))
    program = f"""
        import warnings
        warnings.simplefilter("ignore")
        import eventlet
        eventlet.monkey_patch()
        from onehop.interfaces import Record
        from onehop.registry import open_registry
        from onehop.settings import Settings
        registry, ticks, views = open_registry({server.url()!r}, Settings(lease=1.0, cache_directory="none")), [], []

        def tick():
            while True:
                ticks.append(1)
                eventlet.sleep(0.01)

        eventlet.spawn(tick)
        registry.watch(views.append)
        assert registry.want("clock", 10.0)
        assert len(views[-1]) == 1
        registry.announce(Record(node="{record(2).node}", host="h", services={{"clock": ("a",)}}))
        with eventlet.Timeout(10):
            while len(views[-1]) != 2:
                eventlet.sleep(0.01)
        eventlet.sleep(1.5)
        assert len(ticks) > 80, len(ticks)
        registry.close()
        print("well")
    """
    words = [sys.executable, "-c", textwrap.dedent(program)]
    output = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert output.stdout == "well\n", output.stderr


def test_an_unreachable_server_is_named(
    opened: Callable[..., LeasedRegistry], caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    with caplog.at_level(logging.WARNING):
        assert not opened(f"redis://127.0.0.1:{port}/").want("clock", 0.5)
    assert eventually(lambda: f"the Redis server 127.0.0.1:{port} does not answer" in caplog.text)
