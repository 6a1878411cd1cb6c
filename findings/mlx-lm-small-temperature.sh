#!/bin/bash
# A temperature of 1e-5, "all but greedy", draws at random from all tokens in half
# precision.
#
# Package: mlx-lm 0.32.2 with mlx 0.32.4 (CPU), mlx_lm.sample_utils.make_sampler.
# Guess before: as the temperature goes to 0, sampling goes to the likeliest token.
# Seen: with float16 log-probabilities, which is what a float16 model makes, 200 draws
# at 1e-4 give token 1, the likeliest; at 1e-5 they give all four tokens. 1/1e-5 is
# over float16's largest number: logits * inf is -inf for every token, and nothing is
# left to tell them apart. bfloat16 and float32 do the same from about 1e-39 on.
# (mlx-lm 0.31.3 with mlx 0.31.2 gives token 0 there, whatever the logits are.)
# A server that takes any temperature over 0 should not hand on one below 0.01.
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check \
  'mlx[cpu]==0.32.4' 'mlx-lm==0.32.2'
"$directory/venv/bin/python" - <<'PYTHON'
import mlx.core as mx
from mlx_lm.sample_utils import make_sampler

logits = mx.array([[1.0, 3.0, 2.0, 0.0]])
logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def drawn(temperature, dtype):
    sampler, given = make_sampler(temp=temperature), logprobs.astype(dtype)
    mx.random.seed(0)
    found = sorted({sampler(given).item() for _ in range(200)})
    print(f"temperature {temperature:g}, {dtype}: tokens {found}")
    return found


assert drawn(1e-4, mx.float16) == [1]
assert drawn(1e-5, mx.float16) == [0, 1, 2, 3]
assert drawn(1e-5, mx.bfloat16) == [1]
assert drawn(1e-5, mx.float32) == [1]
PYTHON
