"""Real servers of registries on free ports, each in a temporary directory: started, stopped, wiped, paused, by pid.

Every server has the verbs of :class:`Server`, so that ``outages.py`` can put each through the same. etcd's and
ZooKeeper's are in files of their own beside this one.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from tests.processes import send
from tests.registry.views import eventually

from onehop.testing.chaos.cluster import free_port

START_WITHIN = 30.0  # seconds; the machine may be busy


class Server(ABC):
    """One server process (or several that belong together) with its data in a temporary directory.

    Attributes:
        port: where clients reach it; the same after a restart.
        directory: its data, and ``log``.
    """

    def __init__(self) -> None:
        self.port = free_port()
        self.directory = Path(tempfile.mkdtemp(prefix="oh-", dir="/tmp"))
        self.process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> Sequence[str]:
        """What starts it in the foreground."""

    @abstractmethod
    def answers(self) -> bool:
        """Whether it answers a client; never raises, and takes a second at most."""

    @abstractmethod
    def url(self, *, port: int | None = None, **options: str) -> str:
        """The registry's URL; ``port`` is that of a proxy before it."""

    @abstractmethod
    def garble(self, realm: str, service: str, node: str, value: bytes) -> None:
        """Put ``value`` where the record of that node would be, so that those who follow hear of it."""

    @abstractmethod
    def wipe(self) -> None:
        """Lose all data, and be there again."""

    def start(self) -> Self:
        with open(self.directory / "log", "ab") as log:
            self.process = subprocess.Popen(
                self.command(), stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.directory
            )
        process = self.process
        answered = eventually(lambda: process.poll() is not None or self.answers(), START_WITHIN)
        if not answered or process.poll() is not None:  # not somebody else's who took the port
            raise AssertionError(f"it does not answer:\n{(self.directory / 'log').read_text()[-2000:]}")
        return self

    def stop(self) -> None:
        """Kill it; its data stays, as far as it is on the disk."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()

    def restart(self) -> None:
        self.stop()
        self.start()

    def pause(self) -> None:
        assert self.process is not None
        send(self.process, signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()


class Redis(Server):
    """A redis-server that keeps its data on the disk at each write.

    Args:
        options: words of its command line.
    """

    def __init__(self, *options: str) -> None:
        super().__init__()
        self.options = options

    def command(self) -> Sequence[str]:
        common = ("--bind", "127.0.0.1", "--save", "", "--appendonly", "yes", "--appendfsync", "always")
        return ("redis-server", "--port", str(self.port), "--dir", str(self.directory), *common, *self.options)

    def client(self, **options: Any) -> redis.Redis:
        return redis.Redis(port=self.port, **{"socket_timeout": 10.0, "retry": Retry(NoBackoff(), 0), **options})

    def answers(self) -> bool:
        try:
            with self.client(socket_timeout=1.0) as client:
                return bool(client.ping())
        except redis.AuthenticationError:
            return True
        except redis.RedisError:
            return False

    def url(self, *, port: int | None = None, **options: str) -> str:
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return f"redis://127.0.0.1:{port or self.port}/" + (f"?{query}" if query else "")

    def garble(self, realm: str, service: str, node: str, value: bytes) -> None:
        with self.client() as client:
            root = f"onehop:{realm}"
            client.set(f"{root}:record:{service}:{node}", value)
            client.zadd(f"{root}:nodes:{service}", {node: (time.time() + 3600) * 1000})
            client.zadd(f"{root}:services", {service: (time.time() + 3600) * 1000})
            client.incr(f"{root}:count:{service}")

    def wipe(self) -> None:
        self.stop()
        shutil.rmtree(self.directory / "appendonlydir", ignore_errors=True)
        self.start()

    def flush(self) -> None:
        """Lose all data without a broken connection."""
        with self.client() as client:
            client.flushall()


class Sentinels:
    """A primary called ``main``, one replica, and one Sentinel that fails over after half a second.

    Attributes:
        servers: the two; which of them is the primary changes.
        sentinel: the Sentinel.
    """

    def __init__(self) -> None:
        first = Redis()
        self.servers = (first, Redis("--replicaof", "127.0.0.1", str(first.port)))
        self.sentinel = Sentinel(first.port)

    def url(self) -> str:
        return f"redis://127.0.0.1:{self.sentinel.port}/?sentinel=main"

    def primary(self) -> Redis:
        """The one that the Sentinel names now."""
        with self.sentinel.client() as client:
            answer = client.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "main")
        port = int(answer[1])
        return next(each for each in self.servers if each.port == port)

    def __enter__(self) -> Self:
        try:
            for each in self.servers:
                each.start()
            # Before the Sentinel asks the primary for its replicas: it asks again after ten seconds only.
            assert eventually(self._is_linked, START_WITHIN), "the replica does not find its primary"
            self.sentinel.start()
            assert eventually(self._is_ready, START_WITHIN), "the Sentinel does not see the replica"
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self.sentinel, *self.servers):
            each.close()

    def _is_linked(self) -> bool:
        with self.servers[0].client() as client:
            replica = client.info("replication").get("slave0")
            return bool(replica and replica["state"] == "online")

    def _is_ready(self) -> bool:
        with self.sentinel.client() as client, suppress(redis.RedisError):
            (replica,) = client.sentinel_slaves("main") or [None]
            return bool(replica and replica["master-link-status"] == "ok")
        return False


class Sentinel(Redis):
    """It has no login itself.

    Args:
        primary: the port of the server that it watches under the name ``main``.
        password: of that server.
    """

    def __init__(self, primary: int, password: str = "") -> None:
        super().__init__()
        login = f"sentinel auth-pass main {password}\n" if password else ""
        (self.directory / "sentinel.conf").write_text(
            f"port {self.port}\nbind 127.0.0.1\ndir {self.directory}\n"
            f"sentinel monitor main 127.0.0.1 {primary} 1\n"
            "sentinel down-after-milliseconds main 500\nsentinel failover-timeout main 2000\n" + login
        )

    def command(self) -> Sequence[str]:
        return ("redis-server", str(self.directory / "sentinel.conf"), "--sentinel")


class Proxy:
    """Between a client and a server of this host: hands on what they say to each other, some time later.

    Args:
        target: the server's port.

    Attributes:
        port: for the client.
        delay: seconds that each piece of data waits.
    """

    def __init__(self, target: int, delay: float = 0.0) -> None:
        self.target, self.delay = target, delay
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.create_connection(("127.0.0.1", self.target))
                self._sockets += (client, server)
                for source, drain in ((client, server), (server, client)):
                    threading.Thread(target=self._pump, args=(source, drain), daemon=True).start()

    def _pump(self, source: socket.socket, drain: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                time.sleep(self.delay)  # the subject of the test, not a wait for something
                drain.sendall(data)
        for each in (source, drain):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self._listening, *self._sockets):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
