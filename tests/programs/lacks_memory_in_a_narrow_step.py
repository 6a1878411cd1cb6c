"""A batch of a long prompt and four short ones has not the memory for a step.

The argument is a model. Told: tokens of that step, and of the largest one that the last
try makes of the long prompt.
"""

import sys
from types import SimpleNamespace
from typing import Any

from mlx_lm import load
from mlx_lm.generate import BatchGenerator

from mlx_safe._failures import SMALLEST
from mlx_safe.server import batches
from mlx_safe.server.prefill import PrefillStep
from mlx_safe.server.request import RequestState


def nothing(*args, **more):
    return None


def inserted(uid):
    run = SimpleNamespace(uid=uid)
    return SimpleNamespace(run=run, state=RequestState.PREFILL, is_ended=False)


model = load(sys.argv[1])[0]
called = type(model).__call__
fails: list[int] = []


def call(self, inputs, *args, **more):
    fails.append(inputs.size)
    raise MemoryError


settings: Any = SimpleNamespace(prefill_step_size=2048)
prefill = PrefillStep(settings)
watched: Any = batches.watched
batch = watched(
    BatchGenerator,
    SimpleNamespace(
        inserted=inserted, goes_on=lambda: False, is_unchanged=False, step=list
    ),
    lambda: SimpleNamespace(begin=nothing, end_of_batch_step=nothing),
    SimpleNamespace(make=lambda act, instead: act()),
    SimpleNamespace(token=nothing),
    prefill,
    SimpleNamespace(begin=nothing, running=None),
    lambda: False,
)(model, max_tokens=1, prefill_step_size=2048)
prefill.watch(batch)
for length in (4000, 100, 100, 100, 100):
    batch.insert([[1] * length])
prefill.reads(5 * 2048)  # as is thought before the step
type(model).__call__ = call
try:
    batch.next()
except MemoryError:
    prefill.lacked_memory()
type(model).__call__ = called
prefill.be_careful(SMALLEST)
for _ in range(9):
    prefill.went_well()
print(fails[0], prefill.size)
