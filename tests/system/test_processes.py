"""What happens to requests when processes die, drain, stop, fork and come back."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter

import pytest

from onehop import CallError, CallTimeout, NodeClosed, Rejected

# Killed -------------------------------------------------------------------------------------------


def test_killed_server_leaves_no_caller_without_an_outcome(serve, make_node, background, ledger, eventually) -> None:
    doomed = serve("doomed", 4)
    serve("other", 8)
    calling = make_node()
    assert calling.wait_for("clock", count=2, timeout=5.0)
    client = calling.client("clock", timeout=30.0)
    assert {client.call("name") for _ in range(4)} == {"doomed", "other"}
    calls = [client.at("doomed").start("note", number, 60.0) for number in range(200)]
    eventually(lambda: len(ledger.lines()) == 4)
    ended: dict[int, tuple[float, str]] = {}

    def wait(number: int) -> None:
        try:
            calls[number].result()
            outcome = "reply"
        except CallError as error:
            outcome = f"{type(error).__name__} {error.executed}"
        ended[number] = (time.monotonic(), outcome)

    waiting = [background(wait, number) for number in range(200)]
    doomed.signal(signal.SIGKILL)
    killed = time.monotonic()
    for each in waiting:
        each.result(within=10)
    assert len(ended) == 200
    assert max(moment for moment, _ in ended.values()) - killed < 4.0  # silence is known after 20
    assert Counter(outcome for _, outcome in ended.values()) == {"PeerLost unknown": 200}
    assert max(Counter(ledger.lines()).values()) == 1
    assert client.call("name") == "other"


def test_kill_under_load_loses_only_what_was_under_way(serve, make_node, background, ledger) -> None:
    doomed = serve("doomed")
    for name in ("b", "c"):
        serve(name)
    calling = make_node()
    assert calling.wait_for("clock", count=3, timeout=5.0)
    client = calling.client("clock", timeout=20.0)
    stop = threading.Event()

    def work(thread: int) -> tuple[list[int], list[int], list[CallError]]:
        done, unknown, wrong = [], [], []
        number = thread * 1_000_000
        while not stop.is_set():
            number += 1
            try:
                assert client.call("note", number) == number
                done.append(number)
            except CallError as error:
                (unknown if error.executed == "unknown" else wrong).append(
                    number if error.executed == "unknown" else error
                )  # type: ignore[arg-type]
        return done, unknown, wrong

    workers = [background(work, thread) for thread in range(8)]
    while len(ledger.lines()) < 500:
        assert not any(each.ended for each in workers)
    doomed.signal(signal.SIGKILL)
    doomed.wait()
    serve("doomed again")  # it comes back under another id
    count = len(ledger.lines())
    while len(ledger.lines()) < count + 500:
        assert not any(each.ended for each in workers)
    stop.set()
    results = [each.result(within=20) for each in workers]
    ran = Counter(map(int, ledger.lines()))
    done = [number for each in results for number in each[0]]
    unknown = [number for each in results for number in each[1]]
    assert [error for each in results for error in each[2]] == []
    assert len(unknown) <= 8
    assert set(ran.values()) == {1}
    assert set(done) <= set(ran) <= set(done) | set(unknown)


def test_process_that_exits_right_after_a_cast_has_delivered_it(serve, start, ledger, eventually) -> None:
    serve("a")
    for number in range(10):
        program = start("""
            node = onehop.Node()
            node.cast("clock", "note", int(sys.argv[1]))
            os._exit(7)
        """, str(number))  # fmt: skip
        assert program.wait() == 7
    eventually(lambda: sorted(ledger.lines(), key=int) == [str(number) for number in range(10)])


# Drained ------------------------------------------------------------------------------------------


def test_sigterm_leaves_no_accepted_call_without_an_answer(serve, make_node, background, ledger, eventually) -> None:
    server = serve("a", 4)
    client = make_node().client("clock", timeout=30.0)
    calls = [client.start("note", number, 0.02) for number in range(100)]
    eventually(lambda: len(ledger.lines()) >= 4 and server.catches(signal.SIGTERM))
    server.signal(signal.SIGTERM)
    answered, refused = [], set()
    for number, call in enumerate(calls):
        try:
            assert call.result() == number
            answered.append(number)
        except Rejected as error:  # it came too late to be accepted
            refused.add((error.reason, error.executed))
    assert len(answered) >= 4
    assert refused <= {("draining", "no")}
    assert server.line() == "drained True"
    assert server.wait() == 0
    assert sorted(map(int, ledger.lines())) == answered


SIGNALLED_IN_ITS_WAIT = """
node = onehop.Node()
node.serve("clock", {"read": time.time})
signalled = threading.Event()

def terminate():
    if not signalled.is_set():
        signalled.set()
        os.kill(os.getpid(), signal.SIGTERM)

