"""A tiny random llama model with a byte tokenizer, made on the spot.

Run as a program: ``python tiny_model.py DIRECTORY [SEED [HIDDEN_SIZE]]``. It is
small enough that a whole server test takes a second, and random: its text means
nothing, but with greedy sampling it is always the same.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<eos>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]


def make_tokenizer(
    directory: Path,
    special: Sequence[str] = SPECIAL,
    template: str = CHAT_TEMPLATE,
    words: Sequence[str] = (),
    merges: Sequence[tuple[str, str]] = (),
) -> Any:
    """Writes a byte-level tokenizer and returns it.

    ``words`` are tokens that only a model can say: text is cut into bytes, and
    what ``merges`` makes of them.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = ["".join(pair) for pair in merges]
    tokens = dict.fromkeys([*alphabet, *merged, *words])
    vocabulary = {token: i for i, token in enumerate(tokens)}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(list(special))
    make: Any = PreTrainedTokenizerFast
    tokenizer = make(tokenizer_object=raw, eos_token="<eos>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    return tokenizer


def make(directory: Path, seed: int = 0, hidden_size: int = 64) -> Path:
    """Writes config, weights and tokenizer into ``directory``; returns it."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama

    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = len(make_tokenizer(directory).get_vocab())
    config = {
        "model_type": "llama",
        "hidden_size": hidden_size,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocabulary,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": 131072,
    }
    mx.random.seed(seed)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    weights = {
        name: mx.random.normal(value.shape, scale=0.3) if value.ndim > 1 else value
        for name, value in tree_flatten(model.parameters())
    }
    # The end-of-sequence token must not come up by chance.
    embedding = weights["model.embed_tokens.weight"]
    embedding[vocabulary - len(SPECIAL) :] *= 0.01
    mx.save_safetensors(
        str(directory / "model.safetensors"), weights, metadata={"format": "mlx"}
    )
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    return directory


if __name__ == "__main__":
    make(Path(sys.argv[1]), *map(int, sys.argv[2:]))
