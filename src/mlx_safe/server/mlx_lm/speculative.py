"""Which models can draft for which, so that a draft never changes greedy text.

Speculative decoding reads several tokens at once and takes back those that were
drafted wrongly. mlx-lm asks once, of empty caches, whether that is possible. A rotating
cache says yes then, and takes back nothing when its window is full (0.31.3, 0.32.2):
from there on the text is another. So the target's caches are asked here.

A draft may be any model: what it drafts is checked by the target. Only its tokens
must be the target's, or MLX reads and writes beside the arrays (`fit`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import mlx.core as mx

from ..replies import BadRequest
from . import compat
from .model_facts import ModelFacts
from .protocols.models import Cache, Model
from .protocols.opaque import Array

__all__ = [
    "Reading",
    "fit",
    "fixed_caches",
    "no_draft",
    "report_calls",
    "why_not_draftable",
]


def why_not_draftable(model: Model) -> str | None:
    """Why no model can draft for ``model``; None when any can.

    Args:
        model: the target. Its caches are made; nothing is evaluated.
    """
    caches = compat.make_cache(model)
    # mlx-lm separates the target's caches from the draft's by this number.
    if len(caches) != len(model.layers):
        return "its layers share caches"
    fixed = fixed_caches(caches)
    if fixed:
        return f"its cache cannot take tokens back ({fixed})"
    return None


def no_draft(why: str) -> BadRequest:
    """The refusal of a request for a draft model where none can be used."""
    return BadRequest(
        f"No draft model can be used with this model: {why}.", param="draft_model"
    )


def fixed_caches(caches: Iterable[Cache]) -> str:
    """The kinds among ``caches``, which are empty, that cannot be shortened later."""
    fixed = {type(c).__name__ for c in _leaves(caches) if not _rewinds(c)}
    return ", ".join(sorted(fixed))


def _leaves(caches: Iterable[Cache]) -> Iterator[Cache]:
    for cache in caches:
        if hasattr(cache, "caches"):
            yield from _leaves(cache.caches)
        else:
            yield cache


def _rewinds(cache: Cache) -> bool:
    """Whether ``cache``, which is empty, can be shortened however long it gets."""
    # Windows: of rotating caches and of chunks. What has left them does not return.
    if getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None):
        return False
    return hasattr(cache, "is_trimmable") and bool(cache.is_trimmable())


def fit(draft: Model, has: ModelFacts, target: ModelFacts) -> None:
    """From now on ``draft`` takes and gives the target's tokens.

    Models of one family often differ in how far their vocabulary is padded. What
    the draft cannot read becomes its last token, and what the target does not have
    it never drafts. It keeps its class's name and stays an instance of it.

    Args:
        has, target: what is known of both; all of it.
    """
    assert has.rows is not None and has.width is not None
    assert target.rows is not None and target.width is not None
    last, width, wanted = has.rows - 1, has.width, target.width
    known = min(width, wanted, target.rows)
    if last + 1 >= wanted and width == known == wanted:
        return
    cls = type(draft)

    def __call__(self: Model, tokens: Array, *args: Any, **kwargs: Any) -> Array:
        logits = cls.__call__(self, mx.minimum(tokens, last), *args, **kwargs)
        shape = (*logits.shape[:-1], wanted - known)
        none = mx.full(shape, -mx.inf, dtype=logits.dtype)
        return mx.concatenate([logits[..., :known], none], axis=-1)

    draft.__class__ = type(
        cls.__name__, (cls,), {"__call__": __call__, "__module__": cls.__module__}
    )


def report_calls(model: Model, report: Callable[[int], None]) -> None:
    """From now on ``model`` calls ``report`` with how many tokens each call has.

    Before the call; it keeps its class's name and stays an instance of it.
    """
    cls = type(model)

    def __call__(self: Model, tokens: Array, *args: Any, **kwargs: Any) -> Array:
        report(int(tokens.shape[-1]))
        return cls.__call__(self, tokens, *args, **kwargs)

    model.__class__ = type(
        cls.__name__, (cls,), {"__call__": __call__, "__module__": cls.__module__}
    )


class Reading:
    """How far a prompt is read by a draft model and its target, one after the other.

    mlx-lm (0.31, 0.32) calls no ``prompt_progress_callback`` with a draft model. But
    it evaluates each step before it begins the next, so a call of either model tells
    that the steps before have been done.

    Args:
        tokens: that each of them has to read.
        on_step: called between two steps with the tokens that have been read, of how
            many, by both; and whether the target has read the last of them.
    """

    def __init__(self, tokens: int, on_step: Callable[[int, int, bool], None]) -> None:
        # The last token of the prompt is read with the first of the answer.
        self._each = tokens - 1
        self._on_step = on_step
        self._read = 0
        self._is_over = False

    def calls(self, tokens: int) -> None:
        """A call with so many tokens begins, of whichever model."""
        if self._is_over:
            return
        self._is_over = self._read >= 2 * self._each
        self._on_step(self._read, 2 * self._each, self._read > self._each)
        self._read += tokens
