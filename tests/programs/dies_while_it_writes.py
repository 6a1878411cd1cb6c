"""Dies while its run file is written."""

import threading
import time

import mlx_safe
from mlx_safe import _core, testing

mlx_safe.install(signals=True)
mlx_safe.breadcrumb("about to die", attempt=1)


def write():
    while True:
        _core.write_run_file()


threading.Thread(target=write, daemon=True).start()
time.sleep(0.02)
testing.throw_on_foreign_thread()
time.sleep(200)
