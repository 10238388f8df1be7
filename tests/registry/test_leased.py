"""What registries on databases with leases have in common, over a database in the memory of the test."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from math import inf
from pathlib import Path
from statistics import median

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.registry.memory_store import Database
from tests.registry.outages import record
from tests.registry.views import Views, eventually

from onehop.errors import RegistryError
from onehop.interfaces import Deliver, Record
from onehop.registry.leased import (
    _CACHE_PATIENCE,
    CLOSE_PATIENCE,
    FIRST_DELAY,
    PATIENCE,
    RETURN_DELAY,
    LeasedRegistry,
    quoted,
    unquoted,
)
from onehop.registry.urls import Place
from onehop.settings import Settings
from onehop.testing.contracts import check_registry

LEASE = 0.6
PLACE = Place((("192.0.2.1", 1), ("192.0.2.2", 2)), user="u", password="secret", shown="memory://u:***@192.0.2.1/")

Open = Callable[..., LeasedRegistry]


def value(number: int) -> bytes:
    return msgspec.json.encode(record(number))


def key(number: int) -> tuple[str, str]:
    return "clock", record(number).node


@pytest.fixture
def database() -> Database:
    return Database()


@pytest.fixture
def make(database: Database) -> Iterator[Open]:
    with ExitStack() as closing:

        def make(**settings: object) -> LeasedRegistry:
            values = {"lease": LEASE, "cache_directory": "none"} | settings
            registry = LeasedRegistry(Settings(**values), PLACE, database.store)  # type: ignore[arg-type]
            closing.callback(registry.close)
            closing.callback(setattr, database, "hung", False)
            return registry

        yield make


def watched(registry: LeasedRegistry, service: str = "clock") -> Views:
    views = Views()
    registry.watch(views)
    assert registry.want(service, 5.0)
    return views


def threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "onehop-registry"]


# --- one thread, made at first use ---


def test_construction_and_watching_without_a_wish_start_nothing(make: Open, database: Database) -> None:
    before, views = threads(), Views()
    registry = make()
    registry.watch(views)
    registry.refresh()
    registry.withdraw()
    assert not registry.is_fresh()
    assert registry.skipped == {}
    assert views.all == [()]
    assert threads() == before
    assert database.stores == []
    assert registry.addresses == PLACE.servers


def test_one_thread_makes_and_uses_the_store(make: Open, database: Database) -> None:
    registry = make()
    watched(registry)
    registry.announce(record(1))
    registry.want("compute", 5.0)
    assert eventually(lambda: database.keeps > 1, 5.0)
    registry.withdraw()
    (store,) = database.stores
    assert store.threads == {"onehop-registry"}


def test_a_lease_is_kept_three_times_in_its_length(make: Open, database: Database) -> None:
    began = time.monotonic()
    make().announce(record(1))
    assert eventually(lambda: database.keeps >= 6, 10.0)
    assert time.monotonic() - began > 6 * LEASE / 3 * 0.7


def test_each_service_has_a_value_of_its_own_and_nothing_of_the_others(make: Open, database: Database) -> None:
    services, idempotent = {"clock": ("a",), "compute": ("b", "b")}, {"clock": ("read",), "compute": ("ping",)}
    make().announce(record(1, services=services, idempotent=idempotent))
    for service in services:
        decoded = msgspec.json.decode(database.values[service, record(1).node], type=Record)
        assert decoded.services == {service: services[service]}
        assert decoded.idempotent == {service: idempotent[service]}


def test_only_what_is_wanted_is_followed_and_each_service_once(make: Open, database: Database) -> None:
    registry = make()
    watched(registry)
    for _ in range(3):
        assert registry.want("clock", 5.0)
    assert database.stores[0].following == {"clock"}
    assert database.follows == 1
    assert registry.want("", 5.0)
    database.cut()
    assert eventually(lambda: database.stores[0].following == {""}, 5.0), "all includes the others"


# --- what is announced ---


def test_a_lost_lease_is_replaced(make: Open, database: Database) -> None:
    views = watched(make())
    make().announce(record(1))
    assert views.become(1)
    database.wipe()
    assert eventually(lambda: key(1) in database.values, 5.0)
    assert views.nodes == [1]
    database.go()
    database.wipe()
    database.away = False
    assert eventually(lambda: key(1) in database.values, 10.0), (
        "over a new connection, whose lease is still to be taken"
    )
    assert views.nodes == [1]


def test_a_lease_that_is_lost_as_soon_as_it_is_taken_is_no_endless_loop(make: Open, database: Database) -> None:
    database.loses_leases = True
    registry = make()
    registry.announce(record(1))
    assert database.publishes < 40
    database.loses_leases = False
    assert eventually(lambda: key(1) in database.values, 10.0)


def test_what_is_announced_while_the_database_is_away_comes_when_it_is_back(
    make: Open, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    database.away = True
    registry = make()
    began = time.monotonic()
    registry.announce(record(1))
    assert PATIENCE * 0.9 < time.monotonic() - began < PATIENCE + 2.0
    began = time.monotonic()
    registry.announce(record(1, version="new"))
    registry.withdraw()
    registry.announce(record(2))
    assert time.monotonic() - began < PATIENCE, "an absence that is known is not waited for again"
    why = f"the registry {PLACE.shown} is away (the database in memory is away)"
    warnings = [each.getMessage() for each in caplog.records if "not announced yet" in each.getMessage()]
    assert warnings == [f"node {record(1).node} is not announced yet, {why}"]
    database.away = False
    assert eventually(lambda: list(database.values) == [key(2)], 10.0)


def test_what_no_waiting_mends_is_raised_and_what_stood_before_stays(make: Open, database: Database) -> None:
    registry = make()
    registry.announce(record(1))
    database.refusal = "the password is wrong: change it"
    with pytest.raises(RegistryError, match="the password is wrong"):
        registry.announce(record(1, version="new"))
    time.sleep(PATIENCE)  # it is long known by now
    with pytest.raises(RegistryError, match="the password is wrong"):
        registry.announce(record(1, version="newer"))
    assert eventually(lambda: database.values[key(1)] == value(1), 5.0)
    database.refusal = ""
    registry.announce(record(1, version="newest"))
    assert eventually(lambda: b"newest" in database.values[key(1)], 5.0)


def test_what_cannot_be_a_record_is_refused(make: Open) -> None:
    with pytest.raises(RegistryError, match="32 lower-case hexadecimal digits"):
        make().announce(msgspec.structs.replace(record(1), node="x"))
    with pytest.raises(RegistryError, match="1048576"):
        make().announce(record(1, host="x" * 1024 * 1024))


# --- what is delivered ---


def test_want_does_not_wait_in_the_registrys_own_thread(make: Open, database: Database) -> None:
    database.put(("compute", record(2).node), msgspec.json.encode(record(2, services={"compute": ("b",)})))
    registry, answers, views = make(), [], Views()

    def deliver(records: Sequence[Record]) -> None:
        views(records)
        began = time.monotonic()
        answer = registry.want("compute", 30.0)
        answers.append((answer, time.monotonic() - began < 5.0, threading.current_thread().name))

    registry.watch(deliver)
    make().announce(record(1))
    assert registry.want("clock", 5.0)
    assert eventually(lambda: views.nodes == [1, 2], 5.0)
    assert eventually(lambda: registry.want("compute", 5.0), 5.0)
    assert {quick for _, quick, _ in answers} == {True}
    assert "onehop-registry" in {name for _, _, name in answers}


def test_want_ends_in_time_when_deliver_waits_for_whoever_wants(make: Open, database: Database) -> None:
    registry, lock, delivered = make(), threading.Lock(), []

    def deliver(records: Sequence[Record]) -> None:
        with lock:
            delivered.append(records)

    registry.watch(deliver)
    database.put(key(1), value(1))
    with lock:
        began = time.monotonic()
        assert not registry.want("clock", 0.5)
        assert time.monotonic() - began < 2.0
    assert registry.want("clock", 5.0)
    assert len(delivered[-1]) == 1


def test_want_says_whether_it_was_delivered(make: Open, database: Database) -> None:
    registry = make()
    watched(registry)
    database.go()
    assert not registry.want("compute", 0.2)
    assert registry.want("clock", 0.0), "as far as it is known from before"
    database.away = False
    assert registry.want("compute", 10.0)


def test_many_changes_are_delivered_together(make: Open, database: Database) -> None:
    registry, views = make(), Views()

    def deliver(records: Sequence[Record]) -> None:
        time.sleep(0.005)  # a receiver that has something to do
        views(records)

    registry.watch(deliver)
    assert registry.want("clock", 5.0)
    began = time.monotonic()
    for number in range(400):
        database.put(key(number), value(number))
        time.sleep(0.002)  # they come one by one
    took = time.monotonic() - began
    assert eventually(lambda: len(views.last) == 400, 20.0)
    assert len(views.all) < 10 + took / 0.005 / 3, "no more than a fifth of the time goes into deliveries"


def test_a_change_after_a_quiet_time_is_delivered_at_once(make: Open, database: Database) -> None:
    views, took = watched(make()), []
    for number in range(5):
        time.sleep(0.05)  # the quiet time is the subject
        began = time.monotonic()
        database.put(key(number), value(number))
        assert eventually(lambda number=number: number in views.nodes, 5.0)
        took.append(time.monotonic() - began)
    assert median(took) < 0.5


def test_a_deliver_that_raises_is_told_of_the_next_change(
    make: Open, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    registry, views = make(), Views()

    def deliver(records: Sequence[Record]) -> None:
        views(records)
        raise ValueError("a defect of the receiver")

    registry.watch(deliver)
    assert registry.want("clock", 5.0)
    database.put(key(1), value(1))
    assert eventually(lambda: views.nodes == [1], 5.0)
    database.put(key(2), value(2))
    assert eventually(lambda: views.nodes == [1, 2], 5.0)
    assert "a defect of the receiver" in caplog.text


def test_nothing_is_delivered_twice_and_never_two_at_once(make: Open, database: Database) -> None:
    registry, views, inside = make(), Views(), threading.Lock()
    overlapped = []

    def deliver(records: Sequence[Record]) -> None:
        overlapped.append(not inside.acquire(blocking=False))
        views(records)
        inside.release()

    registry.watch(deliver)

    def put(first: int) -> None:
        for number in range(first, first + 50):
            database.put(key(number), value(number))
            registry.want(f"service {number}", 0.0)

    putting = [threading.Thread(target=put, args=(first,)) for first in (0, 100, 200)]
    assert registry.want("clock", 5.0)
    for each in putting:
        each.start()
    for each in putting:
        each.join()
    assert eventually(lambda: len(views.last) == 150, 10.0)
    assert not any(overlapped)
    assert all(before != after for before, after in pairwise(views.all))


def test_late_words_of_an_earlier_connection_are_ignored(make: Open, database: Database) -> None:
    views = watched(make())
    early = database.stores[0].tell
    assert early is not None
    database.put(key(1), value(1))
    assert eventually(lambda: views.nodes == [1], 5.0)
    database.cut()
    assert eventually(lambda: database.stores[0].tell is not None and database.stores[0].following, 5.0)
    connects = database.connects
    early.changed(*key(1), None, withdrawn=True)
    early.changed(*key(2), value(2))
    early.broke("long ago")
    database.put(key(3), value(3))
    assert eventually(lambda: 3 in views.nodes, 5.0)
    assert views.nodes == [1, 3]
    assert database.connects == connects


def test_who_died_in_an_absence_is_held_and_then_gone(make: Open, database: Database) -> None:
    views = watched(make())
    for number in range(5):
        database.put(key(number), value(number))
    assert eventually(lambda: len(views.nodes) == 5, 5.0)
    database.go()
    database.expire(record(0).node)
    back = time.monotonic()
    database.away = False
    assert eventually(lambda: views.nodes == [1, 2, 3, 4], 20.0)
    assert time.monotonic() - back > 2.5 * LEASE


# --- while the database is away ---


def test_absence_and_return_are_logged_once_each(
    make: Open, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    views = watched(make())
    database.go()
    assert eventually(lambda: database.connects >= 5, 10.0)
    database.away = False
    assert eventually(lambda: " is back " in caplog.text, 10.0)
    texts = [each.getMessage() for each in caplog.records]
    assert len(texts) == 2, texts
    assert "the database in memory went away" in texts[0]
    assert PLACE.shown in texts[0]
    assert views.all == [()]


@pytest.mark.alone
def test_many_who_lose_their_connections_together_do_not_come_back_together(make: Open, database: Database) -> None:
    crowd = 60
    for _ in range(crowd):
        watched(make(lease=6.0))
    database.connected_at.clear()
    began = time.monotonic()
    database.cut()
    assert eventually(lambda: len(database.connected_at) == crowd, 10.0)
    at = sorted(each - began for each in database.connected_at)
    assert at[-1] - at[0] > RETURN_DELAY / 2
    assert at[-1] < RETURN_DELAY + 1.0
    fullest = max(sum(begin <= each < begin + FIRST_DELAY for each in at) for begin in at)
    assert fullest < crowd / 2, at


def test_a_database_that_was_never_there_is_asked_again_at_once(make: Open, database: Database) -> None:
    database.away = True
    waited = []
    for _ in range(5):
        database.connected_at.clear()
        registry = make(lease=6.0)
        registry.want("clock", 0.0)
        assert eventually(lambda: len(database.connected_at) > 2, 10.0)
        registry.close()
        first, second, *_ = database.connected_at
        waited.append(second - first)
    assert median(waited) < FIRST_DELAY + 0.4


def test_an_absent_database_is_asked_less_and_less_and_costs_nothing(make: Open, database: Database) -> None:
    database.away = True
    registry = make()
    registry.watch(Views())
    registry.want("clock", 0.0)
    used, began = time.process_time(), time.monotonic()
    time.sleep(3.0)  # an absence is the subject
    share = (time.process_time() - used) / (time.monotonic() - began)
    assert database.connects < 40
    assert share < 0.02


def test_watch_and_want_deliver_what_the_disk_knows(make: Open, database: Database, tmp_path: Path) -> None:
    database.put(key(1), value(1))
    database.put(("compute", record(2).node), msgspec.json.encode(record(2, services={"compute": ("b",)})))
    first = make(cache_directory=str(tmp_path))
    watched(first)
    watched(first, "compute")
    assert eventually(lambda: len(list(tmp_path.glob("*.json"))) == 2, 10.0)
    first.close()
    for absence in ("away", "hung"):
        setattr(database, absence, True)
        second, views = make(cache_directory=str(tmp_path)), Views()
        second.watch(views)
        began = time.monotonic()
        assert second.want("clock", 5.0)
        assert time.monotonic() - began < 2.0
        assert views.nodes == [1], "and nothing that is not wanted"
        setattr(database, absence, False)
        assert second.want("exchange", 10.0)
        second.close()


def test_who_does_not_wait_hears_from_the_disk_when_the_database_turns_out_to_be_away(
    make: Open, database: Database, tmp_path: Path
) -> None:
    database.put(key(1), value(1))
    first = make(cache_directory=str(tmp_path))
    watched(first)
    assert eventually(lambda: list(tmp_path.glob("*.json")), 10.0)
    first.close()
    database.hung = True
    second, views = make(cache_directory=str(tmp_path)), Views()
    second.watch(views)
    assert not second.want("clock", 0.0)
    assert views.last == ()
    database.away, database.hung = True, False
    assert eventually(lambda: views.nodes == [1], 5.0)


def test_the_disk_is_not_asked_where_the_database_answers(make: Open, database: Database, tmp_path: Path) -> None:
    database.put(key(1), value(1))
    database.put(key(2), value(2))
    first = make(cache_directory=str(tmp_path))
    watched(first)
    assert eventually(lambda: list(tmp_path.glob("*.json")), 10.0)
    first.close()
    database.put(key(1), None)
    took = inf
    while took > _CACHE_PATIENCE:  # from then on it is asked, rightly
        began = time.monotonic()
        nodes = watched(make(cache_directory=str(tmp_path))).nodes
        took = time.monotonic() - began
    assert nodes == [2]


def test_the_disk_is_written_seldom(make: Open, database: Database, tmp_path: Path) -> None:
    watched(make(cache_directory=str(tmp_path)))
    database.put(key(0), value(0))
    assert eventually(lambda: list(tmp_path.glob("*.json")), 10.0)
    (path,) = tmp_path.glob("*.json")
    inode, number = path.stat().st_ino, 1
    until = time.monotonic() + 2.0
    while time.monotonic() < until:
        database.put(key(number), value(number))
        number += 1
        time.sleep(0.05)
    assert path.stat().st_ino == inode
    assert eventually(lambda: len(msgspec.json.decode(path.read_bytes())) == number, 10.0)


# --- the end, and forks ---


@pytest.mark.parametrize("state", ["there", "away", "hung"])
def test_close_is_quick_and_nothing_is_delivered_after_it(make: Open, database: Database, state: str) -> None:
    registry = make()
    registry.announce(record(1))
    views = watched(registry)
    if state != "there":
        setattr(database, state, True)
    if state == "away":
        database.cut()
    began = time.monotonic()
    registry.close()
    registry.close()
    assert time.monotonic() - began < CLOSE_PATIENCE + 3.0
    mark = len(views.all)
    database.put(key(2), value(2))
    database.away = database.hung = False
    assert eventually(lambda: database.ended, 5.0)
    assert len(views.all) == mark
    assert (key(1) in database.values) == (state == "away"), "what cannot be withdrawn ends with the lease"
    with pytest.raises(RegistryError, match="closed"):
        registry.announce(record(1))
    with pytest.raises(RegistryError, match="closed"):
        registry.watch(views)
    assert not registry.want("clock", 1.0)


def test_close_inside_deliver_ends_the_registry(make: Open, database: Database) -> None:
    registry, seen = make(), []

    def deliver(records: Sequence[Record]) -> None:
        seen.append(records)
        if records:
            registry.close()

    registry.watch(deliver)
    assert registry.want("clock", 5.0)
    database.put(key(1), value(1))
    assert eventually(lambda: database.ended, 5.0)
    assert len(seen) == 2


def test_a_forked_child_forgets_everything_and_the_parent_goes_on(make: Open, database: Database) -> None:
    registry = make()
    registry.announce(record(1))
    views = watched(registry)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            registry.announce(record(2))
        except RegistryError as error:
            os.write(writing, str(error).encode())
        registry.close()
        registry.forget()
        silent = not database.ended and database.stores[0].tell is None and not threads()
        os._exit(0 if silent else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert b"parent of this process" in os.read(reading, 1000)
    os.close(reading)
    os.close(writing)
    keeps = database.keeps
    database.put(key(3), value(3))
    assert eventually(lambda: views.nodes == [1, 3] and database.keeps > keeps, 5.0)


def test_what_is_forgotten_without_a_fork_ends_without_a_message(make: Open, database: Database) -> None:
    registry = make()
    registry.announce(record(1))
    registry.forget()
    assert eventually(lambda: database.stores[0].tell is None, 5.0)
    assert database.ended == []
    assert key(1) in database.values


# --- the contract's check ---


class Deaf(LeasedRegistry):
    """Follows what it is asked for first, and says of everything else that it was delivered."""

    def want(self, service: str, timeout: float) -> bool:
        return service not in ("", "clock") or super().want(service, timeout)


class Talkative(LeasedRegistry):
    """Follows everything, whatever is wanted; and cuts what it delivers down to a part."""

    def want(self, service: str, timeout: float) -> bool:
        return super().want("", timeout)

    def watch(self, deliver: Deliver) -> None:
        def cut(each: Record) -> Record:
            return msgspec.structs.replace(each, services=dict(list(each.services.items())[:1]))

        super().watch(lambda records: deliver([cut(each) for each in records]))


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [(Deaf, "before want returns"), (Talkative, "reaches who watches already, with all its fields")],
)
def test_the_contracts_check_finds_who_does_not_deliver_what_is_wanted(
    database: Database, kind: type[LeasedRegistry], sentence: str
) -> None:
    settings = Settings(lease=LEASE, cache_directory="none")
    with pytest.raises(AssertionError, match=sentence):
        check_registry(lambda: kind(settings, PLACE, database.store), within=5.0, joins=4)


# --- who cannot write ---


def test_others_are_read_where_nothing_can_be_written(make: Open, database: Database) -> None:
    registry = make()
    database.put(key(2), value(2))
    database.loses_leases = True
    registry.announce(record(1))
    views = Views()
    registry.watch(views)
    assert registry.want("clock", 5.0)
    assert views.nodes == [2]


def test_who_can_write_nothing_sees_the_dead_go_all_the_same(make: Open, database: Database) -> None:
    for number in range(1, 6):
        database.put(key(number), value(number))
    views = watched(registry := make(lease=1.0))
    assert views.nodes == [1, 2, 3, 4, 5]
    database.full = True
    registry.announce(record(6))
    attempts = database.connects
    database.expire(record(1).node)
    assert eventually(lambda: views.nodes == [2, 3, 4, 5], 20.0)
    assert database.connects > attempts, "each attempt began a new connection"


# --- names in keys ---


@given(st.text(min_size=1), st.text(min_size=1))
def test_quoted_names_are_apart_and_come_back(one: str, other: str) -> None:
    part = quoted(one)
    assert unquoted(part) == one
    assert part.isascii()
    assert not set("/:*?[ ") & set(part)
    assert not part.startswith(".")
    assert (quoted(other) == part) == (one == other)


@given(st.text(alphabet="%0128ACDEFf", max_size=9))
def test_what_is_no_quoted_name_is_taken_as_it_is_and_for_no_others(part: str) -> None:
    assert unquoted("%FF") == "%FF"
    assert unquoted(part) == part or unquoted(quoted(unquoted(part))) == unquoted(part)
