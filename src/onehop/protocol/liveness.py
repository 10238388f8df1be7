"""Whether a peer that owes answers lives.

ZeroMQ answers heartbeats in a thread of its own, so they tell of the host and of the network, not of the process.
So a peer that owes an answer for a while is asked twice, over the connection that its calls are on:

* a PING, which its receiving thread answers: one who does not is stopped, or starved, and its calls are given up;
* an echo, which a worker of the service answers: where none does, they hang, or are busy with long work. The calls that
  it has go on, and new ones go to others, as long as there are some.

Who lets one call after the other reach its deadline is avoided too, for a while that grows each time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from onehop.protocol import wire
from onehop.protocol.calls import Call, CallTable

QUIET = 1.0
"""Seconds that a call waits before its peer is asked."""
ASKED_EVERY = 2.0
"""Seconds between two questions, as long as they are answered."""
STALLED_AFTER = 2.5
"""Seconds without an answer, to either question, until others are called instead."""
SILENT_AFTER = 4.0
"""Seconds without an answer to a PING until the calls that wait as long end as lost."""
TIMEOUTS = 5
"""Calls that reach their deadline, without a reply between them, until others are called instead."""
SHORTEST = 0.2
"""Seconds; who gives less time than that learns nothing of the server when it is over."""
FIRST_BAN, LONGEST_BAN, FORGIVEN = 5.0, 300.0, 60.0
"""Seconds for which others are called; it doubles each time, unless the last time is so long over."""


class Findings(NamedTuple):
    """What a look came to.

    Attributes:
        ask: a call about whose service the peer is to be asked now: see :meth:`Liveness.asked`.
        answers: False where it has come to be stalled, True where it is no more; None for no news.
        overdue: calls up to this number have waited too long for a peer that answers nothing; 0 for none.
    """

    ask: Call | None
    answers: bool | None
    overdue: int


class Liveness:
    """What is known of the peer of one connection. Looked at about twice a second while calls are under way.

    Args:
        random: a number in [0, 1) at each call.
    """

    __slots__ = (
        "_asked_at", "_ban", "_bans", "_echo", "_marks", "_ping", "_random", "_replies", "_subject", "_timeouts",
        "stalled",
    )  # fmt: skip

    def __init__(self, random: Callable[[], float]) -> None:
        self._random = random
        self._marks: deque[tuple[float, int]] = deque()  # when which number was the last
        self._asked_at = float("-inf")
        self._ping: Call | None = None
        self._echo: Call | None = None
        self._subject: Call | None = None
        self._timeouts = self._replies = 0
        self._ban = float("-inf")
        self._bans = 0
        self.stalled = False

    def look(self, calls: CallTable, now: float) -> Findings:
        """Judge by the present moment."""
        self._marks.append((now, calls.last))
        while len(self._marks) > 1 and self._marks[1][0] <= now - SILENT_AFTER:
            self._marks.popleft()
        answered = all(each is None or each.outcome is not None for each in (self._ping, self._echo))
        since = now - self._asked_at
        is_over = now >= self._ban  # then only an answer to what is asked from now on brings it back
        ask = None
        if answered and since >= ASKED_EVERY:
            ask = self._waiting_since(calls, now - QUIET)
            if ask is None and self.stalled and is_over and self._asked_at < self._ban:
                ask = self._subject
        news: bool | None = None
        if self.stalled and answered and is_over and self._asked_at >= self._ban:
            self.stalled, news = False, True
            self._timeouts = 0
        elif not self.stalled and not answered and since >= STALLED_AFTER:
            self.stalled, news = True, False
        overdue = 0
        if self._ping is not None and self._ping.outcome is None and since >= SILENT_AFTER:
            overdue = self._last_at(now - SILENT_AFTER)
        return Findings(ask, news, overdue)

    def asked(self, subject: Call, ping: Call, echo: Call | None, now: float) -> None:
        """The peer was asked.

        Args:
            subject: about whose service; ``ping`` and ``echo`` are the calls that the answers end.
        """
        self._subject, self._ping, self._echo, self._asked_at = subject, ping, echo, now

    def timed_out(self, calls: CallTable, call: Call, waited: float, now: float) -> bool:
        """``call`` was sent and reached its deadline after ``waited`` seconds; whether that makes the peer stalled."""
        if waited < SHORTEST:
            return False
        if calls.replies != self._replies:
            self._replies, self._timeouts = calls.replies, 0
        self._timeouts += 1
        if self._timeouts < TIMEOUTS or self.stalled:
            return False
        self._bans = 0 if now - self._ban > FORGIVEN else self._bans
        pause = min(FIRST_BAN * 2.0**self._bans, LONGEST_BAN)
        self._bans += 1
        self._ban = now + pause * (0.5 + self._random())
        self._subject, self.stalled = call, True
        return True

    def excuse(self, seconds: float) -> None:
        """It was this process that did not look for so long: nobody else is to be blamed for it."""
        self._asked_at += seconds
        self._marks = deque((time + seconds, last) for time, last in self._marks)

    def _waiting_since(self, calls: CallTable, moment: float) -> Call | None:
        """The call that waits longest, if it has waited since ``moment``."""
        last = self._last_at(moment)
        for id, call in list(calls.pending.items()):
            if call.kind in (wire.REQUEST, wire.CAST):
                return call if id <= last else None
        return None

    def _last_at(self, moment: float) -> int:
        """The last number that had been drawn at ``moment``, as far back as is remembered."""
        return max((last for time, last in self._marks if time <= moment), default=0)
