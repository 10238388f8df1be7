"""The compiled way to a socket keeps the promises of ``_native.pyi``, against real sockets of ZeroMQ."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import pytest
import zmq
import zmq.backend.cython._zmq as backend

SOURCE = Path(__file__).parents[2] / "src" / "onehop" / "transport" / "_native.c"
SOON = 10_000
LARGE = 1_000_000


@pytest.fixture(scope="module")
def native() -> Any:
    try:
        from onehop.transport import _native
    except ImportError as error:
        if shutil.which("cc"):
            pytest.fail(f"there is a C compiler and no compiled module: run 'pip install --editable .' ({error})")
        pytest.skip("there is no C compiler here, so that nothing was compiled that could be tested")
    _native.bind(backend.__file__)
    return _native


Make = Callable[..., Any]


@pytest.fixture
def make() -> Iterator[Make]:
    """``make(kind, **options)`` makes sockets of one context."""
    context: zmq.Context[Any] = zmq.Context()
    sockets: list[zmq.Socket[bytes]] = []

    def make(kind: int, **options: Any) -> zmq.Socket[bytes]:
        sockets.append(context.socket(kind))
        for name, value in options.items():
            sockets[-1].set(getattr(zmq, name), value)
        return sockets[-1]

    yield make
    for socket in sockets:
        socket.close(0)
    context.term()


@pytest.fixture(params=["inproc", "ipc"])
def pair(request: pytest.FixtureRequest, make: Make, run_directory: str) -> tuple[Any, Any, bytes]:
    """A ROUTER, a DEALER connected to it, and the identity it has there."""
    endpoint = "inproc://here" if request.param == "inproc" else f"ipc://{run_directory}/s"
    router, dealer = make(zmq.ROUTER, ROUTER_MANDATORY=1), make(zmq.DEALER)
    router.bind(endpoint)
    dealer.connect(endpoint)
    dealer.send(b"hello")
    identity, _ = router.recv_multipart()
    return router, dealer, identity


def drained(drain: Any, socket: Any, wanted: int = 1, limit: int = 100) -> list[Any]:
    """What has come once there are `wanted` messages."""
    into: list[Any] = []
    deadline = time.monotonic() + SOON / 1000
    while len(into) < wanted:
        assert time.monotonic() < deadline, into
        if not drain(socket.underlying, limit, into):
            socket.poll(10)
    return into


def plain(entries: list[Any]) -> list[tuple[Any, ...]]:
    return [tuple(bytes(each) if isinstance(each, memoryview) else each for each in entry) for entry in entries]


# What it is made of -------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler here")
def test_compiling_gives_no_warning(tmp_path: Path) -> None:
    include = sysconfig.get_path("include")
    command = ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", f"-I{include}", "-c", str(SOURCE)]
    done = subprocess.run([*command, "-o", str(tmp_path / "native.o")], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")


def test_another_library_than_pyzmqs_is_refused_and_the_first_stays(native: Any, pair: Any, tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"_core\..* does not lead to libzmq: zmq_msg_init is not found"):
        native.bind(msgspec._core.__file__)
    second = shutil.copy(backend.__file__, tmp_path)
    for path in (second, "/nowhere/lib.so"):
        with pytest.raises(ImportError, match=f"{path} is not loaded: give the file of pyzmq's imported backend"):
            native.bind(path)
    router, dealer, _ = pair
    assert native.send(dealer.underlying, b"x")
    assert drained(native.drain_from, router)[0][1] == b"x"


def test_nothing_works_before_it_is_bound(native: Any) -> None:
    names = [*AFTER_THE_SOCKET, "wait"]
    program = f"""if True:
        from importlib.util import module_from_spec, spec_from_file_location
        spec = spec_from_file_location("_native", {native.__file__!r})
        native = module_from_spec(spec)
        spec.loader.exec_module(native)
        for name in {names!r}:
            try:
                getattr(native, name)()
            except RuntimeError as error:
                print(error)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "not bound to libzmq: call bind() first\n" * len(names), done.stderr


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("bind", (1,), TypeError),
        ("send", (0,), TypeError),
        ("send", (0, b"", b""), TypeError),
        ("send", ("0", b""), TypeError),
        ("send", (0, "text"), TypeError),
        ("send", (0, bytearray(b"x")), TypeError),
        ("send_to", (0, "name", b""), TypeError),
        ("send_to", (0, b"name", ""), TypeError),
        ("drain", (0, 1), TypeError),
        ("drain", (0, 1, ()), TypeError),
        ("drain", (0, 2**31, []), OverflowError),
        ("drain_from", (0, 1.5, []), TypeError),
        ("receive_from", (0, 0, 0, 0), TypeError),
        ("receive_from", (0, 0, 0, 0, ()), TypeError),
        ("receive_from", (0, 0, 0, 1.5, []), TypeError),
        ("exchange", (0, b"", 0, 0, 0), TypeError),
        ("exchange", (0, b"", 0, 0, 0, ()), TypeError),
        ("exchange", (0, "", 0, 0, 0, []), TypeError),
        ("exchange", (0, b"", 0, 0, 1.5, []), TypeError),
        ("wait", (0, 0), TypeError),
        ("wait", (0, 0, 1.5), TypeError),
        ("wait", (0, 0, 2**70), OverflowError),
    ],
)
def test_wrong_arguments_are_refused(native: Any, name: str, arguments: tuple[Any, ...], error: type) -> None:
    with pytest.raises(error):
        getattr(native, name)(*arguments)


