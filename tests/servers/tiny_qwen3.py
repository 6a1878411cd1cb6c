"""A tiny random qwen3 model with a byte tokenizer: a type that every server knows.

Run as a program: ``python tiny_qwen3.py DIRECTORY [HIDDEN LAYERS]``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from support.tiny_model import SPECIAL, make_tokenizer


def make(directory: Path, hidden: int = 64, layers: int = 2) -> Path:
    """Writes config, weights and tokenizer into ``directory``; returns it."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import qwen3

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(directory)
    # What some servers read in its place.
    (directory / "chat_template.jinja").write_text(tokenizer.chat_template)
    vocabulary = len(tokenizer.get_vocab())
    head = min(64, hidden // 4)
    config = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": 2 * hidden,
        "num_attention_heads": hidden // head,
        "num_key_value_heads": hidden // head // 2,
        "head_dim": head,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocabulary,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
        "eos_token_id": tokenizer.eos_token_id,
        "torch_dtype": "float32",
    }
    mx.random.seed(3)
    model = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    scale = 2.4 / hidden**0.5
    weights = {
        name: mx.random.normal(value.shape, scale=scale) if value.ndim > 1 else value
        for name, value in tree_flatten(model.parameters())
    }
    # The end of an answer must not come up by chance.
    weights["model.embed_tokens.weight"][vocabulary - len(SPECIAL) :] *= 0.01
    mx.save_safetensors(
        str(directory / "model.safetensors"), weights, metadata={"format": "mlx"}
    )
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    (directory / "generation_config.json").write_text(
        json.dumps({"eos_token_id": tokenizer.eos_token_id})
    )
    return directory


if __name__ == "__main__":
    make(Path(sys.argv[1]), *map(int, sys.argv[2:]))
