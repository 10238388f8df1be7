"""The registry of one host, with real processes, users and signals."""

from __future__ import annotations

import fcntl
import grp
import logging
import os
import random
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from statistics import median

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.registry.views import Views, eventually, in_child

from onehop.errors import RegistryError, SettingsError
from onehop.interfaces import Record
from onehop.registry import open_registry
from onehop.registry.inotify import Inotify
from onehop.registry.local import (
    _DOUBT_LOOKS,
    _DOUBT_PERIOD,
    RECORD_LIMIT,
    LocalRegistry,
    remove_dead_sockets,
    run_directory,
)
from onehop.settings import Settings
from onehop.testing.contracts import check_registry, killed_process

ROOT = os.geteuid() == 0
NOTICED_WITHIN = 0.3  # seconds: what the registry promises
BEFORE_A_FULL_LOOK = 1.5  # seconds: a notice did it, or a look at everything that happened to be due
DOUBT = _DOUBT_LOOKS * _DOUBT_PERIOD  # seconds that a lock which was closed is looked at again
SOURCES = Path(__file__).parents[2] / "src"

Open = Callable[..., LocalRegistry]


def record(number: int, **fields: object) -> Record:
    return Record(node=f"{number:032x}", host="host-1", services={"clock": ("a",)}, **fields)  # type: ignore[arg-type]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(run_directory=str(tmp_path / "run"))


@pytest.fixture(params=[True, False], ids=["inotify", "polling"])
def make(request: pytest.FixtureRequest, settings: Settings) -> Iterator[Open]:
    with ExitStack() as closing:

        def make() -> LocalRegistry:
            registry = LocalRegistry(settings, inotify=request.param)
            closing.callback(registry.close)
            return registry

        yield make


