"""What a simulated node serves, and the queue of it."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from onehop.protocol.inbox import Request

SLOWEST = 30.0
"""Seconds beyond which nothing that slows a process down drags a handler: worlds come to rest at last."""


class Offer(NamedTuple):
    """A service that a node offers.

    Args:
        work: seconds a handler takes, on average.
        workers: handlers at once.
    """

    service: str
    server: str
    work: float = 0.01
    workers: int = 8


class Target:
    """The queue of one instance of a service."""

    def __init__(self, offer: Offer, instance: int) -> None:
        self.offer = offer
        self.instance = instance
        self.tasks: deque[Request] = deque()
        self.busy = 0

    def __len__(self) -> int:
        return len(self.tasks)


def slowed(seconds: float, slowness: float) -> float:
    """How long a handler takes that takes ``seconds`` where nothing slows it down; see :data:`SLOWEST`."""
    return max(seconds, min(seconds * slowness, SLOWEST))
