"""What the commands share: options given to all of them, exit codes, and how things are printed."""

from __future__ import annotations

import base64
import json
import math
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from onehop import CallError, CallTimeout, Node, NoRoute, OnehopError, RemoteError, SettingsError

OK, FAILED, USAGE, NOBODY, TIMEOUT, INTERRUPTED = 0, 1, 2, 3, 4, 130
WIDTH_OF_A_FILE = 160
"""Columns of tables that do not go to a terminal."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


def exit_code(error: OnehopError) -> int:
    """What the process says about ``error`` when it ends."""
    if isinstance(error, SettingsError):
        return USAGE
    if isinstance(error, NoRoute):
        return NOBODY
    if isinstance(error, CallTimeout):
        return TIMEOUT
    return FAILED


def complain(sentence: object) -> None:
    """One sentence on standard error."""
    print(f"onehop: {sentence}", file=sys.stderr)


def open_node(context: typer.Context, **more: Any) -> Node:
    """A node with the options given to every command; nothing is opened before its first use.

    Raises:
        SettingsError: one of them, or a variable ``ONEHOP_*``, does not fit.
    """
    return Node(**{**(context.obj or {}), **more})


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Have SIGTERM end the command as Ctrl-C does, so that its processes and its directories go."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def out() -> Console:
    """Standard output as it is now."""
    console = Console(file=sys.stdout)
    return console if console.is_terminal else Console(file=sys.stdout, width=WIDTH_OF_A_FILE)


def print_table(columns: Iterable[str], rows: Iterable[Iterable[object]], title: str | None = None) -> None:
    """A table whose numbers stand to the right."""
    listed = [list(row) for row in rows]
    table = Table(title=title, title_justify="left")
    for place, name in enumerate(columns):
        numbers = bool(listed) and all(isinstance(row[place], int | float) for row in listed)
        table.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for row in listed:
        table.add_row(*map(str, row))
    out().print(table)


def print_json(value: Any, *, indent: int | None = None) -> None:
    """``value`` as JSON on one line, or indented."""
    print(json.dumps(plain(value), ensure_ascii=False, indent=indent), flush=True)


def plain(value: Any) -> Any:
    """``value`` with a JSON form for everything: bytes as base64, keys and what JSON has not as text."""
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else _text(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(each) for each in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    return _text(value)


def _text(value: Any) -> str:
    return base64.b64encode(value).decode() if isinstance(value, bytes | bytearray | memoryview) else str(value)


def error_as_json(error: OnehopError) -> dict[str, Any]:
    """What ``--json`` prints of a failure."""
    told: dict[str, Any] = {"type": type(error).__name__, "message": str(error)}
    if isinstance(error, CallError):
        told["executed"] = error.executed
    if isinstance(error, RemoteError):
        told |= {"remote_type": error.type, "remote_module": error.module, "detail": error.detail, "trace": error.trace}
    return {"error": told}
