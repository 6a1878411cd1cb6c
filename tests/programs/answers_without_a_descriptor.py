"""An exception reaches std::terminate when the program can open no file any more."""

import contextlib
import os
import resource
import time

import mlx_safe
from mlx_safe import testing

mlx_safe.install(on_terminate="drain")
mlx_safe.on_fault(lambda fault: print("answered", flush=True), drains=True)
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, most))
with contextlib.suppress(OSError):
    while True:
        os.dup(2)
testing.throw_on_foreign_thread()
time.sleep(20)
