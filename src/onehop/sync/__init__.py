"""The blocking face."""

from onehop.faces import Gathered, Receipt, ServerView
from onehop.serving import Incoming, Serving, current
from onehop.sync.client import Call, Client, Stream
from onehop.sync.node import Node
from onehop.sync.server import Listener, Server
from onehop.transport.native import compiled

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
    "compiled",
    "current",
]
