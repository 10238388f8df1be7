"""Calls made over one link and not finished.

A call is registered before its frame exists, so a reply can never come too early: only :meth:`CallTable.begin`
gives the number a frame needs.

Safe under threads without a lock of its own: every change of ``pending`` is one operation of a dict, which is
atomic, and who gets the entry out of ``pop`` decides how the call ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import count
from typing import Any, Literal, NamedTuple

from onehop.errors import WireError
from onehop.protocol import wire
from onehop.protocol.wire import Body

# How a call ended, as the engine sees it.
REPLIED = "replied"
FAILED = "failed"
TAKEN = "taken"
REJECTED = "rejected"
LOST = "lost"


class Call:
    """One request under way.

    Args:
        kind: of its frame: REQUEST, CAST or PING, or HELLO for the one that stands for the answer to a hello.
        deadline: when the caller gives up, on the caller's clock.
        size: bytes of its body, for the window.

    Attributes:
        id: its number on the link; 0 until registered.
        outcome: None while it runs, then one of REPLIED, FAILED, TAKEN, REJECTED, LOST. Set last.
        body: what came with the outcome: the reply's body, or (reason, text) of a rejection, or why it was lost.
        items: of a stream, what has come and was not read; None for other calls.
        granted, arrived: of a stream, how many items were asked for and how many have come.
        signs: progress frames and items heard so far; a change restarts the monitor's clock.
        sent: whether the frame may have left this process.
        resumed: whether it was sent before, over a connection that ended: nothing that befalls it here says that it did
            not run.
        given_up: whoever sends passes over it.
        began: the engine's; when, where its deadline does not tell.
        waiter: the engine's; who is to be woken.
        route: the engine's; where it went.
    """

    # Defaults that most calls never change stand in the class: a call is made for every request.
    id = 0
    outcome: str | None = None
    body: Any = None
    items: deque[Body] | None = None
    granted = 0
    arrived = 0
    signs = 0
    sent = False
    resumed = False
    given_up = False
    waiter: Any = None
    began: float | None = None
    route: Any = None

    def __init__(self, kind: int, deadline: float = float("inf"), size: int = 0) -> None:
        self.kind = kind
        self.deadline = deadline
        self.size = size

    @property
    def executed(self) -> Literal["no", "unknown"]:
        """Of a call without a reply: whether it certainly did not run."""
        if self.outcome == REJECTED:
            reason = self.body[0]
            return "unknown" if reason == "duplicate" or (self.resumed and reason == "hello first") else "no"
        return "unknown" if self.resumed or self.sent else "no"


class Room(NamedTuple):
    """What may be under way over one link; shared by all links of a node.

    Attributes:
        messages, size: calls at most, and the bytes of their bodies; one that is larger goes alone.
        plenty, small: while fewer calls than this are under way, and for bodies up to so many bytes, there is room
            without adding up: together they take no more than ``size``.
    """

    messages: int
    size: int
    plenty: int
    small: int


def room_for(messages: int, size: int) -> Room:
    """The room for so many calls, and bytes of their bodies."""
    return Room(messages, size, min(messages, size // 2 // wire.SECOND_FRAME_FROM), size // 2 // messages)


ORDINARY = room_for(4096, 1 << 23)


class CallTable:
    """The calls of one link, by number.

    Args:
        numbers: where numbers come from. It outlives the link: a peer's window knows a request by the caller's
            node id and this number, so a new link to the same peer must go on where the old one stopped.
        room: what may be under way.

    Attributes:
        replies: how many came, items included.
        load: requests that wait at the peer, as it told last.
        late: answers that came when their call had ended.
        last: the number drawn last.
    """

    # One for each peer that is known, of which there are thousands.
    __slots__ = ("_left", "last", "late", "load", "numbers", "pending", "replies", "room")

    def __init__(self, numbers: Iterator[int] | None = None, room: Room = ORDINARY) -> None:
        self.pending: dict[int, Call] = {}
        self.numbers = numbers if numbers is not None else count(1)
        self.room = room
        self._left = 0
        self.load = 0
        self.replies = 0
        self.late = 0
        self.last = 0

    def begin(self, call: Call) -> int:
        """Register ``call`` and return its number, from which its frame is made."""
        call.id = self.last = number = next(self.numbers)
        self.pending[number] = call
        return number

    def resume(self, call: Call, number: int) -> None:
        """Register ``call`` under the number of a call of a connection that has ended, whose request it is."""
        call.id, call.resumed = number, True
        self.pending[number] = call

    def full(self, size: int) -> bool:
        """Whether one more request of ``size`` bytes would pass the window."""
        room, under_way = self.room, len(self.pending)
        if under_way >= room.messages:
            return True
        if size <= room.small or (under_way < room.plenty and size < wire.SECOND_FRAME_FROM):
            return False
        # Added up now and then: when all that there was room for at the last time may be used up.
        self._left -= size
        if self._left < 0:
            sizes = [call.size for call in list(self.pending.values())]
            self._left = room.size - sum(sizes) - size
            if self._left < 0:
                return any(sizes)
        return False

    def give_up(self, call: Call) -> bool:
        """Forget ``call``; False when its outcome came first (or is being written at this moment).

        Read ``sent`` only after this: the sender sets it, then looks at ``given_up``.
        """
        call.given_up = True
        return self.pending.pop(call.id, None) is not None

    def receive_all(self, incoming: list[tuple[bytes, Body | None]], moved: list[Call], others: list[bytes]) -> int:
        """Take in frames, in their order, and out of the list; append to ``moved`` whoever has news.

        Args:
            others: gets the frames that are for no call. Behind a final goodbye nothing more is looked at.

        Returns:
            How many broke the wire format.
        """
        unpack, pending = wire.HEADER.unpack_from, self.pending
        bad = done = 0
        try:
            for frame, body in incoming:
                done += 1
                try:
                    kind, flags, extent, _number, id = unpack(frame)
                    # The express lane: a plain reply to a call that waits for it.
                    if (
                        kind == wire.REPLY and not flags and body is None and (call := pending.get(id)) is not None
                        and call.kind == wire.REQUEST and pending.pop(id, None) is not None
                    ):  # fmt: skip
                        self.load = extent
                        self.replies += 1
                        call.body = frame[wire.HEADER_SIZE :]
                        call.outcome = REPLIED
                        moved.append(call)
                    elif not self.receive(frame, body, moved):
                        others.append(frame)
                        if wire.is_final(frame):
                            done = len(incoming)
                            break
                except (WireError, wire.TOO_SHORT):
                    bad += 1
        finally:
            del incoming[:done]
        return bad

    def receive(self, frame: bytes, body: Body | None, moved: list[Call]) -> bool:
        """Take in one frame; append to ``moved`` whoever has news.

        Args:
            body: the second frame, where there was one.

        Returns:
            Whether it was a frame for calls (ACK and above). Nothing was done with any other.

        Raises:
            WireError: the frame breaks the wire format. Nothing has changed.
        """
        try:
            kind, flags, extent, number, id = wire.HEADER.unpack_from(frame)
        except wire.TOO_SHORT:
            raise WireError(f"a frame of {len(frame)} bytes; the header alone takes {wire.HEADER_SIZE}") from None
        if kind < wire.FIRST_FOR_CALLS:
            return False
        if (body is not None or flags & wire.BODY_FOLLOWS) and (body is None or not flags & wire.BODY_FOLLOWS):
            raise WireError("a body that is announced and missing, or there and not announced")
        if kind == wire.REPLY:
            call = self.pending.get(id)
            if call is not None and call.kind != wire.REQUEST:
                raise WireError(f"a reply to {id}, which is no request")
            self.load = extent
            self.replies += 1
            if call is None or self.pending.pop(id, None) is None:
                # Legal (wire 3.5): the call timed out here while the reply was on its way.
                self.late += 1
                return True
            call.body = frame[wire.HEADER_SIZE :] if body is None else body
            call.outcome = FAILED if flags & wire.FAILED else REPLIED
            moved.append(call)
        elif kind == wire.ACK:
            ids = wire.acked(frame)
            if any(call.kind != wire.CAST for call in map(self.pending.get, ids) if call is not None):
                raise WireError("an acknowledgement of what is no cast")
            self.load = extent
            for id in ids:
                self._end(id, wire.CAST, TAKEN, None, moved)
        elif kind == wire.REJECT:
            self._end(id, None, REJECTED, wire.rejection(frame), moved)
        elif kind == wire.PONG:
            self._end(id, wire.PING, REPLIED, frame[wire.HEADER_SIZE :], moved)
        elif kind in (wire.ITEM, wire.PROGRESS):
            call = self.pending.get(id)
            if call is None:
                self.late += 1
                return True
            if kind == wire.ITEM:
                if call.items is None:
                    raise WireError(f"an item for call {id}, which is no stream")
                ahead = (number - call.arrived) & 0xFFFF_FFFF
                if ahead >> 31:
                    raise WireError(f"item {number} of call {id} came before")
                if ahead or call.arrived >= call.granted:
                    # No item after it can be given to the reader, nor the end, as if nothing were wrong (wire 3.6).
                    wrong = f"item {call.arrived} is missing" if ahead else "which was not asked for"
                    self._end(id, None, LOST, f"item {call.arrived + ahead} of the stream came, {wrong}", moved)
                    return True
                self.replies += 1
                call.arrived += 1
                call.items.append(frame[wire.HEADER_SIZE :] if body is None else body)
            call.signs += 1
            moved.append(call)
        else:
            raise WireError(f"kind {kind} does not go from a server to a caller")
        return True

    def _end(self, id: int, kind: int | None, outcome: str, body: Any, moved: list[Call]) -> None:
        call = self.pending.get(id)
        if call is not None and kind is not None and call.kind != kind:
            raise WireError(f"an answer to {id} of another kind than what was sent")
        if call is None or self.pending.pop(id, None) is None:
            self.late += 1
            return
        call.body = body
        call.outcome = outcome
        moved.append(call)

    def lose(self, why: str) -> list[Call]:
        """End every call as LOST; returns them."""
        return self._end_all(LOST, why)

    def refuse(self, reason: str, text: str = "") -> list[Call]:
        """End every call as REJECTED: the peer said that it runs none of them; returns them.

        Those that were resumed end as LOST: it may have answered them, over the connection that ended.
        """
        return self._end_all(REJECTED, (reason, text))

    def _end_all(self, outcome: str, body: Any) -> list[Call]:
        lost: list[Call] = []
        while self.pending:
            try:
                _id, call = self.pending.popitem()
            except KeyError:  # another thread took the last one
                break
            is_proof = outcome == LOST or not call.resumed
            call.body = body if is_proof else f"its server said goodbye ({body[0]})"
            call.outcome = outcome if is_proof else LOST
            lost.append(call)
        return lost

    def expire(self, now: float) -> list[Call]:
        """Forget the calls whose deadline has come; returns them, without an outcome."""
        due = [call for call in list(self.pending.values()) if call.deadline <= now]
        return [call for call in due if self.give_up(call)]
