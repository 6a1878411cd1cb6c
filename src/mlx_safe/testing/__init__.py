"""Faults on demand, on any machine, without a GPU.

For the tests of this project and of any server that runs MLX; docs/testing.md has
worked examples, and the fixtures of the pytest plugin.

    from mlx_safe import testing

    testing.attach(model)                      # count this model's calls
    with testing.inject("decode", step=3, code=8):
        ...                                    # the third decode step fails

A process that cannot be reached from the test takes its plan from the
environment: ``MLX_SAFE_INJECT="decode:3:8"`` (see `parse_plan`). Any program that
imports mlx_safe, or runs under ``mlx-safe run``, then counts the calls of each model
that it loads.

A *generation step* is one call of the model. A call with one token in each row
is a ``"decode"`` step, one with more is a ``"prefill"`` step. The last token of
a prompt is read by the first decode step; that is how mlx-lm splits it.

| Module | What is in it |
|---|---|
| `plans` | what is planned, and what strikes |
| `models` | whose calls are steps |
| `ceilings` | a GPU of a chosen size |
| `environment` | plans for a program that no test can reach |

Thread-safe.
"""

from __future__ import annotations

from .ceilings import GPUCeiling, gpu_ceiling
from .environment import plan_from_environment, tell_unfired
from .models import attach, attach_all, attaches_all, detach, uncounted
from .plans import (
    Injection,
    NeverFired,
    cuda_message,
    fired,
    inject,
    metal_message,
    parse_plan,
    record_fault,
    run_command_buffer,
    step,
    throw_on_foreign_thread,
)

__all__ = [
    "GPUCeiling",
    "Injection",
    "NeverFired",
    "attach",
    "attach_all",
    "attaches_all",
    "cuda_message",
    "detach",
    "fired",
    "gpu_ceiling",
    "inject",
    "metal_message",
    "parse_plan",
    "plan_from_environment",
    "record_fault",
    "run_command_buffer",
    "step",
    "tell_unfired",
    "throw_on_foreign_thread",
    "uncounted",
]
