"""A model that the ranks cannot share evenly is refused, by all of them alike.

mlx-lm gives each rank as many rows of a layer, and divides the numbers of its heads
(``n_heads //= N``). Most types do so without a look at the rest (0.31.3 to 0.32.2).
One KV head for two ranks is none: each request fails. Five heads are two of another
size for each: answers are noise, with status 200.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..replies import is_of_all
from .model_facts import why_not_servable

__all__ = ["RanksRefuse", "evenly", "meet"]

Numbers = dict[tuple[str, str], int]


class RanksRefuse(ValueError):
    """They cannot serve the model; the text says why. All of them find it."""


@contextlib.contextmanager
def evenly() -> Iterator[None]:
    """Models that mlx-lm loads meanwhile are shared evenly, or not at all.

    Raises `RanksRefuse` from within mlx-lm's ``sharded_load``, and of what one rank
    would refuse, too. Generation thread.
    """
    import mlx_lm.utils as utils

    load = utils.load_model

    def load_model(*args: Any, **kwargs: Any) -> Any:
        model, *more = load(*args, **kwargs)
        if (why := why_not_servable(model)) is not None:
            raise RanksRefuse(why)
        if hasattr(model, "shard"):
            _check_sharing(model, model.shard)
        return (model, *more)

    utils.load_model = load_model
    try:
        yield
    finally:
        utils.load_model = load


def meet() -> None:
    """Waits until every rank is here, as mlx-lm's ``sharded_load`` does."""
    mx.eval(mx.distributed.all_sum(mx.array(1.0), stream=mx.cpu))


def _check_sharing(model: nn.Module, shard: Callable[[Any], None]) -> None:
    def checked(group: Any) -> None:
        vars(model).pop("shard")  # it would keep the model alive
        before, failed = _whole_numbers(model), None
        try:
            shard(group)
        except Exception as e:
            if is_of_all(e):
                raise
            failed = e
        cannot = f"{group.size()} ranks cannot share it"
        if (uneven := _uneven(before, _whole_numbers(model), group.size())) is not None:
            raise RanksRefuse(
                f"{cannot} evenly, {uneven}: start a number of ranks that divides it, "
                "or try --pipeline"
            ) from failed
        if failed is not None:
            raise RanksRefuse(f"{cannot}: {failed}") from failed

    model.shard = checked


def _uneven(before: Numbers, after: Numbers, size: int) -> str | None:
    """A number that was divided by ``size``, and is no multiple of it."""
    for (module, name), number in before.items():
        if number % size and after.get((module, name)) == number // size:
            return f"{module}.{name} is {number}"
    return None


def _whole_numbers(model: nn.Module) -> Numbers:
    return {
        (module, name): value
        for module, layer in model.named_modules()
        for name, value in vars(layer).items()
        if type(value) is int
    }
