"""An object's methods as a table, and an exception as an error payload and back."""

from __future__ import annotations

import inspect
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import msgspec

from onehop import payload
from onehop.errors import BadArguments, DecodeError, NoSuchMethod, RemoteError, SettingsError

Function = TypeVar("Function", bound=Callable[..., Any])

_MARK = "__onehop_method__"
TEXT_LIMIT = TRACE_LIMIT = 16_384
"""Characters of a remote error's message, and of its traceback, of which the end is kept."""
ERROR_LIMIT = 262_144
"""Bytes of an error payload; beyond them the exception's arguments are left out."""


class Marks(NamedTuple):
    """What :func:`method` noted."""

    idempotent: bool
    inline: bool


def method(*, idempotent: bool = False, inline: bool = False) -> Callable[[Function], Function]:
    """Say more about a method that will be served.

    Args:
        idempotent: running it twice is as good as once; callers then send it again when it is unknown whether it ran.
        inline: it returns within microseconds and never waits; it is run by the thread that receives, which saves a
            change of threads and holds up everything else while it runs.
    """

    def mark(function: Function) -> Function:
        setattr(function, _MARK, Marks(idempotent, inline))
        return function

    return mark


class Method(NamedTuple):
    """One callable method of a service."""

    function: Callable[..., Any]
    idempotent: bool
    inline: bool
    positional: tuple[Any, ...]
    """The types to restore, by position; None for one that is taken as it comes."""
    keyword: Mapping[str, Any]
    rest: Any
    """The type of each further positional argument (``*args: T``), or None."""

    def invoke(self, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        """Call the function.

        Raises:
            BadArguments: they do not fit its signature or type hints. It did not run.
        """
        if self.keyword or self.rest is not None:
            arguments, keywords = self._restored(arguments, keywords)
        try:
            return self.function(*arguments, **keywords)
        except TypeError as error:
            # Raised by the call itself, not in the function: its traceback ends in this frame.
            if error.__traceback__ is None or error.__traceback__.tb_next is None:
                raise _bad_arguments(str(error)) from error
            raise

    def _restored(self, arguments: list[Any], keywords: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        given = list(arguments)
        for place, value in enumerate(given):
            wanted = self.positional[place] if place < len(self.positional) else self.rest
            if wanted is not None:
                given[place] = self._restore(f"argument {place + 1}", value, wanted)
        named = {
            name: value if self.keyword.get(name) is None else self._restore(name, value, self.keyword[name])
            for name, value in keywords.items()
        }
        return given, named

    def _restore(self, name: str, value: Any, wanted: Any) -> Any:
        try:
            return payload.restore(value, wanted)
        except DecodeError as error:
            raise _bad_arguments(f"{name}: {error}") from error


class Missing(NoSuchMethod):
    """This service has no such method; not what a call made by its handler may have ended in."""


class Misfit(BadArguments):
    """The arguments do not fit this method; not what a call made by its handler may have ended in."""


def _bad_arguments(text: str) -> BadArguments:
    return Misfit(text, type="TypeError", module="builtins", detail=text)


def methods_of(handler: Any) -> dict[str, Method]:
    """The methods that ``handler`` offers, by name.

    Args:
        handler: an object (its public methods), a module (its public functions), a dict of name to function, or a
            single function.

    Raises:
        SettingsError: it offers nothing, or is a class where an instance is needed.
    """
    if isinstance(handler, type):
        raise SettingsError(f"{handler.__qualname__} is a class; serve an instance of it: {handler.__qualname__}()")
    if isinstance(handler, Mapping):
        functions = dict(handler)
    elif isinstance(handler, types.ModuleType):
        functions = {
            name: each for name, each in vars(handler).items()
            if inspect.isfunction(each) and each.__module__ == handler.__name__ and not name.startswith("_")
        }  # fmt: skip
    elif inspect.isroutine(handler):
        functions = {handler.__name__: handler}
    else:
        # Properties are not looked up: reading one could run code before anybody called anything.
        functions = {
            name: getattr(handler, name) for name in dir(type(handler)) + list(getattr(handler, "__dict__", ()))
            if (not name.startswith("_") and callable(inspect.getattr_static(handler, name, None)))
            or isinstance(inspect.getattr_static(handler, name, None), (staticmethod, classmethod))
        }  # fmt: skip
        functions = {name: each for name, each in functions.items() if not name.startswith("_")}
    if not functions:
        raise SettingsError(f"{handler!r} has no public method to serve")
    for name, function in functions.items():
        if not callable(function):
            raise SettingsError(f"{name!r} is to be served but {function!r} cannot be called")
    return {name: _method(function) for name, function in functions.items()}


def _method(function: Callable[..., Any]) -> Method:
    marks = getattr(function, _MARK, Marks(False, False))
    try:
        parameters = list(inspect.signature(function).parameters.values())
        hints = typing.get_type_hints(function)
    except (TypeError, ValueError, NameError):
        return Method(function, marks.idempotent, marks.inline, (), {}, None)
    wanted = {each.name: _restorable(hints.get(each.name)) for each in parameters}
    positional = tuple(
        wanted[each.name] for each in parameters
        if each.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    )  # fmt: skip
    rest = next((wanted[each.name] for each in parameters if each.kind is inspect.Parameter.VAR_POSITIONAL), None)
    named = {
        each.name: wanted[each.name] for each in parameters
        if each.kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    }  # fmt: skip
    if not any(kind is not None for kind in (*wanted.values(), rest)):
        return Method(function, marks.idempotent, marks.inline, (), {}, None)
    return Method(function, marks.idempotent, marks.inline, positional, named, rest)


def _restorable(hint: Any) -> Any:
    """``hint``, if msgspec can make such a value; None where the argument is taken as it comes."""
    if hint is None or hint is Any or isinstance(hint, TypeVar):
        return None
    try:
        shape = msgspec.inspect.type_info(hint)
    except (TypeError, NameError):
        return None
    return None if _has_custom(shape) else hint


def _has_custom(shape: Any) -> bool:
    if isinstance(shape, msgspec.inspect.CustomType):
        return True
    inner = [getattr(shape, name, None) for name in ("item_type", "key_type", "value_type")]
    for name in ("types", "item_types"):
        inner.extend(getattr(shape, name, ()))
    return any(_has_custom(each) for each in inner if each is not None)


# Exceptions on the wire ---------------------------------------------------------------------------


def failure(error: BaseException) -> bytes:
    """The error payload of an exception that a handler raised: type, module, message, traceback, arguments.

    Never fails: what of the arguments has no form is left out.
    """
    kind, cls = "error", type(error)
    if isinstance(error, Missing):
        kind, cls = "no such method", NoSuchMethod
    elif isinstance(error, Misfit):
        kind, cls = "bad arguments", BadArguments
    trace = "".join(traceback.format_exception(error))[-TRACE_LIMIT:] if kind == "error" else ""
    try:
        detail = str(error)
    except Exception as broken:
        detail = f"<its message cannot be made: {broken!r}>"
    parts = [kind, cls.__qualname__, cls.__module__, _text(detail[:TEXT_LIMIT]), _text(trace)]
    try:
        body = payload.encode([*parts, list(error.args)])
    except Exception:  # no form on the wire, or a class that makes something else of its args
        body = b""
    return body if 0 < len(body) <= ERROR_LIMIT else payload.encode([*parts, None])


def _text(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def rebuild(body: bytes | memoryview, allowed: Iterable[type[Exception]], where: str) -> Exception:
    """The exception to raise in the caller for an error payload.

    Args:
        allowed: classes that may be made anew; any other becomes a RemoteError. No name from the wire is imported.
        where: names service, method and peer, for the message.

    Returns:
        An instance of an allowed class, with ``executed`` set and the RemoteError as its cause; else a RemoteError.
    """
    try:
        kind, name, module, detail, trace, arguments = payload.decode(body)
        told = ", ".join(map(str, (kind, name, module, detail, trace))) and list(arguments or ())
    except (DecodeError, ValueError, TypeError):
        return RemoteError(f"{where} failed, and its error cannot be read")
    if kind == "no such method":
        return NoSuchMethod(f"{where}: {detail}", type=name, module=module, detail=detail)
    if kind == "bad arguments":
        return BadArguments(f"{where} takes other arguments: {detail}", type=name, module=module, detail=detail)
    remote = RemoteError(
        f"{where} raised {name}: {detail}", type=name, module=module, detail=detail, trace=trace, arguments=tuple(told)
    )
    for each in allowed:
        if each.__qualname__ == name and each.__module__ == module:
            try:
                again = each(*told) if arguments is not None else each(detail)
            except Exception:
                return remote  # its constructor wants something else
            with suppress(AttributeError):
                again.executed = "yes"  # type: ignore[attr-defined]
            again.__cause__ = remote
            return again
    return remote
