"""What a registry must do, as a check that its author can run against it and its real server."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import pairwise

from onehop.interfaces import Record, Registry

Crash = Callable[[Record], AbstractContextManager[None]]

JOINS = 200


def check_registry(
    make: Callable[[], Registry],
    *,
    crash: Crash | None = None,
    within: float = 0.5,
    crash_within: float | None = None,
    joins: int = JOINS,
) -> None:
    """Check every sentence of :class:`onehop.interfaces.Registry` with several instances over one place.

    It takes a few seconds. The place must be empty, and nobody else may use it meanwhile.

    Args:
        make: gives a new instance over the same place each time, as another node would have.
        crash: a context manager: from its entry on another process has announced the record it is given, at its exit
            that process has been killed. By default a forked child that uses ``make``, ended by SIGKILL.
        within: how long a change may take to be seen by others, in seconds.
        crash_within: how long the record of a killed process may stay, in seconds; by default ``within``. A registry
            with leases may hold it for some time longer than the lease.
        joins: how many instances join and leave at once.

    Raises:
        AssertionError: the registry breaks its contract; the sentence says which part.
    """
    for check in _CHECKS:
        with ExitStack() as closing:
            place = _Place(make, crash or (lambda record: killed_process(make, record)), within, joins, closing)
            place.crash_within = within if crash_within is None else crash_within
            check(place)


@contextmanager
def killed_process(make: Callable[[], Registry], record: Record) -> Iterator[None]:
    """A forked process that has announced ``record`` through ``make()``; it is killed by SIGKILL at the exit.

    Args:
        make: gives the instance that the process uses.
        record: what it announces.

    Raises:
        AssertionError: the process could not announce it.
    """

    def announce(tell: Callable[[str], None], wait: Callable[[], None]) -> None:
        make().announce(record)
        tell("announced")
        wait()

    with _forked(announce) as child:
        answer = child.hear()
        _expect(answer == "announced", f"another process cannot announce a record: {answer}")
        yield


class _Place:
    """The place that all instances of one check share; gives instances and closes them."""

    def __init__(
        self, make: Callable[[], Registry], crash: Crash, within: float, joins: int, closing: ExitStack
    ) -> None:
        self.make, self.crash, self.joins, self._closing = make, crash, joins, closing
        self.within = self.crash_within = within

    def open(self) -> Registry:
        registry = self.make()
        self._closing.callback(registry.close)
        return registry

    def announced(self, record: Record) -> Registry:
        registry = self.open()
        registry.announce(record)
        return registry

    def watched(self, registry: Registry | None = None, *services: str) -> _Views:
        """The views of one instance that wants these services; all, where none is named."""
        views = _Views(self.within)
        registry = registry or self.open()
        registry.watch(views)
        _expect(bool(views.all), "watch delivers the view once before it returns")
        for service in services or ("",):
            self.want(registry, service)
        return views

    def want(self, registry: Registry, service: str) -> None:
        _expect(registry.want(service, 10 * self.within), f"want({service!r}) is answered by a registry that is there")


class _Views:
    """A ``deliver`` that keeps what it is given, and notices when it is called twice at once."""

    def __init__(self, within: float) -> None:
        self.all: list[tuple[Record, ...]] = []
        self.overlapped = False
        self._within = within
        self._inside = threading.Lock()
        self._changed = threading.Condition()

    def __call__(self, records: Sequence[Record]) -> None:
        if not self._inside.acquire(blocking=False):
            self.overlapped = True
            return
        try:
            time.sleep(0.0005)  # gives a second call the time to be seen
            with self._changed:
                self.all.append(tuple(records))
                self._changed.notify_all()
        finally:
            self._inside.release()

    @property
    def last(self) -> tuple[Record, ...]:
        return self.all[-1]

    def expect(self, records: Sequence[Record], promise: str, *, within: float | None = None) -> None:
        """The last view holds just these records, now or soon."""
        wanted = _by_node(records)
        with self._changed:
            self._changed.wait_for(lambda: _by_node(self.last) == wanted, self._within if within is None else within)
        _expect(_by_node(self.last) == wanted, f"{promise}; wanted {wanted}, the last view is {_by_node(self.last)}")


class _Child:
    def __init__(self, pid: int, answers: int) -> None:
        self.pid, self._answers = pid, answers

    def hear(self) -> str:
        """The next words of the child, or nothing if it has ended."""
        return os.read(self._answers, 65_536).decode()


@contextmanager
def _forked(work: Callable[[Callable[[str], None], Callable[[], None]], None]) -> Iterator[_Child]:
    """A forked child that runs ``work(tell, wait)``; killed at the exit. ``wait`` lasts as long as the parent."""
    answers, tell = os.pipe()
    alive, hold = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(hold)
            work(lambda words: _write(tell, words), lambda: _write(tell, os.read(alive, 1).decode()))
        except BaseException as error:
            _write(tell, f"{type(error).__name__}: {error}")
        finally:
            os._exit(0)
    os.close(tell)
    os.close(alive)
    try:
        yield _Child(pid, answers)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(answers)
        os.close(hold)


def _write(descriptor: int, words: str) -> None:
    os.write(descriptor, words.encode())


def _by_node(records: Sequence[Record]) -> list[Record]:
    return sorted(records, key=lambda record: record.node)


def _expect(condition: bool, promise: str) -> None:
    if not condition:
        raise AssertionError(promise)


def _record(number: int, **fields: object) -> Record:
    values = {"host": "host-1", "pid": number, "services": {"clock": ("a",)}} | fields
    return Record(node=f"{number * 7919 % 100_003:032x}", **values)  # type: ignore[arg-type]


# --- the checks ---


def _construction_does_nothing(place: _Place) -> None:
    threads = set(threading.enumerate())
    registry = place.make()
    _expect(set(threading.enumerate()) <= threads, "construction starts no thread")
    registry.refresh()
    registry.withdraw()
    registry.close()
    registry.close()


def _an_empty_place_is_an_empty_view(place: _Place) -> None:
    _expect(place.watched().last == (), "the view of an empty place is empty")


def _announced_records_are_seen_whole(place: _Place) -> None:
    early = place.watched()
    one = _record(
        1,
        host="host-ä",
        endpoints=("ipc:///nowhere/1.sock", "tcp://192.0.2.1:9501"),
        services={"clock": ("a", "a", "b"), "exchange/topic": ("host-7",)},
        idempotent={"clock": ("read",)},
        version="0.1.0",
        zone="north",
        state="draining",
        key="key",
        grant="grant",
    )
    two = _record(2)
    place.announced(one)
    early.expect([one], "an announced record reaches who watches already, with all its fields")
    place.announced(two)
    early.expect([one, two], "the whole view is delivered, not the change alone")
    late = place.watched()
    late.expect([one, two], "who begins to watch sees what was announced before")


def _own_records_are_in_the_view(place: _Place) -> None:
    registry = place.announced(_record(1))
    place.watched(registry).expect([_record(1)], "a node's own record is in its view")


def _the_order_is_stable(place: _Place) -> None:
    views = place.watched()
    for number in range(1, 9):
        place.announced(_record(number))
    records = [_record(number) for number in range(1, 9)]
    views.expect(records, "all records are seen")
    others = place.watched()
    others.expect(records, "all records are seen")
    _expect(views.last == others.last, "two watchers get the records in the same order")
    for before, after in pairwise(views.all):
        kept = [record.node for record in after if record in before]
        _expect(kept == [record.node for record in before if record in after], "records keep their order")


def _the_view_is_delivered_only_when_it_changed(place: _Place) -> None:
    registry = place.open()
    views = place.watched(registry)
    place.announced(_record(1))
    views.expect([_record(1)], "an announced record is seen")
    for _ in range(5):
        registry.refresh()
    _expect(all(before != after for before, after in pairwise(views.all)), "an unchanged view is not delivered again")


def _a_record_is_replaced(place: _Place) -> None:
    views = place.watched()
    registry = place.announced(_record(1))
    for state in ("draining", "serving", "draining"):
        registry.announce(_record(1, state=state))
    views.expect([_record(1, state="draining")], "a second announcement takes the place of the first")
    _expect(all(len(view) <= 1 for view in views.all), "a node has one record at a time")
    registry.announce(_record(2))
    views.expect([_record(2)], "an announcement under another node id takes the place of the one before")


def _a_withdrawn_record_goes(place: _Place) -> None:
    views = place.watched()
    one, two = place.announced(_record(1)), place.announced(_record(2))
    views.expect([_record(1), _record(2)], "announced records are seen")
    one.withdraw()
    views.expect([_record(2)], "a withdrawn record goes from the view, and no other")
    one.withdraw()
    one.announce(_record(1))
    views.expect([_record(1), _record(2)], "a node may announce again after a withdrawal")
    two.close()
    two.close()
    views.expect([_record(1)], "close withdraws the record, and may be called twice")


def _what_is_fresh_was_delivered(place: _Place) -> None:
    registry, other = place.open(), place.open()
    views = place.watched(registry)
    for number in range(50):
        other.announce(_record(1, version=str(number)))
        if registry.is_fresh():
            _expect(views.last == (_record(1, version=str(number)),), "a registry that says it is fresh has delivered")
        if number % 2:
            registry.refresh()


def _a_closed_registry_is_silent(place: _Place) -> None:
    closed, open_ = place.open(), place.open()
    silent, views = place.watched(closed), place.watched(open_)
    closed.close()
    before = len(silent.all)
    place.announced(_record(1))
    views.expect([_record(1)], "an announced record is seen")
    closed.refresh()
    _expect(len(silent.all) == before, "nothing is delivered after close")


def _servers_may_share_a_name(place: _Place) -> None:
    views = place.watched()
    names = (("host-7",), ("host-7",), ("host-7", "host-7"))
    records = [_record(number, services={"compute": each}) for number, each in enumerate(names, 1)]
    _, second, third = [place.announced(each) for each in records]
    views.expect(records, "several nodes may offer one server name, and a node may offer it several times")
    second.withdraw()
    views.expect([records[0], records[2]], "one of the nodes with a server name goes, the others stay")
    third.announce(_record(3, services={"compute": ("host-7",)}))
    expected = [records[0], _record(3, services={"compute": ("host-7",)})]
    views.expect(expected, "one of two servers of one name in a node ends, the other stays")


def _what_is_wanted_is_delivered(place: _Place) -> None:
    registry = place.open()
    views, everybody = place.watched(registry, "clock"), place.watched()
    services = {"clock": ("a",), "compute": ("host-7",)}
    place.announced(_record(1, services=services))
    place.announced(_record(2, services={"compute": ("host-8",)}))
    place.announced(_record(3))
    deadline = time.monotonic() + place.within
    while not {_record(1).node, _record(3).node} <= {record.node for record in views.last}:
        _expect(time.monotonic() < deadline, "whoever offers a wanted service is delivered")
        time.sleep(0.005)
    everything = [_record(1, services=services), _record(2, services={"compute": ("host-8",)}), _record(3)]
    wanted = [_record(1), _record(3)]
    filters = _by_node(views.last) == _by_node(wanted)
    _expect(
        filters or all(record in everything for record in views.last),
        f"a record holds only the services that are wanted, or all of its own; delivered was {views.last}",
    )
    if filters:
        delivered = {service for view in views.all for record in view for service in record.services}
        _expect(delivered == {"clock"}, "a registry that filters delivers nobody whose services nobody wants")
    everybody.expect(everything, "what is announced is delivered to who wants everything")  # it has arrived, that is
    place.want(registry, "compute")
    _expect(
        {_record(1).node, _record(2).node, _record(3).node} == {record.node for record in views.last},
        "who offers one more wanted service is delivered before want returns",
    )
    views.expect(everything, "a record holds all services that are wanted")
    place.want(registry, "nobody offers this")
    views.expect(everything, "wanting what nobody offers changes nothing")


def _deliver_may_ask_for_a_refresh(place: _Place) -> None:
    registry = place.open()
    seen: list[Sequence[Record]] = []

    def deliver(records: Sequence[Record]) -> None:
        seen.append(records)
        registry.refresh()
        registry.want("", place.within)

    watching = threading.Thread(target=lambda: registry.watch(deliver), daemon=True)
    watching.start()
    place.announced(_record(1))
    deadline = time.monotonic() + place.within + 1.0
    while not (seen and len(seen[-1]) == 1):
        _expect(time.monotonic() < deadline, "refresh may be called inside deliver")
        time.sleep(0.005)
    watching.join(place.within + 1.0)
    _expect(not watching.is_alive(), "watch returns once it has delivered")


def _many_join_at_once(place: _Place) -> None:
    registry = place.open()
    views, records = place.watched(registry), [_record(number) for number in range(1, place.joins + 1)]
    views.expect([], "whom the check before announced is gone", within=10 * place.within)
    before = len(views.all) - 1
    instances = [place.open() for _ in records]
    ended = threading.Event()

    def refresh() -> None:
        while not ended.is_set():
            registry.refresh()

    def announce(numbers: range) -> None:
        for number in numbers:
            instances[number].announce(records[number])

    refreshing = threading.Thread(target=refresh)
    joining = [threading.Thread(target=announce, args=(range(first, place.joins, 4),)) for first in range(4)]
    for thread in (refreshing, *joining):
        thread.start()
    for thread in joining:
        thread.join()
    try:
        views.expect(records, f"{place.joins} nodes that join at once are all seen", within=10 * place.within)
    finally:
        ended.set()
        refreshing.join()
    for view in views.all[before:]:
        _expect(len({record.node for record in view}) == len(view), "a node stands once in a view")
        _expect(all(record in records for record in view), "a record is never seen half-written")
    for instance in instances:
        instance.withdraw()
    views.expect([], f"{place.joins} nodes that leave at once are all gone", within=10 * place.within)
    _expect(not views.overlapped, "deliver is never called twice at once")


def _a_fork_leaves_the_parent_alone(place: _Place) -> None:
    parent = place.announced(_record(1))
    views = place.watched()
    inherited = place.watched(parent)

    def child(tell: Callable[[str], None], wait: Callable[[], None]) -> None:
        parent.forget()
        own = place.make()
        own.announce(_record(2))
        parent.forget()
        parent.close()
        tell("announced")
        wait()

    with _forked(child) as forked:
        answer = forked.hear()
        _expect(answer == "announced", f"a forked child forgets the inherited instance and announces anew: {answer}")
        views.expect([_record(1), _record(2)], "parent and child both have a record")
        inherited.expect([_record(1), _record(2)], "the parent's watch survives a fork")
    views.expect([_record(1)], "the child's record ends with the child, and no other", within=place.crash_within)
    parent.announce(_record(1, state="draining"))
    views.expect([_record(1, state="draining")], "the parent goes on announcing")
    parent.withdraw()
    views.expect([], "the parent can withdraw after a fork")


def _the_dead_are_not_delivered(place: _Place) -> None:
    views = place.watched()
    with place.crash(_record(1)), place.crash(_record(2)):
        views.expect([_record(1), _record(2)], "records of other processes are seen")
        place.announced(_record(3))
    gone = f"the record of a killed process is gone after {place.crash_within} s"
    views.expect([_record(3)], gone, within=place.crash_within)
    _expect(place.watched().last == (_record(3),), "who begins to watch is never told of the dead")


_CHECKS = (
    _construction_does_nothing,
    _an_empty_place_is_an_empty_view,
    _announced_records_are_seen_whole,
    _own_records_are_in_the_view,
    _the_order_is_stable,
    _the_view_is_delivered_only_when_it_changed,
    _a_record_is_replaced,
    _a_withdrawn_record_goes,
    _what_is_fresh_was_delivered,
    _a_closed_registry_is_silent,
    _servers_may_share_a_name,
    _what_is_wanted_is_delivered,
    _deliver_may_ask_for_a_refresh,
    _many_join_at_once,
    _a_fork_leaves_the_parent_alone,
    _the_dead_are_not_delivered,
)
