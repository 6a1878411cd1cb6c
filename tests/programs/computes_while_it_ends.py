"""An exception reaches std::terminate while MLX computes on another thread."""

import threading
import time

import mlx.core as mx

from mlx_safe import testing

begun = threading.Event()


def compute():
    while True:
        mx.eval(mx.ones((64, 64)) @ mx.ones((64, 64)))
        begun.set()


threading.Thread(target=compute, daemon=True).start()
assert begun.wait(100)
testing.throw_on_foreign_thread()
time.sleep(20)
