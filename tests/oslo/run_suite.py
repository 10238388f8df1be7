"""Run oslo.messaging's own test suite through the ``zmq`` driver and check the exact counts.

    python tests/oslo/run_suite.py [--only functional|redirect|native|unit] [--url zmq://] [--jobs 6]

The oslo.messaging wheel carries its tests, so nothing is fetched. Four suites are run:

``functional``  the functional suite as it is; two tests skip because they are gated to ``rabbit://`` URLs
``redirect``    the same with ``rabbit://`` redirected to the driver, which opens the two gates
``native``      calls, casts, notifications and metrics with native threads in the place of eventlet
``unit``        the unit tests of servers and listeners, redirected from ``fake:``

Each worker process has a run directory of its own, so workers, and whole runs at once, do not see each other.
The exit code is 0 if and only if every count is as expected.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FUNCTIONAL = (
    "oslo_messaging.tests.functional.test_functional",
    "oslo_messaging.tests.functional.test_rabbitmq",
    "oslo_messaging.tests.functional.notify.test_logger",
)
UNIT = ("oslo_messaging.tests.rpc.test_server", "oslo_messaging.tests.notify.test_listener")
NATIVE_CLASSES = ("CallTestCase", "CastTestCase", "NotifyTestCase", "MetricsTestCase")

EXPECTED = {
    "functional": {"pass": 29, "skip": 4},
    "redirect": {"pass": 31, "skip": 2},
    "native": {"pass": 21},
    "unit": {"pass": 80},
}
# With the redirect no test of the native suite is skipped.
REDIRECTED_FROM = {"redirect": "rabbit:", "native": "rabbit:", "unit": "fake:"}

# Started first, so that no long test is left for the end.
SLOW = (
    "LoggingNotificationHandlerTestCase",
    "test_timeout_with_concurrently_queues",
    "MetricsTestCase",
    "test_simple_batch",
    "test_monitor_long_call",
)
# This class starts a collector on a fixed port: one at a time on a machine, also among runs.
EXCLUSIVE = "MetricsTestCase"
COLLECTOR_PORT = 3000
LOCK = Path(tempfile.gettempdir()) / "onehop-oslo-metrics.lock"
TEST_LIMIT = 120.0


# --- the worker process ---------------------------------------------------------------------------------------------


def prepare(suite: str, url: str) -> dict[str, unittest.TestCase]:
    """Import the tests of ``suite`` so that they use ``url``, and return them by id."""
    if suite == "native":
        import eventlet

        eventlet.monkey_patch = lambda *args, **kwargs: None
    import oslo_messaging
    import oslo_messaging.tests  # patches everything for eventlet

    if suite in REDIRECTED_FROM:
        redirect(oslo_messaging, REDIRECTED_FROM[suite], url)
    if suite == "native":
        force_threads(oslo_messaging)
    if suite == "unit":
        compare_contexts_by_content()
    loader = unittest.TestLoader()
    modules = UNIT if suite == "unit" else FUNCTIONAL
    tests = {test.id(): test for test in flatten(loader.loadTestsFromNames(modules))}
    if suite == "native":
        tests = {name: test for name, test in tests.items() if type(test).__name__ in NATIVE_CLASSES}
    return tests


def flatten(suite: Any) -> Iterator[unittest.TestCase]:
    if isinstance(suite, unittest.TestSuite):
        for each in suite:
            yield from flatten(each)
    else:
        yield suite


def redirect(oslo_messaging: Any, prefix: str, url: str) -> None:
    parse = oslo_messaging.TransportURL.parse.__func__

    def redirected(cls: Any, conf: Any, given: str | None = None) -> Any:
        parsed = parse(cls, conf, given)
        return parse(cls, conf, url) if f"{parsed.transport}:" == prefix else parsed

    oslo_messaging.TransportURL.parse = classmethod(redirected)


def force_threads(oslo_messaging: Any) -> None:
    def threaded(original: Any) -> Any:
        def server(*args: Any, executor: str = "", **kwargs: Any) -> Any:
            return original(*args[:3], executor="threading", **kwargs)

        return server

    for name in ("get_rpc_server", "get_notification_listener", "get_batch_notification_listener"):
        setattr(oslo_messaging, name, threaded(getattr(oslo_messaging, name)))


def compare_contexts_by_content() -> None:
    """Let the tests' context objects equal the dicts that they travel as.

    The tests look for the very object that they sent, which only a driver that never leaves the process can show.
    """
    from oslo_messaging.tests.utils import TestContext

    def equal(self: Any, other: Any) -> bool:
        return other is self or (isinstance(other, dict) and self.to_dict() == other)

    TestContext.__eq__ = equal


class Outcome(unittest.TestResult):
    """The result of one test as a word, with the text of what went wrong."""

    word = "pass"
    text = ""

    def _note(self, word: str, text: str) -> None:
        self.word, self.text = word, self.text + text

    def addError(self, test: Any, err: Any = None, details: Any = None) -> None:  # noqa: N802
        self._note("fail", self._render(test, err, details))

    addFailure = addError  # noqa: N815

    def addSkip(self, test: Any, reason: str | None = None, details: Any = None) -> None:  # noqa: N802
        self._note("skip", reason or "")

    def addUnexpectedSuccess(self, test: Any, details: Any = None) -> None:  # noqa: N802
        self._note("fail", "unexpected success")

    def _render(self, test: Any, err: Any, details: Any) -> str:
        if err is not None:
            return self._exc_info_to_string(err, test)
        return "\n".join(f"{name}: {content.as_text()}" for name, content in (details or {}).items())


def work(suite: str, url: str) -> None:
    """Answer the names of tests, one a line on standard input, with their outcomes on the original output."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    tests = prepare(suite, url)
    answers.write(json.dumps(sorted(tests)) + "\n")
    for line in sys.stdin:
        outcome = Outcome()
        started = time.monotonic()
        tests[line.strip()].run(outcome)
        answers.write(json.dumps([outcome.word, time.monotonic() - started, outcome.text]) + "\n")
    answers.flush()
    # Tests leave threads behind; what they hold ends with the process.
    os._exit(0)


