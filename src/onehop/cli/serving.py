"""Serving an object from the command line."""

from __future__ import annotations

import os
import queue
import signal
import sys
from contextlib import suppress
from importlib import import_module
from typing import Annotated, Any

import typer

from onehop import SettingsError
from onehop.cli.console import FAILED, AsJson, complain, open_node, print_json


def serve(
    context: typer.Context,
    target: Annotated[str, typer.Argument(metavar="MODULE[:OBJECT]", help="What to serve; imported from here too.")],
    name: Annotated[
        str, typer.Option(metavar="SERVICE", help="The service's name [default: the object's, in lower case].")
    ] = "",
    server: Annotated[str, typer.Option(metavar="NAME", help="The server's name [default: the host's].")] = "",
    workers: Annotated[int | None, typer.Option(help="Threads that run its methods [default: 8].")] = None,
    as_json: AsJson = False,
) -> None:
    """Serve a module's functions, an object's methods, a dict of functions or one function.

    A class is served as an instance made without arguments. SIGTERM and SIGINT (Ctrl-C) let the requests that were
    taken finish, then the command ends with exit code 0; a second signal ends it at once.
    """
    handler, default_name = imported(target)
    stops: queue.SimpleQueue[int] = queue.SimpleQueue()  # may be used in a signal handler

    def stop(number: int, _frame: object) -> None:
        received.append(number)
        if len(received) > 1:
            os._exit(128 + number)
        stops.put(number)

    received: list[int] = []
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with open_node(context) as node:
            offered = node.serve(name or default_name, handler, server=server, workers=workers)
            if as_json:
                told = {"service": offered.service, "server": offered.name, "node": node.id, "pid": os.getpid()}
                print_json(told)
            else:
                print(f"serving {offered.service!r} as server {offered.name!r}; Ctrl-C ends it", flush=True)
            stops.get()
            if node.statistics().taken:
                with suppress(OSError):  # of whoever reads it; the drain comes first
                    complain("draining; a second Ctrl-C ends it at once")
            if not node.drain():
                complain(f"not everything was answered within drain_timeout ({node.settings.drain_timeout:g} s)")
                raise typer.Exit(FAILED)
    finally:
        for number, handling in before.items():
            signal.signal(number, handling)


def imported(target: str) -> tuple[Any, str]:
    """The object that ``MODULE:OBJECT`` names, and a name for its service.

    Raises:
        SettingsError: there is no such module or object, or it cannot be made.
    """
    module_name, _, path = target.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        raise SettingsError(
            f"{target!r} cannot be served: there is no module {missing!r}, here or installed; write MODULE:OBJECT, "
            "such as clock:Clock for the class Clock in clock.py"
        ) from error
    except (ValueError, TypeError) as error:
        raise SettingsError(f"{target!r} cannot be served; write MODULE:OBJECT, such as clock:Clock") from error
    except Exception as error:
        raise SettingsError(
            f"{target!r} cannot be served: importing {module_name!r} raised {type(error).__name__}: {error}"
        ) from error
    try:
        for name in path.split(".") if path else ():
            found = getattr(found, name)
    except AttributeError as error:
        raise SettingsError(f"{target!r} cannot be served: {error}") from error
    if isinstance(found, type):
        try:
            found = found()
        except Exception as error:
            raise SettingsError(
                f"{target!r} cannot be served: {found.__name__}() raised {type(error).__name__}: {error}; serve an "
                "instance or a class that needs no arguments"
            ) from error
    return found, (path or module_name).rpartition(".")[2].lower()
