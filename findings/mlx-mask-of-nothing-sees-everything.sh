#!/usr/bin/env bash
# A query that may see no key sees all of them, if MLX's attention mask is of truth values.
#
# Package: mlx 0.32.4 and 0.31.2 (CPU backend), mx.fast.scaled_dot_product_attention.
# Guess before: a mask of False and a mask of minus infinity say the same, so the result is
# the same: NaN, or zeros.
# Seen: with False everywhere in a row the answer is the mean of all values, the ones that
# were masked out. With minus infinity everywhere it is NaN. Rows that see anything are
# alike in both.
# Such rows come from padding on the left, and from windows. What is hidden by a mask of
# truth values leaks into these rows, so their results must be thrown away, not pooled.
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

queries = mx.ones((1, 1, 2, 64))
keys = mx.ones((1, 1, 3, 64))
values = mx.broadcast_to(mx.array([1.0, 2.0, 6.0])[None, None, :, None], keys.shape)
allowed = mx.array([[False, False, False], [True, False, False]])
added = mx.where(allowed, 0.0, -math.inf)


def attend(mask):
    attention = mx.fast.scaled_dot_product_attention
    found = attention(queries, keys, values, scale=0.1, mask=mask)
    return found[0, 0, :, 0].tolist()


print("mlx", version("mlx"), "truth values:", attend(allowed), "added:", attend(added))
nothing, first = attend(allowed)
assert abs(nothing - 3.0) < 1e-5
assert first == 1.0
nothing, first = attend(added)
assert math.isnan(nothing)
assert first == 1.0
PYTHON
done
echo "as written: two masks that say the same"
