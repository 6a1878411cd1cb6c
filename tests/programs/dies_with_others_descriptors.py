"""DIRECTORY [fork]: a daemon that has closed all it has not opened dies.

Its files have the numbers that were mlx-safe's, and keep what it writes.
"""

import os
import sys
from pathlib import Path

import mlx_safe

mlx_safe.install(signals=True)
mlx_safe.breadcrumb("about to die", attempt=1)
os.closerange(3, 64)
files = [(Path(sys.argv[1]) / str(i)).open("w+") for i in range(20)]
for file in files:
    file.write("precious")
    file.flush()
if sys.argv[2:] == ["fork"]:
    pid = os.fork()
    if pid > 0:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) + 100)
    for file in files:
        file.write("!")
        file.flush()
os.abort()
