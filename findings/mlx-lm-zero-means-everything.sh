#!/bin/bash
# In mlx-lm's samplers a limit of 0 is no limit: top_p=0 keeps every token, and a
# penalty with a context of 0 tokens looks at all of them.
#
# Package: mlx-lm 0.32.2 with mlx 0.32.4 (CPU), mlx_lm.sample_utils; 0.31.3 with mlx
# 0.31.2 the same.
# Guess before: the values go on to 0 as they are near it. top_p=1e-6 keeps the
# likeliest token, so top_p=0 does as well (so it is in the OpenAI API, whose range
# includes 0). A context of 1 token penalises one, so a context of 0 penalises none.
# Seen: top_p=1e-6 draws token 1 only, top_p=0 draws all four. Of the tokens 0, 1, 2 a
# presence_context_size of 1 penalises token 2, of 2 tokens 1 and 2, and of 0 all three.
# The code takes tokens[-0:], which is the whole list.
# mlx_lm.server takes both from its clients (top_p from 0 to 1, sizes from 0).
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet --disable-pip-version-check \
  'mlx[cpu]==0.32.4' 'mlx-lm==0.32.2'
"$directory/venv/bin/python" - <<'PYTHON'
import mlx.core as mx
from mlx_lm.sample_utils import make_logits_processors, make_sampler

logits = mx.array([[1.0, 3.0, 2.0, 0.0]])
logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def drawn(top_p):
    sampler = make_sampler(temp=1.0, top_p=top_p)
    mx.random.seed(0)
    found = sorted({sampler(logprobs).item() for _ in range(200)})
    print(f"top_p {top_p:g}: tokens {found}")
    return found


def penalised(size):
    (process,) = make_logits_processors(
        presence_penalty=1.0, presence_context_size=size
    )
    after = process(mx.array([0, 1, 2]), mx.zeros((1, 4))).tolist()[0]
    found = [token for token, logit in enumerate(after) if logit]
    print(f"presence_context_size {size}: tokens {found}")
    return found


assert drawn(1e-6) == [1]
assert drawn(0.0) == [0, 1, 2, 3]
assert penalised(1) == [2]
assert penalised(2) == [1, 2]
assert penalised(0) == [0, 1, 2]
PYTHON
