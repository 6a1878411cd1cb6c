"""Its status is how often it was interrupted.

Arguments: the files that it makes when it is ready and when it was interrupted, that
which lets it go on, and "apart": in a process group of its own.
"""

import os
import pathlib
import signal
import sys
import time

where = sys.argv[4]
ready, seen, go_on = (pathlib.Path(name) for name in sys.argv[1:4])
if where == "apart":
    os.setpgid(0, 0)
interrupts: list[int] = []


def interrupted(number: int, *_: object) -> None:
    interrupts.append(number)
    seen.touch()


signal.signal(signal.SIGINT, interrupted)
ready.touch()
for _ in range(3000):
    time.sleep(0.02)
    if interrupts and go_on.exists():
        time.sleep(1)
        sys.exit(len(interrupts))
