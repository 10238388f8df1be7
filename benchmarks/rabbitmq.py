"""A RabbitMQ broker of our own, to compare with: started on free ports, in a temporary directory, ended by its pid.

    with RabbitMQ() as broker:
        ... broker.url, broker.pid ...
        broker.kill()
        broker.restart()

Nothing of the system's configuration is read and no broker that runs already is touched. Needs the Debian package
``rabbitmq-server`` (or a RabbitMQ in the PATH).
"""

from __future__ import annotations

import glob
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

START_LIMIT = 60.0
STOP_LIMIT = 20.0


class RabbitMQMissing(RuntimeError):
    """There is no RabbitMQ on this machine."""


def find_server() -> str:
    """The path of the script that starts RabbitMQ.

    Raises:
        RabbitMQMissing: it is not installed.
    """
    # Debian's script in the PATH insists on a user of its own and on fixed directories; the one behind it does not.
    for path in [
        *sorted(glob.glob("/usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin/rabbitmq-server")),
        shutil.which("rabbitmq-server"),
    ]:
        if path:
            return path
    raise RabbitMQMissing("rabbitmq-server is not installed; on Debian: apt-get install rabbitmq-server")


class RabbitMQ:
    """One broker on 127.0.0.1. Attributes ``url`` (an oslo.messaging transport URL) and ``pid`` are set by start().

    ``pid`` is that of the Erlang VM, which is the broker, and another one after a restart.
    """

    def __init__(self) -> None:
        self.url = ""
        self.pid = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._home = Path()
        self._port = 0
        self._command: list[str] = []
        self._environment: dict[str, str] = {}

    def start(self) -> Self:
        """Start the broker and return when it takes connections.

        Raises:
            RabbitMQMissing: it is not installed.
            RuntimeError: it did not come up; the end of its log is in the message.
        """
        script = find_server()
        self._home = Path(tempfile.mkdtemp(prefix="oh-rabbit-"))
        port, distribution, names = free_ports(3)
        (self._home / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{port}\nloopback_users = none\nlog.file.level = warning\n"
        )
        (self._home / "enabled_plugins").write_text("[].\n")
        (self._home / "environment").write_text("")
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("RABBITMQ_")} | {
            "HOME": str(self._home),
            "RABBITMQ_NODENAME": f"oh{port}@localhost",
            "RABBITMQ_NODE_PORT": str(port),
            "RABBITMQ_DIST_PORT": str(distribution),
            "ERL_EPMD_PORT": str(names),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_CONFIG_FILE": str(self._home / "rabbitmq.conf"),
            "RABBITMQ_CONF_ENV_FILE": str(self._home / "environment"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self._home / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(self._home / "data"),
            "RABBITMQ_LOG_BASE": str(self._home / "log"),
            "RABBITMQ_PID_FILE": str(self._home / "pid"),
            # The Erlang VM replaces the shell then: one process, whose id is known from the start.
            "RABBITMQ_ALLOW_INPUT": "1",
            "RABBITMQ_SERVER_START_ARGS": "-noinput",
        }
        self._command, self._port = [script], port
        self.url = f"rabbit://guest:guest@127.0.0.1:{port}/"
        try:
            self.restart()
        except BaseException:
            self.stop()
            raise
        return self

    def kill(self) -> None:
        """``kill -9`` of the broker; what it has on the disk stays. Returns when the process is gone."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        """Start it again after :meth:`kill`, with its data and on its port; return when it takes connections.

        Raises:
            RuntimeError: it did not come up; the end of its log is in the message.
        """
        with open(self._home / "output", "ab") as output:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                cwd=self._home,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.pid = self._process.pid
        self._await(self._port)

    def _await(self, port: int) -> None:
        assert self._process is not None
        give_up = time.monotonic() + START_LIMIT
        while not greets(port):
            if self._process.poll() is not None or time.monotonic() > give_up:
                text = (self._home / "output").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"RabbitMQ did not come up within {START_LIMIT:.0f} s:\n{text}")
            time.sleep(0.1)

    def cpu_seconds(self) -> float:
        """Processor time that the broker has used, in seconds."""
        with open(f"/proc/{self.pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """End the broker and what it started, and remove its directory. May be called twice."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        # The name daemon puts itself into a session of its own; its environment tells that it is ours.
        for pid in started_in(self._home):
            os.kill(pid, signal.SIGTERM)
        shutil.rmtree(self._home, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def started_in(home: Path) -> list[int]:
    """Ids of the processes whose HOME is ``home``."""
    wanted = f"HOME={home}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def free_ports(count: int) -> list[int]:
    """TCP ports on 127.0.0.1 that nobody uses at this moment.

    They are outside the range from which the kernel takes ports for connections: while a server is away, a client that
    tries to reach it could otherwise be given the server's own port, and keep it.
    """
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(15_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


def greets(port: int) -> bool:
    """Whether an AMQP broker answers on ``port``."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.sendall(b"AMQP\x00\x00\x09\x01")
            return bool(connection.recv(8))
    except OSError:
        return False


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so that the broker is ended too
    parent = os.getppid()
    with RabbitMQ() as running:
        print(running.url, "pid", running.pid, flush=True)
        while os.getppid() == parent:  # until told to end, or until whoever started it has gone
            time.sleep(1)
