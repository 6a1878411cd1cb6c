"""Notes each signal as a file in its directory, and ends with 75 when it is told to.

Argument: the directory. A file ``end`` in it ends it; ``starts`` has an x for each time
that it was started.
"""

import os
import pathlib
import signal
import sys
import time

directory = pathlib.Path(sys.argv[1])


def note(number, frame):
    (directory / signal.Signals(number).name).touch()


for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, note)
starts = directory / "starts"
starts.write_text((starts.read_text() if starts.exists() else "") + "x")
for _ in range(3000):
    time.sleep(0.02)
    if (directory / "end").exists():
        (directory / "end").unlink()
        os._exit(75)
