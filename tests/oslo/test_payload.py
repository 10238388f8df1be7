"""Payload is exactly as lossy as oslo_serialization.jsonutils: no more, no less."""

from __future__ import annotations

import datetime
import decimal
import ipaddress
import json
import math
import sys
import uuid
from collections import OrderedDict
from typing import Any

import netaddr
import oslo_messaging
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oslo_serialization import jsonutils

from onehop.oslo import payload


class WithItems:
    """What jsonutils takes for a mapping: Nova's objects and SQLAlchemy's rows look like this."""

    def __init__(self, inner: dict[Any, Any]) -> None:
        self.inner = inner

    def items(self) -> Any:
        return self.inner.items()


class WithIter:
    def __init__(self, inner: list[Any]) -> None:
        self.inner = inner

    def __iter__(self) -> Any:
        return iter(self.inner)


class Text(str):
    __slots__ = ()


class Number(int):
    pass


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(2**70), max_value=2**70)
    | st.floats()
    | st.text()
    | st.text(alphabet=st.characters())  # lone surrogates too
    | st.text().map(Text)
    | st.integers().map(Number)
    | st.datetimes()
    | st.datetimes(timezones=st.timezones())
    | st.dates()
    | st.uuids()
    | st.decimals()
    | st.ip_addresses()
    | st.ip_addresses().map(lambda address: netaddr.IPAddress(str(address)))
    | st.ip_addresses(v=4).map(lambda address: netaddr.IPNetwork(f"{address}/24"))
    | st.text().map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.binary(max_size=4)
    | st.times()
    | st.timedeltas()
    | st.just(ValueError("an exception"))
    | st.just(len)
    | st.just(math)
)
KEYS = st.text() | st.integers() | st.floats() | st.booleans() | st.none() | st.uuids() | st.text().map(Text)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.dictionaries(st.text(), inner, max_size=4)
        | st.dictionaries(st.text(), inner, max_size=4).map(OrderedDict)
        | st.dictionaries(st.text(), inner, max_size=3).map(WithItems)
        | st.lists(inner, max_size=3).map(WithIter)
        | st.sets(st.integers() | st.text(), max_size=4)
        | st.frozensets(st.uuids(), max_size=3)
    ),
    max_leaves=12,
)


def outcome(function: Any, value: Any) -> tuple[str, Any]:
    """What comes of the value, in a form in which NaN equals itself and 1 does not equal True or 1.0."""
    try:
        return "value", repr(function(value))
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        return "error", type(error)


@settings(max_examples=1500, deadline=None)
@given(VALUES)
def test_a_round_trip_equals_that_of_jsonutils(value: Any) -> None:
    ours = outcome(lambda each: payload.decode(payload.encode(each)), [value])
    theirs = outcome(lambda each: jsonutils.loads(jsonutils.dumps(each)), [value])
    assert ours == theirs


@settings(max_examples=500, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=20))
def test_what_jsonutils_wrote_is_read_as_it_reads_it(value: Any) -> None:
    text = jsonutils.dumps(value)
    assert repr(payload.decode(text.encode())) == repr(jsonutils.loads(text))
    assert repr(payload.decode(memoryview(text.encode()))) == repr(jsonutils.loads(text))


@pytest.mark.parametrize(
    "value",
    [
        2**64,
        -(2**63) - 1,
        10**40,
        math.nan,
        math.inf,
        -math.inf,
        -0.0,
        1e300,
        5e-324,
        "\ud800",
        "\x00\x7f\u2028",
        {1: "a", "1": "b"},
        {None: 1, True: 2, 1.5: 3},
        datetime.datetime(5, 1, 2, 3, 4, 5),
        datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone(datetime.timedelta(hours=2))),
        datetime.date(5, 1, 2),
        decimal.Decimal("1E+3"),
        uuid.UUID(int=7),
        ipaddress.ip_address("fe80::1"),
        netaddr.IPNetwork("10.0.0.0/8"),
        netaddr.IPRange("10.0.0.1", "10.0.0.4"),
        "grüße".encode(),
        {"a": (1, {2})},
        WithItems({"a": WithItems({"b": WithItems({"c": WithItems({"d": WithItems({"e": 1})})})})}),
        [[[[[[[[[[1]]]]]]]]]],
    ],
)  # fmt: skip
def test_a_corner_equals_that_of_jsonutils(value: Any) -> None:
    assert repr(payload.decode(payload.encode([value]))) == repr(jsonutils.loads(jsonutils.dumps([value])))


