#!/usr/bin/env bash
# Batches behind the last whole --grad-accumulation-steps of mlx_lm.lora change nothing.
#
# Package: mlx-lm 0.32.2 with mlx 0.32.4, and 0.31.3 with 0.31.2 (CPU),
# mlx_lm.tuner.trainer.train, as in mlx_lm.lora.
# Guess before: `iters` batches are trained on. What is left over at the end is applied, as
# transformers' Trainer does at the end of an epoch. Or a number of steps that is more than
# the iterations is refused.
# Seen: the gradients of the last `iters % steps` batches are summed up and thrown away. With 10
# iterations and 4 steps there are two updates, of 8 batches; with 16 steps there is none. Each
# iteration reports its loss and tokens, and an adapter is saved. It is the one that training
# began with (LoRA: one that adds 0). Nothing is said.
# Choose `iters` as a multiple of the steps. Schedules count updates, too, not iterations.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for pair in '0.31.2 0.31.3' '0.32.4 0.32.2'; do
  read -r mlx mlx_lm <<< "$pair"
  python3 -m venv "$work/$mlx"
  "$work/$mlx/bin/pip" install --quiet --disable-pip-version-check \
    "mlx[cpu]==$mlx" "mlx-lm==$mlx_lm"
  (cd "$work" && "$work/$mlx/bin/python" - <<'PYTHON'
import contextlib
import io
from importlib.metadata import version

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.trainer import TrainingArgs, train

print("mlx-lm", version("mlx-lm"), "mlx", version("mlx"))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(4, 4)]
        self.embedding = nn.Embedding(10, 4)

    def __call__(self, tokens):
        return self.embedding.as_linear(self.layers[0](self.embedding(tokens)))


class Losses(TrainingCallback):
    def __init__(self):
        self.reported = []

    def on_train_loss_report(self, info):
        self.reported.append((info["train_loss"], info["trained_tokens"]))


class Records(list):
    """Eight examples, as (tokens, where the answer begins)."""


def trained(iters, steps):
    mx.random.seed(0)
    model, optimizer, losses = Model(), optim.SGD(0.1), Losses()
    before = mx.array(model.embedding.weight)
    mx.eval(before)
    args = TrainingArgs(
        batch_size=2, iters=iters, grad_accumulation_steps=steps, steps_per_report=iters,
        adapter_file="adapters.safetensors",
    )
    with contextlib.redirect_stdout(io.StringIO()):
        train(model, optimizer, Records([([1, 2, 3, 4], 0)] * 8), None, args,
              training_callback=losses)
    saved = mx.load("adapters.safetensors")["embedding.weight"]
    loss, tokens = losses.reported[-1]
    changed = not mx.array_equal(saved, before).item()
    print(f"{iters} iterations, {steps} steps: {optimizer.step.item()} updates,"
          f" loss {loss:.2f}, tokens {tokens}, changed: {changed}")
    assert loss > 0 and tokens == iters * 8
    return optimizer.step.item(), changed


assert trained(10, 1) == (10, True)
assert trained(10, 4) == (2, True)
assert trained(10, 16) == (0, False)
PYTHON
  )
done
echo "as written: the rest is dropped"
