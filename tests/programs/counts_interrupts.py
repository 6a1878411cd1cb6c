"""Its status is how often it was interrupted."""

import os
import pathlib
import signal
import sys
import time

if sys.argv[2] == "apart":
    os.setpgid(0, 0)
seen: list[int] = []
signal.signal(signal.SIGINT, lambda *_: seen.append(1))
pathlib.Path(sys.argv[1]).write_text("ready")
for _ in range(3000):
    if seen:
        time.sleep(1)
        sys.exit(len(seen))
    time.sleep(0.02)
