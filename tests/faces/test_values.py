"""What becomes of values on the way, and what type hints bring back."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import math
import uuid
from typing import Any

import msgspec
import pytest

UTC = datetime.UTC
NOON = datetime.datetime(2026, 3, 1, 12, 30, 15, 250_000, UTC)
NAIVE = datetime.datetime(2026, 3, 1, 12, 30)
ID = uuid.UUID("12345678-1234-5678-1234-567812345678")


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0


class Zone(msgspec.Struct):
    name: str
    offset: decimal.Decimal


def name_of(value: Any) -> str:
    """The name of a test; the same in every process."""
    return getattr(value, "__name__", None) or type(value).__name__


def typed(hint: Any) -> Any:
    """A handler that returns its one argument's repr, with that type hint."""

    def handler(value: Any) -> str:
        return repr(value)

    handler.__annotations__["value"] = hint
    return handler


KEPT = [
    None, True, 0, -1, 2**63, 2**64 - 1, -(2**63), 2**64, -(2**63) - 1, 10**40, -(10**40), 1.5, -0.0, math.inf, "",
    "ü\0", b"", b"\0\xff", [], [1, [2]], {}, {"a": {"b": None}}, {1: 2, b"k": 3, 1.5: 4, None: 5}, NOON,
]  # fmt: skip


@pytest.mark.parametrize("value", KEPT, ids=name_of)
def test_plain_values_come_back_as_they_were(node, value) -> None:
    node().serve("clock", {"echo": lambda value: value})
    back = node().call("clock", "echo", value)
    assert back == value
    assert type(back) is type(value)


def test_not_a_number_comes_back(node) -> None:
    node().serve("clock", {"echo": lambda value: value})
    assert math.isnan(node().call("clock", "echo", math.nan))


CHANGED = [
    ((1, 2), [1, 2]),
    ({5}, [5]),
    (frozenset([5]), [5]),
    (NAIVE, "2026-03-01T12:30:00"),
    (datetime.date(2026, 3, 1), "2026-03-01"),
    (datetime.time(12, 30), "12:30:00"),
    (datetime.timedelta(seconds=90), "PT90S"),
    (ID, str(ID)),
    (decimal.Decimal("1.10"), "1.10"),
    (Colour.RED, "red"),
    (Point(1, 2), {"x": 1, "y": 2}),
    (Zone("utc", decimal.Decimal(0)), {"name": "utc", "offset": "0"}),
    (bytearray(b"ab"), b"ab"),
    (memoryview(b"ab"), b"ab"),
]


@pytest.mark.parametrize(("value", "plain"), CHANGED, ids=name_of)
def test_other_values_come_back_in_their_plain_form(node, value, plain) -> None:
    node().serve("clock", {"echo": lambda value: value})
    assert node().call("clock", "echo", value) == plain


RESTORED = [
    (tuple[int, int], (1, 2)),
    (set[int], {5}),
    (frozenset[str], frozenset(["a"])),
    (datetime.datetime, NAIVE),
    (datetime.date, datetime.date(2026, 3, 1)),
    (datetime.time, datetime.time(12, 30)),
    (datetime.timedelta, datetime.timedelta(seconds=90)),
    (uuid.UUID, ID),
    (decimal.Decimal, decimal.Decimal("1.10")),
    (Colour, Colour.RED),
    (Point, Point(1, 2)),
    (Zone, Zone("utc", decimal.Decimal("1.5"))),
    (list[Point], [Point(1), Point(2)]),
    (dict[str, uuid.UUID], {"a": ID}),
    (uuid.UUID | None, None),
    (datetime.datetime | None, NOON),
]


@pytest.mark.parametrize(("hint", "value"), RESTORED, ids=name_of)
def test_type_hints_restore_arguments(node, hint, value) -> None:
    node().serve("clock", {"by": typed(hint)})
    client = node().client("clock")
    assert client.call("by", value) == repr(value)
    assert client.call("by", value=value) == repr(value)


@pytest.mark.parametrize(("hint", "value"), RESTORED, ids=name_of)
def test_returns_restores_the_reply(node, hint, value) -> None:
    node().serve("clock", {"read": lambda: value})
    back = node().client("clock", returns=hint).call("read")
    assert back == value
    assert type(back) is type(value)


def test_hints_of_further_arguments_restore_them(node) -> None:
    def total(first: Any, *rest: uuid.UUID, last: datetime.date, **others: Any) -> str:
        return repr((first, rest, last, others))

    node().serve("clock", {"total": total})
    day = datetime.date(2026, 3, 1)
    said = node().call("clock", "total", "a", ID, ID, last=day, other="x")
    assert said == repr(("a", (ID, ID), day, {"other": "x"}))


def test_returns_restores_each_item_of_a_stream_and_each_reply_of_a_gather(node) -> None:
    node().serve("clock", {"days": lambda: iter([datetime.date(2026, 3, 1)]), "day": lambda: datetime.date(2026, 3, 2)})
    client = node().client("clock", returns=datetime.date)
    assert list(client.stream("days")) == [datetime.date(2026, 3, 1)]
    assert list(client.gather("day").replies.values()) == [datetime.date(2026, 3, 2)]


def test_handler_without_hints_takes_values_as_they_come(node) -> None:
    node().serve("clock", {"by": lambda value: repr(value)})
    assert node().call("clock", "by", ID) == repr(str(ID))
