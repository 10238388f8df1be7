"""Many onehop nodes in one process, as if each had a host to itself; and who calls them.

A thousand nodes on a thousand hosts cost each other nothing. On one host each would watch the run directory, and look
at every record whenever one comes: 1,000 times 1,000 looks before anything is measured. These nodes announce
themselves, and do not watch; everything else is as ever, over ipc.
"""

from __future__ import annotations

from benchmarks.system import Sample, Setup, in_threads
from benchmarks.systems import onehop_
from onehop import Node, Settings
from onehop.interfaces import Deliver
from onehop.registry.local import LocalRegistry
from onehop.transport.sockets import ZmqCarrier


class Announcing(LocalRegistry):
    """The local registry of a node that calls nobody."""

    def watch(self, deliver: Deliver) -> None:
        self.prepare()


class Host:
    """What carries a node's messages: ZeroMQ, and a registry that is told and not asked."""

    def __init__(self, settings: Settings) -> None:
        self.carrier = ZmqCarrier(0o600)
        self._settings = settings

    def registry(self) -> LocalRegistry:
        return Announcing(self._settings)

    def endpoint(self, node: bytes) -> str:
        return f"ipc://{LocalRegistry(self._settings).prepare()}/{node.hex()[:16]}.sock"


class Server(onehop_.Server):
    """``setup.receivers`` nodes, each with one server of the service."""

    def __init__(self, setup: Setup, inline: bool, direct: int) -> None:
        super().__init__(setup, inline)
        settings = Settings(**onehop_.settings(setup))
        self._nodes = [Node(settings, network=Host(settings)) for _ in range(setup.receivers)]


class Client(onehop_.Client):
    """The one process that calls them: one fan-out at a time, since each is timed by itself.

    Args:
        direct: receivers to which it sends without relays, at most.
    """

    def __init__(self, setup: Setup, inline: bool, direct: int) -> None:
        super().__init__(setup, inline)
        self._node = Node(**onehop_.settings(setup), fanout_direct=direct)
        self._client = self._node.client(setup.service)

    def fanout(self, seconds: float) -> Sample:
        return in_threads(self._fan_out, seconds, 1, self._receivers)
