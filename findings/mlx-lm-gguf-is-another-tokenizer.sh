#!/usr/bin/env bash
# A GGUF file that mlx-lm exports of a Llama 3 model has no usable tokenizer, and no scaling.
#
# Package: mlx-lm 0.32.2 with mlx 0.32.4, and 0.31.3 with 0.31.2 (CPU),
# mlx_lm.gguf.convert_to_gguf, as in `mlx_lm.fuse --export-gguf`; gguf 0.19.0.
# Guess before: the file holds what llama.cpp needs for the model that goes in. Or the export is
# refused, as it is for quantized models and for other architectures than Llama's.
# Seen: each vocabulary is called "llama", which in GGUF is SentencePiece. One of bytes, as
# Llama 3 and Mistral Nemo have, is "gpt2" with its merges; here it comes as "llama" with
# tokens such as "Ġcat" and scores, and without merges. A space is "▁" there, so no token
# fits " cat". And "rope_scaling" of {"rope_type": "llama3"} is left out: only an entry
# {"type": "linear"} is written. Nothing is said but "Converted GGUF model saved".
# Convert fused safetensors with llama.cpp's own script.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for pair in '0.31.2 0.31.3' '0.32.4 0.32.2'; do
  read -r mlx mlx_lm <<< "$pair"
  python3 -m venv "$work/$mlx"
  "$work/$mlx/bin/pip" install --quiet --disable-pip-version-check \
    "mlx[cpu]==$mlx" "mlx-lm==$mlx_lm" 'gguf==0.19.0'
  mkdir "$work/$mlx/models"
  (cd "$work/$mlx/models" && HF_HUB_OFFLINE=1 "$work/$mlx/bin/python" - <<'PYTHON'
import json
from importlib.metadata import version
from pathlib import Path

import gguf
from mlx.utils import tree_flatten
from mlx_lm.gguf import convert_to_gguf
from mlx_lm.models import llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

print("mlx-lm", version("mlx-lm"), "mlx", version("mlx"))
words = Tokenizer(models.BPE())
words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
words.decoder = decoders.ByteLevel()
words.train_from_iterator(
    ["the cat sat on the mat and the cat sat"] * 20,
    trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ),
)
words.save("tokenizer.json")
Path("tokenizer_config.json").write_text(
    json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"})
)
config = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1,
    "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5, "vocab_size": words.get_vocab_size(), "rope_theta": 500000.0,
    "max_position_embeddings": 4096, "tie_word_embeddings": False,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
}
model = llama.Model(llama.ModelArgs.from_dict(config))
convert_to_gguf(".", dict(tree_flatten(model.parameters())), config, "model.gguf")

made = gguf.GGUFReader("model.gguf")
fields = {name: field.contents() for name, field in made.fields.items()
          if not name.startswith("GGUF.")}
tokens = [t if isinstance(t, str) else t.decode() for t in fields["tokenizer.ggml.tokens"]]
tensors = {tensor.name for tensor in made.tensors}
print("tokenizer.ggml.model:", fields["tokenizer.ggml.model"])
print("tokens:", [t for t in tokens if "cat" in t], "merges:",
      "tokenizer.ggml.merges" in fields)
print("of RoPE:", sorted(name for name in fields if "rope" in name),
      "rope_freqs.weight" in tensors)
assert words.encode(" cat").tokens == ["Ġcat"]
assert fields["tokenizer.ggml.model"] == "llama"
assert "Ġcat" in tokens and "▁cat" not in tokens
assert "tokenizer.ggml.merges" not in fields
assert not any("rope.scaling" in name for name in fields)
assert "rope_freqs.weight" not in tensors
PYTHON
  )
done
echo "as written: no tokenizer of bytes, no scaling"