# --- the parent -----------------------------------------------------------------------------------------------------


@dataclass
class Suite:
    """One suite: what is left to run and what came of the rest."""

    name: str
    waiting: deque[str] | None = None
    outcomes: dict[str, tuple[str, float, str]] = field(default_factory=dict)
    total: int = 0

    def counts(self) -> dict[str, int]:
        return dict(sorted(Counter(word for word, _, _ in self.outcomes.values()).items()))


class Worker:
    """A process that runs tests of one suite."""

    def __init__(self, suite: str, url: str, workspace: Path) -> None:
        self.directory = tempfile.mkdtemp(prefix="w", dir=workspace)
        target = "rabbit://x" if suite in ("redirect", "native") else url
        environment = os.environ | {
            "ONEHOP_RUN_DIRECTORY": self.directory,
            "RPC_TRANSPORT_URL": target,
            "NOTIFY_TRANSPORT_URL": target,
            # A test starts "python3 -m oslo_metrics": it must find this interpreter.
            "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", ""),
        }
        self.log = open(Path(self.directory) / "log", "w+")  # noqa: SIM115 (closed with the worker)
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--worker", suite, "--url", url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=environment,
            text=True,
            start_new_session=True,
        )
        self.names: list[str] = self._answer(TEST_LIMIT)

    def run(self, name: str) -> tuple[str, float, str]:
        assert self.process.stdin is not None
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        word, seconds, text = self._answer(TEST_LIMIT)
        return word, seconds, text

    def _answer(self, limit: float) -> Any:
        assert self.process.stdout is not None
        alarm = threading.Timer(limit, self.process.kill)
        alarm.start()
        line = self.process.stdout.readline()
        alarm.cancel()
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"the worker ended or took over {limit:.0f} s:\n{self.log.read()[-6000:]}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        # What a failed test left running is in the worker's own session.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.log.close()


