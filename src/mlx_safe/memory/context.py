"""How many tokens a model was made for, by its configuration.

The formats are transformers' ``config.json`` and ``tokenizer_config.json``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["config_of", "context_tokens"]

LENGTHS = (
    *("max_position_embeddings", "n_positions", "max_sequence_length"),
    *("max_seq_len", "seq_length", "n_ctx", "model_max_length"),
)
# Of models that read more than text, or answer with more.
PARTS = (
    *("text_config", "llm_config", "language_config", "thinker_config"),
    *("text_model", "language_model"),
)
# transformers writes 1e30 for "no limit"; no tokenizer that means it says so much.
SANE_MAX = 100_000_000


def config_of(tokenizer: Any) -> dict[str, Any]:
    """The ``config.json`` of the directory that ``tokenizer`` came from; {}: none."""
    path = Path(str(getattr(tokenizer, "name_or_path", "") or "")) / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def context_tokens(
    config: Mapping[str, Any], tokenizer_max: Any = None, *, attends: bool = True
) -> int | None:
    """The most tokens that the model was made to see at once; None: no limit known.

    Args:
        config: of its ``config.json``.
        tokenizer_max: ``model_max_length`` of its tokenizer, which holds where the
            configuration says nothing.
        attends: whether a layer of it looks back at single tokens. A state space has
            no positions, and no end.
    """
    if not attends:
        return None
    for part in _parts(config):
        for name in LENGTHS:
            length = _length(part.get(name))
            if length is not None:
                return _scaled(length, part, str(config.get("model_type", "")))
    return _length(tokenizer_max)


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield config
    for name in PARTS:
        part = config.get(name)
        if isinstance(part, Mapping):
            yield from _parts(part)


def _length(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if 0 < value <= SANE_MAX else None


def _scaled(length: int, part: Mapping[str, Any], model_type: str) -> int:
    """``length`` with the scaling of positions that is not in it yet.

    Some configurations name the length before YaRN's scaling (Qwen 2.5), some the one
    after it (DeepSeek, gpt-oss): where both are known the larger one holds. "linear"
    and "dynamic" scale what is named, but Gemma 3 names the result.
    """
    scaling = part.get("rope_scaling") or part.get("rope_parameters")
    if not isinstance(scaling, Mapping):
        return length
    factor = scaling.get("factor")
    kind = scaling.get("rope_type", scaling.get("type"))
    if isinstance(factor, bool) or not isinstance(factor, int | float) or factor < 1:
        return length
    original = _length(scaling.get("original_max_position_embeddings"))
    if kind == "yarn":
        return max(length, int((original or length) * factor))
    if kind in ("linear", "dynamic") and not model_type.startswith("gemma3"):
        return int(length * factor)
    return length
