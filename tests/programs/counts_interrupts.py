"""Its status is how often it was interrupted.

Arguments: a file that says that it runs, one that says that it was interrupted, one
after which it may end, and "apart" for a process group of its own.
"""

import os
import pathlib
import signal
import sys
import time

ready, seen, go_on = map(pathlib.Path, sys.argv[1:4])
if sys.argv[4] == "apart":
    os.setpgid(0, 0)
interrupts = []


def note(number, frame):
    interrupts.append(number)
    seen.touch()


signal.signal(signal.SIGINT, note)
ready.touch()
for _ in range(3000):
    time.sleep(0.02)
    if interrupts and go_on.exists():
        time.sleep(1)
        sys.exit(len(interrupts))
