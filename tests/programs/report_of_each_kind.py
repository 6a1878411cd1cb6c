"""A fault, a stall and an end leave a report each."""

import contextlib
import time

import mlx.core  # noqa: F401  # the reports name its version

import mlx_safe
from mlx_safe import _core, _reports, testing
from support.simulated import fail_next

mlx_safe.install(mode="intercept")
mlx_safe.check(0)
_core.request_begin("cmpl-1", "/v1/completions")
mlx_safe.breadcrumb("one", n=1)
fail_next(8)
with contextlib.suppress(RuntimeError):
    testing.run_command_buffer()
deadline = time.monotonic() + 50
while not mlx_safe.status().reports_written:
    assert time.monotonic() < deadline
    time.sleep(0.01)
assert _reports.write("stall", "no progress")
testing.throw_on_foreign_thread()
time.sleep(50)
