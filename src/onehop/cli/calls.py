"""Calling from the command line."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from onehop import OnehopError
from onehop.cli.console import FAILED, NOBODY, AsJson, complain, error_as_json, open_node, print_json, print_table

Service = Annotated[str, typer.Argument(help="The service's name.")]
Method = Annotated[str, typer.Argument(help="The method's name.")]
Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[VALUE | NAME=VALUE]...",
        help="Arguments, by position or by name; values are JSON, and a word that is not JSON is text.",
    ),
]
ToServer = Annotated[str, typer.Option("--server", help="Only the server of this name.")]


def call(
    context: typer.Context,
    service: Service,
    method: Method,
    arguments: Arguments = None,
    server: ToServer = "",
    stream: Annotated[bool, typer.Option("--stream", help="Print items as the handler yields them.")] = False,
    as_json: AsJson = False,
) -> None:
    """Call a method at one server of a service and print its reply.

    A reply that is text is printed as it is, any other as JSON. For example: onehop call clock read zone=utc
    """
    given, named = parsed(arguments or [])
    with errors_too(as_json), open_node(context) as node:
        client = node.client(service, server=server)
        begun = time.perf_counter()
        if stream:
            for item in client.stream(method, *given, **named):
                print_json(item)
            return
        reply = client.call(method, *given, **named)
        seconds = time.perf_counter() - begun
    if as_json:
        print_json({"reply": reply, "seconds": round(seconds, 6)})
    elif isinstance(reply, str):
        print(reply)
    else:
        print_json(reply, indent=2)


def cast(
    context: typer.Context,
    service: Service,
    method: Method,
    arguments: Arguments = None,
    server: ToServer = "",
    fanout: Annotated[bool, typer.Option("--fanout", help="Have it run at every server, and print the receipts.")] = (
        False
    ),
    as_json: AsJson = False,
) -> None:
    """Have a method run without waiting for its result: ends when a server has taken it in.

    With --fanout every server gets it; exit code 3 if there is none, 1 if one did not take it.
    """
    given, named = parsed(arguments or [])
    with errors_too(as_json), open_node(context) as node:
        client = node.client(service, server=server)
        if not fanout:
            client.cast(method, *given, **named)
            if as_json:
                print_json({"outcome": "taken"})
            return
        receipts = client.fanout(method, *given, **named)
    if as_json:
        print_json([each._asdict() for each in receipts])
    elif receipts:
        rows = [(each.server, each.host, each.node, each.outcome, each.reason) for each in receipts]
        print_table(("server", "host", "node", "outcome", "reason"), rows)
    if not receipts:
        complain(f"nobody offers service {service!r}; see who is there with: onehop ls")
        raise typer.Exit(NOBODY)
    if any(each.outcome != "taken" for each in receipts):
        raise typer.Exit(FAILED)


@contextmanager
def errors_too(as_json: bool) -> Iterator[None]:
    """Print an error of onehop as JSON, where that was asked for, before it is raised on."""
    try:
        yield
    except OnehopError as error:
        if as_json:
            print_json(error_as_json(error))
        raise


def parsed(arguments: list[str]) -> tuple[list[Any], dict[str, Any]]:
    """The positional and the named arguments of a call.

    Raises:
        typer.BadParameter: one looks like JSON and is not, or a name is given twice.
    """
    given, named = [], {}
    for text in arguments:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            given.append(_value(text))
        elif name in named:
            raise typer.BadParameter(f"argument {name!r} is given twice")
        else:
            named[name] = _value(value)
    return given, named


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        # A word is text, but what begins like JSON was meant to be.
        if text[:1] in ("{", "[", '"'):
            raise typer.BadParameter(
                f"{text!r} is not JSON: {error}; quote it for the shell, for instance '{{\"a\": 1}}'"
            ) from error
        return text
    except RecursionError:
        raise typer.BadParameter("an argument is nested too deeply") from None
