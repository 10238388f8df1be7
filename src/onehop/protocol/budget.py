"""How often requests may be sent again, so that retries do not make an outage of an overload."""

from __future__ import annotations

from collections.abc import Iterable

from onehop.protocol.peers import Peer

SHARE = 0.18
"""Retries for each request: below a fifth, whatever fails."""
FLOOR = 10.0
"""Retries a second that there are in any case."""
MEMORY = 10.0
"""Seconds for which what was not used may be used up at once."""
COUNTED_EVERY = 0.1
"""Seconds."""


class Budget:
    """The retries of one node.

    Requests are counted when a retry is asked for, by the numbers that they took: an ordinary request costs nothing.
    """

    __slots__ = ("_at", "_counted", "_left", "_rate", "_spent")

    def __init__(self) -> None:
        self._at = float("-inf")
        self._left = FLOOR
        self._rate = FLOOR
        self._spent = 0
        self._counted: dict[Peer, int] = {}  # the last number, of peers to which something was sent

    def spend(self, peers: Iterable[Peer], now: float) -> bool:
        """Whether one more request may be sent again.

        Args:
            peers: to which this node sends.
        """
        passed = now - self._at
        if passed >= COUNTED_EVERY:
            # One that returns under its id is another to us, whose numbers begin anew above all that were drawn.
            before, self._counted = self._counted, {peer: peer.calls.last for peer in peers if peer.calls.last}
            sent = sum(last - before.get(peer, last) for peer, last in self._counted.items())
            passed = min(passed, MEMORY)
            earned = max(SHARE * max(sent - self._spent, 0), FLOOR * passed)
            weight = passed / MEMORY
            self._rate += (earned / passed - self._rate) * weight
            self._left = min(self._left + earned, max(self._rate, earned / passed) * MEMORY)
            self._at, self._spent = now, 0
        if self._left < 1.0:
            return False
        self._left -= 1.0
        self._spent += 1
        return True