class Run:
    """All suites asked for, spread over some worker processes."""

    def __init__(self, suites: list[str], url: str, jobs: int) -> None:
        self.suites = [Suite(name) for name in suites]
        self.url = url
        self.jobs = jobs
        self.lock = threading.Lock()
        self.started = time.monotonic()

    def execute(self) -> bool:
        workspace = Path(tempfile.mkdtemp(prefix="oh-"))
        try:
            threads = [threading.Thread(target=self._serve, args=(number, workspace)) for number in range(self.jobs)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            shutil.rmtree(workspace, ignore_errors=True)
        return self._report()

    def _serve(self, number: int, workspace: Path) -> None:
        """Take the suites in turn, starting at another one in each thread, and help with each until it is done."""
        start = number % len(self.suites)
        for suite in self.suites[start:] + self.suites[:start]:
            if suite.waiting is None or suite.waiting:
                self._help(suite, workspace)

    def _help(self, suite: Suite, workspace: Path) -> None:
        worker: Worker | None = None
        name = ""
        try:
            worker = Worker(suite.name, self.url, workspace)
            with self.lock:
                if suite.waiting is None:
                    suite.waiting = deque(sorted(worker.names, key=lambda each: not any(s in each for s in SLOW)))
                    suite.total = len(worker.names)
            while True:
                with self.lock:
                    if not suite.waiting:
                        return
                    name = suite.waiting.popleft()
                with exclusive(EXCLUSIVE in name):
                    self._note(suite, name, worker.run(name))
        except RuntimeError as problem:
            self._note(suite, name or "start of the worker", ("fail", 0.0, str(problem)))
            if name:
                self._help(suite, workspace)
        finally:
            if worker is not None:
                worker.close()

    def _note(self, suite: Suite, name: str, outcome: tuple[str, float, str]) -> None:
        with self.lock:
            suite.outcomes[name] = outcome
            done, total = (sum(len(each.outcomes) for each in self.suites), sum(each.total for each in self.suites))
            short = name.removeprefix("oslo_messaging.tests.")
            print(
                f"[{done:3}/{total:3}] {time.monotonic() - self.started:5.0f} s  {suite.name:10} "
                f"{outcome[0]:4} {outcome[1]:5.1f} s  {short}",
                flush=True,
            )

    def _report(self) -> bool:
        for suite in self.suites:
            for name, (word, _, text) in sorted(suite.outcomes.items()):
                if word == "fail":
                    print(f"\n=== {suite.name}: {name}\n{text.rstrip()}")
        checked = self.url.startswith("zmq")
        right = True
        print(f"\n{'suite':12}{'expected':24}{'got':32}{'verdict'}")
        for suite in self.suites:
            expected = EXPECTED[suite.name] if checked else {}
            good = suite.counts() == expected if checked else bool(suite.outcomes)
            right = right and good
            verdict = ("ok" if good else "WRONG") if checked else "not checked"
            print(f"{suite.name:12}{spell(expected) or '-':24}{spell(suite.counts()):32}{verdict}")
        print(f"{time.monotonic() - self.started:.0f} s in all, url {self.url}")
        return right


@contextlib.contextmanager
def exclusive(wanted: bool) -> Iterator[None]:
    """Hold the machine-wide lock of the tests with a fixed port, if ``wanted``."""
    if not wanted:
        yield
        return
    with open(LOCK, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
        # The test does not wait for its collector to end, and the next one needs the port.
        give_up = time.monotonic() + 10
        while listens(COLLECTOR_PORT) and time.monotonic() < give_up:
            time.sleep(0.05)


def listens(port: int) -> bool:
    try:
        socket.create_connection(("localhost", port), timeout=1).close()
    except OSError:
        return False
    return True


def spell(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {word}" for word, number in counts.items())


def main() -> int:
    parser = argparse.ArgumentParser(description="oslo.messaging's own tests through the zmq driver")
    parser.add_argument("--only", choices=sorted(EXPECTED), action="append", help="run this suite (may be repeated)")
    parser.add_argument("--url", default="zmq://", help="transport URL (counts are checked for zmq)")
    parser.add_argument("--jobs", type=int, default=6, help="worker processes; most tests wait rather than work")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.url)
    return 0 if Run(options.only or list(EXPECTED), options.url, options.jobs).execute() else 1


if __name__ == "__main__":
    sys.exit(main())
