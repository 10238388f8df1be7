"""The commands put together, with the options that all of them take and the way they end."""

from __future__ import annotations

import itertools
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from onehop import OnehopError
from onehop.cli import bench, calls, chaos, demo, look, serving, simulate
from onehop.cli.console import INTERRUPTED, complain, exit_code

GLOBAL_OPTIONS = ("--registry", "--realm", "--run-directory", "--timeout")
EXIT_CODES = (
    "Exit codes: 0 done; 1 the call failed, here or at the server; 2 the command line or a setting is wrong; "
    "3 nobody there offers it; 4 the deadline passed; 130 ended by Ctrl-C."
)


class Commands(TyperGroup):
    """Takes the global options before and after the command's name, and turns errors into sentences and exit codes."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Move the global options in front, up to a ``--``."""
        first, rest = [], []
        remaining = iter(args)
        for each in remaining:
            name, equals, _ = each.partition("=")
            if each == "--":
                rest += [each, *remaining]
            elif name in GLOBAL_OPTIONS:
                first += [each] if equals else [each, *itertools.islice(remaining, 1)]
            else:
                rest.append(each)
        return super().parse_args(ctx, first + rest)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; every error that onehop raises is one sentence, never a traceback."""
        try:
            return super().invoke(ctx)
        except OnehopError as error:
            complain(error)
            raise typer.Exit(exit_code(error)) from error
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # Whoever read our output has seen enough; the interpreter must not fail once more at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(
    context: typer.Context,
    registry: Annotated[
        str | None, typer.Option(metavar="URL", help="Where nodes find each other [default: local].")
    ] = None,
    realm: Annotated[str | None, typer.Option(metavar="NAME", help="See only the nodes of this realm.")] = None,
    run_directory: Annotated[
        str | None, typer.Option(metavar="PATH", help="Where the sockets and records of this host are.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="The deadline of each call [default: 60; ping: 1].")
    ] = None,
) -> None:
    """Brokerless remote procedure calls: try it, look at it, call and serve from the command line.

    The options below may stand before or after the command's name; what is not given comes from the variables
    ONEHOP_REGISTRY, ONEHOP_REALM, ONEHOP_RUN_DIRECTORY, ONEHOP_TIMEOUT.
    """
    given = {"registry": registry, "realm": realm, "run_directory": run_directory, "timeout": timeout}
    context.obj = {name: value for name, value in given.items() if value is not None}


for command in (
    demo.demo, look.ls, look.ping, calls.call, calls.cast, serving.serve, bench.bench, simulate.simulate,
    chaos.chaos, look.version,
):  # fmt: skip
    app.command()(command)
