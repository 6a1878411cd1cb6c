"""Waits for a signal: as it computes, with a handler of its own, or idle."""

import signal
import sys
import threading
import time

import mlx_safe

mlx_safe.install()
if sys.argv[1] == "computes":  # Python's own handlers would wait for ever
    print("ready", flush=True)
    sum(range(10**12))
elif sys.argv[1] == "takes over":  # and puts back what was there, as uvicorn does
    got: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda *_: got.append(1))
    print("ready", flush=True)
    while not got:
        time.sleep(0.1)
    signal.signal(signal.SIGTERM, before)
    signal.raise_signal(signal.SIGTERM)
print("ready", flush=True)
threading.Event().wait()