AFTER_THE_SOCKET: dict[str, tuple[Any, ...]] = {
    "send": (b"x",),
    "send_to": (b"x", b"y"),
    "drain": (10, []),
    "drain_from": (10, []),
    "receive_from": (-1, -1, 0, []),
    "exchange": (b"x", -1, -1, 0, []),
}


@pytest.mark.parametrize(("name", "arguments"), AFTER_THE_SOCKET.items())
def test_no_socket_is_a_clear_error(native: Any, name: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(OSError, match="Socket operation on non-socket") as caught:
        getattr(native, name)(0, *arguments)
    assert caught.value.errno == errno.ENOTSOCK


def test_context_that_ends_is_an_error_in_the_words_of_zeromq(native: Any, background: Any, eventually: Any) -> None:
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    ending = background(context.term)  # which waits for the socket to be closed
    eventually(lambda: _number_of_error(socket.get, zmq.EVENTS) == zmq.ETERM)
    for name, arguments in AFTER_THE_SOCKET.items():
        with pytest.raises(OSError, match="Context was terminated") as caught:
            getattr(native, name)(socket.underlying, *arguments)
        assert caught.value.errno == zmq.ETERM
    socket.close(0)
    ending.result()


def _number_of_error(function: Callable[..., Any], *arguments: Any) -> int | None:
    try:
        function(*arguments)
    except zmq.ZMQError as error:
        return error.errno
    return None


# Sending ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frame", [b"", b"x", b"y" * 33, b"z" * 60_000], ids=len)
def test_frame_goes_both_ways_as_it_is(native: Any, pair: Any, frame: bytes) -> None:
    router, dealer, identity = pair
    assert native.send(dealer.underlying, frame) is True
    assert router.recv_multipart() == [identity, frame]
    assert native.send_to(router.underlying, identity, frame) is True
    assert dealer.recv_multipart() == [frame]


def test_send_says_that_there_is_no_connection(native: Any, make: Make) -> None:
    assert native.send(make(zmq.DEALER).underlying, b"x") is False


def test_send_says_that_there_is_no_room_and_goes_on_when_there_is(native: Any, make: Make) -> None:
    router, dealer = make(zmq.ROUTER, RCVHWM=2), make(zmq.DEALER, SNDHWM=2)
    router.bind("inproc://here")
    dealer.connect("inproc://here")
    for number in range(4):
        assert native.send(dealer.underlying, b"%d" % number) is True
    assert native.send(dealer.underlying, b"too much") is False
    assert [each[1] for each in drained(native.drain_from, router, 4)] == [b"0", b"1", b"2", b"3"]
    assert native.send(dealer.underlying, b"again") is True
    assert [each[1] for each in drained(native.drain_from, router)] == [b"again"]


def test_send_to_says_that_one_connection_has_no_room_and_reaches_the_other(native: Any, make: Make) -> None:
    router = make(zmq.ROUTER, ROUTER_MANDATORY=1, SNDHWM=2)
    router.bind("inproc://here")
    dealers = [make(zmq.DEALER, RCVHWM=2, IDENTITY=name) for name in (b"slow", b"quick")]
    for dealer in dealers:
        dealer.connect("inproc://here")
        dealer.send(b"hello")
        router.recv_multipart()
    for number in range(4):
        assert native.send_to(router.underlying, b"slow", b"%d" % number) is True
    assert native.send_to(router.underlying, b"slow", b"too much") is False
    assert native.send_to(router.underlying, b"quick", b"first") is True
    assert plain(drained(native.drain, dealers[1])) == [(b"first", None)]
    assert plain(drained(native.drain, dealers[0], 4)) == [(b"%d" % number, None) for number in range(4)]
    assert native.send_to(router.underlying, b"slow", b"again") is True
    assert plain(drained(native.drain, dealers[0])) == [(b"again", None)]


def test_connection_that_is_not_there_is_an_error_that_harms_no_other(native: Any, pair: Any) -> None:
    router, dealer, identity = pair
    for name in (b"nobody", b""):
        with pytest.raises(ConnectionResetError):
            native.send_to(router.underlying, name, b"x")
    assert native.send_to(router.underlying, identity, b"y") is True
    assert dealer.recv_multipart() == [b"y"]


def test_connection_that_ended_becomes_an_error(native: Any, pair: Any, eventually: Any) -> None:
    router, dealer, identity = pair
    dealer.close(0)

    def refused() -> bool:
        try:
            native.send_to(router.underlying, identity, b"x")
        except ConnectionResetError:
            return True
        return False

    eventually(refused)


# Receiving ----------------------------------------------------------------------------------------


def test_nothing_there_is_no_error(native: Any, pair: Any) -> None:
    router, dealer, _ = pair
    into: list[Any] = []
    assert native.drain(dealer.underlying, 10, into) is False
    assert native.drain_from(router.underlying, 10, into) is False
    assert into == []


def test_messages_of_one_and_two_frames_arrive_in_order(native: Any, pair: Any) -> None:
    router, dealer, identity = pair
    sent = [[b"one"], [b"two", b"body"], [b""], [b"", b""], [b"large", b"x" * LARGE]]
    for frames in sent:
        dealer.send_multipart(frames)
        router.send_multipart([identity, *frames])
    expected = [(frames[0], frames[1] if len(frames) == 2 else None) for frames in sent]
    assert plain(drained(native.drain, dealer, len(sent))) == expected
    assert plain(drained(native.drain_from, router, len(sent))) == [(identity, *each) for each in expected]


def test_message_of_more_frames_does_not_shift_the_border(native: Any, pair: Any) -> None:
    router, dealer, identity = pair
    for frames in ([b"one", b"two", b"three"], [b"1", b"2", b"3", b"4", b"5"], [b"next"]):
        dealer.send_multipart(frames)
        router.send_multipart([identity, *frames])
    expected = [(b"", b"two"), (b"", b"2"), (b"next", None)]
    assert plain(drained(native.drain, dealer, 3)) == expected
    assert plain(drained(native.drain_from, router, 3)) == [(identity, *each) for each in expected]


def test_message_without_an_identity_has_an_empty_frame(native: Any, pair: Any) -> None:
    router, dealer, identity = pair
    router.send_multipart([identity, b"alone"])
    assert drained(native.drain_from, dealer) == [(b"alone", b"", None)]


def test_no_more_than_the_limit_is_taken(native: Any, pair: Any) -> None:
    router, dealer, _ = pair
    for number in range(5):
        dealer.send(b"%d" % number)
    into: list[Any] = []
    assert native.drain_from(router.underlying, 0, into) is True
    assert native.drain_from(router.underlying, -1, into) is True
    assert into == []
    for wanted in (2, 4):
        deadline = time.monotonic() + SOON / 1000
        while len(into) < wanted:
            assert time.monotonic() < deadline
            full = native.drain_from(router.underlying, wanted - len(into), into)
        assert full is True
        assert len(into) == wanted
    assert [each[1] for each in into + drained(native.drain_from, router)] == [b"0", b"1", b"2", b"3", b"4"]


def test_list_keeps_what_it_has(native: Any, pair: Any) -> None:
    router, dealer, identity = pair
    dealer.send(b"x")
    router.poll(SOON)
    into: list[Any] = ["before"]
    assert native.drain_from(router.underlying, 10, into) is False
    assert into == ["before", (identity, b"x", None)]


def test_large_body_is_the_memory_of_the_sender_in_the_same_process(native: Any, make: Make) -> None:
    router, dealer = make(zmq.ROUTER), make(zmq.DEALER)
    router.bind("inproc://here")
    dealer.connect("inproc://here")
    body = bytearray(LARGE)
    dealer.send_multipart([b"head", body], copy=False)
    ((_, head, view),) = drained(native.drain_from, router)
    body[-1] = 7
    assert (head, len(view), view[-1]) == (b"head", LARGE, 7)


def test_large_body_is_read_only_and_outlives_its_socket(native: Any, pair: Any) -> None:
    router, dealer, _ = pair
    body = os.urandom(LARGE)
    dealer.send_multipart([b"head", body])
    ((_, _, view),) = drained(native.drain_from, router)
    router.close(0)
    dealer.close(0)
    gc.collect()
    assert view.readonly
    assert (view.format, view.ndim, view.nbytes) == ("B", 1, LARGE)
    with pytest.raises(TypeError):
        view[0] = 1
    with pytest.raises(TypeError):
        type(view.obj)()
    part = view[10:20]
    assert view == body
    del view
    assert part == body[10:20]


# Waiting ------------------------------------------------------------------------------------------


@pytest.fixture
def wake() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


def test_wait_ends_when_its_time_is_over(native: Any, wake: int) -> None:
    begun = time.monotonic()
    assert native.wait(-1, wake, 50) == 0
    assert 0.05 <= time.monotonic() - begun < 5
    assert native.wait(-1, wake, 0) == 0


def test_wake_ends_one_wait(native: Any, wake: int, background: Any) -> None:
    os.eventfd_write(wake, 1)
    os.eventfd_write(wake, 1)
    assert native.wait(-1, wake, SOON) == 2
    assert native.wait(-1, wake, 0) == 0
    waiting = background(native.wait, -1, wake, -1)
    os.eventfd_write(wake, 1)
    assert waiting.result() == 2


def test_message_ends_a_wait_and_both_are_told(native: Any, pair: Any, wake: int, background: Any) -> None:
    router, dealer, _ = pair
    into: list[Any] = []
    assert native.drain_from(router.underlying, 10, into) is False
    waiting = background(native.wait, router.fd, wake, SOON)
    dealer.send(b"x")
    assert waiting.result() == 1
    os.eventfd_write(wake, 1)
    assert native.wait(router.fd, wake, SOON) == 3
    assert len(drained(native.drain_from, router)) == 1


def test_broken_descriptor_ends_the_wait(native: Any, wake: int) -> None:
    reader, writer = os.pipe()
    os.close(writer)
    assert native.wait(reader, wake, SOON) == 1
    os.close(reader)
    with pytest.raises(OSError, match="Bad file descriptor"):
        native.wait(-1, reader, SOON)


def test_keyboard_interrupt_ends_the_wait_at_once(native: Any, eventually: Any) -> None:
    program = """if True:
        import os
        import zmq.backend.cython._zmq as backend
        from onehop.transport import _native as native
        native.bind(backend.__file__)
        wake = os.eventfd(0, os.EFD_NONBLOCK)
        try:
            print("ready", flush=True)
            native.wait(-1, wake, 60_000)
        except KeyboardInterrupt:
            print("interrupted")
    """
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        eventually(lambda: Path(f"/proc/{process.pid}/stat").read_text().rsplit(") ", 1)[1].startswith("S"))
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30)[0] == "interrupted\n"
        assert time.monotonic() - begun < 5


