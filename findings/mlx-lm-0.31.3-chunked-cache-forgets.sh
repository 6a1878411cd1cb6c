#!/usr/bin/env bash
# mlx-lm 0.31.3 with mlx 0.31.2.
#
# Guess: save_prompt_cache and load_prompt_cache are inverse to each other for each class
# of mlx_lm.models.cache: a cache that was loaded goes on as the one that was saved.
#
# Seen: a ChunkedKVCache (Llama 4) comes back with equal keys, values, offset and
# start_position, and forgets nearly all of them two tokens later, without an error.
# The buffer that is loaded is as long as what it holds (20 slots), so the next token
# makes it longer by a step (276). Then maybe_trim_front takes the length of the buffer
# for the number of tokens: over 256, it cuts the front. Printed: after the tokens 20, 21
# and 22 how many of them attention sees, of the one that was saved and the one loaded:
#     21 21
#     22 2
#     23 3
# mlx-lm 0.32.2 counts tokens, and both are the same.
#
# Exits with 1 if both see the same tokens.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'mlx[cpu]==0.31.2' 'mlx-lm==0.31.3'

"$work/venv/bin/python" - "$work/cache.safetensors" <<'EOF'
import sys

import mlx.core as mx
from mlx_lm.models.cache import ChunkedKVCache, load_prompt_cache, save_prompt_cache


def add(cache, n):
    """Token ``n``, as the model adds it; the tokens that attention sees."""
    x = mx.full((1, 1, 1, 8), float(n))
    cache.maybe_trim_front()
    keys, _ = cache.update_and_fetch(x, x)
    return [int(value) for value in keys[0, 0, :, 0].tolist()]


saved = ChunkedKVCache(256)
for n in range(20):
    add(saved, n)
save_prompt_cache(sys.argv[1], [saved])
(loaded,) = load_prompt_cache(sys.argv[1])
assert (loaded.offset, loaded.start_position) == (20, 0)

same = True
for n in (20, 21, 22):
    a, b = add(saved, n), add(loaded, n)
    print(len(a), len(b))
    same = same and a == b
sys.exit(1 if same else 0)
EOF
