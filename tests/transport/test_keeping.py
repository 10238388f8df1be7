"""The housekeeping looks at links where something came, and at those that are in use; idle ones cost nothing."""

from __future__ import annotations

import errno
import os
import select
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from onehop.transport.waiting import Watch

EPOLL = select.epoll


@pytest.fixture
def bell() -> Any:
    descriptor = os.eventfd(0, os.EFD_NONBLOCK)
    yield descriptor
    os.close(descriptor)


def test_watch_tells_what_is_readable_and_whose_it_is(bell: int) -> None:
    watch = Watch()
    watch.add(bell, "mine")
    assert watch.wait(0.0) == []
    os.eventfd_write(bell, 1)
    assert watch.wait(5.0) == [(bell, "mine")]
    assert watch.wait(5.0) == [(bell, "mine")]  # for as long as it is readable
    os.eventfd_read(bell)
    assert watch.wait(0.0) == []


def test_watch_forgets_what_cannot_be_watched(bell: int, tmp_path: Path) -> None:
    watch = Watch()
    with open(tmp_path / "file", "w") as file:
        with pytest.raises(PermissionError):  # epoll watches no plain file
            watch.add(file.fileno(), "never")
        os.dup2(bell, file.fileno())
        watch.add(file.fileno(), "mine")
        os.eventfd_write(bell, 1)
        assert watch.wait(5.0) == [(file.fileno(), "mine")]
        watch.discard(file.fileno())


class BreakingEpoll:
    """An epoll of the system whose next wait breaks once for each entry of ``breaks``."""

    breaks: ClassVar[list[None]] = []

    def __init__(self) -> None:
        self._inner = EPOLL()

    def poll(self, seconds: float) -> Any:
        if self.breaks:
            self.breaks.pop()
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return self._inner.poll(seconds)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def test_housekeeping_outlives_a_round_that_breaks(
    make_node: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, eventually: Any
) -> None:
    monkeypatch.setattr(select, "epoll", BreakingEpoll)
    serving, calling = make_node(), make_node()
    serving.serve("clock", {"read": lambda: 1})
    assert calling.call("clock", "read") == 1
    BreakingEpoll.breaks.append(None)
    eventually(lambda: not BreakingEpoll.breaks)
    serving.close()
    eventually(lambda: not calling._core()._links, within=10.0)
    assert "the housekeeping of node" in caplog.text


def test_watch_does_not_tell_of_what_was_discarded_until_it_is_added_again(bell: int) -> None:
    watch = Watch()
    watch.add(bell, "mine")
    watch.discard(bell)
    watch.discard(bell)
    os.eventfd_write(bell, 1)
    assert watch.wait(0.0) == []
    watch.add(bell, "another's")
    assert watch.wait(5.0) == [(bell, "another's")]


def test_watch_hears_of_what_is_added_while_it_waits(bell: int, background: Callable[..., Any]) -> None:
    watch = Watch()
    waiting = background(watch.wait, 20.0)
    watch.add(bell, "late")
    os.eventfd_write(bell, 1)
    assert waiting.result() == [(bell, "late")]


def test_watch_works_where_a_patch_took_epoll_away() -> None:
    done = subprocess.run(
        [sys.executable, "-c", """
import os, select
from onehop.transport.waiting import Watch
early = Watch()
del select.epoll, select.poll
for watch in (early, Watch()):
    bell = os.eventfd(0)
    watch.add(bell, "mine")
    assert watch.wait(0.0) == []
    os.eventfd_write(bell, 1)
    assert watch.wait(5.0) == [(bell, "mine")]
    watch.discard(bell)
    assert watch.wait(0.0) == []
"""],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def only_link(node: Any) -> Any:
    (link,) = node._core()._links.values()
    return link


def test_link_rests_when_no_call_is_under_way_and_not_before(make_node, background, eventually) -> None:
    gate = threading.Event()
    make_node().serve("clock", {"hold": lambda: gate.wait(20.0), "read": lambda: 1})
    calling = make_node()
    assert calling.call("clock", "read") == 1
    link = only_link(calling)
    eventually(lambda: link.resting, within=5.0)
    held = background(calling.call, "clock", "hold")
    eventually(lambda: not link.resting, within=5.0)
    gate.set()
    assert held.result() is True
    eventually(lambda: link.resting, within=5.0)


def test_what_comes_over_a_resting_link_is_heard(make_node, eventually) -> None:
    serving = make_node()
    serving.serve("clock", {"read": lambda: 1})
    calling = make_node()
    assert calling.call("clock", "read") == 1
    link = only_link(calling)
    for _ in range(2):  # it is waited for again after it was heard
        eventually(lambda: link.resting, within=5.0)
        calls, frames = link.calls, link.bad_frames
        inbound = serving._core().inbound
        (identity,) = serving._core().protocol.inbox.senders
        with inbound._lock:
            assert inbound.socket.send(identity, b"\x63" + bytes(15))  # of a kind that there is not
        eventually(lambda frames=frames: link.bad_frames == frames + 1, within=5.0)
        assert link.calls is calls
    assert calling.call("clock", "read") == 1


def test_end_of_a_resting_link_is_heard_at_once(make_node, eventually) -> None:
    serving = make_node()
    serving.serve("clock", {"read": lambda: 1})
    calling = make_node()
    assert calling.call("clock", "read") == 1
    link = only_link(calling)
    eventually(lambda: link.resting, within=5.0)
    serving.close()
    eventually(lambda: link.over and link._closed, within=5.0)
    assert set(calling._core()._watch._watched.values()) == {None}, "descriptors that were given back are waited for"


def test_link_that_is_not_used_is_closed_and_opened_again_by_the_next_call(make_node, eventually) -> None:
    serving = make_node()
    serving.serve("clock", {"read": lambda: 1})
    calling = make_node(idle_timeout=0.5)
    for _ in range(2):
        assert calling.call("clock", "read") == 1
        link = only_link(calling)
        eventually(lambda link=link: link.over and link._closed, within=10.0)
        assert (link.ended, link.peer.state, link.peer.failures) == ("it was not used for a while", "known", 0)
        eventually(lambda: not serving._core().protocol.inbox.senders)  # the goodbye was heard
    assert set(calling.statistics().outcomes.values()) <= {0}


def test_link_on_which_a_call_waits_is_kept_however_long_it_takes(make_node, background, eventually) -> None:
    gate = threading.Event()
    make_node().serve("clock", {"hold": lambda: gate.wait(20.0)})
    calling = make_node(idle_timeout=0.2)
    held = background(calling.call, "clock", "hold")
    eventually(lambda: calling._core()._links)
    link = only_link(calling)
    eventually(lambda: link.ready)
    looked = calling._core()._looked_for_idle
    eventually(lambda: calling._core()._looked_for_idle > looked + 1.5, within=20.0)
    assert link.ended is None
    gate.set()
    assert held.result() is True


def test_no_call_fails_while_links_are_closed_under_it(make_node, background) -> None:
    make_node().serve("clock", {"read": lambda: 1})
    calling = make_node()
    assert calling.call("clock", "read") == 1
    engine = calling._core()
    closed = 0
    for _ in range(100):
        call = background(calling.call, "clock", "read")
        while not call.ended:
            for link in list(engine._links.values()):
                if link.ready and link.retire("for this test"):
                    engine._lost(link.peer, link, "for this test", "idle")
                    closed += 1
        assert call.result() == 1
    assert closed >= 20
