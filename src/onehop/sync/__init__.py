"""The blocking face."""

from onehop.sync.node import (
    Call,
    Client,
    Gathered,
    Incoming,
    Listener,
    Node,
    Receipt,
    Server,
    ServerView,
    Stream,
    current,
)

__all__ = [
    "Call",
    "Client",
    "Gathered",
    "Incoming",
    "Listener",
    "Node",
    "Receipt",
    "Server",
    "ServerView",
    "Stream",
    "current",
]
