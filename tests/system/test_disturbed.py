"""The short form of ``disturbed.py``; the long form is ``make fuzz``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_requests_that_come_up_to_three_times_and_out_of_order_run_once() -> None:
    program = [sys.executable, str(Path(__file__).with_name("disturbed.py")), "--requests", "20000"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=100)
    print(f"R7  {done.stdout}")
    assert done.returncode == 0, done.stdout + done.stderr
