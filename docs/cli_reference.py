"""Writes docs/reference/cli.md from what the command's help is made of:

python docs/cli_reference.py > docs/reference/cli.md
"""

from __future__ import annotations

import enum
import inspect
import typing
from collections.abc import Callable
from typing import Any

from typer.models import ArgumentInfo

from onehop.cli import app as commands

HEAD = """\
# The command line

`pip install 'onehop[cli]'` gives the command `onehop`; `python -m onehop` is the same.
This page is made from the command's own help by `docs/cli_reference.py`.
"""
VALUES = {str: "TEXT", int: "INTEGER", float: "NUMBER"}


def reference() -> str:
    """The page."""
    parts = [HEAD, prose(commands.options), "## Options of every command\n", table(commands.options)]
    parts += ["## Exit codes\n", exit_codes()]
    for each in commands.app.registered_commands:
        command = each.callback
        assert command is not None
        parts += [f"## onehop {command.__name__}\n", usage(command), prose(command), table(command)]
    return "\n".join(part for part in parts if part)


def prose(command: Callable[..., Any]) -> str:
    return inspect.cleandoc(command.__doc__ or "") + "\n"


def parameters(command: Callable[..., Any]) -> list[tuple[str, Any, Any, Any]]:
    """Name, type, what typer is told, and default of each."""
    hints = typing.get_type_hints(command, include_extras=True)
    return [
        (name, typing.get_args(hints[name])[0], typing.get_args(hints[name])[1], each.default)
        for name, each in inspect.signature(command).parameters.items()
        if typing.get_origin(hints[name]) is typing.Annotated
    ]


def usage(command: Callable[..., Any]) -> str:
    words = [command.__name__, "[OPTIONS]"]
    for name, _, told, default in parameters(command):
        if isinstance(told, ArgumentInfo):
            required = default is inspect.Parameter.empty or told.metavar
            words.append((told.metavar or name.upper()) if required else f"[{name.upper()}]")
    return f"    onehop {' '.join(words)}\n"


def table(command: Callable[..., Any]) -> str:
    rows = []
    for name, kind, told, default in parameters(command):
        text = told.help.rstrip(".").replace("].", "]")
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            text += f": {', '.join(kind)}"
        if default not in (inspect.Parameter.empty, None, False, ""):
            text += f" [default: {format(default, 'g') if isinstance(default, float) else default}]"
        if isinstance(told, ArgumentInfo):
            cell = told.metavar or name.upper()
        else:
            # In an annotation the name stands where a default would.
            named = [each for each in (told.default, *(told.param_decls or ())) if str(each).startswith("--")]
            flag = named[0] if named else f"--{name.replace('_', '-')}"
            plain = next((each for each in typing.get_args(kind) if each is not type(None)), kind)
            cell = flag if plain is bool else f"{flag} {told.metavar or VALUES[plain]}"
        rows.append(f"| `{cell.replace('|', chr(92) + '|')}` | {text} |")
    return "\n".join(["| | |", "| --- | --- |", *rows, ""]) if rows else ""


def exit_codes() -> str:
    listed = commands.EXIT_CODES.removeprefix("Exit codes: ").rstrip(".").split("; ")
    rows = [f"| {number} | {meaning} |" for number, _, meaning in (each.partition(" ") for each in listed)]
    return "\n".join(["| code | meaning |", "| --- | --- |", *rows, ""])


if __name__ == "__main__":
    print(reference(), end="")
