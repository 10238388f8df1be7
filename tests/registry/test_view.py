"""What is believed of what a database says, with times as arguments; and the cache on the disk."""

from __future__ import annotations

import gc
import logging
import os
import resource
import signal
import tempfile
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.registry.views import in_child

from onehop.interfaces import Record
from onehop.registry.view import HOLD, RECORD_LIMIT, SETTLE, Cache, View, cache_directory
from onehop.settings import Settings

LEASE = 10.0
HELD = HOLD * LEASE
SETTLED = SETTLE * LEASE
LONG_AGO, NOW = 0.0, 1000.0
ROOT = os.geteuid() == 0


def record(number: int, service: str = "clock", **fields: object) -> Record:
    values = {"host": f"host-{number}", "services": {service: ("a",)}} | fields
    return Record(node=f"{number:032x}", **values)  # type: ignore[arg-type]


def value(number: int, service: str = "clock", **fields: object) -> bytes:
    return msgspec.json.encode(record(number, service, **fields))


def key(number: int, service: str = "clock") -> tuple[str, str]:
    return service, record(number).node


def snapshot(*numbers: int, service: str = "clock") -> dict[tuple[str, str], bytes]:
    return {key(number, service): value(number, service) for number in numbers}


def nodes(view: View) -> list[int]:
    return [int(each.node, 16) for each in view.records()]


def known(*numbers: int, connected: float = LONG_AGO) -> View:
    """A view that has known these for long, over one connection."""
    view = View(LEASE)
    view.connected(connected)
    view.answered("clock", snapshot(*numbers), connected)
    return view


def lose(view: View, numbers: Iterable[int], now: float) -> None:
    for number in numbers:
        view.gone(*key(number), now)
    view.settle(now)


# --- who goes, and when ---


@pytest.mark.parametrize("connected", [LONG_AGO, NOW])
def test_who_withdrew_is_gone_at_once(connected: float) -> None:
    view = known(1, connected=connected)
    view.gone(*key(1), NOW, withdrawn=True)
    assert nodes(view) == []


def test_one_who_vanished_from_an_old_connection_is_gone_as_soon_as_it_is_sure_that_he_is_the_only_one() -> None:
    view = known(1, 2, 3)
    lose(view, [2], NOW)
    assert nodes(view) == [1, 2, 3]
    assert view.due() == NOW + SETTLED
    view.settle(NOW + SETTLED)
    assert nodes(view) == [1, 3]
    assert view.due() is None


@pytest.mark.parametrize(("lost", "of"), [(1, 1), (1, 2), (2, 4), (3, 5), (5, 5)])
def test_half_of_all_who_vanish_together_are_held(lost: int, of: int) -> None:
    view = known(*range(of))
    lose(view, range(lost), NOW)
    view.settle(NOW + SETTLED)
    view.settle(NOW + HELD - 0.001)
    assert len(nodes(view)) == of
    assert view.due() == NOW + HELD
    view.settle(NOW + HELD)
    assert nodes(view) == list(range(lost, of))


@pytest.mark.parametrize(("lost", "of"), [(1, 3), (2, 5), (9, 20)])
def test_fewer_than_half_who_vanish_together_are_believed(lost: int, of: int) -> None:
    view = known(*range(of))
    lose(view, range(lost), NOW)
    view.settle(NOW + SETTLED)
    assert nodes(view) == list(range(lost, of))


def test_who_vanished_one_by_one_within_a_lease_counts_together() -> None:
    view = known(*range(6))
    for number in range(2):
        lose(view, [number], NOW + number)
        view.settle(NOW + number + SETTLED)
    assert nodes(view) == [2, 3, 4, 5]
    lose(view, [2], NOW + 2)
    view.settle(NOW + 2 + SETTLED)
    assert 2 in nodes(view), "three of six within a lease"
    later = NOW + 2 + LEASE
    lose(view, [3], later)
    view.settle(later + SETTLED)
    assert 3 not in nodes(view), "one of four"


def test_nobody_who_is_missing_is_believed_dead_soon_after_a_connection_began() -> None:
    view = known(*range(10), connected=NOW)
    lose(view, [1], NOW + HELD - 0.001)
    view.settle(NOW + HELD + SETTLED)
    assert 1 in nodes(view)
    view.settle(NOW + 2 * HELD)
    assert 1 not in nodes(view)


def test_who_is_missing_in_an_answer_is_doubted_like_who_was_told_to_be_gone() -> None:
    view = known(1, 2, 3)
    view.answered("clock", snapshot(1, 3), NOW)
    assert nodes(view) == [1, 2, 3]
    view.settle(NOW + SETTLED)
    assert nodes(view) == [1, 3]


