"""What is sent. Every system carries the whole message as MessagePack, and every server answers with its ``args``."""

from __future__ import annotations

from typing import Any

import msgspec

encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder().decode

_REAL = {
    "method": "build_and_run_instance",
    "args": {
        "instance": "5f3c8f0e-6a1d-4a58-9a1b-0d4f6c2b7e91",
        "host": "compute-0417",
        "image": "cirros-0.6.2",
        "flavor": {"vcpus": 4, "memory_mb": 8192, "root_gb": 40, "swap": 0},
        "networks": ["9f5b7d38-8c5d-4a9d-b0ab-7d8e36c1b6aa"],
        "limits": {"memory_mb": 98304, "disk_gb": 1200},
        "retry": True,
        "created_at": "2026-11-20T10:00:00Z",
    },
    "namespace": "compute",
    "version": "6.3",
    "context": {
        "user": "d2c9a1f4b37e4f7aa6f3b1c95d6e8a10",
        "tenant": "8f1e6b5a0c9d4e3f8a7b6c5d4e3f2a1b",
        "system_scope": None,
        "project": "8f1e6b5a0c9d4e3f8a7b6c5d4e3f2a1b",
        "domain": None,
        "user_domain": "default",
        "project_domain": "default",
        "is_admin": False,
        "read_only": False,
        "show_deleted": False,
        "auth_token": "gAAAAABlWz0tJ7rFq3nXk5VdQ2uYb9cL1oPzE8mRsTgHwJ6aNvDfBi4Ce",
        "request_id": "req-0d9a51c7-90d6-4a05-8d5b-60c1d4c5d7ce",
        "global_request_id": None,
        "resource_uuid": None,
        "roles": ["member", "reader"],
        "user_identity": "d2c9a1f4b37e4f7a 8f1e6b5a",
        "is_admin_project": True,
        "read_deleted": "no",
        "remote_address": "192.0.2.17",
        "timestamp": "2026-11-20T10:00:00.000000",
        "quota_class": None,
        "user_name": "demo",
        "service_catalog": [],
        "project_name": "demo1",
        "instance_lock_checked": False,
        "user_auth_plugin": None,
        "redact": True,
        "user_domain_name": None,
        "project_domain_name": None,
        "client_timeout": 60,
    },
}


class Message:
    """One message by name: ``real``, ``small``, or a number of bytes.

    ``real`` is a method, its arguments, namespace, version and a context of 30 keys, as OpenStack sends it: 1,031
    bytes of MessagePack, of which the arguments, which come back, are 249. ``small`` is a string of 200 bytes.

    Attributes:
        body: the message, to be encoded anew for each call.
        answer: what the server must answer.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.body: dict[str, Any]
        if name == "real":
            self.body = _REAL
        elif name == "small":
            self.body = {"args": "x" * 200}
        elif name.isdecimal():
            self.body = {"args": bytes(int(name))}
        else:
            raise ValueError(f"no message is called {name!r}: there are real, small, and a number of bytes")
        self.answer = answer(self.body)


def answer(body: dict[str, Any]) -> Any:
    """What a server answers to ``body``."""
    return body["args"]
