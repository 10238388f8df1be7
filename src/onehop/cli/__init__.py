"""The command ``onehop``. One file per group of commands; what they share is in ``console.py``."""

from __future__ import annotations

import sys
from importlib.util import find_spec

NEEDED = ("typer", "rich")


def main() -> None:
    """Run the command line, and end the process with its exit code."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(f"onehop: the command needs {' and '.join(missing)}; pip install 'onehop[cli]'", file=sys.stderr)
        sys.exit(1)
    from onehop.cli.app import app

    app(prog_name="onehop")