def test_an_empty_answer_after_a_full_one_is_not_believed_at_once() -> None:
    view = known(1)
    view.answered("clock", {}, NOW)
    view.settle(NOW + HELD - 0.001)
    assert nodes(view) == [1]


def test_while_the_registry_is_away_nobody_goes() -> None:
    view = known(1, 2, 3)
    lose(view, [1], NOW)
    view.away(NOW)
    lose(view, [2], NOW + 1)
    view.settle(NOW + 1_000_000)
    assert nodes(view) == [1, 2, 3]
    assert view.due() is None


def test_who_is_held_gets_his_time_anew_when_the_registry_is_back() -> None:
    view = known(1, 2, 3)
    lose(view, [1], NOW)
    view.away(NOW)
    back = NOW + 10 * HELD
    view.connected(back)
    view.answered("clock", snapshot(2, 3), back)
    view.settle(back + HELD - 0.001)
    assert nodes(view) == [1, 2, 3]
    view.settle(back + HELD)
    assert nodes(view) == [2, 3]


@pytest.mark.parametrize(("gap", "held"), [(LEASE - 0.001, False), (LEASE, True)])
def test_only_an_absence_of_a_lease_or_more_begins_the_time_of_who_is_held_anew(gap: float, held: bool) -> None:
    view = known(1, 2, 3)
    lose(view, [1, 2], NOW)
    view.settle(NOW + SETTLED)
    view.away(NOW + LEASE)
    view.connected(NOW + LEASE + gap)
    view.answered("clock", snapshot(3), NOW + LEASE + gap)
    view.settle(NOW + HELD)
    assert nodes(view) == ([1, 2, 3] if held else [3])
    view.settle(NOW + LEASE + gap + HELD)
    assert nodes(view) == [3]


def test_the_dead_go_even_where_the_connection_breaks_again_and_again() -> None:
    view, now = known(1, 2, 3), NOW
    while now <= NOW + HELD + LEASE:
        view.away(now)
        view.connected(now + 0.1 * LEASE)
        view.answered("clock", snapshot(2, 3), now + 0.1 * LEASE)
        view.settle(now + 0.1 * LEASE)
        now += LEASE / 2
    assert nodes(view) == [2, 3]


def test_a_registry_that_connects_and_tells_nothing_is_away_all_the_while() -> None:
    view, now = known(1, 2), NOW
    lose(view, [1, 2], NOW)
    view.settle(NOW + SETTLED)
    view.away(NOW + LEASE)
    while now <= NOW + 2 * HELD:
        view.connected(now + 0.1 * LEASE)
        view.settle(now + 0.1 * LEASE)
        view.away(now + 0.1 * LEASE)
        now += LEASE / 2
    assert nodes(view) == [1, 2], "whoever put himself back was not heard of"


def test_who_comes_back_in_time_was_never_away() -> None:
    view = known(1)
    before = view.records()
    lose(view, [1], NOW)
    view.put(*key(1), value(1), NOW + HELD - 0.001)
    view.settle(NOW + 10 * HELD)
    assert view.records() is before


def test_an_answer_about_one_service_says_nothing_of_others() -> None:
    view = known(1)
    view.answered("compute", snapshot(2, service="compute"), NOW)
    assert nodes(view) == [1, 2]
    view.answered("", snapshot(2, service="compute"), NOW)
    view.settle(NOW + HELD)
    assert nodes(view) == [2]


numbers = st.integers(0, 9)
waits = st.floats(0.0, 3 * HELD)


@given(
    living=st.sets(numbers, min_size=1),
    connected=st.floats(0.0, NOW),
    by_answer=st.booleans(),
    order=st.randoms(use_true_random=False),
    returns=st.lists(st.floats(0.0, HELD - 0.01), min_size=10, max_size=10),
)
def test_nobody_is_dropped_when_everything_is_lost_and_everybody_is_back_in_time(
    living: set[int], connected: float, by_answer: bool, order: object, returns: list[float]
) -> None:
    view = known(*living, connected=connected)
    if by_answer:
        view.answered("clock", {}, NOW)
    else:
        lost = sorted(living)
        order.shuffle(lost)  # type: ignore[attr-defined]
        lose(view, lost, NOW)
    for number, after in sorted(zip(sorted(living), returns, strict=False), key=lambda each: each[1]):
        view.settle(NOW + after)
        assert nodes(view) == sorted(living)
        view.put(*key(number), value(number), NOW + after)
    view.settle(NOW + 10 * HELD)
    assert nodes(view) == sorted(living)


