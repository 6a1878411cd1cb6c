"""Another model takes the place of the one that is loaded: only one that can.

mlx-lm drops the old model and then tries to load the new one. Here the new one is
loaded beside it first, lazily: that reads heads of files, takes no memory, and fails
on whatever would have failed. Then the old one goes, and the weights are read.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable

import mlx.core as mx
from mlx.utils import tree_flatten

from ...memory.sizes import format_size
from . import compat, sharing
from .model_facts import ModelFacts, look_at, why_not_servable
from .protocols.models import Model, ModelProvider
from .speculative import fit, fixed_caches, no_draft, why_not_draftable

__all__ = ["Unservable", "replace_model"]

log = logging.getLogger("mlx_safe.server")


class Unservable(ValueError):
    """The model cannot be served here, or not with the flags; the text says why."""


def replace_model(
    provider: ModelProvider, named: tuple[str | None, ...], ceiling: Callable[[], int]
) -> ModelFacts:
    """Loads ``named`` in the place of what mlx-lm's ``provider`` has.

    Args:
        named: model, adapter and draft model, for ``ModelProvider._load``.
        ceiling: how many bytes MLX may hold; asked when something is loaded already.

    Raises:
        BadRequest: the draft model does not go with the model. Like any other error
            before the weights are read, it leaves what is loaded as it is.
        RanksRefuse: they cannot share or serve it, and nothing is loaded any more.
    """
    if provider.is_distributed:
        # Ranks share the work of loading, and it reads weights.
        unload(provider)
        with sharing.evenly():
            loaded = compat.load_beside(provider, *named)
        compat.take_over(provider, loaded)
        return look_at(_target(provider))
    loaded = compat.load_beside(provider, *named)
    facts = _check(loaded, None if provider.model is None else ceiling())
    unload(provider)
    try:
        mx.eval([model.parameters() for model in _models(loaded)])
    except BaseException:
        unload(loaded)
        raise
    compat.take_over(provider, loaded)
    return facts


def _models(provider: ModelProvider) -> list[Model]:
    return [m for m in (provider.model, provider.draft_model) if m is not None]


def _target(provider: ModelProvider) -> Model:
    assert provider.model is not None, "`ModelProvider._load` loads one or raises"
    return provider.model


def _check(loaded: ModelProvider, ceiling: int | None) -> ModelFacts:
    if ceiling is not None:
        weights = [v for m in _models(loaded) for _, v in tree_flatten(m.parameters())]
        size = sum(value.nbytes for value in weights)
        if size > ceiling:
            raise Unservable(
                f"its weights are {format_size(size)}, and MLX may hold "
                f"{format_size(ceiling)}"
            )
    for model in _models(loaded):
        if (why := why_not_servable(model)) is not None:
            raise Unservable(why)
    target = _target(loaded)
    facts = look_at(target)
    if loaded.draft_model is not None:
        _check_draft(loaded.draft_model, target, facts)
    return facts


def _check_draft(model: Model, target: Model, facts: ModelFacts) -> None:
    draft = look_at(model)
    why = why_not_draftable(target)
    if why is None and None in (draft.width, facts.width):
        why = "the number of its tokens, or of the draft model's, is not known"
    if why is not None:
        raise no_draft(why)
    fit(model, draft, facts)
    fixed = fixed_caches(compat.make_cache(model))
    if fixed:
        log.warning(
            "the draft model's cache cannot take tokens back (%s): its drafts get "
            "worse, and answers slower",
            fixed,
        )


def unload(provider: ModelProvider) -> None:
    """Gives the memory of the model back that ``provider`` has.

    mlx-lm drops its own reference, but its loop's variables have another until the
    next model is there (0.31.3 and 0.32.2): both would have to fit.
    """
    for model in _models(provider):
        model.clear()  # a module is the dictionary of its parts
    compat.take_over(provider, None)
    gc.collect()
    mx.clear_cache()
