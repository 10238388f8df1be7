"""Small programs that use oslo.messaging as Nova's services do. A test starts them as processes of their own:

    python programs.py NAME key=value...

Each writes one JSON value a line, and reads commands from standard input where it says so.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

PROGRAMS: dict[str, Callable[..., None]] = {}


def program(function: Callable[..., None]) -> Callable[..., None]:
    PROGRAMS[function.__name__] = function
    return function


def say(value: Any) -> None:
    os.write(1, json.dumps(value).encode() + b"\n")


def hear() -> str:
    return sys.stdin.readline().strip()


def oslo() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import oslo_messaging
        import oslo_messaging.notify
    return oslo_messaging


def transport(url: str = "zmq://", **kwargs: Any) -> Any:
    from oslo_config import cfg

    return oslo().get_rpc_transport(cfg.ConfigOpts(), url, **kwargs)


def client_of(messenger: Any, topic: str, timeout: float = 10, **target: Any) -> Any:
    messaging = oslo()
    return messaging.get_rpc_client(messenger, messaging.Target(topic=topic, **target), timeout=timeout)


def server_of(messenger: Any, topic: str, server: str, *endpoints: Any) -> Any:
    messaging = oslo()
    target = messaging.Target(topic=topic, server=server)
    return messaging.get_rpc_server(messenger, target, list(endpoints) or [Endpoint()])


class Endpoint:
    """What the tests call. Everything that is run is also said, so that a test can count."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.lock = threading.Lock()
        self.seen: list[Any] = []

    def _note(self, what: Any) -> None:
        with self.lock:
            self.seen.append(what)
        if not self.quiet:
            say({"ran": what, "pid": os.getpid()})

    def echo(self, ctxt: Any, value: Any = None) -> Any:
        return value

    def note(self, ctxt: Any, value: Any = None) -> Any:
        self._note(value)
        return os.getpid()

    def pid(self, ctxt: Any) -> int:
        return os.getpid()

    def sleep(self, ctxt: Any, seconds: float) -> float:
        self._note("sleep")
        time.sleep(seconds)
        return seconds

    def blob(self, ctxt: Any, size: int) -> str:
        return "x" * size


def serve_until_told(*servers: Any) -> None:
    for server in servers:
        server.start()
    say({"ready": os.getpid()})
    while hear() not in ("stop", ""):
        pass
    for server in servers:
        server.stop()
        server.wait()


@program
def serve(topic: str = "compute", server: str = "host-1", url: str = "zmq://") -> None:
    """Serve until told to stop."""
    messenger = transport(url)
    serve_until_told(server_of(messenger, topic, server))
    messenger.cleanup()
    say("stopped")


@program
def hang(server: str = "host-1", threads: str = "2") -> None:
    """Serve with few threads; after the line "hang" every one of them waits, until the line "go on"."""
    from oslo_config import cfg

    free = threading.Event()
    free.set()

    class Hanging(Endpoint):
        def pid(self, ctxt: Any) -> int:
            time.sleep(0.05)
            free.wait()
            return os.getpid()

    messaging = oslo()
    messenger = messaging.get_rpc_transport(cfg.ConfigOpts(), "zmq://")
    made = server_of(messenger, "compute", server, Hanging())
    made.start(override_pool_size=int(threads))
    say({"ready": os.getpid()})
    while (told := hear()) in ("hang", "go on"):
        (free.set if told == "go on" else free.clear)()
        say(told)
    free.set()
    made.stop()
    made.wait()


@program
def fork_workers(used: str = "no") -> None:
    """Make (and perhaps use) the transports, then fork workers that serve, as conductor and scheduler do.

    Each line "fork" on standard input forks one more worker, as cotyledon does after SIGHUP or a crash.
    """
    messaging = oslo()
    from oslo_config import cfg

    conf = cfg.ConfigOpts()
    messenger = messaging.get_rpc_transport(conf, "zmq://")
    notifications = messaging.get_notification_transport(conf, "zmq://")
    notifier = messaging.Notifier(notifications, "parent", driver="messaging", topics=["notifications"])
    if used == "yes":
        client_of(messenger, "warm-up").call({}, "echo", value=1)
        notifier.info({}, "parent.used", {})
    workers: list[int] = []
    say("ready")
    while hear() == "fork":
        pid = os.fork()
        if pid == 0:
            server = server_of(messenger, "conductor", "controller")
            server.start()
            client_of(messenger, "warm-up").call({}, "echo", value=2)
            notifier.info({}, "worker.started", {})
            say({"worker": os.getpid(), "node": messenger._driver.core.node.id})
            threading.Event().wait()
        workers.append(pid)
    if used == "yes":
        say({"parent still works": client_of(messenger, "warm-up").call({}, "echo", value=3)})
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    say("ended")
    os._exit(0)


@program
def cast_and_vanish(count: str = "20") -> None:
    """Cast, and end without any clean-up as soon as the last cast has returned."""
    client = client_of(transport(), "compute")
    for number in range(int(count)):
        client.cast({}, "note", value=number)
    os._exit(0)


@program
def two_servers() -> None:
    """Nova's compute: two servers on one transport; the first stops while the second, and a client, go on."""
    messenger = transport()
    first, second = (server_of(messenger, topic, "host-1") for topic in ("compute", "compute-alt"))
    first.start()
    second.start()
    say("ready")
    hear()
    first.stop()
    first.wait()
    say({"client still works": client_of(messenger, "conductor").call({}, "echo", value="yes")})
    hear()
    second.stop()
    second.wait()
    say("stopped")


