"""What a process has used."""

from __future__ import annotations

import subprocess
import sys
import time


def cpu_seconds(pid: int) -> float:
    """The processor time of the process ``pid`` and all of its threads."""
    if sys.platform == "linux":
        # What glibc's clock_getcpuclockid makes of a pid: to the nanosecond.
        return time.clock_gettime(~pid << 3 | 2)
    command = ["ps", "-o", "time=", "-p", str(pid)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seconds = 0.0
    for part in told.strip().replace("-", ":").split(":"):
        seconds = 60 * seconds + float(part)
    return seconds