steps = st.one_of(
    st.tuples(st.just("put"), numbers),
    st.tuples(st.just("gone"), numbers),
    st.tuples(st.just("withdrawn"), numbers),
    st.tuples(st.just("garbage"), numbers),
    st.tuples(st.just("answered"), st.frozensets(numbers)),
    st.tuples(st.just("remember"), numbers),
    st.tuples(st.just("away"), st.none()),
    st.tuples(st.just("connected"), st.none()),
)


def take(view: View, step: str, what: object, now: float) -> None:
    if step == "put":
        view.put(*key(what), value(what), now)  # type: ignore[arg-type]
    elif step in ("gone", "withdrawn"):
        view.gone(*key(what), now, withdrawn=step == "withdrawn")  # type: ignore[arg-type]
    elif step == "garbage":
        view.put(*key(what), b"no record", now)  # type: ignore[arg-type]
    elif step == "answered":
        view.answered("clock", snapshot(*what), now)  # type: ignore[misc]
    elif step == "remember":
        view.remember([record(what)])  # type: ignore[arg-type]
    elif step == "away":
        view.away(now)
    else:
        view.connected(now)


@given(history=st.lists(st.tuples(steps, waits), max_size=40), living=st.frozensets(numbers))
def test_after_any_history_the_living_stay_and_the_dead_are_gone_in_the_end(
    history: list[tuple[tuple[str, object], float]], living: frozenset[int]
) -> None:
    view, now = View(LEASE), NOW
    for (step, what), wait in history:
        before = set(nodes(view))
        take(view, step, what, now)
        after = set(nodes(view))
        if step == "withdrawn":
            assert after == before - {what}
        else:
            assert before <= after, "a step itself drops nobody: that takes time"
        now += wait
        view.settle(now)
        assert nodes(view) == sorted(nodes(view))
    view.connected(now)
    view.answered("clock", snapshot(*living), now)
    view.settle(now)
    assert living <= set(nodes(view))
    while (due := view.due()) is not None:
        assert due > now, "what is due is done"
        now = due
        view.settle(now)
    assert set(nodes(view)) == living
    assert not view.skipped


@given(history=st.lists(st.tuples(steps, waits), max_size=40))
def test_a_record_that_did_not_change_is_the_same_object(history: list[tuple[tuple[str, object], float]]) -> None:
    view, now, before = View(LEASE), NOW, {}
    for (step, what), wait in history:
        take(view, step, what, now)
        now += wait
        view.settle(now)
        after = {each.node: each for each in view.records()}
        for node in before.keys() & after.keys():
            assert (before[node] is after[node]) == (before[node] == after[node])
        assert view.records() is view.records()
        before = after


# --- what a record is ---


def test_a_node_has_one_record_with_all_its_services_and_the_newest_state() -> None:
    view = View(LEASE)
    view.connected(NOW)
    both = {"clock": ("read",), "compute": ("ping",)}
    view.put(*key(1), value(1, idempotent={"clock": both["clock"]}), NOW)
    view.put(*key(1, "compute"), value(1, "compute", idempotent={"compute": both["compute"]}, state="draining"), NOW)
    (merged,) = view.records()
    assert merged.services == {"clock": ("a",), "compute": ("a",)}
    assert merged.idempotent == both
    assert merged.state == "draining"
    view.put(*key(1), value(1, version="2"), NOW)
    assert (view.records()[0].state, view.records()[0].version) == ("serving", "2")
    view.gone(*key(1), NOW, withdrawn=True)
    assert list(view.records()[0].services) == ["compute"]


def test_records_stand_in_the_order_of_their_ids() -> None:
    view = known(3, 1, 2)
    view.put(*key(0), value(0), NOW)
    assert nodes(view) == [0, 1, 2, 3]


GARBAGE: dict[str, tuple[bytes, str]] = {
    "not JSON": (b"\xff\x00", "does not hold a record"),
    "no object": (b"[1, 2]", "does not hold a record"),
    "nothing": (b"", "does not hold a record"),
    "wrong types": (b'{"node": 7}', "does not hold a record"),
    "nested too deeply": (b"[" * 100_000, "does not hold a record"),
    "another's": (value(99), f"node '{99:032x}'"),
    "another service": (value(1, "compute"), "compute"),
    "two services": (value(1, services={"clock": ("a",), "compute": ("a",)}), "alone"),
    "no service": (value(1, services={}), "alone"),
    "too large": (b" " * (RECORD_LIMIT + 1), str(RECORD_LIMIT)),
}


