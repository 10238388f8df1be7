"""Signals to processes, and when they have taken effect."""

from __future__ import annotations

import os
import signal
import subprocess


def send(process: subprocess.Popen[str] | subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a process; with SIGSTOP, return when all of its threads stand still.

    ``kill`` returns before that: until the thread that takes the signal has run, the others go on, and may answer what
    is meant for a process that hangs.
    """
    process.send_signal(number)
    if number == signal.SIGSTOP:
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
