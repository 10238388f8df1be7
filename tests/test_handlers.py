"""An object's methods as a table, and exceptions as payloads and back; without a network."""

from __future__ import annotations

import datetime
import functools
import sys
import uuid
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onehop import payload
from onehop.errors import BadArguments, NoSuchMethod, RemoteError, SettingsError
from onehop.handlers import TRACE_LIMIT, failure, method, methods_of, rebuild

T = TypeVar("T")
ID = uuid.UUID(int=5)


# Methods ------------------------------------------------------------------------------------------


class Clock:
    constant = 5
    looked_at = False

    def __init__(self) -> None:
        self.added = lambda: "added"
        self._hidden = lambda: None
        self.value = 7

    def read(self) -> str:
        return "read"

    @staticmethod
    def still() -> str:
        return "still"

    @classmethod
    def family(cls) -> str:
        return cls.__name__

    @property
    def costly(self) -> str:
        type(self).looked_at = True
        return "costly"

    def _private(self) -> None: ...

    def __call__(self) -> None: ...


class Alarm(Clock):
    def ring(self) -> str:
        return "ring"


def test_public_methods_of_an_object_are_offered_and_nothing_else() -> None:
    table = methods_of(Alarm())
    assert sorted(table) == ["added", "family", "read", "ring", "still"]
    assert [table[name].invoke([], {}) for name in ("added", "family", "read", "ring", "still")] == [
        "added", "Alarm", "read", "ring", "still",
    ]  # fmt: skip


def test_properties_are_not_read() -> None:
    methods_of(Alarm())
    assert Clock.looked_at is Alarm.looked_at is False


def test_public_functions_of_a_module_are_offered_and_not_what_it_imported() -> None:
    own = methods_of(sys.modules[__name__])
    assert "test_properties_are_not_read" in own
    assert "given" not in own
    assert "Clock" not in own


def test_dict_gives_the_names() -> None:
    table = methods_of({"a": len, "b.c": str.upper})
    assert table["a"].invoke(["abc"], {}) == 3
    assert table["b.c"].invoke(["abc"], {}) == "ABC"


def test_function_is_offered_under_its_name() -> None:
    assert list(methods_of(datetime.datetime.now)) == ["now"]


