"""The real ZooKeeper of this machine, for tests: alone, or as an ensemble of three."""

from __future__ import annotations

import contextlib
import shutil
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kazoo.client import KazooClient
from kazoo.exceptions import NodeExistsError
from tests.registry.servers import Server, free_port

from onehop.registry.leased import quoted

# Debian's zookeeper.jar names what it needs but for two, without which there is no TLS.
JARS = ":".join(f"/usr/share/java/{name}.jar" for name in ("zookeeper", "netty-codec", "netty-resolver"))
JVM = ("java", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Dzookeeper.jmx.log4j.disable=true")
TICK = 100  # ms: sessions of half a second are allowed, and end to the tenth


class ZooKeeper(Server):
    """One server.

    Args:
        options: lines for its configuration, besides ours; later ones win.
        java: options for the virtual machine.

    Attributes:
        address: ``host:port`` for clients.
    """

    def __init__(self, options: Sequence[str] = (), java: Sequence[str] = ()) -> None:
        super().__init__()
        self.address = f"127.0.0.1:{self.port}"
        self.data = self.directory / "data"
        self.data.mkdir()
        self._java = java
        ours = {
            "tickTime": TICK,
            "minSessionTimeout": 5 * TICK,
            "maxSessionTimeout": 600 * TICK,
            "initLimit": 100,
            "syncLimit": 50,
            "dataDir": self.data,
            "clientPort": self.port,
            "clientPortAddress": "127.0.0.1",
            "maxClientCnxns": 0,
            "admin.enableServer": "false",
            "4lw.commands.whitelist": "*",
        }
        self.configure([f"{name}={value}" for name, value in ours.items()] + list(options))

    def configure(self, lines: Sequence[str]) -> None:
        """Add lines to its configuration."""
        with (self.directory / "zoo.cfg").open("a") as file:
            file.write("".join(f"{line}\n" for line in lines))

    def command(self) -> Sequence[str]:
        main = "org.apache.zookeeper.server.quorum.QuorumPeerMain"
        return (*JVM, *self._java, "-cp", JARS, main, str(self.directory / "zoo.cfg"))

    def answers(self) -> bool:
        return "Mode:" in self.ask("srvr", within=0.3)  # one that starts takes connections that it never answers

    def url(self, *, port: int | None = None, **options: str) -> str:
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return f"zookeeper://127.0.0.1:{port or self.port}/" + (f"?{query}" if query else "")

    def garble(self, realm: str, service: str, node: str, value: bytes) -> None:
        path = f"/onehop/{quoted(realm)}/services/{quoted(service)}/{node}"
        with client(self) as other:
            try:
                other.create(path, value, makepath=True)
            except NodeExistsError:
                other.set(path, value)

    def wipe(self) -> None:
        self.stop()
        shutil.rmtree(self.data)
        self.data.mkdir()
        self.start()

    def ask(self, word: str, within: float = 5.0) -> str:
        """Its answer to one of its four-letter words; empty where it is away."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), within) as asked:
                asked.sendall(word.encode())
                return b"".join(iter(lambda: asked.recv(65_536), b"")).decode()
        except OSError:
            return ""

    def figure(self, name: str) -> int:
        """One number of what it says of itself (``mntr``), such as ``zk_packets_received``."""
        found = [line.split()[1] for line in self.ask("mntr").splitlines() if line.split()[0] == name]
        assert found, f"ZooKeeper at {self.address} says nothing of {name}"
        return int(float(found[0]))


@contextlib.contextmanager
def ensemble() -> Iterator[list[ZooKeeper]]:
    """Three servers that elect their leader."""
    servers = [ZooKeeper() for _ in range(3)]
    peers = [f"server.{number}=127.0.0.1:{free_port()}:{free_port()}" for number in (1, 2, 3)]
    try:
        for number, each in enumerate(servers, 1):
            each.configure(peers)
            (each.data / "myid").write_text(str(number))
        with ThreadPoolExecutor() as pool:  # each answers only when there are two
            list(pool.map(ZooKeeper.start, servers))
        yield servers
    finally:
        for each in servers:
            each.close()


@contextlib.contextmanager
def client(server: ZooKeeper, **options: Any) -> Iterator[KazooClient]:
    """Another client, which knows nothing of onehop."""
    connected = KazooClient(server.address, **options)
    connected.start(30)
    try:
        yield connected
    finally:
        connected.stop()
        connected.close()
