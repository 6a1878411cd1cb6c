#!/usr/bin/env bash
# Under mx.vmap all rows get the same random numbers, dropout and sampling with them.
#
# Package: mlx 0.32.4 and 0.31.2 (CPU), mx.vmap over functions that draw without a key.
# Guess before: vmap(f)(x) is f of each row, and f draws anew at each call. Or it is refused,
# as PyTorch's vmap does until it is told what is meant (randomness="error").
# Seen: what is drawn does not depend on the mapped array, so it is drawn once and goes to each
# row: one dropout mask for the whole batch, one draw for all rows of logits that
# mx.random.categorical is mapped over, one noise. Nothing is said. Without vmap both take the
# batch as it is and draw for each row.
# Map over keys as well: mx.random.split(key, n), and key= in the function.
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
mx.random.seed(0)
dropout = nn.Dropout(0.5)
functions = {
    "dropout": (dropout, mx.ones((8, 20))),
    "categorical": (lambda row: mx.random.categorical(row), mx.zeros((8, 1000))),
    "noise": (lambda row: row + mx.random.normal(row.shape), mx.zeros((8, 3))),
}
for name, (f, batch) in functions.items():
    whole = {str(row) for row in f(batch).tolist()}
    single = {str(f(row).tolist()) for row in batch}
    mapped = {str(row) for row in mx.vmap(f)(batch).tolist()}
    print(f"{name}: different rows of 8: whole {len(whole)}, one by one {len(single)},"
          f" mapped {len(mapped)}")
    assert len(whole) >= 7 and len(single) >= 7
    assert len(mapped) == 1

keys = mx.random.split(mx.random.key(0), 8)
drawn = mx.vmap(lambda row, key: mx.random.categorical(row, key=key))(mx.zeros((8, 1000)), keys)
assert len(set(drawn.tolist())) >= 7
PYTHON
done
echo "as written: one draw for all rows"