@pytest.mark.parametrize(
    ("handler", "told"),
    [
        (Clock, r"Clock is a class; serve an instance of it: Clock\(\)"),
        ({}, "has no public method to serve"),
        (object(), "has no public method to serve"),
        (None, "has no public method to serve"),
        ({"a": 5}, "'a' is to be served but 5 cannot be called"),
    ],
)
def test_what_offers_nothing_is_refused(handler: Any, told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        methods_of(handler)


def test_marks_are_kept() -> None:
    class Marked:
        @method(idempotent=True)
        def read(self) -> None: ...

        @method(inline=True)
        def quick(self) -> None: ...

        def plain(self) -> None: ...

    table = methods_of(Marked())
    assert {name: (each.idempotent, each.inline) for name, each in table.items()} == {
        "read": (True, False), "quick": (False, True), "plain": (False, False),
    }  # fmt: skip


# Arguments ----------------------------------------------------------------------------------------


def invoke(function: Any, *arguments: Any, **keywords: Any) -> Any:
    (each,) = methods_of({"f": function}).values()
    return each.invoke(list(arguments), keywords)


def test_hints_restore_what_the_wire_made_plain() -> None:
    def f(a: uuid.UUID, /, b: datetime.date, *rest: int, c: tuple[int, ...] = (), **others: Any) -> Any:
        return a, b, rest, c, others

    assert invoke(f, str(ID), "2026-03-01", 1, 2, c=[3], d=4) == (ID, datetime.date(2026, 3, 1), (1, 2), (3,), {"d": 4})


def test_hints_that_cannot_be_restored_are_passed_over() -> None:
    class Own:
        pass

    def f(a: Own, b: T, c: Any, d: None, e, g: Missing, h: list[Own]) -> Any:  # type: ignore[no-untyped-def, name-defined] # noqa: F821
        return [a, b, c, d, e, g, h]

    assert invoke(f, *range(7)) == list(range(7))


def test_method_of_an_object_restores_by_position_without_self() -> None:
    class Service:
        def read(self, when: datetime.date, zone: str = "") -> str:
            return f"{when.year} {zone}"

    assert methods_of(Service())["read"].invoke(["2026-03-01"], {"zone": "utc"}) == "2026 utc"


def test_partial_and_decorated_functions_work() -> None:
    def f(a: int, b: int) -> int:
        return a - b

    @functools.wraps(f)
    def decorated(*arguments: Any, **keywords: Any) -> Any:
        return f(*arguments, **keywords)

    assert invoke(functools.partial(f, 10), 3) == 7
    assert invoke(decorated, 10, b=3) == 7


@pytest.mark.parametrize(
    ("arguments", "keywords"), [((), {}), ((1, 2, 3), {}), ((1,), {"x": 1}), ((1,), {"a": 1}), (("one", 2), {})]
)
def test_arguments_that_do_not_fit_never_reach_the_function(arguments: Any, keywords: Any) -> None:
    ran: list[int] = []

    def f(a: int, b: int) -> None:
        ran.append(a)

    with pytest.raises(BadArguments) as caught:
        invoke(f, *arguments, **keywords)
    assert caught.value.executed == "no"
    assert ran == []


def test_type_error_of_the_function_is_its_own() -> None:
    def f(a: int) -> None:
        raise TypeError("inside")

    with pytest.raises(TypeError, match="inside"):
        invoke(f, 1)


# Exceptions ---------------------------------------------------------------------------------------


class Own(Exception):
    pass


def there_and_back(error: BaseException, *allowed: type[Exception]) -> Exception:
    try:
        raise error
    except BaseException as raised:
        return rebuild(failure(raised), allowed, "'read' of service 'clock'")


def test_error_is_told_whole() -> None:
    error = there_and_back(ValueError("no such zone", 5))
    assert isinstance(error, RemoteError)
    assert (error.type, error.module, error.arguments, error.executed) == (
        "ValueError",
        "builtins",
        ("no such zone", 5),
        "yes",
    )
    assert "there_and_back" in error.trace


def test_allowed_class_is_made_again() -> None:
    error = there_and_back(Own(1, "two"), KeyError, Own)
    assert type(error) is Own
    assert (error.args, error.executed) == ((1, "two"), "yes")  # type: ignore[attr-defined]


def test_error_of_this_library_is_told_apart() -> None:
    assert isinstance(rebuild(failure(NoSuchMethod("it has read")), (), "x"), (NoSuchMethod, RemoteError))


def test_long_traceback_keeps_its_end() -> None:
    def deep(levels: int) -> None:
        if levels:
            deep(levels - 1)
        else:
            raise ValueError("at the bottom")

    try:
        deep(400)
    except ValueError as error:
        remote = rebuild(failure(error), (), "x")
    assert isinstance(remote, RemoteError)
    assert len(remote.trace) <= TRACE_LIMIT
    assert remote.trace.rstrip().endswith("ValueError: at the bottom")


@pytest.mark.parametrize(
    "body", [b"", b"\xc1", b"\x05", b"\x90", payload.encode([1] * 6), payload.encode({"a": 1}), b"\x96" + b"\xc0" * 6]
)
def test_error_payload_that_cannot_be_read_is_still_an_error(body: bytes) -> None:
    error = rebuild(body, (ValueError,), "'read' of service 'clock'")
    assert isinstance(error, RemoteError)
    assert "'read' of service 'clock'" in str(error)


@given(st.binary(max_size=200))
def test_no_payload_makes_rebuilding_fail(body: bytes) -> None:
    assert isinstance(rebuild(body, (ValueError, KeyError), "x"), Exception)


@given(
    st.lists(st.one_of(st.none(), st.text(), st.binary(), st.integers(), st.builds(object), st.floats()), max_size=4)
)
def test_no_arguments_make_the_telling_fail(arguments: list[Any]) -> None:
    error = there_and_back(Own(*arguments))
    assert isinstance(error, RemoteError)
    assert error.type == "Own"


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_errors_that_are_no_exceptions_are_told_too(error: BaseException) -> None:
    assert there_and_back(error).type == type(error).__name__  # type: ignore[attr-defined]
