"""What a round trip keeps and loses: each row of docs/reference/payload.md, and any value that is to be kept."""

from __future__ import annotations

import contextlib
import enum
import math
import re
from collections import OrderedDict, deque
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onehop import DecodeError, EncodeError, payload

TABLE = Path(__file__).parent.parent / "docs" / "reference" / "payload.md"
EAST = timezone(timedelta(hours=2))
ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)


class Pair(NamedTuple):
    a: int
    b: int


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    LOW = 1


@dataclass
class Point:
    x: int
    y: int


class Place(msgspec.Struct):
    name: str


class Name(str):
    __slots__ = ()


NAMES = {
    "EAST": EAST, "ENDLESS": ENDLESS, "Pair": Pair, "Colour": Colour, "Level": Level, "Point": Point, "Place": Place,
    "Name": Name, "OrderedDict": OrderedDict, "deque": deque, "UTC": UTC, "date": date, "datetime": datetime,
    "time": time, "timedelta": timedelta, "Decimal": Decimal, "Path": Path, "UUID": UUID,
}  # fmt: skip


def rows(heading: str) -> list[list[str]]:
    """The code in each cell of the table below `heading`."""
    section = TABLE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][2:]
    return [[(re.findall(r"`(.+?)`", cell) or [""])[0] for cell in line.strip("|").split(" | ")] for line in lines]


def value_of(code: str) -> Any:
    return eval(code, dict(NAMES))


KEPT, REFUSED = rows("What comes back"), rows("What is refused")


def test_the_tables_were_found() -> None:
    assert len(KEPT) > 30
    assert len(REFUSED) > 10


@pytest.mark.parametrize(("sent", "plain", "hint"), KEPT, ids=[row[0] for row in KEPT])
def test_row_comes_back_as_the_table_says(sent: str, plain: str, hint: str) -> None:
    value, wanted = value_of(sent), value_of(plain)
    found = payload.decode(payload.encode(value))
    assert found == wanted
    assert type(found) is type(wanted)
    if hint:
        restored = payload.restore(found, value_of(hint))
        assert restored == value
        assert value is None or type(restored) is type(value)


@pytest.mark.parametrize("sent", [row[0] for row in REFUSED])
def test_row_is_refused_as_the_table_says(sent: str) -> None:
    with pytest.raises(EncodeError):
        payload.encode(value_of(sent))


@pytest.mark.parametrize("sent", [row[0] for row in REFUSED])
def test_refused_value_is_refused_wherever_it_sits(sent: str) -> None:
    with pytest.raises(EncodeError):
        payload.encode({"a": [1, {"b": (value_of(sent), 2**70)}]})


def test_error_names_the_type() -> None:
    with pytest.raises(EncodeError, match=r"builtins\.complex"):
        payload.encode([1j])


def test_not_a_number_stays_that() -> None:
    assert math.isnan(payload.decode(payload.encode(float("nan"))))


leaves = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
    | st.datetimes(timezones=st.just(UTC))
)  # fmt: skip
keys = st.text() | st.integers(-(2**63), 2**64 - 1) | st.binary() | st.none() | st.floats(allow_nan=False)
values = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(keys, inner), max_leaves=25)


def same(one: Any, other: Any) -> bool:
    """Equal, and of the same types all the way down (1 == 1.0 == True)."""
    if type(one) is not type(other) or one != other:
        return False
    if isinstance(one, list):
        return all(map(same, one, other))
    if isinstance(one, dict):
        return all(same(*pair) for pair in zip(one.items(), other.items(), strict=True))
    if isinstance(one, tuple):
        return all(map(same, one, other))
    return True


@given(values)
def test_plain_values_come_back_as_they_were(value: Any) -> None:
    assert same(payload.decode(payload.encode(value)), value)


@given(
    st.recursive(leaves, lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner))
)
def test_what_came_back_once_comes_back_the_same(value: Any) -> None:
    once = payload.decode(payload.encode(value))
    assert same(payload.decode(payload.encode(once)), once)


@given(st.binary(max_size=200))
def test_bytes_of_anybody_are_a_value_or_an_error_of_ours(body: bytes) -> None:
    with contextlib.suppress(DecodeError):
        payload.decode(body)


@pytest.mark.parametrize(
    ("value", "hint"), [("x", int), ([1, "a"], list[int]), ({"x": 1}, Point), ("blue", Colour), ("2025-13-01", date)]
)
def test_value_that_does_not_fit_its_hint_is_refused(value: Any, hint: Any) -> None:
    with pytest.raises(DecodeError):
        payload.restore(value, hint)