def test_a_value_that_contains_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(payload.UNENCODABLE):
        payload.encode(loop)


def test_an_object_without_a_form_is_refused() -> None:
    with pytest.raises(ValueError, match="Cannot convert"):
        payload.encode([object()])


def test_bytes_that_are_not_json_are_refused() -> None:
    with pytest.raises(ValueError, match="Expecting value"):
        payload.decode(b"\xff\x00")


def test_encoding_leaves_the_value_alone() -> None:
    value = {"a": [1, (2, 3)], "b": {"c": datetime.date(2026, 1, 1)}}
    before = repr(value)
    payload.encode(value)
    assert repr(value) == before


# --- failures -------------------------------------------------------------------------------------------------------


class Strange(Exception):
    def __init__(self, value: Any) -> None:
        super().__init__(value)
        self.value = value


class Picky(Exception):
    """Its constructor refuses what travels as its argument."""

    def __init__(self, value: Any) -> None:
        if isinstance(value, str):
            raise ValueError("I want no text")
        super().__init__(str(value))


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def failure_of(error: BaseException) -> payload.Failure:
    try:
        raise error
    except BaseException:
        return sys.exc_info()  # type: ignore[return-value]


def travelled(error: BaseException, *allowed: str) -> Exception:
    answer = payload.decode(payload.encode_failure(failure_of(error)))
    assert answer[0] is None
    return payload.rebuild_failure(answer[1], list(allowed))


def test_a_builtin_comes_back_as_itself_with_the_remote_traceback_as_a_note() -> None:
    back = travelled(KeyError("port", 7))
    assert type(back) is KeyError
    assert back.args == ("port", 7)
    assert "in failure_of" in back.__notes__[0]


def test_an_allowed_exception_comes_back_as_a_subclass() -> None:
    back = travelled(Strange(5), __name__)
    assert isinstance(back, Strange)
    assert type(back).__name__ == "Strange_Remote"
    assert back.value == 5


def test_an_exception_that_is_not_allowed_comes_back_as_remote_error() -> None:
    back = travelled(Strange(5))
    assert isinstance(back, oslo_messaging.RemoteError)
    assert back.exc_type == "Strange"


def test_an_exception_whose_arguments_have_no_form_still_travels() -> None:
    back = travelled(ValueError(object()))
    assert isinstance(back, ValueError)
    assert "object object at" in str(back)


def test_an_exception_without_a_text_still_travels() -> None:
    back = travelled(Mute(), __name__)
    assert isinstance(back, oslo_messaging.RemoteError | Mute)
    assert "Mute" in json.dumps([str(getattr(back, "value", back.args))])


def test_an_exception_that_cannot_be_rebuilt_comes_back_as_remote_error() -> None:
    back = travelled(Picky(5), __name__)
    assert isinstance(back, oslo_messaging.RemoteError)
    assert (back.exc_type, back.value) == ("Picky", "5")


def test_a_failure_that_is_too_large_is_cut() -> None:
    body = payload.encode_failure(failure_of(ValueError("x" * 1_000_000)), limit=100)
    assert len(body) < 1000
    assert isinstance(payload.rebuild_failure(payload.decode(body)[1], []), ValueError)


def test_what_is_not_an_exception_class_is_not_rebuilt() -> None:
    back = travelled(SystemExit(3))
    assert isinstance(back, oslo_messaging.RemoteError)