@program
def stop_in_signal_handler(main: str = "waits") -> None:
    """Stop the server inside the SIGTERM handler, on the main thread, which waits meanwhile, or is in a call."""
    messenger = transport()
    client = client_of(messenger, "conductor")
    server = server_of(messenger, "compute", "host-1")

    def stop(*_: Any) -> None:
        if main == "waits":
            client.call({}, "echo", value="saving the service record")
        server.stop()
        server.wait()
        if main == "waits":
            client.cast({}, "note", value="stopped")
        say("stopped")
        os._exit(0)

    signal.signal(signal.SIGTERM, stop)
    server.start()
    say({"ready": os.getpid()})
    while main == "calls":
        client.call({}, "echo", value=1)
    threading.Event().wait()


@program
def transports(count: str = "3") -> None:
    """Several transports to one URL, some of them dropped without clean-up."""
    import gc

    several = [transport() for _ in range(int(count))]
    before = len(os.listdir("/proc/self/fd"))
    clients = [client_of(each, "compute") for each in several]
    say([client.call({}, "echo", value=number) for number, client in enumerate(clients)])
    one = len(os.listdir("/proc/self/fd")) - before
    nodes = {each._driver.core.node.id for each in several}
    for each in [transport() for _ in range(20)]:
        client_of(each, "compute").call({}, "echo", value=1)
    gc.collect()
    several.pop().cleanup()
    say(clients[0].call({}, "echo", value="still here"))
    say({"nodes": len(nodes), "descriptors": one, "more": len(os.listdir("/proc/self/fd")) - before - one})


@program
def construct() -> None:
    """Construct transports, clients and servers, and look at what that made."""

    def made() -> dict[str, Any]:
        return {"threads": threading.active_count(), "files": sorted(os.listdir("/proc/self/fd"))}

    oslo()
    transport("fake:")
    before = made()
    from oslo_messaging._drivers import base

    messenger = transport()
    client_of(messenger, "compute")
    server_of(messenger, "compute", "host-1")
    assert isinstance(messenger._driver, base.BaseDriver)
    directory = os.environ["ONEHOP_RUN_DIRECTORY"]
    say({"before": before, "after": made(), "directory": os.listdir(directory) if os.path.isdir(directory) else []})


@program
def many_threads(threads: str = "64", calls: str = "50") -> None:
    """Many threads share one client; each reply is compared with its request."""
    client = client_of(transport(), "compute", timeout=60)
    wrong: list[Any] = []
    slowest = [0.0]
    start = threading.Event()

    def work(number: int) -> None:
        start.wait()
        for turn in range(int(calls)):
            began = time.monotonic()
            if client.call({}, "echo", value=[number, turn]) != [number, turn]:
                wrong.append([number, turn])
            slowest[0] = max(slowest[0], time.monotonic() - began)

    working = [threading.Thread(target=work, args=(number,)) for number in range(int(threads))]
    for each in working:
        each.start()
    start.set()
    for each in working:
        each.join()
    say({"wrong": wrong, "slowest": slowest[0]})


@program
def green(when: str = "first") -> None:
    """Serve and call under eventlet, patched at the start, or late: after everything is imported and made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import eventlet

        if when == "first":
            eventlet.monkey_patch()
        messenger = transport()
        if when == "late":
            import onehop

            assert onehop.Node
            eventlet.monkey_patch()
        server = server_of(messenger, "green", "host-1", Endpoint(quiet=True))
        server.start()
        pool = eventlet.GreenPool(20)
        client = client_of(messenger, "green")
        results = list(pool.imap(lambda number: client.call({}, "echo", value=number), range(100)))
        began = time.monotonic()
        sleeps = list(pool.imap(lambda _: client.call({}, "sleep", seconds=0.5), range(5)))
        say({"own": results == list(range(100)), "sleeps": len(sleeps), "seconds": time.monotonic() - began})
        say(client_of(messenger, "compute").call({}, "echo", value="other process"))
        client.cast({}, "note", value="cast")
        server.stop()
        server.wait()
        messenger.cleanup()
        say("stopped")


@program
def poisoned() -> None:
    """Serve and call where an import of eventlet fails, as Nova has it."""
    messaging = oslo()
    for name in [each for each in sys.modules if each.split(".")[0] in ("eventlet", "greenlet")]:
        del sys.modules[name]
    sys.modules["eventlet"] = None  # type: ignore[assignment]
    from oslo_config import cfg

    messenger = messaging.get_rpc_transport(cfg.ConfigOpts(), "zmq://")
    server = server_of(messenger, "native", "host-1", Endpoint(quiet=True))
    server.start()
    say(client_of(messenger, "native").call({}, "echo", value="native"))
    server.stop()
    server.wait()
    messenger.cleanup()
    say("eventlet" in sys.modules and sys.modules["eventlet"] is None)


@program
def notify_and_time(count: str = "50") -> None:
    """Send notifications that nobody listens to, and say how long that took."""
    messaging = oslo()
    from oslo_config import cfg

    messenger = messaging.get_notification_transport(cfg.ConfigOpts(), "zmq://")
    notifier = messaging.Notifier(messenger, "nova", driver="messagingv2", topics=["notifications"])
    began = time.monotonic()
    for number in range(int(count)):
        notifier.info({}, "instance.update", {"number": number})
    say(time.monotonic() - began)
    hear()


@program
def die_at_once(topic: str = "compute", server: str = "host-1") -> None:
    """Serve; a call of ``die`` ends the process in the middle of it."""

    class Dying(Endpoint):
        def die(self, ctxt: Any) -> None:
            self._note("die")
            os.kill(os.getpid(), signal.SIGKILL)

    serve_until_told(server_of(transport(), topic, server, Dying()))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    with contextlib.suppress(KeyboardInterrupt):
        PROGRAMS[sys.argv[1]](**dict(each.split("=", 1) for each in sys.argv[2:]))
