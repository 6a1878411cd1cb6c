#!/usr/bin/env bash
# mlx_lm.convert --q-bits 4 quantizes nothing; a recipe takes no notice of --q-bits.
#
# Package: mlx-lm 0.32.2 with mlx 0.32.4, and 0.31.3 with 0.31.2 (CPU), mlx_lm.convert.
# Guess before: to say how many bits is to ask for quantization. Or it is a usage error, as
# options are that do not go together.
# Seen: without -q the options --q-bits, --q-group-size, --q-mode and --quant-predicate do
# nothing: status 0, no word, and a model as large as before. With -q and --quant-predicate
# mixed_4_6 all layers have 4 or 6 bits whatever --q-bits says, and config.json says
# "bits": 8 at the top and the true ones layer by layer. Who reads the first number there, for a
# name or to know how much memory it takes, is wrong. Count the bytes of the weights instead.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for pair in '0.31.2 0.31.3' '0.32.4 0.32.2'; do
  read -r mlx mlx_lm <<< "$pair"
  python3 -m venv "$work/$mlx"
  "$work/$mlx/bin/pip" install --quiet --disable-pip-version-check \
    "mlx[cpu]==$mlx" "mlx-lm==$mlx_lm"
  mkdir "$work/$mlx/models"
  (cd "$work/$mlx/models" && HF_HUB_OFFLINE=1 "$work/$mlx/bin/python" - <<'PYTHON'
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tokenizers import Tokenizer, models

print("mlx-lm", version("mlx-lm"), "mlx", version("mlx"))
config = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2,
    "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5, "vocab_size": 64, "rope_theta": 1e4, "tie_word_embeddings": False,
}
model = llama.Model(llama.ModelArgs.from_dict(config))
plain = Path("plain")
plain.mkdir()
(plain / "config.json").write_text(json.dumps(config))
mx.save_safetensors(str(plain / "model.safetensors"), dict(tree_flatten(model.parameters())))
Tokenizer(models.WordLevel({"a": 0, "<end>": 1}, "a")).save(str(plain / "tokenizer.json"))
(plain / "tokenizer_config.json").write_text(
    json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"})
)


def convert(*options):
    """Of a conversion: what its configuration says, and the bits of its layers."""
    target = "-".join(("to", *options)).replace("--", "")
    command = [sys.executable, "-m", "mlx_lm", "convert", "--model", "plain"]
    done = subprocess.run([*command, "--mlx-path", target, *options], text=True,
                          capture_output=True, check=True)
    said = json.loads(Path(target, "config.json").read_text()).get("quantization")
    weights = mx.load(f"{target}/model.safetensors")
    bits = {
        32 * w.shape[-1] // 64
        for name, w in weights.items()
        if "self_attn" in name and name.endswith("weight") and w.dtype == mx.uint32
    }
    warned = "not quantized" in (done.stdout + done.stderr).lower()
    print(" ".join(options), "->", said and said["bits"], "in the configuration, layers have",
          sorted(bits) or "float weights")
    return said and said["bits"], bits, warned


assert convert("-q", "--q-bits", "8") == (8, {8}, False)
for options in (
    ["--q-bits", "4"],
    ["--q-mode", "mxfp4"],
    ["--quant-predicate", "mixed_4_6"],
):
    assert convert(*options) == (None, set(), False)
assert convert("-q", "--q-bits", "8", "--quant-predicate", "mixed_4_6") == (8, {4, 6}, False)
PYTHON
  )
done
echo "as written: nothing is quantized"
