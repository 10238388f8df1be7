"""How a thread waits and is woken."""

from __future__ import annotations

import gc
import os
import threading
import time

import pytest

from onehop.transport.waiting import Wake, acquire, new_lock, poll, release


def test_wake_that_came_before_the_wait_ends_it() -> None:
    wake = Wake()
    wake.set()
    wake.set()
    began = time.monotonic()
    wake.wait(30.0)
    assert time.monotonic() - began < 5


def test_wait_that_is_not_woken_ends_in_time_never_early() -> None:
    wake = Wake()
    for seconds in (0.0, 0.0004, 0.05):
        began = time.monotonic()
        wake.wait(seconds)
        assert seconds <= time.monotonic() - began < seconds + 5


@pytest.mark.parametrize("seconds", [-1.0, 0.0])
def test_wait_without_time_returns_at_once(seconds: float) -> None:
    began = time.monotonic()
    Wake().wait(seconds)
    assert time.monotonic() - began < 5


def test_wait_without_an_end_is_woken_by_another_thread(background) -> None:
    wake = Wake()
    waiting = background(wake.wait, float("inf"))
    wake.set()
    waiting.result(2.0)


def test_wait_ends_when_the_descriptor_beside_it_is_readable() -> None:
    other = os.eventfd(0, os.EFD_NONBLOCK)
    wake = Wake(other)
    os.eventfd_write(other, 1)
    began = time.monotonic()
    wake.wait(30.0)
    assert time.monotonic() - began < 5
    os.close(other)


def test_poll_names_those_that_are_readable() -> None:
    first, second = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
    assert poll([first, second], 0.0) == []
    os.eventfd_write(second, 1)
    assert poll([first, second], 30.0) == [second]
    os.close(first)
    os.close(second)


def test_lock_may_be_released_twice() -> None:
    lock = new_lock()
    lock.acquire()
    release(lock)
    release(lock)
    assert acquire(lock, 0.0)
    assert not acquire(lock, 0.0)
    assert not acquire(lock, -5.0)


def test_waiting_for_a_lock_takes_any_number_of_seconds(background) -> None:
    lock = new_lock()
    lock.acquire()
    waiting = background(acquire, lock, float("inf"))
    release(lock)
    assert waiting.result(2.0) is True


def test_wake_gives_its_descriptor_back() -> None:
    gc.collect()  # what other tests left
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        Wake()
    assert len(os.listdir("/proc/self/fd")) <= before


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def test_closed_wake_never_writes_to_what_gets_its_number_next(background, eventually) -> None:
    for _ in range(50):
        wake = Wake()
        begun, ended = threading.Event(), threading.Event()

        def set_often(wake: Wake = wake, begun: threading.Event = begun, ended: threading.Event = ended) -> None:
            while not ended.is_set():
                wake.set()
                begun.set()

        setting = [background(set_often) for _ in range(2)]
        assert begun.wait(10.0)
        number = wake.fd
        wake.close()
        eventually(lambda number=number: not is_open(number))  # a thread that was about to set it gives it back
        others = []
        while number not in others:
            others.append(os.eventfd(0, os.EFD_NONBLOCK))
            assert len(others) < 10_000
        wake.set()
        ended.set()
        for each in setting:
            each.result()
        for each in others:
            with pytest.raises(BlockingIOError):  # nothing was written
                os.eventfd_read(each)
            os.close(each)


def test_wait_of_a_closed_wake_ends_in_time() -> None:
    other = os.eventfd(1, os.EFD_NONBLOCK)
    wake = Wake(other)
    wake.close()
    wake.close()
    wake.clear()
    began = time.monotonic()
    wake.wait(0.05)
    assert time.monotonic() - began >= 0.05
    os.close(other)
