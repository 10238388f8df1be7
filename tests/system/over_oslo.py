"""The programs of a chaos run over oslo.messaging's public API, by any transport URL: only the driver differs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # futurist imports eventlet where it is installed, which warns of itself
    import oslo_messaging
from oslo_config import cfg

from onehop.testing.chaos.programs import SERVICE, Job
from onehop.testing.ledger import AGAIN, CALL, CAST

NAMED = "{name}"
PRESENT_WITHIN = 30.0


class Endpoint:
    """The methods of a server, as oslo.messaging calls them."""

    def __init__(self, methods: Mapping[str, Callable[..., Any]]) -> None:
        self._methods = methods

    def call(self, ctxt: Any, request: str) -> Any:
        return self._methods[CALL](request)

    def again(self, ctxt: Any, request: str) -> Any:
        return self._methods[AGAIN](request)

    def cast(self, ctxt: Any, request: str) -> None:
        self._methods[CAST](request)

    def present(self, ctxt: Any) -> bool:
        return True


class Oslo:
    """How the programs reach each other: see :class:`onehop.testing.chaos.programs.Messages`.

    Options are those that oslo.messaging has by default, except the threads of a server, which are the job's.

    Args:
        job: its ``url`` is a transport URL; ``{name}`` in it stands for this process.
    """

    def __init__(self, job: Job) -> None:
        # The global one: oslo.messaging registers some of its options there only.
        cfg.CONF([], project="chaos", default_config_files=[], default_config_dirs=[])
        url = job.url.replace(NAMED, f"{job.name}.{os.getpid()}")
        self._transport = oslo_messaging.get_rpc_transport(cfg.CONF, url)
        self._client = oslo_messaging.get_rpc_client(self._transport, oslo_messaging.Target(topic=SERVICE))
        self._workers = job.workers

    def serve(self, name: str, methods: Mapping[str, Callable[..., Any]]) -> Callable[[], bool]:
        target = oslo_messaging.Target(topic=SERVICE, server=name)
        server = oslo_messaging.get_rpc_server(self._transport, target, [Endpoint(methods)])
        server.start(override_pool_size=self._workers)

        def end() -> bool:
            server.stop()
            server.wait()
            return True

        return end

    def wait_for(self, servers: int) -> None:
        for number in range(servers):
            self._client.prepare(server=f"server-{number + 1}", timeout=PRESENT_WITHIN).call({}, "present")

    def call(self, method: str, *arguments: Any, timeout: float) -> Any:
        return self._client.prepare(timeout=timeout).call({}, method, request=arguments[0])

    def cast(self, method: str, *arguments: Any, timeout: float) -> None:
        self._client.prepare(timeout=timeout).cast({}, method, request=arguments[0])

    def executed(self, error: Exception) -> str:
        if isinstance(error, oslo_messaging.RemoteError):
            return "yes"
        return "no" if isinstance(error, oslo_messaging.MessageDeliveryFailure) else "unknown"

    def counts(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self._transport.cleanup()
