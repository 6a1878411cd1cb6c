#!/usr/bin/env bash
# With a prompt cache and --prefill-response, mlx_lm.generate leaves the question out.
#
# Package: mlx-lm 0.32.2 with mlx 0.32.4, and 0.31.3 with 0.31.2 (CPU), mlx_lm.cache_prompt and
# mlx_lm.generate with --prompt-cache-file.
# Guess before: behind the cached text the model reads the question, the question's end, and
# then the beginning of the answer, as it does without a cache.
# Seen: it reads the beginning of the answer only, right behind the cached text. What the cache
# holds already is found by a placeholder, which is put in the last message; and that is
# the answer then, not the question. Here a question of 23 letters makes 25 tokens without a
# prefilled answer, and 5 with one of 5 letters, whatever is asked. --system-prompt is
# dropped with a cache, too. Nothing is said.
# Write the question into the cached text, or leave --prefill-response out.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for pair in '0.31.2 0.31.3' '0.32.4 0.32.2'; do
  read -r mlx mlx_lm <<< "$pair"
  python3 -m venv "$work/$mlx"
  "$work/$mlx/bin/pip" install --quiet --disable-pip-version-check \
    "mlx[cpu]==$mlx" "mlx-lm==$mlx_lm"
  "$work/$mlx/bin/python" - "$work/$mlx/model" <<'PYTHON'
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

ROLES = ["<end>", "<system>", "<user>", "<assistant>"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

# A model that says "!", with a token for each letter.
place = Path(sys.argv[1])
place.mkdir()
letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
made = Tokenizer(models.BPE(vocab=letters, merges=[]))
made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
made.decoder = decoders.ByteLevel()
made.add_special_tokens(ROLES)
made.save(str(place / "tokenizer.json"))
settings = {
    "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>",
    "chat_template": TEMPLATE,
}
(place / "tokenizer_config.json").write_text(json.dumps(settings))
config = dict(
    model_type="llama", hidden_size=32, num_hidden_layers=1, intermediate_size=32,
    num_attention_heads=2, num_key_value_heads=2, rms_norm_eps=1e-5,
    vocab_size=made.get_vocab_size(), tie_word_embeddings=False,
)
(place / "config.json").write_text(json.dumps(config))
weights = dict(tree_flatten(llama.Model(llama.ModelArgs(**config)).parameters()))
weights["lm_head.weight"] *= 0
mx.save_safetensors(str(place / "model.safetensors"), weights)
cache = str(place / "cache.safetensors")


def run(command, *options):
    done = subprocess.run(
        [sys.executable, "-m", "mlx_lm", command, "--model", str(place), *options],
        capture_output=True, text=True, timeout=300, check=True,
    )
    return done.stdout


def read(*options):
    said = run("generate", "--prompt-cache-file", cache, "--max-tokens", "2", *options)
    tokens = int(re.search(r"Prompt: (\d+) tokens", said)[1])
    print(f"mlx-lm {version('mlx-lm')}: {options}: {tokens} tokens")
    return tokens


run("cache_prompt", "--prompt-cache-file", cache, "--prompt", "The sky is green. ")
QUESTION = "What colour is the sky?"
ANSWER = "It is"
asked = len(QUESTION) + 2
assert read("--prompt", QUESTION) == asked
assert read("--prompt", QUESTION, "--system-prompt", "Be brief.") == asked
assert read("--prompt", QUESTION, "--prefill-response", ANSWER) == len(ANSWER)
assert read("--prompt", "Yes?", "--prefill-response", ANSWER) == len(ANSWER)
PYTHON
done
