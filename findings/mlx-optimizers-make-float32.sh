#!/usr/bin/env bash
# Five optimizers of mlx-optimizers make a bfloat16 model float32 in their first step.
#
# Package: mlx-optimizers 0.4.1 with mlx 0.32.4 (CPU): DiffGrad, Lamb, MADGRAD, MARS, Shampoo.
# Guess before: a step changes the weights' values. Their type is the model's, as with all
# optimizers of MLX itself, and with ADOPT and QHAdam of this package.
# Seen: after one step of these five the weights of a bfloat16 or float16 model are float32,
# for good: twice the memory, for weights, gradients, activations and what is saved, and
# arithmetic in another type from the second step on. Nothing is said, and the loss goes on
# as it should.
# Look at the weights' type after the first step, or cast what the step returns.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'mlx[cpu]==0.32.4' \
  'mlx-optimizers==0.4.1'
"$work/venv/bin/python" - <<'PYTHON'
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_optimizers as more


def after_a_step(make, dtype):
    layer = nn.Linear(2, 2, bias=False)
    layer.set_dtype(dtype)
    optimizer = make(learning_rate=0.01)
    optimizer.update(layer, {"weight": mx.ones((2, 2), dtype)})
    mx.eval(layer.parameters())
    return layer.weight.dtype, layer(mx.ones((1, 2), dtype)).dtype, layer.weight.nbytes


own = (optim.SGD, optim.Adam, optim.AdamW, optim.Adagrad, optim.AdaDelta, optim.Adamax,
       optim.Lion, optim.RMSprop, optim.Muon, optim.Adafactor)
for dtype in (mx.bfloat16, mx.float16):
    for make in (*own, more.ADOPT, more.QHAdam):
        assert after_a_step(make, dtype) == (dtype, dtype, 8), make
    for make in (more.DiffGrad, more.Lamb, more.MADGRAD, more.MARS, more.Shampoo):
        weight, answer, size = after_a_step(make, dtype)
        print(f"{make.__name__}: {dtype} becomes {weight}, 8 bytes {size}, answers {answer}")
        assert (weight, answer, size) == (mx.float32, mx.float32, 16)
PYTHON
echo "as written: float32"
