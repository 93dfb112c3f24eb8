"""What demos and benches have in common about the processes that they start."""

from __future__ import annotations

import subprocess
import threading


def line_of(process: subprocess.Popen[str], timeout_s: float) -> str:
    """The next line of its standard output, which is a pipe; empty where it has ended. It is
    killed where the line does not come in time."""
    assert process.stdout is not None
    # readline has no deadline of its own: past it, the process's end ends the reading.
    alarm = threading.Timer(timeout_s, process.kill)
    alarm.start()
    try:
        return process.stdout.readline()
    finally:
        alarm.cancel()
