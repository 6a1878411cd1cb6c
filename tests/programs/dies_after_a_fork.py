"""A forked child whose parent drains."""

import os
import time

import mlx_safe
from mlx_safe import testing

mlx_safe.install(on_terminate="drain")
pid = os.fork()
if pid == 0:
    testing.throw_on_foreign_thread()
    time.sleep(20)
_, status = os.waitpid(pid, 0)
assert os.waitstatus_to_exitcode(status) == -6, status
