"""The short form of ``flood.py``; the long form is ``make fuzz``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_fuzzed_frames_and_garbage_harm_no_process_and_no_other_call() -> None:
    program = [sys.executable, str(Path(__file__).with_name("flood.py"))]
    done = subprocess.run(program, capture_output=True, text=True, timeout=110)
    print(f"R16  {done.stdout}")
    assert done.returncode == 0, done.stdout + done.stderr
