"""MODE WHY FUNCTION NUMBERS...: a verification that fails breaks nothing.

FUNCTION of the simulated Metal, called with the numbers, makes it fail for WHY.
"""

import sys
import warnings
from typing import Any

import mlx_safe
from mlx_safe import testing
from support.simulated import sim

mode: Any
mode, why, function, *numbers = sys.argv[1:]
getattr(sim, function)(*map(int, numbers))
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    status = mlx_safe.install(mode=mode)
assert not status.verified and not status.hooked, status
assert why in status.reasons[-1], status.reasons
assert len(told) == 1 and why in str(told[0].message), told
assert sim.metalsim_modified_methods() == 0
assert status.terminate_handler and mlx_safe.status().installed
sim.metalsim_hold_handlers(0)
sim.metalsim_reset()
assert mlx_safe.install(mode=mode).verified
testing.run_command_buffer()
