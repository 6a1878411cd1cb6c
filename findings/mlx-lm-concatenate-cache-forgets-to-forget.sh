#!/usr/bin/env bash
# Tokens that are trimmed off a ConcatenateKVCache stay in it.
#
# Package: mlx-lm 0.32.2 with mlx 0.32.4, and 0.31.3 with 0.31.2 (CPU), trim_prompt_cache with
# mlx_lm.models.cache.ConcatenateKVCache.
# Guess before: what is_trimmable says and trim returns is so: after trim_prompt_cache(cache, 2) the
# last two tokens are gone, as with KVCache and QuantizedKVCache.
# Seen: it says that it can, returns 2, and its offset is 2 less. The keys stay, and the next token
# comes behind them: attention sees the two, at the positions of others. The offset is
# right again then, as if nothing had been trimmed. Speculative decoding, which trims what
# was refused, and a chat that goes back read text that is not there. Nothing is said.
# Use KVCache.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for pair in '0.31.2 0.31.3' '0.32.4 0.32.2'; do
  read -r mlx mlx_lm <<< "$pair"
  python3 -m venv "$work/$mlx"
  "$work/$mlx/bin/pip" install --quiet --disable-pip-version-check \
    "mlx[cpu]==$mlx" "mlx-lm==$mlx_lm"
  "$work/$mlx/bin/python" - <<'PYTHON'
from importlib.metadata import version

import mlx.core as mx
from mlx_lm.models import cache

print("mlx-lm", version("mlx-lm"), "mlx", version("mlx"))


def numbered(*numbers):
    """Keys or values of tokens, each filled with its number."""
    return mx.broadcast_to(mx.array(numbers, mx.float32)[None, None, :, None],
                           (1, 1, len(numbers), 32))


def seen(made):
    made.update_and_fetch(numbered(1, 2, 3, 4), numbered(1, 2, 3, 4))
    assert cache.can_trim_prompt_cache([made])
    assert cache.trim_prompt_cache([made], 2) == 2
    offset = made.offset
    keys, _ = made.update_and_fetch(numbered(5), numbered(5))
    if isinstance(made, cache.QuantizedKVCache):
        keys = mx.dequantize(*keys, group_size=32, bits=8)
    return offset, mx.round(keys[0, 0, :, 0]).tolist(), made.offset


for made in (cache.KVCache(), cache.QuantizedKVCache(32, 8), cache.ConcatenateKVCache()):
    found = seen(made)
    print(type(made).__name__, "offset, what is seen, offset:", found)
    expected = (2, [1, 2, 5], 3)
    if isinstance(made, cache.ConcatenateKVCache):
        expected = (2, [1, 2, 3, 4, 5], 5)
    assert found == expected
PYTHON
done
echo "as written: they stay"
