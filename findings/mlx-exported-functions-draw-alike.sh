#!/usr/bin/env bash
# A function that MLX has exported draws the same numbers for ever, whatever the seed.
#
# Package: mlx 0.32.4 and 0.31.2 (CPU), mx.export_function and mx.import_function.
# Guess before: what calls mx.random draws anew at each call, and mx.random.seed decides
# what; or exporting such a function is refused.
# Seen: the key of the moment of export is a constant in the file. Each call gives the same
# numbers, also in another process and after mx.random.seed. Nothing is said at export.
# So does mx.compile without random.state among its inputs, which its documentation says.
# A sampler or a dropout that is exported is no random one. Export a function that takes
# the key.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
for version in 0.31.2 0.32.4; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install --quiet --disable-pip-version-check "mlx[cpu]==$version"
  "$work/$version/bin/python" - <<'PYTHON'
from importlib.metadata import version

import mlx.core as mx

print("mlx", version("mlx"))
zeros = mx.zeros((3,))
mx.export_function("noise.mlxfn", lambda x: x + mx.random.normal(x.shape), zeros)
with_key = mx.random.key(1)
mx.export_function(
    "keyed.mlxfn", lambda x, key: x + mx.random.normal(x.shape, key=key), zeros, with_key
)
PYTHON
  for seed in 1 2; do
    SEED=$seed "$work/$version/bin/python" - <<'PYTHON'
import os

import mlx.core as mx

zeros = mx.zeros((3,))
noise, keyed = mx.import_function("noise.mlxfn"), mx.import_function("keyed.mlxfn")
mx.random.seed(int(os.environ["SEED"]))
first, second = noise(zeros)[0].tolist(), noise(zeros)[0].tolist()
print(first, second)
assert first == second
one, two = (keyed(zeros, mx.random.key(i))[0].tolist() for i in (1, 2))
assert one != two
with open("seen", "a") as file:
    file.write(f"{first}\n")
PYTHON
  done
  test "$(sort -u seen | wc -l)" = 1
  rm seen
done
echo "as written: the key is part of the file"
