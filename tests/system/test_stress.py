"""The short form of ``stress.py``: a tenth of a million calls; the long form is ``make storms``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_sixty_four_threads_on_one_client_and_a_loop_lose_mix_up_and_repeat_nothing() -> None:
    program = [sys.executable, str(Path(__file__).with_name("stress.py")), "--calls", "100000", "--threads", "64"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=110)
    print(f"R22  {done.stdout}")
    assert done.returncode == 0, done.stdout + done.stderr
