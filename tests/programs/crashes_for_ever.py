"""Survives the same crash for ever, and then dies of another."""

import os
import signal
import time

import mlx_safe
from mlx_safe import testing

signal.signal(signal.SIGBUS, lambda *_: None)
mlx_safe.install(signals=True)
mlx_safe.breadcrumb("about to die", attempt=1)
signal.setitimer(signal.ITIMER_REAL, 250)  # a limit
for _ in range(200):
    os.kill(os.getpid(), signal.SIGBUS)
print("alive", flush=True)
testing.throw_on_foreign_thread()
time.sleep(200)
