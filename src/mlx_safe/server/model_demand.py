"""What a loaded model takes: its caches and its steps, measured by trying.

Used by the generation thread only.
"""

from __future__ import annotations

import logging
from functools import partial

from ..memory.demand import Demand
from ..memory.estimate import CacheCost, LayerCost, Transients, calibrate
from .mlx_lm import compat
from .mlx_lm.protocols.models import ModelProvider
from .replies import is_of_all

__all__ = ["NoRoom", "demand_of"]

log = logging.getLogger("mlx_safe.server")


class NoRoom(ValueError):
    """The user's flags leave no room for the model, or do not suit it."""


def demand_of(provider: ModelProvider, held_back: bool = False) -> Demand:
    """What requests to the model of ``provider`` take; with a draft model, both.

    ``held_back``: as of `calibrate`. Of a model that cannot be measured it says
    nothing: requests take no memory then.

    Raises:
        RuntimeError: MLX failed while it was measured, as any step can.
        NoRoom: it cannot be served with the flags.
    """
    transients = Transients()
    cost = CacheCost()
    try:
        cost = _measure(provider, transients, held_back)
    except NoRoom:
        raise
    except Exception as e:
        if is_of_all(e):
            raise
        # Only what is active can be looked at then, not what will be.
        log.warning(
            "this model cannot be measured; what requests take is not known: %r",
            e,
        )
    return Demand(cost, transients)


def _measure(
    provider: ModelProvider, transients: Transients, held_back: bool
) -> CacheCost:
    layers: tuple[tuple[LayerCost, int], ...] = ()
    quantization = compat.kv_quantization(provider.cli_args)
    for model in filter(None, (provider.model, provider.draft_model)):
        make_cache = partial(compat.make_cache, model)
        try:
            compat.try_quantization(make_cache(), quantization)
            cost = calibrate(
                model, make_cache, transients, held_back=held_back, **quantization
            )
        except (ValueError, NotImplementedError) as e:
            if isinstance(e, ValueError) and not str(e).startswith("[quantize]"):
                raise
            # Each prompt beyond --quantized-kv-start would fail on it.
            flags = "--kv-bits {kv_bits} --kv-group-size {kv_group_size}"
            raise NoRoom(f"{flags.format(**quantization)}: {e}") from e
        layers += cost.layers
    return CacheCost(layers)
