#!/usr/bin/env bash
# After one gradient that is NaN, Lion leaves a weight as it is for ever, and says nothing.
#
# Package: mlx 0.32.4 and 0.31.2 (CPU), mlx.optimizers.Lion, mx.sign.
# Guess before: a NaN goes through. The weight is NaN, and so is the loss of the next step,
# which a look at the loss finds. So it is with Adam, AdamW and SGD. NumPy's sign of NaN is
# NaN.
# Seen: mx.sign(nan) is 0. Lion steps by the sign of its momentum, so the weight stays, finite.
# The momentum is NaN from then on: no later gradient moves that weight. The loss is finite
# and the rest of the model trains on. weight_decay still acts, so such weights fade to 0.
# Look at the gradients (mx.isfinite), or at optimizer.state, not only at the loss.
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
nan = math.nan


def weights_after(optimizer):
    """Two weights of 1.0. The first has one gradient that is NaN, and 49 good ones."""
    weights = {"w": mx.array([1.0, 1.0])}
    for i in range(50):
        gradients = {"w": mx.array([nan if i == 0 else 1.0, 1.0])}
        weights = optimizer.apply_gradients(gradients, weights)
        mx.eval(weights, optimizer.state)
    return weights["w"].tolist()


for make in (optim.SGD, optim.Adam, optim.AdamW):
    found = weights_after(make(0.01))
    print(make.__name__, found)
    assert math.isnan(found[0]) and found[1] < 0.9
lion = optim.Lion(0.01)
found = weights_after(lion)
print("Lion", found, "momentum", lion.state["w"]["m"].tolist())
assert found[0] == 1.0 and found[1] < 0.9
assert math.isnan(lion.state["w"]["m"][0].item())
found = weights_after(optim.Lion(0.01, weight_decay=1.0))
print("Lion with weight_decay=1", found)
assert 0 < found[0] < 0.7
assert mx.sign(mx.array(nan)).item() == 0.0
PYTHON
done
echo "as written: the weight stays"
