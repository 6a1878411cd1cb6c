#!/usr/bin/env bash
# A text's likelihood, as mlx_lm.evaluate has it for perplexities, lacks the first token. In
# 0.31.3 it depends on the texts beside it.
#
# Package: mlx-lm 0.32.2 with mlx 0.32.4, and 0.31.3 with 0.31.2 (CPU),
# MLXLM.loglikelihood_rolling of mlx_lm.evaluate, as lm-eval 0.4.13 calls it for wikitext.
# Guess before: "conditioned on the EOT token", "each token is predicted exactly once", says the
# docstring. A model that gives all of 256 tokens the same probability has log(1/256) for
# each token, whatever texts are asked about together.
# Seen: nothing is put before a text. A tokenizer that adds no first token (GPT-2's kind: Qwen,
# SmolLM; with a chat template, each) so has one token too few. "a" has 0, which is
# certainty. 0.31.3 counts one token of padding for each text that is not the longest of
# its batch of eight. So "a" is -5.5 beside "abcd", and 0 alone; "abcd" is always -16.6.
# Compare perplexities of models only where the tokenizer is the same, with --batch-size 1.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for pair in '0.31.2 0.31.3' '0.32.4 0.32.2'; do
  read -r mlx mlx_lm <<< "$pair"
  python3 -m venv "$work/$mlx"
  "$work/$mlx/bin/pip" install --quiet --disable-pip-version-check \
    "mlx[cpu]==$mlx" "mlx-lm==$mlx_lm" 'lm-eval==0.4.13'
  "$work/$mlx/bin/python" - "$work/$mlx" <<'PYTHON'
import json
import math
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.evaluate import MLXLM
from mlx_lm.models import llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

place = Path(sys.argv[1]) / "model"
place.mkdir()
letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
made = Tokenizer(models.BPE(vocab=letters, merges=[]))
made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
made.decoder = decoders.ByteLevel()
made.save(str(place / "tokenizer.json"))
(place / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
config = dict(
    model_type="llama", hidden_size=32, num_hidden_layers=1, intermediate_size=32,
    num_attention_heads=2, num_key_value_heads=2, rms_norm_eps=1e-5,
    vocab_size=len(letters), tie_word_embeddings=False,
)
(place / "config.json").write_text(json.dumps(config))
weights = dict(tree_flatten(llama.Model(llama.ModelArgs(**config)).parameters()))
weights["lm_head.weight"] *= 0
mx.save_safetensors(str(place / "model.safetensors"), weights)


def likelihoods(*texts):
    asked = [SimpleNamespace(args=(text,)) for text in texts]
    found = [x / math.log(len(letters)) for x in lm.loglikelihood_rolling(asked)]
    print(f"mlx-lm {version('mlx-lm')}: {texts}: tokens that are counted: {found}")
    return [round(x, 3) for x in found]


lm = MLXLM(str(place))
assert len(letters) == 256
PADDING = 1 if version("mlx-lm") == "0.31.3" else 0
assert likelihoods("abcd") == [-3]
assert likelihoods("ab", "abcd") == [-1 - PADDING, -3]
assert likelihoods("a", "abcd") == [0 - PADDING, -3]
PYTHON
done
