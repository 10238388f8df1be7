"""The real ZooKeeper of this machine, for tests: alone or as an ensemble, on free ports, in a temporary directory."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from kazoo.client import KazooClient

from onehop.registry.leased import quoted

JAR = "/usr/share/java/zookeeper.jar"
JVM = ("java", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Dzookeeper.jmx.log4j.disable=true")
TICK = 0.1  # seconds; sessions of half a second are allowed, and end to the tenth


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens at."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class ZooKeeperServer:
    """One server, which keeps its port and its data over stops and starts.

    Args:
        options: lines for its configuration, besides ours.
        java: options for the virtual machine.

    Attributes:
        address: ``host:port`` of its clients.
    """

    def __init__(self, options: Sequence[str] = (), java: Sequence[str] = (), port: int = 0) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="zk-", dir="/tmp"))
        self.port = port or free_ports(1)[0]
        self.address = f"127.0.0.1:{self.port}"
        self.data = self.directory / "data"
        self._java = java
        self._process: subprocess.Popen[bytes] | None = None
        ours = {
            "tickTime": int(TICK * 1000),
            "minSessionTimeout": 500,
            "maxSessionTimeout": 60_000,
            "dataDir": self.data,
            "clientPort": self.port,
            "clientPortAddress": "127.0.0.1",
            "maxClientCnxns": 0,
            "admin.enableServer": "false",
            "4lw.commands.whitelist": "*",
            "initLimit": 100,
            "syncLimit": 50,
        }
        lines = [f"{name}={value}" for name, value in ours.items()] + list(options)
        (self.directory / "zoo.cfg").write_text("\n".join(lines) + "\n")

    def start(self, wait: bool = True) -> Self:
        """Run it, with the data it had."""
        self.data.mkdir(exist_ok=True)
        main = "org.apache.zookeeper.server.quorum.QuorumPeerMain"
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*JVM, *self._java, "-cp", JAR, main, str(self.directory / "zoo.cfg")], stdout=log, stderr=log
            )
        if wait:
            self.wait()
        return self

    def wait(self, within: float = 60) -> None:
        """Until it serves."""
        deadline = time.monotonic() + within
        while "Mode:" not in self.ask("srvr"):
            assert self._process is not None
            assert self._process.poll() is None, self._log()
            assert time.monotonic() < deadline, f"ZooKeeper does not serve after {within} s: {self._log()}"
            time.sleep(0.02)

    def stop(self) -> None:
        """End it as a crash of its host would: at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        self.stop()
        self.start()

    def wipe(self) -> None:
        """Let it lose everything. It must not run."""
        shutil.rmtree(self.data)

    def pause(self) -> None:
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def ask(self, word: str) -> str:
        """Its answer to one of its four-letter words; empty where it is away."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), 5) as asked:
                asked.sendall(word.encode())
                return b"".join(iter(lambda: asked.recv(65_536), b"")).decode()
        except OSError:
            return ""

    def figure(self, name: str) -> int:
        """One number of what it says of itself (``mntr``), such as ``zk_packets_received``."""
        found = [line.split()[1] for line in self.ask("mntr").splitlines() if line.split()[0] == name]
        assert found, f"ZooKeeper at {self.address} says nothing of {name}"
        return int(float(found[0]))

    def url(self, *options: str) -> str:
        return f"zookeeper://{self.address}/" + ("?" + "&".join(options) if options else "")

    def garble(self, realm: str, service: str, node: str, value: bytes) -> None:
        """Put ``value`` where a record of ``node`` would stand."""
        with client(self) as other:
            other.create(
                f"/onehop/{quoted(realm or 'default')}/services/{quoted(service)}/{node}", value, makepath=True
            )

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _log(self) -> str:
        return (self.directory / "log").read_text()[-2000:]


@contextlib.contextmanager
def client(server: ZooKeeperServer, **options: Any) -> Iterator[KazooClient]:
    """Another client, which knows nothing of onehop."""
    connected = KazooClient(server.address, **options)
    connected.start(30)
    try:
        yield connected
    finally:
        connected.stop()
        connected.close()


@contextlib.contextmanager
def server(options: Sequence[str] = (), java: Sequence[str] = ()) -> Iterator[ZooKeeperServer]:
    """A server that serves, and is gone at the end."""
    running = ZooKeeperServer(options, java)
    try:
        yield running.start()
    finally:
        running.close()


@contextlib.contextmanager
def ensemble() -> Iterator[list[ZooKeeperServer]]:
    """Three servers that elect their leader."""
    ports = free_ports(9)
    peers = [f"server.{1 + each}=127.0.0.1:{ports[each]}:{ports[3 + each]}" for each in range(3)]
    servers = [ZooKeeperServer(peers, port=port) for port in ports[6:]]
    try:
        for number, each in enumerate(servers, 1):
            each.data.mkdir()
            (each.data / "myid").write_text(str(number))
            each.start(wait=False)
        for each in servers:
            each.wait()
        yield servers
    finally:
        for each in servers:
            each.close()