@pytest.mark.parametrize("garbage", GARBAGE)
def test_what_is_no_record_is_skipped_with_one_warning_until_it_is_mended(
    garbage: str, caplog: pytest.LogCaptureFixture
) -> None:
    content, problem = GARBAGE[garbage]
    view = known(2)
    name = "/".join(key(1))
    for _ in range(3):
        view.put(*key(1), content, NOW)
        view.answered("clock", snapshot(2) | {key(1): content}, NOW)
    assert nodes(view) == [2]
    assert problem in view.skipped[name]
    (warning,) = [each.getMessage() for each in caplog.records]
    assert name in warning
    assert problem in warning
    view.put(*key(1), value(1), NOW)
    assert nodes(view) == [1, 2]
    assert not view.skipped
    view.put(*key(1), content, NOW)
    assert len(caplog.records) == 2, "broken anew, warned of anew"


@pytest.mark.parametrize("node", ["", "x", "0" * 31, "0" * 33, "A" * 32, "../" + "0" * 29])
def test_a_bad_node_id_is_no_record(node: str) -> None:
    view = known(2)
    bad = msgspec.json.encode(msgspec.structs.replace(record(1), node=node))
    view.put("clock", node, bad, NOW)
    assert nodes(view) == [2]
    assert "32 lower-case hexadecimal digits" in view.skipped[f"clock/{node}"]


def test_garbage_that_goes_is_forgotten() -> None:
    view = known(2)
    view.put(*key(1), b"", NOW)
    view.put("clock", "not/a/node", b"", NOW)
    view.gone(*key(1), NOW)
    assert list(view.skipped) == ["clock/not/a/node"]
    view.answered("clock", snapshot(2), NOW)
    assert view.skipped == {}


def test_a_record_that_became_garbage_is_doubted_and_not_dropped_at_once() -> None:
    view = known(1)
    view.put(*key(1), b"", NOW)
    view.settle(NOW + SETTLED)
    assert nodes(view) == [1]
    view.settle(NOW + HELD)
    assert nodes(view) == []


def test_a_known_record_takes_less_than_a_kibibyte_and_a_half() -> None:
    count = 2_000
    values = {}
    for number in range(count):
        endpoints = (
            f"ipc:///run/onehop/default/{number:016x}.sock",
            f"tcp://10.20.{number // 250}.{number % 250}:9501",
        )
        host = f"host-{number // 8:05d}.example.org"
        fields = {"host": host, "pid": number, "endpoints": endpoints, "version": "0.1.0", "zone": "north"}
        services = {"exchange/compute": (host,)}
        idempotent = {"exchange/compute": ("ping", "read")}
        entry = value(number * 7919, services=services, idempotent=idempotent, **fields)
        values["exchange/compute", record(number * 7919).node] = entry
    view = View(LEASE)
    view.connected(NOW)
    gc.collect()
    tracemalloc.start()
    try:
        view.answered("exchange/compute", values, NOW)
        assert len(view.records()) == count
        gc.collect()
        each = tracemalloc.get_traced_memory()[0] / count
    finally:
        tracemalloc.stop()
    assert each < 1.5 * 1024


# --- the disk ---


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(cache_directory=str(tmp_path / "cache" / "onehop"))


def cache(settings: Settings, url: str = "redis://ctl1/") -> Cache:
    return Cache(settings, url)


def test_what_was_saved_is_loaded(settings: Settings) -> None:
    records = [record(1), record(2, state="draining")]
    cache(settings).save("clock", records)
    assert cache(settings).load("clock") == records


def test_registries_realms_and_services_have_files_of_their_own(settings: Settings) -> None:
    cache(settings).save("clock", [record(1)])
    assert cache(settings).load("compute") == cache(settings).load("") == []
    assert cache(settings, "redis://ctl2/").load("clock") == []
    other = Settings(cache_directory=settings.cache_directory, realm="other")
    assert cache(other).load("clock") == []
    assert cache(Settings(cache_directory=settings.cache_directory, realm="default")).load("clock") == [record(1)]


@pytest.mark.parametrize("service", ["exchange/topic", "..", "a\0b", "x" * 300, "ä" * 100, "\udc80"])
def test_any_service_has_a_file_within_the_directory(settings: Settings, service: str) -> None:
    path = cache(settings).path(service)
    assert path is not None
    assert path.parent == Path(settings.cache_directory)
    assert len(os.fsencode(path.name)) < 256
    cache(settings).save(service, [record(1)])
    assert cache(settings).load(service) == [record(1)]


