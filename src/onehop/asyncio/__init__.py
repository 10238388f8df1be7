"""The asyncio face: the twin of the blocking one, with the same names and the same promises."""

from onehop.asyncio.client import Call, Client, Stream
from onehop.asyncio.node import Node
from onehop.asyncio.server import Listener, Server
from onehop.faces import Gathered, Receipt, ServerView
from onehop.serving import Incoming, Serving, current

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
