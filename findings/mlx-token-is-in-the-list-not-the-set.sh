#!/usr/bin/env bash
# A token is in the list of stop tokens, and not in the set of the same.
#
# Package: mlx 0.32.4 and 0.31.2 (CPU), mx.array as a member of set and dict.
# Guess before: `mx.array(2) in {1, 2}` is True, as it is for NumPy's numbers (np.int32(2)). Or it
# raises, as for what is equal by value but can change: a list, or a NumPy array of no
# dimensions ("unhashable type").
# Seen: it has a hash, that of the object, so it is in no set and no dictionary of numbers; in
# the list [1, 2] it is. set() keeps equal tokens apart. Nothing is raised. mlx-lm gives
# eos_token_ids as a set: `token in tokenizer.eos_token_ids`, with a token as it was sampled,
# never ends an answer. (In 200 tries below, none is found.)
# Call .item() or .tolist() first.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 0.31.2 0.32.4; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install --quiet --disable-pip-version-check \
    "mlx[cpu]==$version" 'numpy==2.4.6'
  "$work/$version/bin/python" - <<'PYTHON'
from importlib.metadata import version

import mlx.core as mx
import numpy as np

print("mlx", version("mlx"))
ends = [1, 2]
found = {
    "a list": sum(mx.array(2) in ends for _ in range(200)),
    "a set": sum(mx.array(2) in set(ends) for _ in range(200)),
    "a dictionary": sum(mx.array(2) in dict.fromkeys(ends) for _ in range(200)),
}
print("of 200 tokens equal to 2, found in", found)
assert found == {"a list": 200, "a set": 0, "a dictionary": 0}
assert np.int32(2) in set(ends)

tokens = list(mx.array([7, 7, 7]))
print("set of three equal tokens:", len(set(tokens)))
assert len(set(tokens)) == 3 and tokens[0] == tokens[1]
try:
    hash(np.array(2))
except TypeError as e:
    print("numpy:", e)
else:
    raise SystemExit("numpy has a hash")
PYTHON
done
echo "as written: not in the set"
