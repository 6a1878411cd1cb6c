#!/usr/bin/env bash
# model.freeze() and model.unfreeze() leave BatchNorm's statistics to the optimizer.
#
# Package: mlx 0.32.4 and 0.31.2 (CPU), mlx.nn: Module.unfreeze, BatchNorm, QuantizedLinear.
# Guess before: "Wrap unfreeze to make sure that running_mean and var are always frozen
# parameters." (nn.BatchNorm.unfreeze); QuantizedLinear says the like of itself. So freezing
# and unfreezing a model gives the trainable parameters that it had.
# Seen: that is so when the layer is asked itself. A model's unfreeze goes through its layers
# without calling their own, and running_mean and running_var are trainable then. They have
# no gradient, but AdamW's weight decay is not for gradients only: with each step the
# variance shrinks, on top of what BatchNorm does. They are saved as trainable weights, too. A
# quantized layer's packed weights are trainable as well; there the gradient raises.
# Unfreeze by layers, or freeze the statistics again: m.freeze(keys=["running_mean",
# "running_var"]).
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 0.31.2 0.32.4; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install --quiet --disable-pip-version-check "mlx[cpu]==$version"
  "$work/$version/bin/python" - <<'PYTHON'
from importlib.metadata import version

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

print("mlx", version("mlx"))


def trainable(module):
    return sorted(name.split(".")[-1] for name, _ in tree_flatten(module.trainable_parameters()))


layer = nn.BatchNorm(1)
layer.freeze()
layer.unfreeze()
assert trainable(layer) == ["bias", "weight"], "the layer keeps its word"


def trained(again):
    mx.random.seed(0)
    model = nn.Sequential(nn.BatchNorm(1))
    if again:
        model.freeze()
        model.unfreeze()
    names = trainable(model)
    optimizer = optim.AdamW(learning_rate=0.1, weight_decay=0.5)
    step = nn.value_and_grad(model, lambda x: model(x).sum())
    for _ in range(100):
        # Normal numbers, in a batch whose mean is 0 and whose variance is 1.
        _, gradients = step(mx.array([[-1.0], [1.0]] * 50))
        optimizer.update(model, gradients)
        mx.eval(model.parameters())
    return names, model.layers[0].running_var.item()


before, after = trained(False), trained(True)
print("as made:                   ", before)
print("after freeze and unfreeze: ", after)
assert before[0] == ["bias", "weight"] and 0.99 < before[1] < 1.02
assert after[0] == ["bias", "running_mean", "running_var", "weight"]
assert after[1] < 0.9

quantized = nn.Sequential(nn.Linear(64, 64))
nn.quantize(quantized)
assert trainable(quantized) == ["bias"]
quantized.freeze()
quantized.unfreeze()
print("a quantized layer:         ", trainable(quantized))
assert trainable(quantized) == ["bias", "biases", "scales", "weight"]
PYTHON
done
echo "as written: the statistics are trainable"
