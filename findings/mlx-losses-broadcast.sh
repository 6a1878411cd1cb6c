#!/usr/bin/env bash
# Three losses compare each prediction with each target, where the others raise.
#
# Package: mlx 0.32.4 and 0.31.2 (CPU), mlx.nn.losses: huber_loss, hinge_loss, log_cosh_loss.
# Guess before: predictions of shape (4, 1), a layer's, and targets of shape (4,), a file's,
# raise ValueError "Predictions shape (4, 1) does not match targets shape (4,)". So it is with
# mse_loss, l1_loss, smooth_l1_loss and binary_cross_entropy.
# Seen: these three broadcast to (4, 4) and take the mean of 16 numbers. Predictions that are
# right have a loss, a larger one than one number for everything has (huber, log_cosh), which
# is what the model learns to say. Nothing is said.
# Squeeze the predictions, or look at the shapes.
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

print("mlx", version("mlx"))
targets = mx.array([0.0, 1.0, 2.0, 5.0])
right = targets[:, None]
losses = nn.losses
for loss in (losses.huber_loss, losses.log_cosh_loss, losses.hinge_loss):
    shape = loss(right, targets).shape
    mean = loss(right, targets, reduction="mean").item()
    print(f"{loss.__name__}: {shape}, mean {mean:.2f}")
    assert shape == (4, 4)
    assert loss(right[:, 0], targets).shape == (4,)
    if loss is not losses.hinge_loss:
        assert loss(right[:, 0], targets, reduction="mean").item() < 1e-6 < mean
        same = loss(mx.full((4, 1), 1.5), targets, reduction="mean").item()
        print(f"  when 1.5 is said each time: {same:.2f}")
        assert same < mean
for loss in (losses.mse_loss, losses.l1_loss, losses.smooth_l1_loss,
             losses.binary_cross_entropy):
    try:
        loss(right, targets)
    except ValueError as e:
        print(f"{loss.__name__} raises:", e)
    else:
        raise SystemExit(f"{loss.__name__} does not raise")
PYTHON
done
echo "as written: each with each"
