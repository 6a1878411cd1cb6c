#!/usr/bin/env bash
# --max-kv-size bounds nothing with a Llama model, and says nothing.
#
# Package: mlx-lm 0.32.2 with mlx 0.32.4, and 0.31.3 with 0.31.2 (CPU), generate_step with
# max_kv_size, as in mlx_lm.generate, mlx_lm.chat and mlx_lm.cache_prompt.
# Guess before: "Maximum size of the key-value cache. Old entries (except the first 4 tokens)
# will be overwritten." (generate_step). That is so for each model with ordinary attention.
# Seen: it is so for Qwen 3 and Mixtral: 64 places for 150 tokens. A model that makes its own
# caches is not asked. Llama's class does since it knows sliding windows, also for models
# without one: all 150 are kept, and the cache grows by 256 each time. Mistral's models are of
# that class, too. Gemma 3, Qwen 3.5 and some forty others make their own as well. (The
# docstring of make_prompt_cache says so; generate_step's and --help do not.)
# Who bounds memory with it should look at the caches' class: RotatingKVCache.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for pair in '0.31.2 0.31.3' '0.32.4 0.32.2'; do
  read -r mlx mlx_lm <<< "$pair"
  python3 -m venv "$work/$mlx"
  "$work/$mlx/bin/pip" install --quiet --disable-pip-version-check \
    "mlx[cpu]==$mlx" "mlx-lm==$mlx_lm"
  "$work/$mlx/bin/python" - <<'PYTHON'
import importlib
import pkgutil
from importlib.metadata import version

import mlx.core as mx
import mlx_lm.models
from mlx_lm.generate import generate_step
from mlx_lm.models import cache, llama, mixtral, qwen3

print("mlx-lm", version("mlx-lm"), "mlx", version("mlx"))
CONFIG = {
    "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
    "rms_norm_eps": 1e-5, "vocab_size": 100, "rope_theta": 1e4,
    "max_position_embeddings": 4096, "tie_word_embeddings": True,
    "num_local_experts": 2, "num_experts_per_tok": 1,
}
find = importlib.import_module("mlx_lm.utils").MODEL_REMAPPING
assert find["mistral"] == "llama"


def kept(module):
    """The places in the cache after 50 tokens and 100 more, with max_kv_size=64."""
    name = module.__name__.split(".")[-1]
    model = module.Model(module.ModelArgs.from_dict({"model_type": name, **CONFIG}))
    # What generate_step does with its own max_kv_size.
    made = cache.make_prompt_cache(model, max_kv_size=64)
    for _ in generate_step(mx.arange(50), model, max_tokens=100, prompt_cache=made):
        pass
    return type(made[0]).__name__, made[0].keys.shape[2], made[0].offset


for module, seen in (
    (llama, ("KVCache", 256, 150)),
    (qwen3, ("RotatingKVCache", 64, 150)),
    (mixtral, ("RotatingKVCache", 64, 150)),
):
    found = kept(module)
    print(module.__name__.split(".")[-1], "keeps (class, places, tokens)", found)
    assert found == seen

own = 0
for info in pkgutil.iter_modules(mlx_lm.models.__path__):
    source = open(f"{mlx_lm.models.__path__[0]}/{info.name}.py").read()
    own += "def make_cache" in source
print("modules whose models make their own caches:", own)
assert own > 30
PYTHON
done
echo "as written: Llama keeps all"
