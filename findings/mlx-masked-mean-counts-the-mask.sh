#!/usr/bin/env bash
# The mean loss with a mask as weights is divided by all tokens, the masked ones too.
#
# Package: mlx 0.32.4 and 0.31.2 (CPU), mlx.nn.losses.cross_entropy and binary_cross_entropy
# with weights= and reduction="mean".
# Guess before: the weighted mean, sum(weights * losses) / sum(weights), as PyTorch's
# cross_entropy has it with weights, and NumPy's average. Padding changes nothing.
# Seen: sum(weights * losses) / number of targets. Four tokens with a loss of 2 each have a mean
# of 2, with four of padding behind them 1, with twelve 0.5. So the gradient of a batch shrinks
# with its padding, and a reported perplexity is exp(0.5), not exp(2). The documentation
# says "weights for each target" and "mean".
# Divide by weights.sum() yourself, with reduction="sum".
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
losses = nn.losses
# Two classes; the right one has the probability exp(-2).
right = math.log(1 / (math.exp(2) - 1))
for padding, expected in ((0, 2.0), (4, 1.0), (12, 0.5)):
    n = 4 + padding
    mask = mx.array([1.0] * 4 + [0.0] * padding)
    logits = mx.broadcast_to(mx.array([right, 0.0]), (n, 2))
    cross = losses.cross_entropy(logits, mx.zeros(n, mx.int32), mask, reduction="mean")
    binary = losses.binary_cross_entropy(mx.full((n,), right), mx.ones(n), mask)
    total = losses.cross_entropy(logits, mx.zeros(n, mx.int32), mask, reduction="sum")
    print(f"{padding} of padding: cross_entropy {cross.item():.3f}, binary {binary.item():.3f},"
          f" by hand {(total / mask.sum()).item():.3f}")
    assert abs(cross.item() - expected) < 1e-3 and abs(binary.item() - expected) < 1e-3
    assert abs((total / mask.sum()).item() - 2) < 1e-3
PYTHON
done
echo "as written: padding counts"
