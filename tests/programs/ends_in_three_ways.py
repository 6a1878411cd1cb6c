"""Ends with status 75, then by a signal, then with status 3."""

import os
import pathlib
import signal
import sys

seen = pathlib.Path(sys.argv[1])
seen.write_text(seen.read_text() + "x" if seen.exists() else "x")
if len(seen.read_text()) == 1:
    sys.exit(75)
if len(seen.read_text()) == 2:
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(3)