def trace(frame, event, argument):
    # where a wait written in Python has its lock: a handler that wants the same one waits for ever
    if frame.f_code.co_filename == threading.__file__ and frame.f_code.co_name == "wait":
        if event == "line" and "signaled" in frame.f_locals:
            terminate()
        return trace

def once_handled():
    while signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        time.sleep(0.01)
    time.sleep(0.2)
    terminate()

threading.Thread(target=once_handled, daemon=True).start()
sys.settrace(trace)
print("drained", node.run(), flush=True)
"""


def test_sigterm_in_the_midst_of_the_wait_for_it_is_not_lost(start) -> None:
    assert start(SIGNALLED_IN_ITS_WAIT).line() == "drained True"


def test_servers_drained_one_after_the_other_under_load_fail_no_call(serve, make_node, background, ledger) -> None:
    servers = [serve(name) for name in ("a", "b", "c")]
    calling = make_node()
    assert calling.wait_for("clock", count=3, timeout=5.0)
    client = calling.client("clock", timeout=20.0)
    stop = threading.Event()

    def work(thread: int) -> int:
        number = thread * 1_000_000
        while not stop.is_set():
            number += 1
            assert client.call("note", number) == number
        return number - thread * 1_000_000

    workers = [background(work, thread) for thread in range(8)]
    for each in servers[:2]:
        each.signal(signal.SIGTERM)
        assert each.line() == "drained True"
        assert each.wait() == 0
    stop.set()
    done = sum(each.result(within=20) for each in workers)
    assert len(ledger.lines()) == len(set(ledger.lines())) == done


# Stopped ------------------------------------------------------------------------------------------


def test_calls_to_a_stopped_process_end_in_time_and_their_late_replies_are_dropped(
    serve, make_node, background, eventually
) -> None:
    server = serve("a")
    calling = make_node()
    client = calling.client("clock", timeout=0.5)
    assert client.options(timeout=10.0).call("name") == "a"
    server.signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        calls = [background(client.call, "note", number) for number in range(10)]
        for each in calls:
            with pytest.raises(CallTimeout) as caught:
                each.result()
            assert caught.value.executed == "unknown"
        assert time.monotonic() - began < 3.0  # silence is known after 5
    finally:
        server.signal(signal.SIGCONT)
    assert client.options(timeout=10.0).call("name") == "a"
    eventually(lambda: [(peer.in_flight, peer.late) for peer in calling.statistics().peers] == [(0, 10)])


def test_monitored_call_to_a_stopped_process_ends_before_its_deadline(serve, make_node, background) -> None:
    server = serve("a")
    client = make_node().client("clock", timeout=60.0)
    assert client.call("name") == "a"
    call = background(client.options(monitor=0.6).call, "hang")
    server.signal(signal.SIGSTOP)
    try:
        with pytest.raises(CallTimeout, match=r"gave no sign of life for 0\.6 s"):
            call.result(within=4.0)
    finally:
        server.signal(signal.SIGCONT)


# Forked -------------------------------------------------------------------------------------------


def fork(child) -> int:  # type: ignore[no-untyped-def]
    """Run ``child`` in a forked process, which ends with 0 if it returned."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            child()
            code = 0
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
        finally:
            os._exit(code)
    return pid


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_process_in_use_forks_a_hundred_times_and_loses_nothing(start, make_node) -> None:
    program = start("""
        counts = {"calls": 0, "casts": 0}
        stop = threading.Event()
        node = onehop.Node(timeout=20.0)
        taken = []
        node.serve("parent", {"echo": lambda value: value, "note": taken.append}, server="p")
        client = node.client("parent")
        failures = []

        def work(thread):
            number = 0
            try:
                while not stop.is_set():
                    number += 1
                    assert client.call("echo", [thread, number]) == [thread, number]
                    counts["calls"] += 1
                    if number % 10 == 0:
                        client.cast("note", number)
            except BaseException as error:
                failures.append(repr(error))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        [thread.start() for thread in threads]
        parent = node.id
        ids = []
        for number in range(100):
            read, write = os.pipe()
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    if number % 4 == 0:      # uses the node it inherited: a new one
                        assert client.call("echo", number) == number
                        os.write(write, node.id.encode())
                    elif number % 4 == 1:    # uses a node of its own
                        with onehop.Node() as own:
                            assert own.call("parent", "echo", number) == number
                            os.write(write, own.id.encode())
                    elif number % 4 == 2:    # closes what it inherited
                        os.write(write, node.id.encode())
                        node.close()
                    else:                    # does nothing with it
                        os.write(write, b"0" * 32)
                    code = 0
                except BaseException as error:
                    os.write(2, repr(error).encode())
                finally:
                    os._exit(code)
            os.close(write)
            if number % 4 != 3:
                ids.append(os.read(read, 100).decode())
            os.close(read)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, number
        stop.set()
        [thread.join(20) for thread in threads]
        assert not any(thread.is_alive() for thread in threads)
        assert failures == [], failures
        assert node.id == parent
        assert len({parent, *ids}) == 1 + len(ids) == 76, len(ids)
        assert client.call("echo", 1) == 1
        print(counts["calls"] > 100, flush=True)
        sys.stdin.read()
    """)
    assert program.line() == "True"
    outside = make_node()
    assert outside.call("parent", "echo", 5) == 5
    assert [each.pid for each in outside.servers("parent")] == [program.pid]


