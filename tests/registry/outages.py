"""What every registry on a database has to come through, with the real server: one suite for all of them.

::

    class TestRedis(Outages):
        server_class = Redis
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast

import msgspec
import pytest
from tests.registry.servers import Proxy, Server
from tests.registry.views import Views, eventually

from onehop.interfaces import Record
from onehop.registry import open_registry
from onehop.registry.leased import LeasedRegistry
from onehop.registry.view import HOLD, SETTLE
from onehop.settings import Settings, revise
from onehop.testing.contracts import check_registry

LOGGER = "onehop.registry"


def record(number: int, **fields: object) -> Record:
    values = {"host": f"host-{number}", "services": {"clock": ("a",)}, "endpoints": ("tcp://192.0.2.1:9501",)} | fields
    return Record(node=f"{number:032x}", **values)  # type: ignore[arg-type]


class Cluster:
    """Registries of several nodes in one realm of one server; closed at the end."""

    def __init__(self, settings: Settings, url: Callable[[], str], closing: ExitStack) -> None:
        self.settings, self.url, self._closing = settings, url, closing

    def open(self, *, url: str = "", **settings: object) -> LeasedRegistry:
        changed = revise(self.settings, **settings)
        registry = cast(LeasedRegistry, open_registry(url or self.url(), changed))
        self._closing.callback(registry.close)
        return registry

    def announced(self, *records: Record) -> list[LeasedRegistry]:
        registries = [self.open() for _ in records]
        for registry, each in zip(registries, records, strict=True):
            registry.announce(each)
        return registries

    def watched(self, registry: LeasedRegistry | None = None, service: str = "clock", within: float = 10.0) -> Views:
        views, registry = Views(), registry or self.open()
        registry.watch(views)
        assert registry.want(service, within), "a registry that is there answers"
        return views

    @contextmanager
    def process(self, announced: Record) -> Iterator[int]:
        """A process that has announced this, by pid; killed at the exit."""
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                registry = self.open()
                registry.announce(announced)
                os.write(writing, b"+")
                signal.pause()
            finally:
                os._exit(1)
        os.close(writing)
        try:
            answer = os.read(reading, 1)
            assert answer == b"+", "the process cannot announce its record"
            yield pid
        finally:
            os.close(reading)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


class Outages:
    """The suite. A subclass names the server's class.

    Attributes:
        server_class: starts one server.
        lease: seconds; short, so that the tests are.
        within: seconds within which others see, beyond a lease's own time, that it has ended.
        joins: how many nodes join at once in the contract's check.
    """

    server_class: type[Server]
    lease = 1.0
    within = 1.0
    joins = 60

    @pytest.fixture(scope="class")
    @classmethod
    def one_server(cls) -> Iterator[Server]:
        with cls.server_class() as server:
            yield server

    @pytest.fixture
    def server(self, one_server: Server) -> Iterator[Server]:
        yield one_server
        if one_server.process is None:
            one_server.start()
        one_server.resume()
        assert eventually(one_server.answers, 30.0)

    @pytest.fixture
    def cluster(self, server: Server, tmp_path: Path) -> Iterator[Cluster]:
        """A realm of its own for each test."""
        settings = Settings(
            lease=self.lease, realm=f"realm{next(_numbers)}", cache_directory="none", run_directory=str(tmp_path)
        )
        with ExitStack() as closing:
            yield Cluster(settings, server.url, closing)

    @property
    def expired(self) -> float:
        """Seconds until a dead node's lease has ended and that is known."""
        return self.lease * (1 + 1 / 3 + SETTLE) + self.within

    @property
    def hold(self) -> float:
        return HOLD * self.lease

    # --- while the server is there ---

    def test_it_keeps_the_contract(self, cluster: Cluster) -> None:
        gone = self.expired + self.hold + self.within
        check_registry(cluster.open, within=self.within, crash_within=gone, joins=self.joins)

    def test_a_single_dead_node_is_gone_when_its_lease_ends(self, cluster: Cluster) -> None:
        views = cluster.watched()
        cluster.announced(record(1), record(2), record(3))
        with cluster.process(record(4)):
            assert views.become(1, 2, 3, 4)
            time.sleep(self.hold)  # the connection has to be an old one: that time is the subject
            assert views.nodes == [1, 2, 3, 4]
        assert views.become(1, 2, 3, within=self.expired)

    def test_half_of_all_who_vanish_together_are_held_for_a_while(self, cluster: Cluster) -> None:
        views = cluster.watched()
        cluster.announced(record(1), record(2))
        with cluster.process(record(3)), cluster.process(record(4)):
            assert views.become(1, 2, 3, 4)
            time.sleep(self.hold)  # as above
        killed = time.monotonic()
        assert views.become(1, 2, within=self.expired + self.hold + self.within)
        assert time.monotonic() - killed > self.hold / 2  # where the machine is busy, a lease may have ended before

    def test_one_of_two_holders_of_a_server_name_dies_and_the_other_stays(self, cluster: Cluster) -> None:
        views = cluster.watched()
        cluster.announced(record(1))
        with cluster.process(record(2)):
            assert views.become(1, 2)
        mark = len(views.all)
        assert views.become(1, within=self.expired + self.hold)
        assert all(record(1) in view for view in views.all[mark - 1 :])

    def test_what_an_earlier_session_left_does_not_take_a_newer_record_away(self, cluster: Cluster) -> None:
        views = cluster.watched()
        with cluster.process(record(1, version="old")) as pid:
            assert views.become(1)
            os.kill(pid, signal.SIGSTOP)  # it renews nothing any more, and its lease ends on its own
            cluster.announced(record(1, version="new"))
            assert eventually(lambda: views.last == (record(1, version="new"),))
            mark = len(views.all)
            time.sleep(self.expired)  # the end of the old lease is the subject
        assert views.last == (record(1, version="new"),)
        assert len(views.all) == mark
        assert cluster.watched().last == (record(1, version="new"),)

    def test_a_late_withdrawal_does_not_take_a_newer_record_away(self, cluster: Cluster) -> None:
        views = cluster.watched()
        (early,) = cluster.announced(record(1, version="old"))
        cluster.announced(record(1, version="new"))
        early.close()
        assert eventually(lambda: views.last == (record(1, version="new"),))
        time.sleep(self.lease)  # nothing else comes
        assert views.last == (record(1, version="new"),)
        assert cluster.watched().last == (record(1, version="new"),)

    def test_two_realms_never_see_each_other(self, cluster: Cluster) -> None:
        names = ("", "a", "a/services", "a:record", "a*", "ä", "../a", ".", "default/x")
        registries = [cluster.open(realm=name) for name in names]
        for number, registry in enumerate(registries):
            registry.announce(record(number))
        watching = [cluster.watched(cluster.open(realm=name), "") for name in names]
        for number, views in enumerate(watching):
            assert views.become(number)
        registries[0].announce(record(0, version="new"))
        assert eventually(lambda: watching[0].last == (record(0, version="new"),))
        assert all(view == () or [each.node for each in view] == [record(number).node]
                   for number, views in enumerate(watching) for view in views.all)  # fmt: skip

    def test_any_name_of_a_service_can_be_announced_and_wanted(self, cluster: Cluster) -> None:
        names = ("exchange/topic", "a:b", "a*", "ä ö", "..", "%41", "A", "x" * 200)
        cluster.announced(record(1, services=dict.fromkeys(names, ("host-1",))))
        registry = cluster.open()
        for name in names:
            views = cluster.watched(registry, name)
            assert name in views.last[0].services
        assert set(views.last[0].services) == set(names)
        assert set(cluster.watched(service="").last[0].services) == set(names)

    def test_garbage_is_skipped_with_one_warning_that_names_the_key(
        self, server: Server, cluster: Cluster, caplog: pytest.LogCaptureFixture
    ) -> None:
        views = cluster.watched(registry := cluster.open())
        cluster.announced(record(1))
        garbage = {
            f"{11:032x}": b"\xff no json",
            f"{12:032x}": b'{"node": 7}',
            f"{13:032x}": msgspec.json.encode(record(99)),
            "not-a-node": msgspec.json.encode(msgspec.structs.replace(record(1), node="not-a-node")),
        }
        with caplog.at_level(logging.WARNING, LOGGER):
            for node, value in garbage.items():
                server.garble(cluster.settings.realm, "clock", node, value)
            assert eventually(lambda: set(registry.skipped) == {f"clock/{node}" for node in garbage}, self.expired)
            cluster.announced(record(2))
            assert views.become(1, 2)
        for node in garbage:
            assert [f"clock/{node}" in each.getMessage() for each in caplog.records].count(True) == 1
        assert cluster.watched().become(1, 2)
        mended = msgspec.json.encode(record(11))
        server.garble(cluster.settings.realm, "clock", record(11).node, mended)
        assert views.become(1, 2, 11, within=self.expired)
        assert f"clock/{11:032x}" not in registry.skipped

    def test_slow_answers_are_answers(self, server: Server, cluster: Cluster) -> None:
        with Proxy(server.port, delay=0.05 * self.lease) as proxy:
            registry = cluster.open(url=server.url(port=proxy.port))
            registry.announce(record(1))
            slow = cluster.watched(cluster.open(url=server.url(port=proxy.port)))
            assert slow.become(1, within=self.within + self.lease)
            views = cluster.watched()
            mark = len(views.all)
            time.sleep(2 * self.lease)  # the lease has to be renewed through it
            assert views.nodes == slow.nodes == [1]
            assert len(views.all) == mark
            cluster.announced(record(2))
            assert slow.become(1, 2, within=self.within + self.lease)

    # --- while it is away ---

    def test_a_restart_changes_nothing(
        self, server: Server, cluster: Cluster, caplog: pytest.LogCaptureFixture
    ) -> None:
        views = cluster.watched()
        cluster.announced(*(record(number) for number in range(1, 6)))
        assert views.become(1, 2, 3, 4, 5)
        mark = len(views.all)
        with caplog.at_level(logging.INFO, LOGGER):
            server.restart()
            cluster.announced(record(6))
            assert views.become(1, 2, 3, 4, 5, 6, within=20.0)
            fresh = cluster.watched()
            assert fresh.become(1, 2, 3, 4, 5, 6, within=10.0)
            time.sleep(self.hold)  # who was held would go now
        assert views.nodes == [1, 2, 3, 4, 5, 6]
        assert views.fewest_since(mark) == 5
        _were_logged_once(caplog, registries=6)

    def test_after_the_loss_of_all_data_everybody_is_listed_again(self, server: Server, cluster: Cluster) -> None:
        views = cluster.watched()
        numbers = range(1, 21)
        cluster.announced(*map(record, numbers))
        assert views.become(*numbers)
        mark = len(views.all)
        server.wipe()
        fresh = cluster.watched()
        assert fresh.become(*numbers, within=20.0)
        time.sleep(self.hold + self.within)  # who was held would go now
        assert views.nodes == list(numbers)
        assert views.fewest_since(mark) == len(numbers)

    def test_nobody_is_dropped_over_a_pause_longer_than_the_lease(self, server: Server, cluster: Cluster) -> None:
        views = cluster.watched()
        cluster.announced(*(record(number) for number in range(1, 6)))
        assert views.become(1, 2, 3, 4, 5)
        mark = len(views.all)
        server.pause()
        time.sleep(3 * self.lease)  # the pause is the subject
        server.resume()
        late = cluster.open()
        late.announce(record(6))
        assert views.become(1, 2, 3, 4, 5, 6, within=20.0)
        assert cluster.watched().become(1, 2, 3, 4, 5, 6, within=10.0)
        time.sleep(self.hold)  # who was held would go now
        assert views.nodes == [1, 2, 3, 4, 5, 6]
        assert views.fewest_since(mark) == 5

    def test_who_died_while_it_was_away_goes_in_the_end(self, server: Server, cluster: Cluster) -> None:
        views = cluster.watched()
        cluster.announced(record(1), record(2))
        with cluster.process(record(3)):
            assert views.become(1, 2, 3)
            server.stop()
        time.sleep(self.lease)  # its lease would have ended
        assert views.nodes == [1, 2, 3]
        server.start()
        assert views.become(1, 2, within=20.0)

    def test_a_start_without_it_knows_what_was_known_before(
        self, server: Server, cluster: Cluster, tmp_path: Path
    ) -> None:
        cache = {"cache_directory": str(tmp_path / "cache")}
        cluster.announced(record(1), record(2))
        first = cluster.open(**cache)
        assert cluster.watched(first).become(1, 2)
        assert eventually(lambda: list((tmp_path / "cache").glob("clock-*.json")), 10.0)
        first.close()
        server.stop()
        second, views = cluster.open(**cache), Views()
        began = time.monotonic()
        second.watch(views)
        assert views.last == ()
        assert second.want("clock", 5.0)
        assert views.nodes == [1, 2]
        assert not second.want("nobody offers this", 0.1)
        assert time.monotonic() - began < 3.0
        server.start()
        assert second.want("nobody offers this", 20.0)
        time.sleep(self.hold)  # who was held would go now
        assert views.fewest_since(2) == 2

    def test_announce_and_withdraw_do_not_wait_long_for_it(
        self, server: Server, cluster: Cluster, caplog: pytest.LogCaptureFixture
    ) -> None:
        views, registry = cluster.watched(), cluster.open()
        server.stop()
        began = time.monotonic()
        with caplog.at_level(logging.WARNING, LOGGER):
            registry.announce(record(1))
            registry.announce(record(1, version="new"))
        registry.withdraw()
        registry.announce(record(1, version="newest"))
        assert time.monotonic() - began < 5.0
        warnings = [each.getMessage() for each in caplog.records]
        assert sum(f"node {record(1).node} is not announced yet" in each for each in warnings) == 1
        server.start()
        assert eventually(lambda: views.last == (record(1, version="newest"),), 20.0)
        assert len(views.all) == 2, "nobody, and then the record that was announced last"

    @pytest.mark.parametrize("verb", ["stop", "pause"])
    def test_close_does_not_wait_long_for_it(self, server: Server, cluster: Cluster, verb: str) -> None:
        registry = cluster.open()
        registry.announce(record(1))
        cluster.watched(registry)
        getattr(server, verb)()
        began = time.monotonic()
        registry.close()
        assert time.monotonic() - began < 5.0


_numbers = itertools.count(1)


def _were_logged_once(caplog: pytest.LogCaptureFixture, registries: int) -> None:
    """That the registry went away and that it is back, and not each attempt in between."""
    texts = [each.getMessage() for each in caplog.records]
    for words in (" is away, ", " is back "):
        assert 0 < sum(words in each for each in texts) <= 2 * registries, texts
