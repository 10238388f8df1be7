"""A NATS server of our own, to compare with: started on a free port, in a temporary directory, ended by its pid.

    with NatsServer() as broker:
        ... broker.url, broker.pid ...

Nothing of the system's configuration is read and no server that runs already is touched. Needs the Debian package
``nats-server`` (or a nats-server in the PATH).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

START_LIMIT = 20.0
STOP_LIMIT = 10.0

# Everything else is the server's default. Its limit of 1 MiB a message is below the largest bodies that are measured.
CONFIGURATION = """\
host: 127.0.0.1
port: -1
max_payload: 32MB
"""


class NatsMissing(RuntimeError):
    """There is no nats-server on this machine."""


def find_server() -> str:
    """The path of nats-server.

    Raises:
        NatsMissing: it is not installed.
    """
    # Debian keeps it where a user's PATH often does not look.
    path = shutil.which("nats-server", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
    if path is None:
        raise NatsMissing("nats-server is not installed; on Debian: apt-get install nats-server")
    return path


class NatsServer:
    """One server on 127.0.0.1. Attributes ``url`` (nats://host:port) and ``pid`` are set by start()."""

    def __init__(self) -> None:
        self.url = ""
        self.pid = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._home = Path()

    def start(self) -> Self:
        """Start the server and return when it takes connections.

        Raises:
            NatsMissing: it is not installed.
            RuntimeError: it did not come up; the end of its log is in the message.
        """
        program = find_server()
        self._home = Path(tempfile.mkdtemp(prefix="oh-nats-"))
        configuration = self._home / "nats.conf"
        configuration.write_text(CONFIGURATION)
        with open(self._home / "output", "wb") as output:
            # The server chooses the port itself, and writes it into a file once it listens.
            self._process = subprocess.Popen(
                [program, "--config", str(configuration), "--ports_file_dir", str(self._home)],
                cwd=self._home,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.pid = self._process.pid
        try:
            self.url = self._await()
        except BaseException:
            self.stop()
            raise
        return self

    def _await(self) -> str:
        assert self._process is not None
        give_up = time.monotonic() + START_LIMIT
        while True:
            for path in self._home.glob("*.ports"):
                try:
                    return str(json.loads(path.read_bytes())["nats"][0])
                except ValueError:
                    pass  # not all of it is written yet
            if self._process.poll() is not None or time.monotonic() > give_up:
                text = (self._home / "output").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"nats-server did not come up within {START_LIMIT:.0f} s:\n{text}")
            time.sleep(0.02)

    def stop(self) -> None:
        """End the server and remove its directory. May be called twice."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(self._home, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so that the server is ended too
    parent = os.getppid()
    with NatsServer() as running:
        print(running.url, "pid", running.pid, flush=True)
        while os.getppid() == parent:  # until told to end, or until whoever started it has gone
            time.sleep(1)
