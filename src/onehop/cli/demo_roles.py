"""The processes of the demo: what Nova does, in small, with oslo.messaging and nothing of onehop's.

The API casts boots to any conductor; that calls the scheduler for a host and casts the build to the compute of that
name; that calls a conductor for each change of the instance, and tells the schedulers by fan-out. Beside it the API
calls computes and conductors, casts to computes and fans out to all of them.

A process says ``ready`` on standard output, takes ``go`` and ``quiet`` (for the API) from standard input, and ends in
order when that is closed, so none outlives the demo.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import random
import signal
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import oslo_messaging
from oslo_config import cfg

from onehop.cli.demo_ledger import ANSWERED, CALL_TIMEOUT, RAISED, RECEIVERS, REFUSED, SERVERS, TOPICS, UNKNOWN, Writer

API_THREADS = 32
LONG = 0.5
"""Seconds that the handler of a long call works."""
CHANGES_OF_A_BUILD = 4
THIS_MODULE = "onehop.cli.demo_roles"


class InstanceNotFound(Exception):
    """What Nova's conductor raises now and then in normal traffic."""


class Sender:
    """Sends with oslo.messaging's client, and writes what became of each message into the ledger."""

    def __init__(self, transport: Any, ledger: Writer, prefix: str) -> None:
        self._ledger = ledger
        self._clients = {
            topic: oslo_messaging.get_rpc_client(transport, target(topic, prefix), timeout=CALL_TIMEOUT)
            for topic in RECEIVERS
        }

    def call(
        self, topic: str, method: str, host: str = "", *, long: bool = False, only_now: bool = False, **arguments: Any
    ) -> Any:
        """Call; None where it failed, which the ledger tells. ``only_now``: fail rather than wait for the server."""
        options = oslo_messaging.TransportOptions(at_least_once=True) if only_now else None
        client = self._clients[topic].prepare(server=host or None, transport_options=options)
        id = self._begin("long" if long else "call", topic, host)
        try:
            reply = client.call(context(id), method, message=id, **arguments)
        except Exception as error:
            self._ledger.write("E", id, outcome_of(error))
            return None
        self._ledger.write("E", id, ANSWERED)
        return reply

    def cast(self, topic: str, method: str, host: str = "", *, fanout: bool = False, **arguments: Any) -> None:
        """Cast to one server or, with ``fanout``, to all."""
        client = self._clients[topic].prepare(server=host or None, fanout=fanout or None)
        id = self._begin("fanout" if fanout else "cast", topic, host)
        try:
            client.cast(context(id), method, message=id, **arguments)
        except Exception as error:
            self._ledger.write("E", id, outcome_of(error))
            return
        self._ledger.write("E", id, ANSWERED)

    def _begin(self, verb: str, topic: str, host: str) -> str:
        id = uuid.uuid4().hex
        self._ledger.write("S", id, verb, topic, host)
        return id


def target(topic: str, prefix: str, host: str | None = None) -> Any:
    """oslo.messaging's target. ``prefix`` keeps the demo's queues apart from others of the same broker."""
    return oslo_messaging.Target(exchange=f"{prefix}nova", topic=f"{prefix}{topic}", server=host, version="1.0")


def outcome_of(error: Exception) -> str:
    """The word of the ledger for what oslo.messaging raised; of what it should not raise, the text."""
    if isinstance(error, InstanceNotFound | oslo_messaging.RemoteError):
        return RAISED
    # A driver that knows that the server did not run it says so in the error's cause.
    surely_not = getattr(error.__cause__, "executed", "unknown") == "no"
    undelivered = isinstance(error, oslo_messaging.MessageDeliveryFailure | oslo_messaging.MessageUndeliverable)
    if surely_not or undelivered:
        return REFUSED
    if isinstance(error, oslo_messaging.MessagingException):
        return UNKNOWN
    return f"{type(error).__name__}: {error}".replace("\t", " ").replace("\n", " ")


class Endpoint:
    """What every server of the demo has."""

    target = oslo_messaging.Target(version="1.0")

    def __init__(self, host: str, ledger: Writer, sender: Sender) -> None:
        self._host = host
        self._ledger = ledger
        self._sender = sender

    def _ran(self, message: str) -> None:
        self._ledger.write("R", message, self._host)


class Conductor(Endpoint):
    """Builds instances and keeps their state."""

    def schedule_and_build_instances(self, ctxt: Any, message: str, instance: Any) -> None:
        self._ran(message)
        host = self._sender.call("scheduler", "select_destinations", instance=instance)
        if host is not None:
            self._sender.cast("compute", "build_and_run_instance", host, instance=instance)

    @oslo_messaging.expected_exceptions(InstanceNotFound)  # type: ignore[untyped-decorator]
    def object_action(self, ctxt: Any, message: str, instance: Any, action: str) -> Any:
        self._ran(message)
        if message.endswith("00"):  # one of 256
            raise InstanceNotFound(f"instance {instance['uuid']} could not be found")
        return {"updates": {"vm_state": "building", "task_state": action}, "result": None}

    def migrate_server(self, ctxt: Any, message: str, instance: Any) -> str:
        self._ran(message)
        time.sleep(LONG)
        return "done"


class Scheduler(Endpoint):
    """Chooses hosts in turn."""

    def __init__(self, host: str, ledger: Writer, sender: Sender) -> None:
        super().__init__(host, ledger, sender)
        self._turns = itertools.cycle(SERVERS["compute"])

    def select_destinations(self, ctxt: Any, message: str, instance: Any) -> str:
        self._ran(message)
        return next(self._turns)

    def update_instance_info(self, ctxt: Any, message: str, host_name: str, instance: Any) -> None:
        self._ran(message)


