"""Forked children hook nothing, whatever another thread does meanwhile."""

import os
import sys
import threading
import warnings
from typing import Any

import mlx_safe
from mlx_safe import testing
from support.simulated import fail_next

mode: Any = sys.argv[1]
mlx_safe.install(mode=mode)


def busy():
    while not stop.is_set():
        mlx_safe.install(mode=mode)


stop = threading.Event()
thread = threading.Thread(target=busy, daemon=True)
thread.start()
for _ in range(20):
    pid = os.fork()
    if pid == 0:
        warnings.simplefilter("ignore")
        status = mlx_safe.status()
        told = [r for r in status.reasons if "forked child" in r]
        good = len(told) == 1 and not (
            status.metal_hooks or status.verified or status.hooked
        )
        again = mlx_safe.install(mode=mode)
        good = good and not again.metal_hooks and told[0] in again.reasons
        mlx_safe.uninstall()
        os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
stop.set()
thread.join()
status = mlx_safe.status()
assert status.verified and not any("fork" in r for r in status.reasons)
fail_next()
try:
    testing.run_command_buffer()
except RuntimeError:
    pass
else:
    raise AssertionError("nothing was raised")
