"""A fault is an exception, a guard's and a callback's, once, and nobody else's."""

import contextlib
import os
import sys
import time
from typing import Any

import mlx_safe
from mlx_safe import testing
from support.simulated import fail_next

mode: Any = sys.argv[1]
status = mlx_safe.install(mode=mode)
assert status.verified and status.metal_hooks, status.reasons
assert any("commit]" in name for name in status.hooked), status.hooked
wraps = any("addCompletedHandler" in name for name in status.hooked)
assert wraps == (mode == "intercept"), status.hooked
assert status.runtime == os.environ["MLX_SAFE_METAL_RUNTIME"]
with mlx_safe.guard():
    testing.run_command_buffer()
seen: list[mlx_safe.Fault] = []
mlx_safe.on_fault(seen.append)
for late_us in (0, 5000):
    before = mlx_safe.epoch()
    fail_next(8, late_us)
    try:
        with mlx_safe.guard():
            testing.run_command_buffer()
    except mlx_safe.errors.MetalOutOfMemoryError as e:
        (fault,) = e.faults
        assert fault.source == "metal" and fault.queue and fault.buffer
        assert 0 < fault.gpu_start <= fault.gpu_end
        assert fault.message == str(e) == str(e.__cause__)
    else:
        raise AssertionError("nothing was raised")
    assert mlx_safe.epoch() == before + 1
    fail_next(2, late_us)
    try:
        # As MLX swallows some of its own.
        with mlx_safe.guard(), contextlib.suppress(RuntimeError):
            testing.run_command_buffer()
    except mlx_safe.errors.MetalTimeoutError as e:
        assert [fault.code for fault in e.faults] == [2]
    else:
        raise AssertionError("the guard did not see what was swallowed")
    with mlx_safe.guard():
        testing.run_command_buffer()
until = time.monotonic() + 200
while len(seen) < 4 and time.monotonic() < until:
    time.sleep(0.01)
assert [f.code for f in seen] == [8, 2, 8, 2]
mlx_safe.uninstall()
assert mlx_safe.status().hooked == ()