class Compute(Endpoint):
    """Runs no virtual machine."""

    def build_and_run_instance(self, ctxt: Any, message: str, instance: Any) -> None:
        self._ran(message)
        for action in ("networking", "block_device_mapping", "spawning", None)[:CHANGES_OF_A_BUILD]:
            self._sender.call("conductor", "object_action", instance=instance, action=action)
        self._sender.cast("scheduler", "update_instance_info", fanout=True, host_name=self._host, instance=instance)

    def reboot_instance(self, ctxt: Any, message: str, instance: Any) -> None:
        self._ran(message)

    def get_console_output(self, ctxt: Any, message: str, instance: Any) -> str:
        self._ran(message)
        return "login: " * 40

    def check_can_live_migrate(self, ctxt: Any, message: str, instance: Any) -> str:
        self._ran(message)
        time.sleep(LONG)
        return "yes"

    def refresh_security_rules(self, ctxt: Any, message: str, instance: Any) -> None:
        self._ran(message)


class Api:
    """The load: threads that each do one thing after the other, at a pace."""

    def __init__(self, sender: Sender, rate: float) -> None:
        self._sender = sender
        self._pace = API_THREADS / rate
        self._numbers = itertools.count()
        self._quiet = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(API_THREADS)]

    def go(self) -> None:
        for thread in self._threads:
            thread.start()

    def quiet(self) -> None:
        self._quiet.set()

    def _run(self) -> None:
        if self._quiet.wait(random.uniform(0, self._pace)):
            return
        while True:
            self._act(next(self._numbers))
            if self._quiet.wait(self._pace):
                return

    def _act(self, number: int) -> None:
        send, vm = self._sender, instance(number)
        compute = SERVERS["compute"][number // 10 % 5]
        match number % 10:
            case 0 | 5:
                send.cast("conductor", "schedule_and_build_instances", instance=vm)
            case 1 | 6:
                send.call("conductor", "object_action", instance=vm, action="refresh")
            case 2:
                send.call("compute", "get_console_output", compute, instance=vm)
            case 3:
                send.cast("compute", "reboot_instance", compute, instance=vm)
            case 4:
                send.call("compute-alt", "get_console_output", compute, only_now=True, instance=vm)
            case 7:
                send.call("conductor", "migrate_server", long=True, instance=vm)
            case 8:
                send.call("compute", "check_can_live_migrate", compute, long=True, instance=vm)
            case _:
                send.cast("compute", "refresh_security_rules", fanout=True, instance=vm)


def context(request: str) -> dict[str, Any]:
    """A request's context as Nova sends it: 30 keys."""
    return {
        "user": "9f1c3a5b7d2e4f60", "project_id": "5b0d8e2c9a7f4136", "system_scope": None, "is_admin": True,
        "read_deleted": "no", "remote_address": "192.0.2.17", "timestamp": "2025-01-01T12:00:00.000000",
        "request_id": f"req-{request}", "user_name": "demo", "project_name": "demo", "domain": None,
        "user_domain": "default", "project_domain": "default", "user_domain_name": "Default",
        "project_domain_name": "Default", "is_admin_project": True, "read_only": False, "show_deleted": False,
        "resource_uuid": None, "global_request_id": f"req-{request}", "roles": ["reader", "member", "admin"],
        "service_user_id": None, "service_user_domain_id": None, "service_project_id": None,
        "service_project_domain_id": None, "service_roles": [], "quota_class": None, "tenant": "5b0d8e2c9a7f4136",
        "user_identity": "9f1c3a5b7d2e4f60 5b0d8e2c9a7f4136 - default default",
        "service_catalog": [{"type": "placement", "name": "placement", "endpoints": [{"publicURL": "http://192.0.2.1"}]}],
    }  # fmt: skip


def instance(number: int) -> dict[str, Any]:
    """An instance as Nova's objects are sent."""
    return {
        "nova_object.name": "Instance", "nova_object.namespace": "nova", "nova_object.version": "2.8",
        "uuid": str(uuid.UUID(int=number)), "host": None, "display_name": f"server-{number}", "memory_mb": 2048,
        "vcpus": 1, "root_gb": 20, "image_ref": "70a599e0-31e7-49b7-b260-868f441e862b", "vm_state": "building",
        "task_state": "scheduling", "metadata": {}, "nova_object.changes": ["host", "task_state", "vm_state"],
    }  # fmt: skip


ENDPOINTS = {"conductor": Conductor, "scheduler": Scheduler, "compute": Compute}


def main() -> None:
    """One process of the demo."""
    parser = argparse.ArgumentParser()
    for name in ("role", "host", "url", "prefix"):
        parser.add_argument(name)
    parser.add_argument("directory", type=Path)
    parser.add_argument("rate", type=float)
    given = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the demo itself, which then closes our input
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(message)s")

    conf = cfg.CONF  # like a service: the other drivers expect options that oslo.messaging registers there only
    conf([], project="onehop-demo")
    transport = oslo_messaging.get_rpc_transport(conf, url=given.url, allowed_remote_exmods=[THIS_MODULE])
    ledger = Writer(given.directory, given.host)
    sender = Sender(transport, ledger, given.prefix)
    servers = []
    for topic in TOPICS.get(given.role, ()):
        endpoint = ENDPOINTS[given.role](given.host, ledger, sender)
        server = oslo_messaging.get_rpc_server(transport, target(topic, given.prefix, given.host), [endpoint])
        server.start()
        servers.append(server)
    api = Api(sender, given.rate)
    print("ready", flush=True)
    for line in sys.stdin:
        {"go": api.go, "quiet": api.quiet}[line.strip()]()
    for server in servers:
        server.stop()
    for server in servers:
        server.wait()
    transport.cleanup()