Alarm = Callable[[Callable[[], Any]], None]


@pytest.fixture
def alarm() -> Iterator[Alarm]:
    """``alarm(function)``: a signal's handler calls the function every 20 ms, until it raises."""
    before = signal.getsignal(signal.SIGALRM)

    def alarm(function: Callable[[], Any]) -> None:
        def handler(_number: int, _frame: FrameType | None) -> None:
            try:
                function()
            except BaseException:
                signal.setitimer(signal.ITIMER_REAL, 0)
                raise

        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)

    yield alarm
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_handler_that_returns_lets_the_wait_go_on(native: Any, wake: int, alarm: Alarm) -> None:
    seen: list[float] = []

    def note() -> None:
        seen.append(time.monotonic())
        if len(seen) == 5:  # during the wait, that is
            os.eventfd_write(wake, 1)

    alarm(note)
    assert native.wait(-1, wake, SOON) == 2
    assert len(seen) >= 5


def test_handlers_that_return_do_not_make_the_wait_longer(native: Any, wake: int, alarm: Alarm) -> None:
    begun = time.monotonic()
    alarm(lambda: None)
    assert native.wait(-1, wake, 300) == 0
    assert 0.3 <= time.monotonic() - begun < 5


def test_handler_that_raises_ends_the_wait(native: Any, wake: int, alarm: Alarm) -> None:
    def wait() -> None:
        alarm(lambda: 1 // 0)
        native.wait(-1, wake, 60_000)

    with pytest.raises(ZeroDivisionError):
        wait()


def test_only_the_wait_lets_other_threads_run(native: Any, wake: int, background: Any) -> None:
    waiting = background(native.wait, -1, wake, -1)  # with the lock held, this thread would never come back
    assert not waiting.ended
    os.eventfd_write(wake, 1)
    assert waiting.result() == 2


# Waiting for a message ----------------------------------------------------------------------------


def test_receive_waits_for_one_message_and_takes_no_second(native: Any, pair: Any, wake: int, background: Any) -> None:
    router, dealer, identity = pair
    into: list[Any] = []
    waiting = background(native.receive_from, router.underlying, router.fd, wake, -1, into)
    dealer.send_multipart([b"x", b"body"])
    waiting.result()
    assert plain(into) == [(identity, b"x", b"body")]
    for frame in (b"y", b"z"):
        dealer.send(frame)
    for frame in (b"y", b"z"):
        into.clear()
        native.receive_from(router.underlying, router.fd, wake, -1, into)
        assert into == [(identity, frame, None)]


def test_receive_finds_what_came_before_it_was_asked(native: Any, pair: Any, wake: int) -> None:
    router, dealer, identity = pair
    dealer.send(b"x")
    assert router.poll(SOON)  # which takes the edge
    into: list[Any] = []
    assert native.receive_from(router.underlying, router.fd, wake, -1, into) is False
    assert into == [(identity, b"x", None)]


def test_receive_ends_at_its_time_and_by_the_wake(native: Any, pair: Any, wake: int, background: Any) -> None:
    router, _, _ = pair
    into: list[Any] = []
    begun = time.monotonic()
    assert native.receive_from(router.underlying, router.fd, wake, 50, into) is True
    assert 0.05 <= time.monotonic() - begun < 5
    waiting = background(native.receive_from, router.underlying, router.fd, wake, -1, into)
    os.eventfd_write(wake, 1)
    assert waiting.result() is True
    assert into == []


# Exchanging ---------------------------------------------------------------------------------------


def test_exchange_sends_and_comes_back_with_the_reply(native: Any, pair: Any, wake: int, background: Any) -> None:
    router, dealer, _ = pair

    def echo() -> None:
        identity, frame = router.recv_multipart()
        router.send_multipart([identity, b"reply to " + frame, b"body"])

    answering = background(echo)
    into: list[Any] = []
    assert native.exchange(dealer.underlying, b"x", dealer.fd, wake, -1, into) is True
    assert plain(into) == [(b"reply to x", b"body")]
    answering.result()


def test_exchange_finds_what_came_before_its_frame_left(native: Any, pair: Any, wake: int) -> None:
    router, dealer, identity = pair
    for number in range(2):
        router.send_multipart([identity, b"%d" % number])
    assert dealer.poll(SOON)  # which takes the edge
    into: list[Any] = []
    assert native.exchange(dealer.underlying, b"x", dealer.fd, wake, -1, into) is True
    assert into == [(b"0", None)]
    assert drained(native.drain, dealer) == [(b"1", None)]
    assert router.recv_multipart() == [identity, b"x"]


def test_exchange_does_not_wait_when_there_is_no_room(native: Any, make: Make, wake: int) -> None:
    dealer = make(zmq.DEALER)
    into: list[Any] = []
    os.eventfd_write(wake, 1)
    assert native.exchange(dealer.underlying, b"x", dealer.fd, wake, -1, into) is False
    assert into == []
    assert os.eventfd_read(wake) == 1


def test_exchange_ends_at_its_time_and_by_the_wake(native: Any, pair: Any, wake: int, background: Any) -> None:
    router, dealer, identity = pair
    into: list[Any] = []
    begun = time.monotonic()
    assert native.exchange(dealer.underlying, b"x", dealer.fd, wake, 50, into) is True
    assert 0.05 <= time.monotonic() - begun < 5
    waiting = background(native.exchange, dealer.underlying, b"y", dealer.fd, wake, -1, into)
    os.eventfd_write(wake, 1)
    assert waiting.result() is True
    assert into == []
    assert [router.recv_multipart() for _ in range(2)] == [[identity, b"x"], [identity, b"y"]]


def test_exchange_that_a_signal_ends_has_sent(native: Any, pair: Any, wake: int, alarm: Alarm) -> None:
    router, dealer, identity = pair
    alarm(lambda: 1 // (0 if router.poll(0) else 1))
    with pytest.raises(ZeroDivisionError):
        native.exchange(dealer.underlying, b"x", dealer.fd, wake, 60_000, [])
    assert router.recv_multipart() == [identity, b"x"]


# Nothing is left behind ---------------------------------------------------------------------------


def resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_hundred_thousand_messages_leave_nothing_behind(native: Any, make: Make) -> None:
    router, dealer = make(zmq.ROUTER, ROUTER_MANDATORY=1), make(zmq.DEALER, IDENTITY=b"dealer")
    router.bind("inproc://here")
    dealer.connect("inproc://here")
    frame, body = b"f" * 200, bytes(5_000)
    inwards, outwards = router.underlying, dealer.underlying

    def go_round(times: int) -> None:
        for _ in range(times):
            into: list[Any] = []
            assert native.exchange(outwards, frame, -1, -1, 0, into) is True
            for _ in range(19):
                assert native.send(outwards, frame)
            dealer.send_multipart([frame, body])
            dealer.send_multipart([frame, body, body, body])
            assert native.drain_from(inwards, 100, into) is False
            assert len(into) == 22
            for identity, _, _ in into:
                assert native.send_to(inwards, identity, frame)
            into.clear()
            assert native.drain(outwards, 100, into) is False
            assert len(into) == 22
            for function, arguments in failing:
                with pytest.raises((OSError, TypeError)):
                    function(*arguments)

    failing: list[tuple[Any, tuple[Any, ...]]] = [
        (native.send, (0, body)),
        (native.send_to, (inwards, body, body)),  # large names too: a small message takes no memory of its own
        (native.send_to, (inwards, body, "text")),
        (native.drain_from, (0, 1, [])),
    ]
    go_round(300)
    gc.collect()
    counts, memory, blocks = (
        [sys.getrefcount(each) for each in (frame, body, None)],
        resident(),
        sys.getallocatedblocks(),
    )
    go_round(2_300)
    gc.collect()
    assert [sys.getrefcount(each) for each in (frame, body)] == counts[:2]
    assert abs(sys.getrefcount(None) - counts[2]) < 100
    assert sys.getallocatedblocks() - blocks < 1_000
    assert resident() - memory < 4 * 2**20
