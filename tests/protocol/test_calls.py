"""Calls made and not finished: each ends once, and never as something that was not asked."""

from __future__ import annotations

from collections import deque
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onehop.errors import WireError
from onehop.protocol import wire
from onehop.protocol.calls import FAILED, LOST, REJECTED, REPLIED, TAKEN, Call, CallTable, room_for


def begun(table: CallTable, kind: int = wire.REQUEST, **details: Any) -> Call:
    call = Call(kind, **details)
    table.begin(call)
    return call


def stream(table: CallTable, granted: int) -> Call:
    call = Call(wire.REQUEST)
    call.items = deque()
    call.granted = granted
    table.begin(call)
    return call


def receive(table: CallTable, frame: wire.Frame) -> list[Call]:
    moved: list[Call] = []
    head, body = (frame, None) if isinstance(frame, bytes) else frame
    table.receive(head, body, moved)
    return moved


def reply(call: Call, body: bytes = b"result", flags: int = 0, load: int = 0) -> wire.Frame:
    return wire.answer(wire.REPLY, flags, call.id, body, load)


# Beginning ----------------------------------------------------------------------------------------


def test_call_is_registered_before_its_frame_can_exist() -> None:
    table = CallTable()
    call = Call(wire.REQUEST)
    assert call.id == 0
    number = table.begin(call)
    assert (call.id, table.last) == (number, number) == (1, 1)
    assert table.pending == {1: call}


def test_numbers_go_on_over_a_new_table() -> None:
    numbers = count(7)
    assert [begun(CallTable(numbers)).id for _ in range(3)] == [7, 8, 9]


def test_window_is_full_at_its_number_of_calls_and_has_room_again_when_one_ends() -> None:
    table = CallTable(room=room_for(2, 1 << 23))
    first = begun(table)
    assert not table.full(0)
    begun(table)
    assert table.full(0)
    receive(table, reply(first))
    assert not table.full(0)


