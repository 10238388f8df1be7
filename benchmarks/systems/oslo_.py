"""oslo.messaging's RPC, unchanged, over RabbitMQ, over our driver, and over a driver that costs nothing.

The last one is the floor: what oslo.messaging itself takes for a call, whatever carries it. Its client and server are
one process, and its server's process has nothing to do. Every server is the stock one, with the stock executor.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from time import perf_counter
from typing import Any

import oslo_messaging
from oslo_config import cfg
from oslo_messaging import Target
from oslo_messaging._drivers import base

from benchmarks.messages import Message
from benchmarks.system import Sample, Setup, in_threads, stream

CALL_TIMEOUT = 30
NAMESPACE, VERSION = "compute", "6.3"


class Endpoint:
    """Answers with the arguments, and counts."""

    target = Target(namespace=NAMESPACE, version=VERSION)

    def __init__(self) -> None:
        self.taken = 0
        self._lock = threading.Lock()

    def build_and_run_instance(self, ctxt: dict[str, Any], **arguments: Any) -> dict[str, Any]:
        with self._lock:
            self.taken += 1
        return arguments

    def echo(self, ctxt: dict[str, Any], args: Any) -> Any:
        with self._lock:
            self.taken += 1
        return args


def configuration() -> cfg.ConfigOpts:
    """The global one: oslo.messaging registers some of its options there only."""
    cfg.CONF([], project="benchmarks", default_config_files=[], default_config_dirs=[])
    return cfg.CONF


def carrier(setup: Setup, url: str) -> Any:
    """The transport of ``url``; ``{broker}`` and ``{directory}`` in it are those of the run."""
    return oslo_messaging.get_rpc_transport(configuration(), url.format(broker=setup.broker, directory=setup.directory))


class Server:
    """An RPC server; for a fan-out as many as it is to hold.

    Args:
        url: of the transport.
    """

    def __init__(self, setup: Setup, url: str) -> None:
        self._setup, self._url = setup, url
        self._endpoint = Endpoint()

    def start(self) -> str:
        self._transport = carrier(self._setup, self._url)
        names = [self._setup.name, *(f"{self._setup.name}-{extra}" for extra in range(1, self._setup.receivers))]
        self._servers = [self._serve(name) for name in names]
        return json.dumps({"topic": self._setup.service, "server": self._setup.name})

    def _serve(self, name: str) -> Any:
        target = Target(topic=self._setup.service, server=name)
        server = oslo_messaging.get_rpc_server(self._transport, target, [self._endpoint])
        server.start()
        return server

    def serve(self) -> None:
        threading.Event().wait()

    def received(self) -> int:
        return self._endpoint.taken


class Client:
    """An RPC client: of the one server whose address it gets, or of a topic where there are several.

    Args:
        url: of the transport.
    """

    def __init__(self, setup: Setup, url: str) -> None:
        self._setup, self._url = setup, url
        self._message = Message(setup.message)
        self._transport: Any = None

    def connect(self, addresses: list[str]) -> None:
        if self._transport is None:
            self._transport = carrier(self._setup, self._url)
        address = json.loads(addresses[0])
        self._aim(address["topic"], address["server"] if len(addresses) == 1 else None)

    def _aim(self, topic: str, server: str | None) -> None:
        target = Target(topic=topic, server=server, namespace=NAMESPACE, version=VERSION)
        self._client = oslo_messaging.get_rpc_client(self._transport, target, timeout=CALL_TIMEOUT)
        self._everybody = self._client.prepare(server=None, fanout=True)

    def _verb(self, verb: Callable[..., Any]) -> Callable[[], Any]:
        """``verb`` with this client's message: a method with its arguments and context, or a mere string."""
        body = self._message.body
        if "method" in body:
            context, method, arguments = body["context"], body["method"], body["args"]
            return lambda: verb(context, method, **arguments)
        return lambda: verb({}, "echo", args=body["args"])

    def run(self, seconds: float, callers: int) -> Sample:
        return in_threads(self._verb(self._client.call), seconds, callers, self._message.answer)

    def cast(self, seconds: float) -> Sample:
        sent, began = stream(self._verb(self._client.cast), seconds, batch=10)
        return Sample(sent, perf_counter() - began)

    def fanout(self, seconds: float) -> Sample:
        sent, began = stream(self._verb(self._everybody.cast), seconds, batch=1)
        return Sample(sent, perf_counter() - began)


# --- the floor ------------------------------------------------------------------------------------------------------


class InPlace(base.RpcIncomingMessage):  # type: ignore[misc]
    """A request that is the client's own objects; its reply comes the same way."""

    def __init__(self, ctxt: Any, message: Any) -> None:
        super().__init__(ctxt, message, msg_id="")
        self.answer: Any = None
        self.answered = threading.Lock()
        self.answered.acquire()

    def reply(self, reply: Any = None, failure: Any = None) -> None:
        self.answer = reply if failure is None else failure[1]
        self.answered.release()

    def requeue(self) -> None:
        raise NotImplementedError("nothing to put it back to")

    def heartbeat(self) -> None:
        """Nobody asks for one."""


class InPlaceListener(base.Listener):  # type: ignore[misc]
    """Takes what the driver hands to its callback."""

    def cleanup(self) -> None:
        """There is nothing to clean up."""


class InPlaceDriver(base.BaseDriver):  # type: ignore[misc]
    """Hands each request to the one listener, in the thread that sends it."""

    def __init__(self) -> None:
        super().__init__(configuration(), url=None)
        self._listener = InPlaceListener(1, None)

    def send(self, target: Any, ctxt: Any, message: Any, **_: Any) -> Any:
        request = InPlace(ctxt, message)
        self._listener.on_incoming_callback([request])
        request.answered.acquire()
        return request.answer

    def listen(self, target: Any, batch_size: int, batch_timeout: float | None) -> Any:
        return self._listener

    def send_notification(self, target: Any, ctxt: Any, message: Any, version: Any, retry: Any = None) -> None:
        raise NotImplementedError("no notifications here")

    def listen_for_notifications(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("no notifications here")

    def cleanup(self) -> None:
        """There is nothing to clean up."""


class FloorServer:
    """The server is in the client's process; there is nothing to do here."""

    def __init__(self, setup: Setup) -> None:
        self._address = json.dumps({"topic": setup.service, "server": setup.name})

    def start(self) -> str:
        return self._address

    def serve(self) -> None:
        threading.Event().wait()

    def received(self) -> int:
        return 0


class FloorClient(Client):
    """A client, and the server that it calls."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup, "")
        self._transport = oslo_messaging.transport.RPCTransport(InPlaceDriver())
        self._server = oslo_messaging.get_rpc_server(
            self._transport, Target(topic=setup.service, server=setup.name), [Endpoint()]
        )
        self._server.start()
