"""The short form of ``forks.py``; the long form is ``make storms``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_process_of_thirty_two_calling_threads_forks_and_loses_nothing() -> None:
    program = [sys.executable, str(Path(__file__).with_name("forks.py")), "--forks", "150"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=100)
    print(f"R13  {done.stdout}")
    assert done.returncode == 0, done.stdout + done.stderr
