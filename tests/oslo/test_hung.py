"""A server whose threads all hang, as in a deadlock: oslo.messaging takes requests for it all the same."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import oslo_messaging

from onehop.oslo.listener import AHEAD

RATE = 100.0
"""Calls a second, each of which takes 50 ms."""
OUT, BACK = 6.0, 5.0
"""Seconds until nobody is sent to who hangs, and until somebody is again who hangs no more."""


class Answered(NamedTuple):
    """One call: seconds from the first, until the end, and who answered."""

    began: float
    ended: float
    pid: int


class Load:
    """Calls at a steady rate, whatever becomes of those before."""

    def __init__(self, client: Any, threads: ThreadPoolExecutor) -> None:
        self._client = client
        self._threads = threads
        self._began = time.monotonic()
        self.calls: list[Future[Answered]] = []

    def now(self) -> float:
        return time.monotonic() - self._began

    def _call(self) -> Answered:
        began = self.now()
        pid = self._client.call({}, "pid")
        return Answered(began, self.now(), pid)

    def run(self, until: Callable[[], bool], limit: float) -> float:
        """Call until that is so; when it was."""
        began = self.now()
        while not until():
            assert self.now() < began + limit, "not so in time"
            self.burst(1)
            time.sleep(1 / RATE)
        return self.now()

    def burst(self, calls: int) -> None:
        """So many at once: more than anybody has under way, so that who is in rotation gets some."""
        self.calls += [self._threads.submit(self._call) for _ in range(calls)]

    def answered(self, pid: int, since: float) -> int:
        """How many calls that began ``since`` were answered there."""
        done = [each.result() for each in self.calls if each.done()]
        return sum(each.pid == pid and each.began >= since for each in done)


def test_a_server_whose_threads_hang_is_called_no_more_until_they_go_on(bus: Any, start: Any, eventually: Any) -> None:
    programs = start("hang", server="host-1", threads=8), start("hang", server="host-2", threads=8)
    hanging, well = (program.line()["ready"] for program in programs)
    client = bus.client("compute", timeout=60)
    eventually(lambda: {client.call({}, "pid") for _ in range(4)} == {hanging, well})
    with ThreadPoolExecutor(1000) as threads:
        load = Load(client, threads)
        load.run(lambda: load.answered(hanging, 0.0) > 5 and load.answered(well, 0.0) > 5, 10.0)
        programs[0].tell("hang")
        assert programs[0].line() == "hang"
        hung = load.now()
        load.burst(100)
        load.run(lambda: load.now() >= hung + OUT, OUT + 5.0)
        load.burst(200)
        load.run(lambda: load.now() >= hung + OUT + 3.0, OUT + 5.0)
        programs[0].tell("go on")
        assert programs[0].line() == "go on"
        free = load.now()
        load.run(lambda: load.answered(hanging, free) > 5, BACK)
    calls = [each.result() for each in load.calls]  # none is lost, and none runs into its timeout
    waited = [each.began - hung for each in calls if each.pid == hanging and hung <= each.began < free]
    print(f"{len(waited)} calls waited for threads that hung; the last of them began {max(waited):.1f} s after")
    assert max(waited) < OUT


def test_what_waits_for_a_thread_too_long_is_not_run_and_makes_room_for_others(bus: Any, start: Any) -> None:
    program = start("hang", threads="1")
    assert program.line()["ready"]
    client = bus.client("compute", timeout=10)
    client.call({}, "pid")
    program.tell("hang")
    assert program.line() == "hang"
    with ThreadPoolExecutor(300) as threads:
        hasty = bus.client("compute", client.transport, timeout=1)
        lost = [
            threads.submit(hasty.call, {}, "pid") for _ in range(200)
        ]  # more than are taken before a thread is free
        assert all(isinstance(each.exception(), oslo_messaging.MessagingTimeout) for each in lost)
        later = threads.submit(client.call, {}, "pid")
        program.tell("go on")
        assert program.line() == "go on"
        assert later.result() == program.pid


def test_polls_take_no_more_than_is_begun_and_some(bus: Any) -> None:
    listener = bus.transport()._driver.listen(oslo_messaging.Target(topic="compute", server="h"), 1, None)
    polled = listener._poll_style_listener
    client = bus.client("compute", timeout=30)
    found: list[Any] = []
    with ThreadPoolExecutor(200) as threads:
        calls = [threads.submit(client.call, {}, "echo", value=number) for number in range(200)]
        while len(found) < AHEAD:
            found += polled.poll(timeout=10.0)
        assert polled.poll(timeout=1.0) == []
        for each in found[:-1]:
            each.acknowledge()
        for _ in range(AHEAD - 1):
            found += polled.poll(timeout=5.0)
        assert polled.poll(timeout=0.0) == []
        polled.stop()
        while batch := polled.poll(timeout=1.0):  # what was taken in is handed out when it ends, however many that are
            found += batch
        for each in found:
            each.acknowledge()
            each.reply(each.message["args"]["value"])
        assert [each.result() for each in calls] == list(range(200))
    listener.cleanup()