@pytest.fixture
def public_directory() -> Iterator[Path]:
    """A directory that every user of this machine can enter."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.fixture
def watched(make: Open) -> Views:
    views = Views()
    make().watch(views)
    return views


# --- the contract ---


@pytest.mark.parametrize("inotify", [True, False], ids=["inotify", "polling"])
def test_the_local_registry_keeps_the_contract(settings: Settings, inotify: bool) -> None:
    check_registry(lambda: LocalRegistry(settings, inotify=inotify), within=5.0)


def test_construction_touches_nothing(settings: Settings) -> None:
    threads, descriptors = threading.active_count(), os.listdir("/proc/self/fd")
    registry = LocalRegistry(settings)
    assert not registry.directory.parent.exists()
    assert threading.active_count() == threads
    assert os.listdir("/proc/self/fd") == descriptors


def test_what_was_opened_is_given_back_at_close(settings: Settings) -> None:
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for number in range(10):
        registry = LocalRegistry(settings)
        registry.announce(record(number))
        registry.announce(record(number, state="draining"))
        registry.watch(Views())
        registry.close()
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert os.listdir(registry.directory) == []


def test_a_closed_registry_says_so(settings: Settings) -> None:
    registry = LocalRegistry(settings)
    registry.close()
    with pytest.raises(RegistryError, match="was closed"):
        registry.announce(record(1))
    with pytest.raises(RegistryError, match="was closed"):
        registry.watch(Views())


# --- who died ---


@pytest.mark.alone
def test_who_comes_and_who_is_killed_is_noticed_soon(make: Open, watched: Views) -> None:
    came, went = [], []
    for number in range(5):
        began = time.monotonic()
        with killed_process(make, record(number)):
            assert watched.become(number)
            came.append(time.monotonic() - began)
            began = time.monotonic()
        assert watched.become()
        went.append(time.monotonic() - began)
    assert median(came) < NOTICED_WITHIN
    assert median(went) < NOTICED_WITHIN


def test_a_killed_process_is_noticed_and_its_leavings_removed(make: Open, watched: Views, tmp_path: Path) -> None:
    directory = make().prepare()
    inside, outside, no_socket = directory / "1.sock", tmp_path / "other.sock", directory / "notes.txt"
    for path in (inside, outside):
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    no_socket.touch()
    endpoints = tuple(f"ipc://{path}" for path in (inside, outside, no_socket))
    with killed_process(make, record(1, endpoints=endpoints)):
        assert watched.become(1)
        assert inside.exists()
    assert watched.become()
    assert eventually(lambda: not (directory / f"{1:032x}.json").exists())
    assert (inside.exists(), outside.exists(), no_socket.exists()) == (False, True, True)


def test_a_hundred_nodes_come_and_are_killed_in_any_order(make: Open, watched: Views) -> None:
    order = random.Random(1)
    living: dict[int, ExitStack] = {}
    for number in range(100):
        living[number] = ExitStack()
        living[number].enter_context(killed_process(make, record(number)))
        if len(living) > 20:
            living.pop(order.choice(list(living))).close()
    assert watched.become(*sorted(living))
    for each in living.values():
        each.close()
    assert watched.become()


class LeavesBehind(LocalRegistry):
    """Announces, and then begets a process that outlives its own and knows nothing of onehop."""

    def __init__(self, settings: Settings, beget: Callable[[], object]) -> None:
        super().__init__(settings)
        self._beget = beget

    def announce(self, record: Record) -> None:
        super().announce(record)
        self._beget()


@pytest.mark.parametrize("program", [False, True], ids=["fork", "program"])
def test_what_a_dead_process_begot_does_not_keep_its_record(settings: Settings, watched: Views, program: bool) -> None:
    lives_on, end = os.pipe()

    def beget() -> None:
        if program:
            subprocess.Popen(["cat"], stdin=lives_on, stdout=subprocess.DEVNULL, close_fds=False)
        elif os.fork() == 0:
            os.close(end)
            os.read(lives_on, 1)
            os._exit(0)
        os.close(end)

    try:
        with killed_process(lambda: LeavesBehind(settings, beget), record(1)):
            assert watched.become(1)
        assert watched.become()
    finally:
        os.close(end)
        os.close(lives_on)


def lock_and_place(registry: LocalRegistry, record: Record) -> int:
    """A record put in place by hand; returns the descriptor that locks it, opened for reading only."""
    unfinished = registry.prepare() / "unfinished"
    unfinished.write_bytes(msgspec.json.encode(record))
    descriptor = os.open(unfinished, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    unfinished.rename(registry.directory / f"{record.node}.json")
    return descriptor


def test_two_who_ask_at_once_both_know_that_a_node_is_dead(make: Open) -> None:
    registry, views = make(), Views()
    descriptor = lock_and_place(registry, record(1))
    registry.watch(views)
    assert views.nodes == [1]
    fcntl.flock(descriptor, fcntl.LOCK_SH)  # as another who asks holds it
    registry.refresh()
    assert views.nodes == []
    os.close(descriptor)


def test_a_lock_that_goes_just_after_the_notice_is_seen_to_go(make: Open, watched: Views) -> None:
    # The kernel tells that a dying process closed the file, and drops its lock after that.
    registry = make()
    soon = 0
    for number in range(7):
        descriptor = lock_and_place(registry, record(number))
        assert watched.become(number)
        os.close(os.open(registry.directory / f"{number:032x}.json", os.O_WRONLY))  # the notice
        time.sleep(0.004)
        os.close(descriptor)
        began = time.monotonic()
        assert watched.become()
        soon += time.monotonic() - began < 2 * NOTICED_WITHIN
    assert soon >= 5  # where this process was held up between the two, only the next look at everything sees it


# --- changes ---


def test_a_refresh_has_delivered_when_it_returns(make: Open) -> None:
    registry, other, views = make(), make(), Views()
    registry.watch(views)
    for number in range(20):
        other.announce(record(number))
        registry.refresh()
        assert views.nodes == [number]
    other.withdraw()
    registry.refresh()
    assert views.nodes == []


def test_a_registry_is_fresh_again_once_its_watch_has_looked(settings: Settings) -> None:
    registry, other, views = LocalRegistry(settings), LocalRegistry(settings), Views()
    assert registry.is_fresh(), "who does not watch waits for nothing"
    registry.watch(views)
    for number in range(20):
        other.announce(record(number))
        assert eventually(registry.is_fresh)
        assert views.nodes == [number]
    other.withdraw()
    assert eventually(registry.is_fresh)
    assert views.nodes == []
    registry.close()


def test_a_registry_is_not_fresh_while_a_lock_is_in_doubt(settings: Settings) -> None:
    registry, views = LocalRegistry(settings), Views()
    descriptor = lock_and_place(registry, record(1))
    registry.watch(views)
    assert eventually(registry.is_fresh)
    path, judged = registry.directory / f"{1:032x}.json", 0
    while judged < 5:
        began = time.monotonic()
        os.close(os.open(path, os.O_WRONLY))  # as when a process dies
        is_fresh = registry.is_fresh()
        time.sleep(DOUBT / 3)  # it has looked by now, and is to look again
        is_fresh |= registry.is_fresh()
        if time.monotonic() - began < DOUBT:
            judged += 1
            assert not is_fresh
    os.close(descriptor)
    with suppress(FileNotFoundError):  # another notice, should the doubts have been over before that
        os.close(os.open(path, os.O_WRONLY))
    assert eventually(registry.is_fresh)
    assert views.nodes == []
    registry.close()


def test_a_registry_that_reads_the_directory_now_and_then_is_never_fresh(settings: Settings) -> None:
    registry = LocalRegistry(settings, inotify=False)
    registry.watch(Views())
    assert not registry.is_fresh()
    registry.close()


def test_a_registry_is_not_fresh_where_its_directory_was_put_aside(settings: Settings, tmp_path: Path) -> None:
    registry, views = LocalRegistry(settings), Views()
    registry.watch(views)
    assert eventually(registry.is_fresh)
    registry.directory.rename(tmp_path / "away")
    assert not registry.is_fresh()
    registry.close()


def test_a_removed_file_is_published_again_without_a_refresh(settings: Settings) -> None:
    registry, other, views = LocalRegistry(settings), LocalRegistry(settings), Views()
    registry.watch(Views())
    other.watch(views)
    registry.announce(record(1))
    path = registry.directory / f"{1:032x}.json"
    assert views.become(1)
    path.unlink()
    assert eventually(path.exists, within=BEFORE_A_FULL_LOOK)
    assert views.become(1)
    registry.close()
    other.close()


def instances() -> tuple[int, int]:
    """Of this process: watching threads, inotify instances."""
    links = []
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return sum(each.name == "onehop-registry" for each in threading.enumerate()), links.count("anon_inode:inotify")


def test_nodes_of_a_process_share_one_watch_until_the_last_of_them_closes(settings: Settings) -> None:
    before = instances()
    registries = [LocalRegistry(settings) for _ in range(5)]
    everyone = [Views() for _ in registries]
    for registry, views in zip(registries, everyone, strict=True):
        registry.watch(views)
    assert instances() == (before[0] + 1, before[1] + 1)
    other = LocalRegistry(settings)
    for number in range(5):
        other.announce(record(number))
        assert all(views.become(number) for views in everyone[number:])
        registries[number].close()
        assert instances() == (before if number == 4 else (before[0] + 1, before[1] + 1))
    assert [views.nodes for views in everyone] == [[number] for number in range(5)], "a closed one was told"
    other.close()


def test_a_watcher_that_fails_keeps_nothing_from_others(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    def deliver(records: Sequence[Record]) -> None:
        if records:
            raise ValueError("none is too many")

    failing, other, views = LocalRegistry(settings), LocalRegistry(settings), Views()
    failing.watch(deliver)
    other.watch(views)
    other.announce(record(1))
    assert views.become(1)
    assert eventually(lambda: "none is too many" in caplog.text)
    other.announce(record(2))
    assert views.become(2)
    failing.close()
    other.close()


def test_churn_in_many_threads_ends_in_the_right_view(make: Open, watched: Views) -> None:
    def churn(first: int) -> None:
        order, registries = random.Random(first), {number: make() for number in range(first, first + 25)}
        for _ in range(200):
            number = order.choice(list(registries))
            if order.random() < 0.7:
                registries[number].announce(record(number, zone=str(order.random())))
            else:
                registries[number].withdraw()
        for number, registry in registries.items():
            registry.announce(record(number))

    threads = [threading.Thread(target=churn, args=(first,)) for first in (0, 25, 50, 75)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert eventually(lambda: list(watched.all[-1]) == [record(number) for number in range(100)])
    assert all(list(view) == sorted(view, key=lambda each: each.node) for view in watched.all)


def test_a_removed_file_is_published_again(make: Open, watched: Views) -> None:
    registry = make()
    registry.announce(record(1))
    registry.watch(Views())
    (registry.directory / f"{1:032x}.json").unlink()
    registry.refresh()
    assert watched.become(1)


def test_a_removed_directory_is_made_again(make: Open, watched: Views, tmp_path: Path) -> None:
    registry = make()
    registry.announce(record(1))
    registry.watch(Views())
    assert watched.become(1)
    registry.directory.rename(tmp_path / "away")  # at once, as it is restored while it is emptied
    assert eventually((registry.directory / f"{1:032x}.json").exists)
    make().announce(record(2))
    assert watched.become(1, 2)


def test_close_inside_deliver_ends_the_watch(make: Open) -> None:
    registry, other, views = make(), make(), Views()

    def deliver(records: Sequence[Record]) -> None:
        views(records)
        if records:
            registry.close()

    threads = threading.active_count()
    registry.watch(deliver)
    other.announce(record(1))
    assert eventually(lambda: threading.active_count() == threads)
    other.announce(record(1, state="draining"))
    assert [len(view) for view in views.all] == [0, 1]


def test_a_deliver_that_raises_is_told_of_the_next_change(make: Open, caplog: pytest.LogCaptureFixture) -> None:
    registry, other, views = make(), make(), Views()

    def deliver(records: Sequence[Record]) -> None:
        views(records)
        if len(records) == 1:
            raise ValueError("one is too few")

    registry.watch(deliver)
    other.announce(record(1))
    assert eventually(lambda: "one is too few" in caplog.text)
    make().announce(record(2))
    assert views.become(1, 2)


def test_where_no_inotify_is_left_changes_are_noticed_all_the_same(public_directory: Path) -> None:
    user = 60_123 if ROOT else None  # the limit is a user's; take it from nobody else

    def exhaust_and_watch() -> list[int]:
        held = []
        try:
            while True:
                held.append(Inotify())
        except OSError:
            registry, views = LocalRegistry(settings), Views()
            registry.watch(views)
        other = LocalRegistry(settings)
        other.announce(record(1))
        assert views.become(1)
        return views.nodes

    public_directory.chmod(0o777)
    settings = Settings(run_directory=str(public_directory / "run"))
    assert in_child(exhaust_and_watch, user=user) == "[1]"


@pytest.mark.parametrize("patch", ["import eventlet; eventlet.monkey_patch()", ""], ids=["green", "native"])
def test_the_watch_lets_other_threads_run(settings: Settings, patch: str) -> None:
    script = f"""
        {patch or "pass"}
        import threading, time
        from onehop.interfaces import Record
        from onehop.registry.local import LocalRegistry
        from onehop.settings import Settings

        settings = Settings(run_directory={settings.run_directory!r})
        seen = threading.Event()
        registry, other = LocalRegistry(settings), LocalRegistry(settings)
        registry.watch(lambda records: records and seen.set())
        begun = time.monotonic()
        time.sleep(0.01)
        other.announce(Record(node="0" * 32, host="h"))
        print(seen.wait({BEFORE_A_FULL_LOOK}), time.monotonic() - begun < {BEFORE_A_FULL_LOOK})
        registry.close()
        other.close()
    """
    environment = os.environ | {"PYTHONPATH": str(SOURCES)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True, timeout=30
    )
    assert done.stdout == "True True\n", done.stderr


# --- what is not a record ---


GARBAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no-json": (lambda path: path.write_bytes(b"\xff\x00 no"), "does not hold a record"),
    "empty": (lambda path: path.touch(), "does not hold a record"),
    "no-record": (lambda path: path.write_text("[1, 2]"), "does not hold a record"),
    "wrong-field": (lambda path: path.write_text('{"node": 7, "host": "h"}'), "does not hold a record"),
    "deep": (lambda path: path.write_text("[" * 500_000), "does not hold a record"),
    "deep-inside": (lambda path: path.write_text('{"node": "a", "x": ' + "[" * 500_000), "does not hold a record"),
    "other-name": (lambda path: path.write_text('{"node": "a", "host": "h"}'), "holds the record of node 'a'"),
    "oversize": (lambda path: path.write_bytes(b" " * (RECORD_LIMIT + 1)), f"has {RECORD_LIMIT + 1} bytes"),
    "directory": (lambda path: path.mkdir(), "not a regular file"),
    "fifo": (os.mkfifo, "not a regular file"),
    "link": (lambda path: path.symlink_to("/etc/passwd"), "cannot be opened"),
    "loop": (lambda path: path.symlink_to(path), "cannot be opened"),
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_is_skipped_and_named_once(make: Open, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    put, complaint = GARBAGE[kind]
    registry, views = make(), Views()
    path = registry.prepare() / f"{kind}.json"
    put(path)
    make().announce(record(1))
    registry.watch(views)
    for _ in range(3):
        registry.refresh()
    assert views.nodes == [1]
    assert complaint in registry.skipped[path.name]
    warnings = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert str(path) in warnings[0]
    assert complaint in warnings[0]
    assert os.path.lexists(path)

    path.rename(path.with_suffix(".away"))
    registry.refresh()
    assert registry.skipped == {}


def test_a_file_that_this_user_may_not_read_is_skipped(public_directory: Path) -> None:
    public_directory.chmod(0o777)
    settings = Settings(run_directory=str(public_directory / "run"))

    def look() -> tuple[str, ...]:
        registry = LocalRegistry(settings)
        path = registry.prepare() / "closed.json"
        path.touch(mode=0)
        registry.watch(Views())
        return tuple(registry.skipped.values())

    assert "Permission denied" in in_child(look, user=60_124 if ROOT else None)


def test_what_is_no_record_by_name_is_left_alone(make: Open) -> None:
    registry = make()
    for name in ("notes.txt", "1.sock", "other.json.bak"):
        (registry.prepare() / name).touch()
    registry.watch(Views())
    assert registry.skipped == {}
    assert len(os.listdir(registry.directory)) == 3


def test_what_a_process_left_that_died_while_it_announced_is_removed(make: Open) -> None:
    registry = make()
    leftover = registry.prepare() / f".{1:032x}.tmp"
    leftover.touch()
    registry.watch(Views())
    assert not leftover.exists()


def test_no_descriptor_left_is_no_death(settings: Settings) -> None:
    def run_out() -> bool:
        registry, other, views = LocalRegistry(settings), LocalRegistry(settings), Views()
        other.announce(record(1))
        registry.watch(views)
        path, held = other.directory / f"{1:032x}.json", []
        try:
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            path.rename(path.with_suffix(".away"))  # has the watching thread look at the file, which it cannot open
            path.with_suffix(".away").rename(path)
            registry.refresh()
        for each in held:
            os.close(each)
        LocalRegistry(settings).announce(record(2))
        return views.become(1, 2) and all(view[0] == record(1) for view in views.all)

    assert in_child(run_out) == "True"


@pytest.mark.parametrize("node", ["", "../" + "0" * 29, "0" * 31, "A" * 32])
def test_a_wrong_node_id_is_refused(make: Open, node: str) -> None:
    with pytest.raises(RegistryError, match="32 lower-case hexadecimal digits"):
        make().announce(Record(node=node, host="h"))


def test_a_record_that_is_too_large_is_refused(make: Open) -> None:
    registry = make()
    registry.announce(record(1))
    with pytest.raises(RegistryError, match=f"it may have {RECORD_LIMIT}"):
        registry.announce(record(1, zone="x" * RECORD_LIMIT))
    views = Views()
    registry.watch(views)
    assert views.all[-1] == (record(1),)


# --- directories, users and groups ---


@pytest.mark.parametrize("umask", [0, 0o377])
def test_directories_are_for_their_user_alone_whatever_the_umask(settings: Settings, umask: int) -> None:
    registry = LocalRegistry(settings)
    before = os.umask(umask)
    try:
        registry.announce(record(1))
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (registry.directory.parent, registry.directory)}
    assert set(modes.values()) == {0o700}
    assert stat.S_IMODE((registry.directory / f"{1:032x}.json").stat().st_mode) == 0o600
    registry.close()


def test_a_directory_that_others_can_write_to_is_refused(settings: Settings) -> None:
    directory = Path(settings.run_directory)
    directory.mkdir()
    directory.chmod(0o777)
    with pytest.raises(RegistryError, match="can be written to by others") as caught:
        LocalRegistry(settings).announce(record(1))
    assert "ONEHOP_RUN_DIRECTORY" in str(caught.value)


def test_no_permission_on_the_run_directory_says_what_to_set(public_directory: Path) -> None:
    closed = public_directory / "closed"
    closed.mkdir(mode=0o700 if ROOT else 0o000)
    user = 60_125 if ROOT else None
    for path in (closed, closed / "below"):
        settings = Settings(run_directory=str(path))
        for use in (
            lambda settings=settings: LocalRegistry(settings).announce(record(1)),
            lambda settings=settings: LocalRegistry(settings).watch(Views()),
        ):
            said = in_child(use, user=user)
            assert said.startswith("RegistryError")
            assert str(path) in said
            assert "ONEHOP_RUN_DIRECTORY" in said


def test_the_run_directory_is_a_file(settings: Settings) -> None:
    Path(settings.run_directory).touch()
    with pytest.raises(RegistryError, match="not a directory"):
        LocalRegistry(settings).prepare()


def test_a_group_shares_the_directory(public_directory: Path) -> None:
    group = grp.getgrgid(os.getegid()) if not ROOT else grp.getgrnam("users")
    public_directory.chmod(0o777)
    settings = Settings(run_directory=str(public_directory / "run"), group=group.gr_name)
    registry, views = LocalRegistry(settings), Views()
    registry.announce(record(1))
    registry.watch(views)
    for path in (registry.directory.parent, registry.directory):
        assert stat.S_IMODE(path.stat().st_mode) == 0o2770
        assert path.stat().st_gid == group.gr_gid

    def meet() -> list[int]:
        other, theirs = LocalRegistry(settings), Views()
        other.announce(record(2))
        other.watch(theirs)
        return theirs.nodes if views.become(1) else []

    user = 60_126 if ROOT else None
    assert in_child(meet, user=user, groups=[group.gr_gid]) == "[1, 2]"
    registry.refresh()
    assert views.nodes == [1], "the other user's process has ended"
    if ROOT:
        assert in_child(meet, user=60_127).startswith("RegistryError")
    registry.close()


def test_an_unknown_group_is_a_wrong_setting(settings: Settings) -> None:
    with pytest.raises(SettingsError, match="'no-such-group', which this host does not have"):
        LocalRegistry(Settings(run_directory=settings.run_directory, group="no-such-group")).prepare()


def test_a_path_too_long_for_sockets_is_a_wrong_setting(tmp_path: Path) -> None:
    room = 107 - len(str(tmp_path)) - len("//default/0123456789abcdef.sock")
    LocalRegistry(Settings(run_directory=str(tmp_path / ("x" * room)))).prepare()
    with pytest.raises(SettingsError, match="paths of 108 bytes; the system allows 107"):
        LocalRegistry(Settings(run_directory=str(tmp_path / ("x" * (room + 1))))).prepare()


def test_the_run_directory_is_the_first_that_this_process_can_use(
    public_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(public_directory))
    assert run_directory(Settings()) == public_directory / "onehop"
    assert run_directory(Settings(run_directory="/somewhere")) == Path("/somewhere")
    for unusable in ("", "relative", str(public_directory / "missing")):
        monkeypatch.setenv("XDG_RUNTIME_DIR", unusable)
        user = 60_128 if ROOT else None
        assert in_child(lambda: run_directory(Settings()), user=user) == f"/tmp/onehop-{user or os.geteuid()}"
        assert not ROOT or run_directory(Settings()) == Path("/run/onehop")


# --- realms and URLs ---


def test_realms_do_not_see_each_other(settings: Settings) -> None:
    here = LocalRegistry(settings)
    there = LocalRegistry(Settings(run_directory=settings.run_directory, realm="there"))
    views = Views()
    here.watch(views)
    there.announce(record(1))
    here.refresh()
    assert views.nodes == []
    here.close()
    there.close()


@given(st.lists(st.text(max_size=20) | st.sampled_from(["..", ".", "/", "a/../..", "default", "\0"]), min_size=2))
def test_a_realm_is_always_a_directory_of_its_own(realms: list[str]) -> None:
    named = {realm or "default" for realm in realms}
    directories = {LocalRegistry(Settings(run_directory="/base", realm=realm)).directory for realm in realms}
    assert len(directories) == len(named)
    assert {Path(os.path.normpath(each)).parent for each in directories} == {Path("/base")}


@pytest.mark.parametrize("url", ["local", "local:", "local://", "local:///"])
def test_local_is_found_by_its_name(settings: Settings, url: str) -> None:
    assert isinstance(open_registry(url, settings), LocalRegistry)


def test_an_unknown_registry_is_answered_with_the_known_ones(settings: Settings) -> None:
    for url in ("nosuch://host", "nosuch", "", "/local"):
        with pytest.raises(SettingsError, match=r"begins with: .*local"):
            open_registry(url, settings)


def test_local_takes_no_place_in_its_url(settings: Settings) -> None:
    with pytest.raises(SettingsError, match="run_directory"):
        open_registry("local:///run/other", settings)


def test_registries_of_others_are_found_by_entry_point(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "others-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(
        "[onehop.registries]\nelsewhere = others:open\nbroken = others:missing\nlocal = others:open\n"
    )
    (tmp_path / "others.py").write_text("def open(settings, url):\n    return url\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert open_registry("Elsewhere://host/x", settings) == "Elsewhere://host/x"
    assert isinstance(open_registry("local", settings), LocalRegistry)
    with pytest.raises(SettingsError, match=r"needs others:missing, which cannot be imported"):
        open_registry("broken://", settings)


def test_sockets_of_killed_nodes_are_removed_where_no_record_tells_of_them(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.sock" for name in ("dead", "alive", "young")]
    bound = [socket.socket(socket.AF_UNIX) for _ in paths]
    for each, path in zip(bound, paths, strict=True):
        each.bind(str(path))
    bound[1].listen()
    (tmp_path / "file.sock").write_text("no socket")
    for path in (*paths[:2], tmp_path / "file.sock"):
        os.utime(path, (time.time() - 60.0,) * 2)
    bound[0].close()
    bound[2].close()
    remove_dead_sockets(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alive.sock", "file.sock", "young.sock"]
    bound[1].close()
