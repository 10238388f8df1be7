"""The real etcd, alone or as a cluster, on free ports of this host and in a temporary directory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from base64 import b64decode, b64encode
from contextlib import ExitStack
from pathlib import Path
from random import sample
from typing import Any, Self

from onehop.registry.leased import quoted

START_WITHIN = 60.0  # seconds; a busy machine takes its time
ETCD = shutil.which("etcd") or "/usr/bin/etcd"


class Member:
    """One etcd process, which keeps its ports and its data over restarts.

    Args:
        name: within its cluster.
        directory: where its data and its log go.
        options: more arguments of etcd's.
        context: for TLS with its clients, where the options ask for it.
    """

    def __init__(
        self, name: str, directory: Path, options: tuple[str, ...] = (), context: ssl.SSLContext | None = None
    ) -> None:
        self.name = name
        self.port, self.peer_port = free_ports(2)
        self.cluster = ""  # all members, as etcd wants to be told
        self._directory = directory
        self._options, self._context = options, context
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def peer(self) -> str:
        return f"{self.name}=http://127.0.0.1:{self.peer_port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def client(self) -> str:
        return f"{'https' if self._context else 'http'}://127.0.0.1:{self.port}"

    def launch(self) -> None:
        """Start the process, unless it runs; :meth:`wait` for it to answer."""
        if self._process is not None:
            return
        peer = f"http://127.0.0.1:{self.peer_port}"
        arguments = {
            "name": self.name,
            "data-dir": str(self._directory / self.name),
            "listen-client-urls": self.client,
            "advertise-client-urls": self.client,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": self.cluster or self.peer,
        }
        given = [part for name, value in arguments.items() for part in (f"--{name}", value)]
        with (self._directory / f"{self.name}.log").open("ab") as log:
            self._process = subprocess.Popen([ETCD, *given, *self._options], stdout=log, stderr=log)

    def wait(self) -> None:
        """Until it answers, with a leader."""
        deadline = time.monotonic() + START_WITHIN
        while True:
            try:
                self.call("kv/range", key="x")
                return
            except urllib.error.HTTPError as error:
                if error.code in (400, 403):  # it wants a user, so it answers
                    return
                said: Any = error
            except OSError as error:
                said = error
            assert self._process is not None
            assert self._process.poll() is None, f"etcd ended: {self.log()[-2_000:]}"
            assert time.monotonic() < deadline, f"etcd did not start within {START_WITHIN} s: {said}"
            time.sleep(0.02)

    def end(self, number: int = signal.SIGKILL) -> None:
        """End the process; killed by default, as in a crash."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.send_signal(signal.SIGCONT)
            self._process.wait(30.0)
            self._process = None

    def pause(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def wipe(self) -> None:
        """Lose all data of the ended process."""
        shutil.rmtree(self._directory / self.name, ignore_errors=True)

    def log(self) -> str:
        return (self._directory / f"{self.name}.log").read_text(errors="replace")

    def call(self, path: str, token: str = "", within: float = 10.0, **request: Any) -> Any:
        """Ask etcd something; keys and values as text, whatever the gateway wants."""
        for each in ("key", "range_end", "value"):
            if isinstance(request.get(each), str):
                request[each] = b64encode(request[each].encode()).decode()
        headers = {"Authorization": token} if token else {}
        asked = urllib.request.Request(f"{self.client}/v3/{path}", json.dumps(request).encode(), headers)
        with urllib.request.urlopen(asked, timeout=within, context=self._context) as answer:
            return json.load(answer)


class Etcd:
    """A cluster of real etcd processes; alone by default. It runs from the beginning.

    Args:
        members: how many.
        options: more arguments of each.
        context: for TLS with its clients, where the options ask for it.
    """

    def __init__(self, members: int = 1, *options: str, context: ssl.SSLContext | None = None) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="etcd-", dir="/tmp"))
        self.members = [Member(f"m{number}", self._directory, options, context) for number in range(members)]
        for each in self.members:
            each.cluster = ",".join(other.peer for other in self.members)
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._directory, ignore_errors=True)

    def url(self, *options: str) -> str:
        """A registry's URL that names all members, with ``options`` of the form ``name=value``."""
        servers = ",".join(f"127.0.0.1:{each.port}" for each in self.members)
        return f"etcd://{servers}/" + ("?" + "&".join(options) if options else "")

    def start(self) -> None:
        """Start all members that do not run, with the data that is there."""
        for each in self.members:
            each.launch()
        for each in self.members:
            each.wait()

    def stop(self) -> None:
        """Kill all members; their data stays."""
        for each in self.members:
            each.end()

    def restart(self) -> None:
        self.stop()
        self.start()

    def wipe(self) -> None:
        """Lose all data: stopped, emptied, started."""
        self.stop()
        for each in self.members:
            each.wipe()
        self.start()

    def pause(self) -> None:
        for each in self.members:
            each.pause()

    def resume(self) -> None:
        for each in self.members:
            each.resume()

    def call(self, path: str, **request: Any) -> Any:
        return self.members[0].call(path, **request)

    def put(self, key: str, value: str, **more: Any) -> None:
        self.call("kv/put", key=key, value=value, **more)

    def delete(self, key: str) -> None:
        self.call("kv/deleterange", key=key)

    def garble(self, realm: str, service: str, node: str, value: str) -> None:
        """Put ``value`` where a node's record belongs."""
        self.put(f"/onehop/{quoted(realm or 'default')}/services/{quoted(service)}/{quoted(node)}", value)

    def keys(self, prefix: str = "/") -> list[str]:
        """All keys that begin with ``prefix``."""
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        found = self.call("kv/range", key=prefix, range_end=end, keys_only=True).get("kvs", [])
        return [b64decode(each["key"]).decode() for each in found]

    def revision(self) -> int:
        return int(self.call("kv/range", key="x")["header"]["revision"])

    def compact(self) -> None:
        """Forget all history before now."""
        self.call("kv/compaction", revision=self.revision(), physical=True)


def free_ports(count: int) -> list[int]:
    """Ports of this host that nobody listens at, outside the range from which the kernel gives ports away."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found: list[int] = []
    with ExitStack() as stack:
        for port in sample(range(max(10_000, first - 20_000), first), 1_000):
            listener = stack.enter_context(socket.socket())
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            found.append(port)
            if len(found) == count:
                return found
    raise AssertionError("no port is free")