def test_bodies_are_bounded_together_and_the_small_ones_by_their_number() -> None:
    large = wire.SECOND_FRAME_FROM
    table = CallTable(room=room_for(4096, 4 * large))
    begun(table, size=2 * large)
    begun(table, size=large - 1)
    assert not table.full(large)
    table = CallTable(room=room_for(4096, 4 * large))
    begun(table, size=3 * large)
    assert table.full(large + 1)
    assert not table.full(4 * large // 2 // 4096)


def test_one_that_is_larger_than_all_may_be_goes_alone() -> None:
    table = CallTable(room=room_for(4096, 1_000_000))
    table.begin(Call(wire.PING))
    assert not table.full(9_000_000)
    begun(table, size=9_000_000)
    assert table.full(100_000)


@pytest.mark.parametrize("size", [100, 1_024, 10_000, 65_535, 65_536, 500_000])
def test_whatever_their_size_bodies_under_way_stay_within_the_window(size: int) -> None:
    table = CallTable()
    while not table.full(size):
        begun(table, size=size)
    under_way = sum(call.size for call in table.pending.values())
    assert under_way <= table.room.size
    assert under_way > table.room.size - size - 65_536 or len(table.pending) == table.room.messages
    for _ in range(1_000):  # one comes when another ends: it goes on
        table.pending.popitem()
        assert not table.full(size)
        begun(table, size=size)
    assert sum(call.size for call in table.pending.values()) <= table.room.size


def test_a_call_is_resumed_under_its_old_number() -> None:
    numbers = count(1)
    old = CallTable(numbers)
    call = begun(old)
    old.lose("it ended")
    new, again = CallTable(numbers), Call(wire.REQUEST)
    new.resume(again, call.id)
    assert receive(new, reply(again, b"four")) == [again]
    assert again.body == b"four"
    assert begun(new).id > call.id


@pytest.mark.parametrize(
    ("resumed", "sent", "outcome", "body", "executed"),
    [
        (False, False, LOST, "it ended", "no"),
        (False, True, LOST, "it ended", "unknown"),
        (False, True, None, None, "unknown"),
        (False, True, REJECTED, ("full", ""), "no"),
        (False, True, REJECTED, ("duplicate", ""), "unknown"),
        # What was sent over a connection before may have run, whatever befalls it on this one.
        (True, False, LOST, "it ended", "unknown"),
        (True, False, None, None, "unknown"),
        (True, True, REJECTED, ("hello first", ""), "unknown"),
        # By its number the peer knows whether it has come before, and says so.
        (True, True, REJECTED, ("duplicate", ""), "unknown"),
        (True, True, REJECTED, ("draining", ""), "no"),
        (False, True, REJECTED, ("hello first", ""), "no"),
    ],
)
def test_call_without_a_reply_did_not_run_only_where_that_is_certain(
    resumed: bool, sent: bool, outcome: str | None, body: Any, executed: str
) -> None:
    call = Call(wire.REQUEST)
    if resumed:
        CallTable().resume(call, 7)
    call.sent, call.outcome, call.body = sent, outcome, body
    assert call.executed == executed


def test_final_goodbye_proves_nothing_of_a_call_that_was_resumed() -> None:
    numbers = count(1)
    table, again = CallTable(numbers), Call(wire.REQUEST)
    first = begun(table)
    table.resume(again, 7)
    last = begun(table)
    assert table.refuse("draining") == [last, again, first]
    assert [call.outcome for call in (first, again, last)] == [REJECTED, LOST, REJECTED]
    assert first.body == last.body == ("draining", "")
    assert (again.body, again.executed) == ("its server said goodbye (draining)", "unknown")


# Ending -------------------------------------------------------------------------------------------


def test_reply_ends_its_call_with_its_body_and_tells_the_load() -> None:
    table = CallTable()
    call, other = begun(table), begun(table)
    assert receive(table, reply(call, b"four", load=4)) == [call]
    assert (call.outcome, call.body, table.load) == (REPLIED, b"four", 4)
    assert other.outcome is None
    assert list(table.pending) == [other.id]


def test_failed_reply_ends_its_call_as_failed() -> None:
    table = CallTable()
    call = begun(table)
    receive(table, reply(call, b"error", wire.FAILED))
    assert (call.outcome, call.body) == (FAILED, b"error")


def test_large_body_is_taken_from_the_second_frame() -> None:
    table = CallTable()
    call, lines = begun(table), stream(table, 1)
    large = bytes(wire.SECOND_FRAME_FROM)
    receive(table, reply(call, large))
    receive(table, wire.answer(wire.ITEM, 0, lines.id, large))
    assert call.body is large
    assert lines.items is not None
    assert lines.items[0] is large


@pytest.mark.parametrize("kind", [wire.REPLY, wire.ITEM])
def test_body_that_is_announced_and_missing_or_there_and_not_announced_is_refused(kind: int) -> None:
    table = CallTable()
    call = stream(table, 1)
    with pytest.raises(WireError, match="announced"):
        receive(table, wire.pack(kind, wire.BODY_FOLLOWS, id=call.id))
    with pytest.raises(WireError, match="announced"):
        receive(table, (wire.pack(kind, id=call.id), b"body"))
    assert call.outcome is None
    assert not call.items
    assert call.id in table.pending


def test_acknowledgement_ends_each_of_its_casts_as_taken() -> None:
    table = CallTable()
    casts = [begun(table, wire.CAST) for _ in range(4)]
    assert receive(table, wire.ack([1, 2, 4], load=9)) == [casts[0], casts[1], casts[3]]
    assert [each.outcome for each in casts] == [TAKEN, TAKEN, None, TAKEN]
    assert table.load == 9


@pytest.mark.parametrize("kind", [wire.REQUEST, wire.CAST, wire.PING, wire.HELLO])
def test_rejection_ends_whatever_it_names_with_reason_and_text(kind: int) -> None:
    table = CallTable()
    call = begun(table, kind)
    assert receive(table, wire.reject(call.id, "full", "later")) == [call]
    assert (call.outcome, call.body) == (REJECTED, ("full", "later"))


def test_pong_ends_its_ping() -> None:
    table = CallTable()
    ping = begun(table, wire.PING)
    assert receive(table, wire.pack(wire.PONG, id=ping.id)) == [ping]
    assert ping.outcome == REPLIED


ANSWERS = {
    "reply": (lambda id: wire.answer(wire.REPLY, 0, id, b""), wire.REQUEST),
    "acknowledgement": (lambda id: wire.ack([id]), wire.CAST),
    "pong": (lambda id: wire.pack(wire.PONG, id=id), wire.PING),
}


@pytest.mark.parametrize("kind", [wire.REQUEST, wire.CAST, wire.PING, wire.HELLO])
@pytest.mark.parametrize("answer", ANSWERS)
def test_answer_of_another_kind_than_what_was_asked_is_refused_and_ends_nothing(answer: str, kind: int) -> None:
    frame, right = ANSWERS[answer]
    table = CallTable()
    call = begun(table, kind)
    if kind == right:
        assert receive(table, frame(call.id)) == [call]
        return
    with pytest.raises(WireError):
        receive(table, frame(call.id))
    assert call.outcome is None
    assert call.id in table.pending


@pytest.mark.parametrize("kind", [22, 255])
def test_kind_that_is_no_answer_is_refused(kind: int) -> None:
    with pytest.raises(WireError, match=f"kind {kind} does not go from a server to a caller"):
        receive(CallTable(), wire.HEADER.pack(kind, 0, 0, 0, 1))


@pytest.mark.parametrize("kind", [0, wire.HELLO, wire.REQUEST, wire.GOODBYE, wire.PING])
def test_frame_that_is_for_no_call_is_left_to_who_gave_it_and_changes_nothing(kind: int) -> None:
    table, moved = CallTable(), []
    call = begun(table)
    assert table.receive(wire.HEADER.pack(kind, 0, 9, 0, call.id), None, moved) is False
    assert (moved, call.outcome, table.pending, table.load, table.late) == ([], None, {call.id: call}, 0, 0)


@pytest.mark.parametrize("size", [0, 1, wire.HEADER_SIZE - 1])
def test_frame_without_a_whole_header_is_refused(size: int) -> None:
    table = CallTable()
    call = begun(table)
    with pytest.raises(WireError, match=f"a frame of {size} bytes"):
        receive(table, wire.pack(wire.PROGRESS, id=call.id)[:size])
    assert call.signs == 0


@pytest.mark.parametrize("late", [False, True])
def test_frame_that_is_for_a_call_is_taken_whether_somebody_waits_for_it_or_not(late: bool) -> None:
    table = CallTable()
    call = stream(table, 1)
    frames = [LATE["progress"], LATE["item"], LATE["reply"]]
    if late:
        assert table.give_up(call)
    assert [table.receive(frame, None, []) for frame in frames] == [True] * 3
    assert table.late == (3 if late else 0)


def test_acknowledgement_that_is_no_row_of_ids_changes_nothing() -> None:
    table = CallTable()
    cast = begun(table, wire.CAST)
    with pytest.raises(WireError):
        receive(table, wire.ack([cast.id]) + b"x")
    assert (cast.outcome, table.load) == (None, 0)


LATE = {
    "reply": wire.answer(wire.REPLY, 0, 1, b""),
    "acknowledgement": wire.ack([1]),
    "rejection": wire.reject(1, "full"),
    "pong": wire.pack(wire.PONG, id=1),
    "item": wire.answer(wire.ITEM, 0, 1, b""),
    "progress": wire.pack(wire.PROGRESS, id=1),
}


@pytest.mark.parametrize("frame", LATE.values(), ids=LATE)
def test_answer_after_the_call_was_given_up_is_counted_and_dropped(frame: bytes) -> None:
    table = CallTable()
    call = stream(table, 1)
    assert table.give_up(call)
    assert receive(table, frame) == []
    assert table.late == 1
    assert call.outcome is None
    assert not call.items


def test_call_ends_once_whoever_comes_first() -> None:
    table = CallTable()
    call = begun(table)
    receive(table, reply(call, b"first"))
    assert not table.give_up(call)
    receive(table, reply(call, b"second"))
    receive(table, wire.reject(call.id, "full"))
    assert table.lose("gone") == []
    assert (call.outcome, call.body, table.late) == (REPLIED, b"first", 2)


class TakenMeanwhile(dict[int, Call]):
    """A table from which another thread takes a call between a look at it and the taking out."""

    def get(self, id: int, default: Any = None) -> Any:
        found = super().get(id, default)
        self.clear()
        return found

    def popitem(self) -> tuple[int, Call]:
        if len(self) == 1:
            self.clear()
        return super().popitem()


@pytest.mark.parametrize(("frame", "kind"), [(LATE["reply"], wire.REQUEST), (LATE["acknowledgement"], wire.CAST)])
def test_call_given_up_while_its_answer_is_read_stays_given_up(frame: bytes, kind: int) -> None:
    table = CallTable()
    call = Call(kind)
    table.pending = TakenMeanwhile({1: call})
    assert receive(table, frame) == []
    assert (call.outcome, table.late) == (None, 1)


def test_lost_connection_ends_every_call_with_the_reason() -> None:
    table = CallTable()
    calls = [begun(table) for _ in range(3)]
    lost = table.lose("the host is gone")
    assert sorted(lost, key=lambda call: call.id) == calls
    assert {(call.outcome, call.body) for call in calls} == {(LOST, "the host is gone")}
    assert not table.pending


def test_refused_by_its_peer_every_call_ends_with_the_reason() -> None:
    table = CallTable()
    calls = [begun(table) for _ in range(2)]
    assert sorted(table.refuse("draining", "bye"), key=lambda call: call.id) == calls
    assert {(call.outcome, call.body) for call in calls} == {(REJECTED, ("draining", "bye"))}
    assert not table.pending


def test_call_taken_out_by_another_thread_while_the_rest_are_lost_is_not_lost() -> None:
    table = CallTable()
    table.pending = TakenMeanwhile({1: Call(wire.REQUEST), 2: Call(wire.REQUEST)})
    kept = table.pending[1]
    assert len(table.lose("gone")) == 1
    assert kept.outcome is None


def test_call_expires_at_its_deadline_and_not_before() -> None:
    table = CallTable()
    soon, late, never = begun(table, deadline=2.0), begun(table, deadline=3.0), begun(table)
    assert table.expire(1.999) == []
    assert table.expire(2.0) == [soon]
    assert soon.outcome is None, "who waits says how it ended"
    assert table.expire(2.5) == []
    assert table.expire(1e9) == [late]
    assert list(table.pending.values()) == [never]


# Streams ------------------------------------------------------------------------------------------


def test_items_arrive_in_order_and_each_is_a_sign_of_life() -> None:
    table = CallTable()
    call = stream(table, 3)
    for at in range(3):
        assert receive(table, wire.answer(wire.ITEM, 0, call.id, b"%d" % at, number=at)) == [call]
        assert call.signs == at + 1
    assert call.items == deque([b"0", b"1", b"2"])
    receive(table, reply(call, b"", wire.STREAM))
    assert call.outcome == REPLIED


def item(call: Call, number: int) -> wire.Frame:
    return wire.answer(wire.ITEM, 0, call.id, b"%d" % number, number=number & 0xFFFF_FFFF)


def test_item_beyond_what_was_asked_for_ends_the_stream_behind_those_that_were() -> None:
    table = CallTable()
    call = stream(table, 1)
    receive(table, item(call, 0))
    assert receive(table, item(call, 1)) == [call]
    assert (call.outcome, call.body) == (LOST, "item 1 of the stream came, which was not asked for")
    assert call.items == deque([b"0"])
    call.granted += 1
    assert receive(table, item(call, 1)) == []
    assert (call.items, table.late) == (deque([b"0"]), 1)


def test_item_behind_a_missing_one_ends_the_stream_and_says_which() -> None:
    table = CallTable()
    call = stream(table, 8)
    receive(table, item(call, 0))
    assert receive(table, item(call, 2)) == [call]
    assert (call.outcome, call.body) == (LOST, "item 2 of the stream came, item 1 is missing")
    assert call.items == deque([b"0"])
    assert receive(table, item(call, 1)) == []  # out of order: too late
    assert receive(table, reply(call, b"", wire.STREAM)) == []
    assert (call.outcome, table.late) == (LOST, 2)


@pytest.mark.parametrize("granted", [2, 8])
def test_item_that_came_before_is_dropped_and_counted_and_the_stream_goes_on(granted: int) -> None:
    table = CallTable()
    call = stream(table, granted)
    frames: list[Any] = [(item(call, each), None) for each in (0, 0, 1, 0, 1)]
    assert table.receive_all(frames, [], []) == 3
    assert (call.items, call.signs, call.outcome) == (deque([b"0", b"1"]), 2, None)


def test_position_of_an_item_begins_anew_behind_the_largest_number() -> None:
    table = CallTable()
    call = stream(table, 1 << 40)
    call.arrived = 0xFFFF_FFFF
    receive(table, item(call, 0xFFFF_FFFF))
    with pytest.raises(WireError, match="item 4294967295 of call 1 came before"):
        receive(table, item(call, 0xFFFF_FFFF))
    receive(table, item(call, 1 << 32))
    assert call.items == deque([b"%d" % 0xFFFF_FFFF, b"%d" % (1 << 32)])
    receive(table, item(call, (1 << 32) + 3))
    assert call.body == f"item {(1 << 32) + 3} of the stream came, item {(1 << 32) + 1} is missing"


def test_item_for_a_call_that_is_no_stream_is_refused() -> None:
    table = CallTable()
    call = begun(table)
    with pytest.raises(WireError, match=f"an item for call {call.id}"):
        receive(table, wire.answer(wire.ITEM, 0, call.id, b"x"))
    assert call.signs == 0


def test_progress_is_a_sign_of_life_and_ends_nothing() -> None:
    table = CallTable()
    call = begun(table)
    assert receive(table, wire.pack(wire.PROGRESS, id=call.id)) == [call]
    assert (call.signs, call.outcome) == (1, None)
    assert call.id in table.pending


# Any order ----------------------------------------------------------------------------------------

ACTIONS = st.lists(
    st.tuples(st.sampled_from(["reply", "ack", "reject", "give up", "expire"]), st.integers(1, 6)), max_size=30
)


@given(ACTIONS)
def test_each_call_leaves_the_table_exactly_once_whatever_comes_in_whatever_order(
    actions: list[tuple[str, int]],
) -> None:
    table = CallTable()
    calls = [begun(table, deadline=1.0) for _ in range(4)] + [begun(table, wire.CAST, deadline=1.0) for _ in range(2)]
    left: list[Call] = []
    for action, id in actions:
        try:
            match action:
                case "reply":
                    left += receive(table, wire.answer(wire.REPLY, 0, id, b""))
                case "ack":
                    left += receive(table, wire.ack([id]))
                case "reject":
                    left += receive(table, wire.reject(id, "full"))
                case "give up":
                    left += [calls[id - 1]] if table.give_up(calls[id - 1]) else []
                case "expire":
                    left += table.expire(float(id - 5))
        except WireError:
            pass
    left += table.lose("end")
    assert sorted(call.id for call in left) == [1, 2, 3, 4, 5, 6]


# In batches ---------------------------------------------------------------------------------------


def table_of(*kinds: int) -> tuple[CallTable, list[Call]]:
    """A table with a registered call of each kind, numbered from 1."""
    table = CallTable()
    calls = [Call(kind) for kind in kinds]
    for call in calls:
        table.begin(call)
    return table, calls


def plain(frame: wire.Frame) -> bytes:
    assert isinstance(frame, bytes)
    return frame


BATCH = [
    plain(wire.answer(wire.REPLY, 0, 1, b"one", load=7)),
    b"short",
    plain(wire.answer(wire.REPLY, wire.FAILED, 2, b"failed")),
    wire.ack([3]),
    plain(wire.answer(wire.REPLY, 0, 3, b"no request")),
    plain(wire.answer(wire.REPLY, 0, 99, b"late")),
    wire.pack(wire.PING),
    plain(wire.answer(wire.REPLY, 0, 4, b"four")),
    wire.reject(5, "full"),
]


def test_batch_leaves_what_the_same_frames_leave_one_by_one() -> None:
    found = []
    for together in (True, False):
        table, calls = table_of(wire.REQUEST, wire.REQUEST, wire.CAST, wire.REQUEST, wire.REQUEST)
        moved: list[Call] = []
        others: list[bytes] = []
        incoming: list[tuple[bytes, wire.Body | None]] = [(frame, None) for frame in BATCH]
        bad = 0
        for part in [incoming] if together else [[each] for each in incoming]:
            bad += table.receive_all(part, moved, others)
            assert part == []
        told = [(call.outcome, call.body) for call in calls]
        found.append((bad, told, [call.id for call in moved], others, table.load, table.late, list(table.pending)))
    assert found[0] == found[1]
    bad, told, moved_ids, others, _load, late, pending = found[0]
    assert (bad, late, pending) == (1, 2, [])
    assert told == [
        (REPLIED, b"one"), (FAILED, b"failed"), (TAKEN, None), (REPLIED, b"four"), (REJECTED, ("full", ""))
    ]  # fmt: skip
    assert (moved_ids, others) == ([1, 2, 3, 4, 5], [wire.pack(wire.PING)])


def test_reply_to_a_cast_breaks_the_format_in_a_batch_too() -> None:
    table, [call] = table_of(wire.CAST)
    assert table.receive_all([(plain(wire.answer(wire.REPLY, 0, 1, b"")), None)], [], []) == 1
    assert call.outcome is None
    assert list(table.pending) == [1]


def test_nothing_behind_a_final_goodbye_is_looked_at() -> None:
    table, [call] = table_of(wire.REQUEST)
    others: list[bytes] = []
    goodbye = wire.goodbye(final=True)
    incoming: list[tuple[bytes, wire.Body | None]] = [
        (goodbye, None), (plain(wire.answer(wire.REPLY, 0, 1, b"")), None)
    ]  # fmt: skip
    assert table.receive_all(incoming, [], others) == 0
    assert (incoming, others, call.outcome) == ([], [goodbye], None)


def test_reply_whose_caller_gives_up_at_this_moment_is_late() -> None:
    class GivenUpMeanwhile(dict[int, Call]):
        def pop(self, number: int, default: Any = None) -> Any:  # type: ignore[override]
            super().pop(number, None)
            return default

    table, [call] = table_of(wire.REQUEST)
    table.pending = GivenUpMeanwhile(table.pending)
    moved: list[Call] = []
    assert table.receive_all([(plain(wire.answer(wire.REPLY, 0, 1, b"")), None)], moved, []) == 0
    assert (moved, call.outcome, table.late) == ([], None, 1)
