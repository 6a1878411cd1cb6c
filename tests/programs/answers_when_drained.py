"""An exception reaches std::terminate; the one callback answers the clients."""

import time

import mlx_safe
from mlx_safe import testing


def answer(fault):
    assert fault.source == "terminate" and fault.fatal and fault.code == 8
    print("answered", flush=True)
    mlx_safe.drained()


mlx_safe.install(on_terminate="drain")
mlx_safe.on_fault(answer, drains=True)
testing.throw_on_foreign_thread()
time.sleep(20)
