"""Threads that commit command buffers, some of which fail."""

import threading

import mlx_safe
from mlx_safe import _core, testing
from support.simulated import sim

mlx_safe.install(mode="intercept")
raised: list[Exception] = []


def work():
    for _ in range(50):
        try:
            testing.run_command_buffer()
        except RuntimeError as e:
            raised.append(e)


sim.metalsim_plan_fail(7, 8, 0, 500)
threads = [threading.Thread(target=work) for _ in range(4)]
for t in threads:
    t.start()
for t in threads:
    t.join()
assert raised and mlx_safe.epoch() == 1, (raised, mlx_safe.epoch())
c = _core.metal_counters()
assert c["buffers"] == c["completed"] and c["gate_limit"] == 0, c
assert c["buffer_records"] == 0, c
testing.run_command_buffer()
