"""What a model really does with token ids, found once when it is loaded.

MLX checks no index: a bias for a token that the logits do not have is written where
other memory begins, and can end the process. A config does not tell how wide they
are (multimodal ones keep it in `text_config`, 13 of 108 types of mlx-lm 0.31.3 and
more of 0.32.2 have no `vocab_size`). What it has need not be what the weights are. So
the model is asked: MLX's arrays know their shape before they are computed.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..replies import BadRequest, is_of_all
from . import compat
from .protocols.models import Model
from .protocols.requests import LogitsProcessorArguments

__all__ = ["ModelFacts", "look_at", "why_not_servable"]

log = logging.getLogger("mlx_safe.server")

# mlx-lm's penalties write to the logits of tokens that the prompt has.
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


@dataclass(frozen=True)
class ModelFacts:
    """Of one model. Immutable: any thread may read it.

    Attributes:
        width: how many logits there are for each token; None: not found.
        rows: how many token ids can be embedded; None: neither was found.
    """

    width: int | None = None
    rows: int | None = None

    @property
    def writable(self) -> int | None:
        """Below it a token's logit may be changed: there is one, and it can be read."""
        if self.width is None:
            return None
        return self.width if self.rows is None else min(self.width, self.rows)

    def check_bias(self, logit_bias: dict[int, float] | None) -> None:
        """Raises `BadRequest` when a bias would be written where no logit is."""
        if not logit_bias:
            return
        if self.writable is None:
            raise BadRequest(
                "logit_bias is not supported with this model: the number of its "
                "tokens is not known.",
                param="logit_bias",
            )
        for token in logit_bias:
            if not 0 <= token < self.writable:
                raise BadRequest(
                    f"logit_bias: there is no token {token}; the model has tokens 0 "
                    f"to {self.writable - 1}.",
                    param="logit_bias",
                )

    def check_prompt(
        self, prompt: list[int], logits: LogitsProcessorArguments, param: str
    ) -> None:
        """Raises `BadRequest` for a prompt with tokens that the model does not have.

        A tokenizer can have more than its model: tokens that were added to it alone.

        Args:
            logits: of the request.
            param: the field that the prompt is of.
        """
        penalized = any(getattr(logits, name) for name in PENALTIES)
        limit = self.writable if penalized else self.rows
        largest = max(prompt, default=0)
        if limit is not None and largest >= limit:
            raise BadRequest(
                f"The prompt has a token that the model does not know ({largest}; it "
                f"has tokens 0 to {limit - 1}).",
                param,
            )


def look_at(model: Model) -> ModelFacts:
    """The facts of ``model``, by a step of one token that is never evaluated.

    Builds a graph and drops it: no weight is read, no memory is taken. Called on the
    thread that generates, with nothing else under way there.
    """
    tokens = mx.zeros((1, 1), dtype=mx.int32)
    rows: list[int] = []
    try:
        with _embeddings_of(tokens, rows):
            logits = model(tokens, cache=compat.make_cache(model))
        width = int(logits.shape[-1])
    except Exception as e:
        if is_of_all(e):
            raise
        log.warning(
            "cannot read the width of this model's logits (%r): no logit_bias", e
        )
        return ModelFacts(None, min(rows, default=None))
    return ModelFacts(width, min(rows, default=width))


@contextlib.contextmanager
def _embeddings_of(tokens: mx.array, rows: list[int]) -> Iterator[None]:
    """Notes in ``rows`` how many each embedding has that is asked for ``tokens``.

    By the very object: positions have an embedding too, in some models.
    """
    kinds = (nn.Embedding, nn.QuantizedEmbedding)
    calls = [kind.__call__ for kind in kinds]

    def noting(call: Any) -> Any:
        def __call__(self: Any, x: mx.array) -> mx.array:
            if x is tokens:
                rows.append(int(self.weight.shape[0]))
            embedded: mx.array = call(self, x)
            return embedded

        return __call__

    try:
        for kind, call in zip(kinds, calls, strict=True):
            kind.__call__ = noting(call)
        yield
    finally:
        for kind, call in zip(kinds, calls, strict=True):
            kind.__call__ = call


def why_not_servable(model: object) -> str | None:
    """Why every answer would be noise, with status 200. Nothing is evaluated.

    MLX reads FP8 numbers as the whole numbers that their bits are, and mlx-lm computes
    with those (mlx 0.31.2 and 0.32.4, mlx-lm 0.31.3 and 0.32.2). Where mlx-lm decodes
    them, as it does for DeepSeek, it has done so when the model is there.
    """
    assert isinstance(model, nn.Module)
    for name, layer in model.named_modules():
        if type(layer) not in (nn.Linear, nn.Embedding):
            continue
        kind = layer.weight.dtype
        if not mx.issubdtype(kind, mx.floating):
            return (
                f"{name}.weight is {str(kind).rpartition('.')[2]}, as MLX reads FP8, "
                "and mlx-lm does not decode it; take a model with 16-bit weights, or "
                "one that mlx_lm.convert has quantised"
            )
    return None
