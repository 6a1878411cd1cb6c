"""What a process has used."""

from __future__ import annotations

import subprocess
from pathlib import Path


def cpu_seconds(pid: int) -> float:
    """The processor time of the process ``pid`` and all of its threads."""
    stat = Path(f"/proc/{pid}/stat")
    if stat.exists():
        fields = stat.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100  # USER_HZ, on all of Linux
    command = ["ps", "-o", "time=", "-p", str(pid)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seconds = 0.0
    for part in told.strip().replace("-", ":").split(":"):
        seconds = 60 * seconds + float(part)
    return seconds
