#!/usr/bin/env bash
# mlx-lm quantises a model to four bits and leaves all of it as it was.
#
# Package: mlx-lm 0.32.2 with mlx 0.32.4 (CPU), utils.quantize_model, as in mlx_lm.convert.
# Guess before: a group size that does not divide a layer's width is an error, or the
# nearest that does is taken.
# Seen: each layer whose width is no multiple of it is left out, with no word about it. Of
# a model that is 64 wide with groups of 128 that is every layer. The configuration says 4
# bits in groups of 128; one line says "Quantized model with 32.000 bits per weight". Such
# a model is loaded again and answers.
# Who sizes memory by the configuration's bits is wrong by a factor of eight. Look for the
# "scales" among the weights instead.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  'mlx[cpu]==0.32.4' 'mlx-lm==0.32.2' 'transformers<6'
"$work/venv/bin/python" - <<'PYTHON'
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.utils import quantize_model

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 192,
    "num_attention_heads": 1,
    "rms_norm_eps": 1e-6,
    "vocab_size": 100,
    "tie_word_embeddings": True,
}


def scales(group_size):
    model = llama.Model(llama.ModelArgs.from_dict(CONFIG))
    model, config = quantize_model(model, dict(CONFIG), group_size, 4)
    names = [name for name, _ in tree_flatten(model.parameters())]
    found = sum(name.endswith(".scales") for name in names)
    print(config["quantization"], "layers with scales:", found, "of", len(names))
    return config["quantization"], found


said, found = scales(64)
assert found == 15
said, found = scales(128)
assert (said["bits"], said["group_size"]) == (4, 128)
assert found == 0
PYTHON
echo "as written: what does not divide is left out"
