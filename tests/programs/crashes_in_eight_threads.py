"""Eight threads that crash at once."""

import ctypes
import threading
import time

import mlx_safe

mlx_safe.install(signals=True)
mlx_safe.breadcrumb("about to die", attempt=1)
write = ctypes.CDLL(None).memset  # without the GIL
at_once = threading.Barrier(8)


def crash():
    at_once.wait()
    write(0, 0, 1)


for _ in range(8):
    threading.Thread(target=crash).start()
time.sleep(200)
