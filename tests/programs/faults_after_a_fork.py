"""Faults of a process and of its child, which have callbacks of their own."""

import os
import time

import mlx_safe
from mlx_safe import testing


def wait_for(told, codes):
    until = time.monotonic() + 40
    while [f.code for f in told] != codes and time.monotonic() < until:
        time.sleep(0.01)
    assert [f.code for f in told] == codes, told


seen: list[mlx_safe.Fault] = []
mlx_safe.on_fault(seen.append)
testing.record_fault(8)
wait_for(seen, [8])
pid = os.fork()
if pid == 0:
    mine: list[mlx_safe.Fault] = []
    mlx_safe.on_fault(mine.append)
    testing.record_fault(2)
    wait_for(mine, [2])
    os._exit(0)
_, status = os.waitpid(pid, 0)
assert os.waitstatus_to_exitcode(status) == 0
testing.record_fault(3)
wait_for(seen, [8, 3])  # and not the child's
