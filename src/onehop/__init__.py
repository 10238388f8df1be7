"""Brokerless remote procedure calls between Python processes.

A server, and a client in another process::

    server = onehop.Node().serve("clock", {"read": time.time})
    server.run()

    onehop.Node().call("clock", "read")

Names are loaded when they are used, so that importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from onehop.errors import (
    BadArguments,
    CallCancelled,
    CallError,
    CallTimeout,
    DecodeError,
    EncodeError,
    NodeClosed,
    NoRoute,
    NoSuchMethod,
    OnehopError,
    PayloadError,
    PeerLost,
    ProtocolError,
    RegistryError,
    Rejected,
    RemoteError,
    ResourceLimit,
    SettingsError,
    TooLarge,
    VersionMismatch,
    WireError,
)

if TYPE_CHECKING:
    from onehop.handlers import method
    from onehop.interfaces import Record
    from onehop.settings import Settings
    from onehop.sync import (
        Call,
        Client,
        Gathered,
        Incoming,
        Listener,
        Node,
        Receipt,
        Server,
        ServerView,
        Serving,
        Stream,
        compiled,
        current,
    )

__version__ = "0.1.0"

_LAZY = {
    "Record": "onehop.interfaces",
    "Settings": "onehop.settings",
    "method": "onehop.handlers",
    **dict.fromkeys(
        (
            "Call",
            "Client",
            "Gathered",
            "Incoming",
            "Listener",
            "Node",
            "Receipt",
            "Server",
            "ServerView",
            "Serving",
            "Stream",
            "compiled",
            "current",
        ),
        "onehop.sync",
    ),
}

__all__ = [
    "BadArguments",
    "Call",
    "CallCancelled",
    "CallError",
    "CallTimeout",
    "Client",
    "DecodeError",
    "EncodeError",
    "Gathered",
    "Incoming",
    "Listener",
    "NoRoute",
    "NoSuchMethod",
    "Node",
    "NodeClosed",
    "OnehopError",
    "PayloadError",
    "PeerLost",
    "ProtocolError",
    "Receipt",
    "Record",
    "RegistryError",
    "Rejected",
    "RemoteError",
    "ResourceLimit",
    "Server",
    "ServerView",
    "Serving",
    "Settings",
    "SettingsError",
    "Stream",
    "TooLarge",
    "VersionMismatch",
    "WireError",
    "compiled",
    "current",
    "method",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = globals()[name] = getattr(import_module(_LAZY[name]), name)
        return value
    raise AttributeError(f"module 'onehop' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
