"""A callback runs while the interpreter ends."""

import threading
import time

import mlx_safe
from mlx_safe import _core, testing

begun = threading.Event()


def work(fault):
    begun.set()
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        _core.write_run_file()  # releases the GIL


mlx_safe.on_fault(work)
testing.record_fault(8)
assert begun.wait(60)
