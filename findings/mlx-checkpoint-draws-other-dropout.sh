#!/usr/bin/env bash
# With mx.checkpoint the gradient is that of another dropout than the loss.
#
# Package: mlx 0.32.4 and 0.31.2 (CPU), mx.checkpoint over nn.Dropout, and
# mlx_lm.tuner.trainer.grad_checkpoint (mlx-lm 0.32.2 and 0.31.3), which is
# `mlx_lm.lora --grad-checkpoint`.
# Guess before: a checkpoint saves memory and changes no number. What is computed anew for the
# gradient has the dropout of the first time (PyTorch keeps the state of its generator for
# that: preserve_rng_state), or drawing in it is refused.
# Seen: it is drawn anew. Of sum(dropout(x)) of x = 1, 1, … the gradient times x should be the
# value itself; with the checkpoint other elements are dropped. Nothing is said. The gradient
# is of a network that was never run: each unit's with another mask than its loss. A
# layer of a model behind grad_checkpoint does the same.
# Use dropout 0 (mlx_lm.lora's default) with --grad-checkpoint.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for pair in '0.31.2 0.31.3' '0.32.4 0.32.2'; do
  read -r mlx mlx_lm <<< "$pair"
  python3 -m venv "$work/$mlx"
  "$work/$mlx/bin/pip" install --quiet --disable-pip-version-check \
    "mlx[cpu]==$mlx" "mlx-lm==$mlx_lm"
  "$work/$mlx/bin/python" - <<'PYTHON'
from importlib.metadata import version

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.trainer import grad_checkpoint

print("mlx", version("mlx"), "mlx-lm", version("mlx-lm"))
dropout = nn.Dropout(0.5)
x = mx.ones(1000)


def kept(f):
    """What a function that only drops has kept: in its value, in its gradient."""
    mx.random.seed(0)
    value, gradient = mx.value_and_grad(lambda x: f(x).sum())(x)
    return value.item(), (gradient * x).sum().item()


plain = kept(dropout)
saved = kept(mx.checkpoint(lambda x: dropout(x)))
print("value and gradient * x: without a checkpoint", plain, "with one", saved)
assert plain[0] == plain[1]
assert saved[0] == plain[0] and saved[1] != saved[0]


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.weight = mx.ones(1000)

    def __call__(self, x):
        return self.dropout(x * self.weight)


layer = Layer()


def trained():
    mx.random.seed(0)
    value, gradient = nn.value_and_grad(layer, lambda x: layer(x).sum())(x)
    return value.item(), gradient["weight"].sum().item()


plain = trained()
grad_checkpoint(layer)
saved = trained()
print("a layer: without", plain, "with grad_checkpoint", saved)
assert plain[0] == plain[1]
assert saved[0] == plain[0] and saved[1] != saved[0]
PYTHON
done
echo "as written: another dropout in the gradient"
