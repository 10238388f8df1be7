"""What the engine asks of whatever carries its messages: ZeroMQ (``sockets.py``) or memory (``memory.py``).

Both are held to the same conformance suite (``tests/conformance``). A carrier keeps the order of messages on a
connection, delivers each whole or not at all, loses what was under way when the connection ends, and then says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from onehop.protocol.inbox import Message
from onehop.protocol.wire import Body
from onehop.transport.waiting import Wake


class LinkSocket(Protocol):
    """The connecting end. Used by one thread at a time."""

    fd: int
    """Becomes readable when something may have arrived since a look that found nothing. An edge, not a level: poll
    it only after :meth:`drain` ran dry."""
    monitor_fd: int
    """Becomes readable when :meth:`ended` may have news; an edge too."""

    def send(self, frame: bytes) -> bool:
        """Hand ``frame`` over; False when there is no room (or no connection) at the moment."""

    def send_large(self, head: bytes, body: Body) -> bool:
        """:meth:`send` of a message whose body rides as a second frame, which is not copied."""

    def drain(self, limit: int, into: list[tuple[bytes, Body | None]]) -> bool:
        """Append the messages that are there, as (frame, large body or None), at most ``limit``. Never waits.

        Returns:
            False when it ran dry: nothing is left. True when the limit came first.
        """

    def exchange(self, frame: bytes, wake: Wake, milliseconds: int, into: list[tuple[bytes, Body | None]]) -> bool:
        """Send ``frame``, wait once for a message, and append it if one came.

        Args:
            wake: made beside this socket's descriptor; ends the wait too.
            milliseconds: to wait at most.

        Returns:
            Whether ``frame`` was taken; where there was no room for it nothing else was done.
        """
        if not self.send(frame):
            return False
        if not self.drain(1, into) and not into:
            wake.wait(milliseconds / 1000)
            self.drain(1, into)
        return True

    def ended(self) -> str | None:
        """Why the connection ended or could not be made; None while it is being made or stands."""

    def close(self, linger: float) -> None:
        """Give it back, letting what was handed over leave for up to ``linger`` seconds."""


class InboundSocket(Protocol):
    """The binding end: many connections, each with an identity. Used by one thread at a time."""

    fd: int
    endpoints: tuple[str, ...]
    arrivals_fd: int = -1
    """Becomes readable when :meth:`look_at_arrivals` may have news; -1 where it never has."""

    def send(self, identity: bytes, frame: bytes) -> bool:
        """Hand ``frame`` over to one connection; False when it has no room.

        Raises:
            ConnectionResetError: the connection has ended.
        """

    def send_large(self, identity: bytes, head: bytes, body: Body) -> bool:
        """:meth:`send` of a message whose body rides as a second frame, which is not copied."""

    def drain(self, limit: int, into: list[Message]) -> bool:
        """Append the messages that are there, as (identity, frame, large body or None), at most ``limit``.

        Returns:
            False when it ran dry: nothing is left. True when the limit came first.
        """

    def receive(self, wake: Wake, milliseconds: int, into: list[Message]) -> bool:
        """Wait once for a message, and append it if one came.

        Args:
            wake: made beside this socket's descriptor; ends the wait too.
            milliseconds: to wait at most.

        Returns:
            False where one was there already.
        """
        if self.drain(1, into) or into:
            return False
        wake.wait(milliseconds / 1000)
        self.drain(1, into)
        return True

    def look_at_arrivals(self, counts: Counter[str]) -> bool:
        """Look who has connected; whoever comes while the machine has no room for it is turned away. From any thread.

        Args:
            counts: gets who was turned away, and what went wrong before a first message.

        Returns:
            Whether there is no room: then look again soon.
        """
        return False

    def close(self, linger: float) -> None:
        """Give it back, letting what was handed over leave for up to ``linger`` seconds."""


class Carrier(Protocol):
    """Makes sockets; one per node and process."""

    def bind(self, *endpoints: str) -> InboundSocket:
        """Listen at each of ``endpoints``; of several ports (``tcp://10.0.0.5:9502,9503``) at the first free one.

        Raises:
            ResourceLimit: the machine has no room for it.
            SettingsError: an endpoint cannot be used; says why.
        """

    def nearest(self, endpoints: Sequence[str]) -> str:
        """To which of a node's endpoints to connect: on the same host the one that does not leave it."""

    def connect(self, endpoint: str) -> LinkSocket:
        """Begin a connection; whether it comes about is told by :meth:`LinkSocket.ended`.

        Raises:
            ResourceLimit: the machine has no room for it.
        """

    def close(self) -> None:
        """Give everything back."""
