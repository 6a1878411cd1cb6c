"""A forked child crashes; its parent goes on."""

import ctypes
import os
import signal

import mlx_safe

mlx_safe.install(signals=True)
mlx_safe.breadcrumb("about to die", attempt=1)
pid = os.fork()
if pid == 0:
    ctypes.string_at(0)
_, status = os.waitpid(pid, 0)
assert os.waitstatus_to_exitcode(status) == -signal.SIGSEGV, status
d = os.environ["MLX_SAFE_REPORT_DIR"]
assert f"run-{os.getpid()}.json" in os.listdir(d), os.listdir(d)
print(pid)
