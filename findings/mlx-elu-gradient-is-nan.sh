#!/usr/bin/env bash
# The gradient of nn.elu and nn.selu is NaN where their input is over 88.
#
# Package: mlx 0.32.4 and 0.31.2 (CPU), mlx.nn.elu, ELU, selu, SELU.
# Guess before: 1 (selu 1.05): from 0 on they are the input itself, which is all that they
# are for. PyTorch and JAX give that.
# Seen: the value is right, and the gradient NaN. The exponential for negative inputs is
# computed for all. Over 88.7 it is infinite, and infinity times the 0 of the choice is NaN. In
# float16 that is over 11, which an ordinary activation reaches. nn.celu, which says the same
# function in another way, gives 1. So do softplus, gelu, silu and mish.
# One large activation makes all weights NaN in the next step. Use nn.celu in place of nn.elu.
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
import mlx.nn as nn

print("mlx", version("mlx"))


def gradient(f, at, dtype=mx.float32):
    return mx.grad(lambda x: f(x).sum())(mx.array([at], dtype)).item()


for dtype, fine, large in ((mx.float32, 88.0, 89.0), (mx.float16, 11.0, 12.0)):
    for f in (nn.elu, nn.selu):
        value = f(mx.array([large], dtype)).item()
        print(f"{f.__name__} in {dtype}: at {fine} {gradient(f, fine, dtype):.2f},"
              f" at {large} {gradient(f, large, dtype)} (value {value})")
        assert abs(gradient(f, fine, dtype) - 1) < 0.06
        assert math.isfinite(value) and math.isnan(gradient(f, large, dtype))
    for f in (nn.celu, nn.softplus, nn.gelu, nn.silu, nn.mish):
        assert abs(gradient(f, large, dtype) - 1) < 0.01, f

layer = nn.Linear(1, 2)
layer.weight = mx.array([[100.0], [0.5]])
_, gradients = nn.value_and_grad(layer, lambda x: nn.elu(layer(x)).sum())(mx.ones((1, 1)))
print("gradient of a layer's weights, one of them large:", gradients["weight"].tolist())
assert math.isnan(gradients["weight"][0].item())
PYTHON
done
echo "as written: NaN"
