"""The blocking face."""

from onehop.sync.client import Call, Client, Gathered, Receipt, Stream
from onehop.sync.node import Node, ServerView
from onehop.sync.server import Incoming, Listener, Server, Serving, current

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
    "Serving",
    "Stream",
    "current",
]
