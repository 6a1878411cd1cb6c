#!/usr/bin/env bash
# Training with mlx-lm teaches one token of padding after each example.
#
# Package: mlx-lm 0.32.2 with mlx 0.32.4, and 0.31.3 with 0.31.2 (CPU),
# mlx_lm.tuner.trainer: iterate_batches and default_loss, as in mlx_lm.lora.
# Guess before: the loss is the mean over the tokens of the examples; what is filled up
# behind them is masked.
# Seen: the mask goes one too far. An example of 4 tokens has 3 that follow another; counted
# are 4. The fourth is token 0, with which the batch is filled up. A model that is sure of
# each token of the examples, and of another one behind them, has a loss of 5.0 and not 0.
# So "Trained Tokens" and each loss have one token too many for each example, the shorter the
# examples the more; a model learns to say token 0 ("!" in Qwen's vocabulary) behind its
# end. Only an example that was cut to the longest length has none.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/look.py" <<'PYTHON'
import sys

import mlx.core as mx
from mlx_lm.tuner.trainer import default_loss, iterate_batches


def sure(tokens):
    """Logits of who knows what comes next, and expects a 9 behind the end."""
    after = mx.concatenate([tokens[:, 1:], mx.zeros((len(tokens), 1), tokens.dtype)], 1)
    after = mx.where(after == 0, 9, after)
    return (after[..., None] == mx.arange(10)).astype(mx.float32) * 20


def looked_at(length, longest):
    examples = [(list(range(1, length + 1)), 0)] * 4
    ((batch, lengths),) = iterate_batches(examples, 4, longest)
    loss, count = default_loss(sure, batch, lengths)
    return loss.item(), count.item() / 4


loss, count = looked_at(4, 64)
print(f"mlx-lm {sys.argv[1]}: 4 tokens: {count} are counted, the loss is {loss:.2f}")
assert count == 4
assert abs(loss - 20 / 4) < 0.01
loss, count = looked_at(8, 64)
print(f"   8 tokens: {count} are counted, the loss is {loss:.2f}")
assert count == 8
assert abs(loss - 20 / 8) < 0.01
_, count = looked_at(8, 6)
print(f"   8 tokens, cut to 6: {count} are counted")
assert count == 5
PYTHON
python3 -m venv "$work/venv"
for pair in 0.31.2/0.31.3 0.32.4/0.32.2; do
  "$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    "mlx[cpu]==${pair%/*}" "mlx-lm==${pair#*/}"
  "$work/venv/bin/python" "$work/look.py" "${pair#*/}"
done
echo "as written: one token of padding counts"
