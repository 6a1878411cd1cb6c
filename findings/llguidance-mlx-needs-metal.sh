#!/usr/bin/env bash
# llguidance's mask for MLX works with Metal only, which shows at the first token.
#
# Package: llguidance 1.9.1 with mlx 0.32.4 (CPU backend), llguidance.mlx.
# Guess before: what takes and gives an mx.array runs where MLX runs: Metal, CUDA, CPU; or
# the import says that it does not.
# Seen: the import is fine, masks are made and filled. apply_token_bitmask writes its kernel
# in Metal's language, so it raises RuntimeError "[metal_kernel] No Metal back-end.", for
# any logits. The same in plain mx.where takes one line and runs.
# A server that offers structured output this way answers such requests with an error on
# CUDA and CPU. Try one mask when the server starts, or expand the bits on the host.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  'mlx[cpu]==0.32.4' 'llguidance==1.9.1' 'numpy<3'
"$work/venv/bin/python" - <<'PYTHON'
import mlx.core as mx
import numpy as np
from llguidance.mlx import allocate_token_bitmask, apply_token_bitmask

mask = allocate_token_bitmask(1, 100)
mask[:] = 0b101  # of each 32 tokens the first and the third
logits = mx.zeros((1, 100))
try:
    mx.eval(apply_token_bitmask(logits, mask))
except RuntimeError as e:
    print("raised:", e)
    assert "No Metal back-end" in str(e)
else:
    raise SystemExit("it runs without Metal")

bits = np.unpackbits(mask.view(np.uint8), axis=-1, bitorder="little")[:, :100]
found = mx.where(mx.array(bits) == 1, logits, -mx.inf)
allowed = np.flatnonzero(np.array(found)[0] == 0).tolist()
print("by mx.where:", allowed)
assert allowed == [0, 2, 32, 34, 64, 66, 96, 98]
PYTHON
echo "as written: it needs Metal, and says so late"
