#!/usr/bin/env bash
# Adam on bfloat16 weights keeps the largest gradients in mind for ever.
#
# Package: mlx 0.32.4 and 0.31.2 (CPU), mlx.optimizers.Adam.
# Guess before: the mean of the squared gradients fades by 0.1% with each step, as betas =
# [0.9, 0.999] say. A few thousand steps after a large gradient little of it is left.
# Seen: it has the weights' type. In bfloat16 0.999 is 1.0, and to take 0.1% away changes
# nothing in any case. After 50 gradients of 10 and 2,950 of 0.01 it is 4.84, what it was
# after the 50; in float32 it is 0.26 and in float16 0.33. A step is the gradient divided by
# its root, so it stays 4.4 times smaller than in float32.
# So the first, large gradients decide how fast a bfloat16 model learns, to the end.
# mlx_lm.lora --fine-tune-type full is such a case; LoRA's weights are float32.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 0.31.2 0.32.4; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install --quiet --disable-pip-version-check "mlx[cpu]==$version"
  "$work/$version/bin/python" - <<'PYTHON'
from importlib.metadata import version

import mlx.core as mx
import mlx.optimizers as optim

print("mlx", version("mlx"))


def trained(dtype):
    optimizer = optim.Adam(learning_rate=0.01)
    weights = {"w": mx.zeros((1,), dtype)}
    seen = {}
    for i in range(1, 3001):
        gradients = {"w": mx.full((1,), 10.0 if i <= 50 else 0.01, dtype)}
        weights = optimizer.apply_gradients(gradients, weights)
        mx.eval(weights, optimizer.state)
        if i in (50, 500, 3000):
            seen[i] = (weights["w"].item(), optimizer.state["w"]["v"].item())
    return seen


found = {dtype: trained(dtype) for dtype in (mx.float32, mx.float16, mx.bfloat16)}
for dtype, seen in found.items():
    for i, (weight, square) in seen.items():
        print(f"{dtype} after {i}: weight {weight:.3f}, mean square {square:.3f}")
assert found[mx.float32][3000][1] < 0.3
assert found[mx.float16][3000][1] < 0.4
assert found[mx.bfloat16][50][1] == found[mx.bfloat16][3000][1] > 4.8
PYTHON
done
echo "as written: in bfloat16 nothing fades"
