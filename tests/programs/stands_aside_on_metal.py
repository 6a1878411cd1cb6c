"""MODE: Metal lacks a method, so nothing is hooked."""

import sys
import warnings
from typing import Any

from support.simulated import sim

# The first device registers the classes.
sim.MTLCreateSystemDefaultDevice()
assert sim.metalsim_remove_selector(b"encodeWaitForEvent:value:") > 0
warnings.simplefilter("ignore")

import mlx_safe
from mlx_safe import testing

mode: Any = sys.argv[1]
mlx_safe.install(mode=mode)
status = mlx_safe.status()
assert not status.metal_hooks and not status.verified and not status.hooked
(why,) = [r for r in status.reasons if "Metal" in r]
assert "is not hooked" in why, status.reasons
assert why.endswith("CommandBuffer has no method encodeWaitForEvent:value:"), why
assert sim.metalsim_modified_methods() == 0
assert status.installed and status.terminate_handler
with mlx_safe.guard():
    testing.run_command_buffer()