def test_child_that_ends_leaves_the_parents_record_and_socket(serve, make_node, run_directory: str) -> None:
    node = make_node()
    node.serve("parent", {"read": lambda: 1})
    other = make_node()
    assert other.call("parent", "read") == 1
    before = sorted(os.listdir(run_directory))
    for _ in range(5):
        assert exit_code(fork(lambda: None)) == 0
        assert exit_code(fork(node.close)) == 0
    assert sorted(os.listdir(run_directory)) == before
    assert other.call("parent", "read") == 1
    assert make_node().call("parent", "read") == 1


def test_child_serves_under_its_own_identity(make_node, eventually) -> None:
    node = make_node()
    node.serve("parent", {"read": lambda: os.getpid()}, server="p")
    ready, go = os.pipe(), os.pipe()

    def child() -> None:
        assert node.drain() is True
        node.serve("child", {"read": lambda: os.getpid()}, server="c")
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        node.close()

    pid = fork(child)
    os.read(ready[0], 1)
    calling = make_node()
    assert calling.call("child", "read") == pid
    assert calling.call("parent", "read") == os.getpid()
    os.write(go[1], b"x")
    assert exit_code(pid) == 0
    eventually(lambda: calling.servers("child") == [])
    assert calling.call("parent", "read") == os.getpid()
    for end in (*ready, *go):
        os.close(end)


def test_handles_of_the_parent_do_nothing_to_it_in_the_child(make_node, background, eventually) -> None:
    serving = make_node()
    gate = threading.Event()

    def count():  # type: ignore[no-untyped-def]
        yield from range(1000)

    server = serving.serve("clock", {"hold": lambda: gate.wait(20), "count": count, "read": lambda: 1})
    listener = serving.listen("polled")
    calling = make_node()
    call = calling.client("clock").start("hold")
    stream = calling.stream("clock", "count")
    assert next(stream) == 0
    waiting = background(call.result)  # the child has not the thread that waits
    eventually(call._waiting.locked)

    def child() -> None:
        nonlocal stream
        assert listener.poll() == []
        assert listener.poll(timeout=0.1) == []
        listener.stop()
        listener.close()
        server.close()
        server.drain(0.1)
        with pytest.raises((CallError, NodeClosed)):
            call.result()
        stream.close()
        del stream

    pid = fork(child)
    assert exit_code(pid) == 0
    gate.set()
    assert call.result() is waiting.result() is True
    assert sum(1 for _ in stream) == 999
    assert make_node().call("clock", "read") == 1


# Many ---------------------------------------------------------------------------------------------


def test_a_hundred_and_fifty_threads_share_one_client(serve, make_node, background, eventually) -> None:
    for name in ("a", "b"):
        serve(name)
    calling = make_node()
    assert calling.wait_for("clock", count=2, timeout=5.0)
    client = calling.client("clock", timeout=30.0)

    def work(thread: int) -> bool:
        numbers = [thread * 1000 + number for number in range(20)]
        return [client.call("note", number) for number in numbers] == numbers

    assert all(each.result(within=40) for each in [background(work, thread) for thread in range(150)])
    eventually(lambda: [peer.in_flight for peer in calling.statistics().peers] == [0, 0])


def test_memory_and_descriptors_stay_flat_with_nodes_that_come_and_go(start) -> None:
    server = start("""
        def resident():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

        node = onehop.Node()
        node.serve("clock", {
            "echo": lambda value: value,
            "size": lambda: [resident(), len(os.listdir("/proc/self/fd")), threading.active_count()],
        }, workers=1)
        print("serving", flush=True)
        sys.stdin.read()
    """)
    assert server.line() == "serving"
    client = start("""
        import gc

        def resident():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

        def size():
            gc.collect()
            with onehop.Node() as node:
                there = node.call("clock", "size")
                return [resident(), len(os.listdir("/proc/self/fd")), threading.active_count()], there

        def round():
            with onehop.Node() as node:
                echo = node.client("clock").proxy.echo
                for number in range(100):
                    assert echo(number) == number

        for _ in range(40):
            round()
        before = size()
        for _ in range(160):
            round()
        after = size()
        print(*before[0], *before[1], *after[0], *after[1], flush=True)
    """)
    numbers = [float(word) for word in client.line().split()]
    (here, files, threads, there, served, workers) = [
        after - before for before, after in zip(numbers[:6], numbers[6:], strict=True)
    ]
    print(f"growth over 160 nodes and 16,000 calls: client {here:.1f} MiB, server {there:.1f} MiB")
    assert here < 8
    assert there < 8
    assert files <= 4
    assert served <= 4
    assert threads <= 1
    assert workers <= 1
