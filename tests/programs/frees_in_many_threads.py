"""Frees large blocks in threads; the last line is how many MB more the process has.

With SERVES, in a process that is a server.
"""

import os
import threading
from pathlib import Path

from mlx_safe.cli import main

THREADS, BLOCK = 8, 8 * 2**20


def resident() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096 // 10**6


def work(together: threading.Barrier, done: threading.Event) -> None:
    together.wait()
    blocks = [b"x" * BLOCK for _ in range(3)]
    together.wait()
    del blocks
    together.wait()
    done.wait()


if "SERVES" in os.environ:
    main(["serve", "--print-config"])
del (large := [b"x" * 3 * BLOCK])[:]  # blocks of this size are no longer mapped
before = resident()
together, done = threading.Barrier(THREADS + 1), threading.Event()
threads = [threading.Thread(target=work, args=(together, done)) for _ in range(THREADS)]
for thread in threads:
    thread.start()
for _ in range(3):
    together.wait()
print(resident() - before)
done.set()
