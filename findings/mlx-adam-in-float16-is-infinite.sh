#!/usr/bin/env bash
# One step of Adam makes float16 weights infinite, if their gradient is small.
#
# Package: mlx 0.32.4 and 0.31.2 (CPU), mlx.optimizers: Adam, AdamW, RMSprop, Adagrad and
# Adafactor.
# Guess before: Adam's first step depends on the learning rate alone, not on the gradient.
# With 0.01 a weight of 1 becomes 0.9684 (MLX leaves out the bias correction), rounded to
# the type. That is so in float32 and in bfloat16.
# Seen: with float16 weights and a gradient of 1e-4 they are -inf after the first step; with
# Adafactor NaN. The optimizer's state has the weights' type. The square of the gradient is
# under float16's smallest number and becomes 0. So does eps, 1e-8, and the step is divided
# by 0. With Adam the gradients below 0.005 do that. Lion and SGD are not hurt.
# Who trains all weights of a float16 model (not LoRA, whose weights are float32) converts
# it to bfloat16 or float32 first. eps=1e-4 avoids the infinity.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 0.31.2 0.32.4; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install --quiet --disable-pip-version-check "mlx[cpu]==$version"
  "$work/$version/bin/python" - <<'PYTHON'
import math
from importlib.metadata import version

import mlx.core as mx
import mlx.optimizers as optim

print("mlx", version("mlx"))


def stepped(optimizer, dtype):
    weights = {"w": mx.ones((2, 2), dtype)}
    gradients = {"w": mx.full((2, 2), 1e-4, dtype)}
    return optimizer.apply_gradients(gradients, weights)["w"][0, 0].item()


for made in (optim.Adam, optim.AdamW, optim.RMSprop, optim.Adagrad, optim.Adafactor):
    values = [
        stepped(made(learning_rate=0.01), dtype)
        for dtype in (mx.float32, mx.bfloat16, mx.float16)
    ]
    print(f"{made.__name__}: float32 {values[0]:.4f}, bfloat16 {values[1]:.4f},"
          f" float16 {values[2]}")
    assert 0.8 < values[0] < 1
    assert 0.8 < values[1] < 1
    assert not math.isfinite(values[2])
for made in (optim.Lion, optim.SGD):
    assert math.isfinite(stepped(made(learning_rate=0.01), mx.float16))
assert math.isfinite(stepped(optim.Adam(learning_rate=0.01, eps=1e-4), mx.float16))
PYTHON
done
echo "as written: float16 weights are infinite after one step"
