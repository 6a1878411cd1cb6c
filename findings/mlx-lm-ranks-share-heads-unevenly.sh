#!/usr/bin/env bash
# Two ranks share a model of five heads, and its logits are noise. Nothing is raised.
#
# Package: mlx-lm 0.31.3 and 0.32.2, models/llama.py, Model.shard, as most types have it;
# mlx.launch's ring on loopback, with mlx 0.31.2 and 0.32.4 (CPU).
# Guess before: a model whose heads cannot be shared evenly is refused when it is shared,
# as qwen3_5 of 0.32.2 does with its vocabulary.
# Seen: the rows of the projections are shared, and they divide by two: 5 heads of 16 are 40
# rows for each rank. The number of heads is divided with n_heads //= N, to 2. So each rank
# has two heads of 20. All shapes agree, and the answers are another model's, with status 200.
# With one KV head for two ranks the number is 0, and each step raises (a reshape).
# Four heads give the logits that one rank gives.
# mlx-safe refuses such a model at the start.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/rank.py" <<'PYTHON'
import sys

import mlx.core as mx
from mlx_lm.models import llama

group = mx.distributed.init(strict=True, backend="ring")


def logits(heads, is_shared):
    mx.random.seed(1)
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=16 * heads,
            head_dim=16,
            num_hidden_layers=2,
            intermediate_size=64,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            rms_norm_eps=1e-5,
            vocab_size=100,
            max_position_embeddings=64,
        )
    )
    mx.eval(model.parameters())
    if is_shared:
        model.shard(group)
    return model(mx.arange(40)[None])[0, -1]


def relative_difference(heads):
    alone, shared = logits(heads, False), logits(heads, True)
    return (mx.abs(alone - shared).max() / mx.abs(alone).max()).item()


with mx.stream(mx.cpu):
    found = {heads: relative_difference(heads) for heads in (4, 5)}
if group.rank() == 0:
    print({heads: f"{value:.1e}" for heads, value in found.items()})
sys.exit(0 if found[4] < 1e-4 and found[5] > 1e-2 else 1)
PYTHON
python3 - > "$work/hosts.json" <<'PYTHON'
import contextlib
import json
import socket

with contextlib.ExitStack() as stack:
    listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in "ab"]
    print(json.dumps([[f"127.0.0.1:{x.getsockname()[1]}"] for x in listeners]))
PYTHON
for pair in '0.31.2 0.31.3' '0.32.4 0.32.2'; do
  read -r mlx mlx_lm <<< "$pair"
  python3 -m venv "$work/$mlx"
  "$work/$mlx/bin/pip" install --quiet --disable-pip-version-check \
    "mlx[cpu]==$mlx" "mlx-lm==$mlx_lm" 'transformers<6' 'numpy<3'
  echo "mlx $mlx, mlx-lm $mlx_lm: largest difference of a logit, by heads"
  export MLX_HOSTFILE="$work/hosts.json"
  MLX_RANK=1 timeout 120 "$work/$mlx/bin/python" "$work/rank.py" &
  other=$!
  MLX_RANK=0 timeout 120 "$work/$mlx/bin/python" "$work/rank.py"
  wait "$other"
done
echo "as written: five heads on two ranks are another model, and nothing says so"
