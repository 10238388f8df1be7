"""The real etcd, alone and as a cluster of three, on free ports of this host and in temporary directories."""

from __future__ import annotations

import json
import shutil
import ssl
import urllib.error
import urllib.request
from base64 import b64decode, b64encode
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

from tests.registry.servers import Server, free_port

from onehop.registry.leased import quoted

# Leases of one second, which etcd allows only where leaders are missed sooner than that.
SHORT_LEASES = ("--heartbeat-interval", "20", "--election-timeout", "200")


def encoded(text: str | bytes) -> str:
    return b64encode(text.encode() if isinstance(text, str) else text).decode()


class Etcd(Server):
    """One member, which keeps its ports and its data over restarts.

    Args:
        options: more words of its command line.
        name: within its cluster.
        context: for TLS with its clients, where the options ask for that.
    """

    def __init__(self, *options: str, name: str = "alone", context: ssl.SSLContext | None = None) -> None:
        super().__init__()
        self.name, self.options, self.context = name, options, context
        self.peer_port = free_port()
        self.cluster = self.peer  # all members, as etcd wants to be told

    @property
    def peer(self) -> str:
        return f"{self.name}=http://127.0.0.1:{self.peer_port}"

    @property
    def client(self) -> str:
        return f"{'https' if self.context else 'http'}://127.0.0.1:{self.port}"

    def command(self) -> Sequence[str]:
        peer = f"http://127.0.0.1:{self.peer_port}"
        arguments = {
            "name": self.name,
            "data-dir": "data",
            "listen-client-urls": self.client,
            "advertise-client-urls": self.client,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": self.cluster,
        }
        timing = SHORT_LEASES if self.cluster == self.peer else ()  # nobody but itself could be missed
        words = [word for name, value in arguments.items() for word in (f"--{name}", value)]
        return ("etcd", *words, *timing, *self.options)

    def answers(self) -> bool:
        try:
            self.call("kv/range", within=1.0, key="x")
        except urllib.error.HTTPError as error:
            return error.code in (400, 403)  # it wants to know who asks
        except OSError:
            return False
        return True

    def url(self, *, port: int | None = None, **options: str) -> str:
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return f"etcd://127.0.0.1:{port or self.port}/" + (f"?{query}" if query else "")

    def garble(self, realm: str, service: str, node: str, value: bytes) -> None:
        self.put(f"/onehop/{quoted(realm or 'default')}/services/{quoted(service)}/{quoted(node)}", value)

    def wipe(self) -> None:
        self.stop()
        shutil.rmtree(self.directory / "data", ignore_errors=True)
        self.start()

    def call(self, path: str, token: str = "", within: float = 10.0, **request: Any) -> Any:
        """What its gateway answers; keys are text here."""
        for each in ("key", "range_end"):
            if each in request:
                request[each] = encoded(request[each])
        headers = {"Authorization": token} if token else {}
        asked = urllib.request.Request(f"{self.client}/v3/{path}", json.dumps(request).encode(), headers)
        with urllib.request.urlopen(asked, timeout=within, context=self.context) as answer:
            return json.load(answer)

    def put(self, key: str, value: str | bytes) -> None:
        self.call("kv/put", key=key, value=encoded(value))

    def delete(self, key: str) -> None:
        self.call("kv/deleterange", key=key)

    def keys(self, prefix: str) -> list[str]:
        """What follows ``prefix``, which ends in a slash, in the keys that begin with it."""
        found = self.call("kv/range", key=prefix, range_end=prefix[:-1] + "0", keys_only=True).get("kvs", [])
        return [b64decode(each["key"]).decode().removeprefix(prefix) for each in found]

    def revision(self) -> int:
        return int(self.call("kv/range", key="x")["header"]["revision"])

    def watches(self) -> int:
        """How many streams of changes were asked for since it started."""
        with urllib.request.urlopen(f"{self.client}/metrics", timeout=10.0, context=self.context) as answer:
            lines = answer.read().decode().splitlines()
        counted = 'grpc_server_started_total{grpc_method="Watch",grpc_service="etcdserverpb.Watch"'
        return sum(int(float(each.split()[-1])) for each in lines if each.startswith(counted))

    def compact(self) -> None:
        """Forget all history before now."""
        self.call("kv/compaction", revision=self.revision(), physical=True)


class EtcdCluster:
    """Three members.

    Attributes:
        members: each can be stopped, started, paused and resumed by itself.
    """

    def __init__(self) -> None:
        self.members = [Etcd(name=f"member{number}") for number in range(3)]
        for each in self.members:
            each.cluster = ",".join(member.peer for member in self.members)

    def url(self) -> str:
        return f"etcd://{','.join(f'127.0.0.1:{each.port}' for each in self.members)}/"

    def start(self) -> Self:
        """Start those that do not run; at once, since none answers alone."""
        with ThreadPoolExecutor() as pool:
            list(pool.map(Etcd.start, [each for each in self.members if each.process is None]))
        return self

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        for each in self.members:
            each.close()
