#!/usr/bin/env bash
# A text that is padded on the left has an embedding of NaN, in Qwen 3's class.
#
# Package: mlx-embeddings 0.1.0 with mlx 0.32.4 (CPU), mlx-vlm 0.7.10 and transformers 5.24.0,
# mlx_embeddings.models.qwen3 with tiny random weights.
# Guess before: padding changes nothing, on either side: an attention mask comes with it, and the
# class has a branch for texts that are padded on the left ("left_padding"). The model's own
# card pads on the left.
# Seen: on the right, and without a mask, the embedding is the same. On the left it is NaN, of
# each text that has any padding; the longest of the batch is right. A place of padding sees
# no key at all, and minus infinity everywhere makes NaN, which the next layer's values carry to
# all. Nothing is raised: a search with it finds nothing, or puts the text anywhere.
# Pad on the right (padding_side="right"), or look for NaN before storing.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'mlx[cpu]==0.32.4' \
  'mlx-embeddings==0.1.0' 'mlx-vlm==0.7.10' 'transformers==5.24.0'
"$work/venv/bin/python" - <<'PYTHON'
import mlx.core as mx
from mlx_embeddings.models import qwen3

config = {
    "model_type": "qwen3", "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 100,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    "tie_word_embeddings": True, "architectures": ["Qwen3ForCausalLM"],
}
mx.random.seed(0)
model = qwen3.Model(qwen3.ModelArgs.from_dict(config))
model.eval()


def embedded(tokens, mask):
    return model(mx.array(tokens), attention_mask=mx.array(mask)).text_embeds


short, long = [5, 6, 7, 8, 9], list(range(10, 18))
alone = embedded([short], [[1] * 5])[0]
right = embedded([short + [0] * 3, long], [[1] * 5 + [0] * 3, [1] * 8])
left = embedded([[0] * 3 + short, long], [[0] * 3 + [1] * 5, [1] * 8])
print("alone:          ", alone[:3].tolist())
print("padded, right:  ", right[0, :3].tolist())
print("padded, left:   ", left[0, :3].tolist())
print("the longest:    ", left[1, :3].tolist())
assert mx.allclose(right[0], alone, atol=1e-5).item()
assert mx.allclose(left[1], right[1], atol=1e-5).item()
assert mx.isnan(left[0]).all().item()
PYTHON
echo "as written: NaN"