def test_directory_and_files_belong_to_this_user_alone(settings: Settings) -> None:
    before = os.umask(0)
    try:
        cache(settings).save("clock", [record(1)])
    finally:
        os.umask(before)
    path = cache(settings).path("clock")
    assert path is not None
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_what_stands_there_already_is_not_written_again(settings: Settings) -> None:
    path = cache(settings).path("clock")
    assert path is not None
    cache(settings).save("clock", [record(1)])
    inode = path.stat().st_ino
    cache(settings).save("clock", [record(1)])
    assert path.stat().st_ino == inode
    cache(settings).save("clock", [record(2)])
    assert cache(settings).load("clock") == [record(2)]
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"{}",
        b'[{"node": "x", "host": "h"}]',
        b'[{"node": 7}]',
        msgspec.json.encode([record(1, services={})]),
    ],
)
def test_a_corrupt_cache_is_warned_of_once_and_ignored(
    settings: Settings, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    cache(settings).save("clock", [record(1)])
    path = cache(settings).path("clock")
    assert path is not None
    path.write_bytes(content)
    corrupt = cache(settings)
    assert corrupt.load("clock") == corrupt.load("clock") == []
    (warning,) = [each.getMessage() for each in caplog.records]
    assert str(path) in warning
    corrupt.save("clock", [record(2)])
    assert corrupt.load("clock") == [record(2)]


def test_a_cache_that_others_can_write_to_is_not_trusted(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    cache(settings).save("clock", [record(1)])
    path = cache(settings).path("clock")
    assert path is not None
    path.chmod(0o620)
    assert cache(settings).load("clock") == []
    assert "this user alone" in caplog.text


def test_a_directory_that_cannot_be_used_is_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    useless = cache(Settings(cache_directory=str(tmp_path / "file" / "onehop")))
    for number in range(3):
        useless.save("clock", [record(number)])
        assert useless.load("clock") == []
    (warning,) = [each.getMessage() for each in caplog.records]
    assert "cannot be written" in warning


def test_a_directory_that_may_not_be_searched_is_warned_of_and_no_more(tmp_path: Path) -> None:
    directory = tmp_path / "closed" / "onehop"
    directory.mkdir(parents=True)
    (tmp_path / "closed").chmod(0o000)

    def use() -> object:
        if ROOT:  # who may search everything
            os.setuid(65_534)
        warned: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda each: warned.append(each.getMessage())  # type: ignore[method-assign]
        logging.getLogger("onehop").addHandler(handler)
        closed = cache(Settings(cache_directory=str(directory)))
        known = closed.load("clock")
        closed.save("clock", [record(1)])
        return known, [each.split("cannot be ")[1] for each in warned]

    try:
        said = "{}, it goes on without: Permission denied"
        assert in_child(use) == str(([], [said.format("read"), said.format("written")]))
    finally:
        (tmp_path / "closed").chmod(0o700)


def test_a_full_disk_leaves_the_old_view_and_no_rubbish(settings: Settings) -> None:
    cache(settings).save("clock", [record(1)])

    def fill() -> str:
        logging.disable()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # a write beyond it fails as on a full disk
        cache(settings).save("clock", [record(number) for number in range(100)])
        return ",".join(os.listdir(settings.cache_directory))

    path = cache(settings).path("clock")
    assert path is not None
    assert in_child(fill) == path.name
    assert cache(settings).load("clock") == [record(1)]


def test_a_cache_that_is_off_is_nowhere() -> None:
    off = cache(Settings(cache_directory="none"))
    off.save("clock", [record(1)])
    assert off.load("clock") == []
    assert off.path("clock") is None


@pytest.mark.skipif(not ROOT, reason="only root can become another user")
def test_a_user_who_owns_no_system_directory_has_a_cache_of_his_own() -> None:
    with tempfile.TemporaryDirectory() as home:

        def ask(**environment: str) -> str:
            def work() -> object:
                os.setgid(65_534)
                os.setuid(65_534)
                os.environ.pop("XDG_CACHE_HOME", None)
                os.environ.update(environment)
                return cache_directory(Settings())

            return in_child(work)

        assert ask(XDG_CACHE_HOME=home) == f"{home}/onehop"
        assert ask(HOME=home) == f"{home}/.cache/onehop"
        assert ask(XDG_CACHE_HOME="not/absolute", HOME=home) == f"{home}/.cache/onehop"


def test_the_first_choice_is_the_systems_directory_where_this_user_can_use_it() -> None:
    system = Path("/var/cache/onehop")
    usable = system.stat().st_uid == os.geteuid() if system.is_dir() else os.access(system.parent, os.W_OK)
    assert (cache_directory(Settings()) == system) == usable
