"""What a request will need: its caches, and the transient of one step.

Nothing is computed from a model's configuration: the cache objects of the loaded
model are filled with a few tokens and looked at (`calibrate`). What is looked at
are the attributes that all caches of mlx-lm 0.31 and 0.32 share: ``nbytes``,
``keys`` with its slots on axis 2 (quantized: a tuple of arrays), ``max_size`` or
``chunk_size`` of those with a window, ``caches`` of those made of others. A cache
without ``keys`` keeps a state whose size does not depend on the tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CacheCost", "LayerCost", "Transients", "calibrate", "measure"]

# Caches grow by blocks of 256 slots (`KVCache.step` and its kin), counted from the
# tokens they have, so up to a block less one is unused. When that number is a
# multiple of 256, what was unused before is kept as well (mlx-lm 0.31 and 0.32).
UNUSED = 2 * 255
# Too few tokens tell nothing about the cost of each: constants prevail.
TOKENS_MIN = 32
MARGIN = 1.1
FORGET = 0.1
CALIBRATION_TOKENS = 64


@dataclass(frozen=True)
class LayerCost:
    """What one layer's cache costs for one sequence. Bytes.

    Attributes:
        per_slot: bytes of one token's place. constant: bytes in any case.
        window: places kept at most; None when all tokens are.
        quantized: bytes of one place after the cache was quantized, which
            happens at ``quantized_from`` tokens; None when it is not.
    """

    per_slot: int = 0
    constant: int = 0
    window: int | None = None
    quantized: int | None = None
    quantized_from: int = 0

    def nbytes(self, tokens: int, step: int) -> int:
        """At most so many bytes with ``tokens`` read in steps of ``step``."""
        if tokens <= 0:
            return self.constant
        slots = tokens + UNUSED
        if self.window is not None:
            # A step's tokens are put behind the window before it is trimmed,
            # and a window made of chunks has its blocks behind it.
            slots = min(slots, self.window + step - 1 + UNUSED)
        full = self.constant + slots * self.per_slot
        if self.quantized is None or tokens < self.quantized_from:
            return full
        # While it is converted there are both.
        at = min(tokens, self.quantized_from + step) + UNUSED
        both = at * (self.per_slot + self.quantized)
        return self.constant + max(both, slots * self.quantized)


@dataclass(frozen=True)
class CacheCost:
    """What all caches of a model cost: each kind of layer, and how many."""

    layers: tuple[tuple[LayerCost, int], ...] = ()

    def nbytes(self, tokens: int, *, rows: int = 1, step: int = 2048) -> int:
        """At most so many bytes for ``rows`` sequences.

        All rows of a batch have as many places as the longest (mlx-lm pads),
        so ``tokens`` is the length of that.
        """
        one = sum(n * layer.nbytes(tokens, step) for layer, n in self.layers)
        return rows * one

    @property
    def per_token(self) -> int:
        """Bytes of one more token while no window is full."""
        return sum(
            n * (layer.per_slot if layer.quantized is None else layer.quantized)
            for layer, n in self.layers
        )

    def tokens_in(self, size: int, *, step: int = 2048) -> int:
        """How many tokens of one sequence fit into ``size`` bytes.

        2**31 - 1 when there is no end to it (all layers have windows).
        """
        low, high = 0, 2**31 - 1
        while low < high:
            middle = (low + high + 1) // 2
            if self.nbytes(middle, step=step) <= size:
                low = middle
            else:
                high = middle - 1
        return low


def _leaves(caches: Iterable[Any]) -> Iterator[Any]:
    for cache in caches:
        inner = getattr(cache, "caches", None)
        if inner is None:
            yield cache
        else:
            yield from _leaves(inner)


def _slots(cache: Any) -> int:
    keys = getattr(cache, "keys", None)
    while isinstance(keys, tuple | list):
        keys = keys[0]
    return 0 if keys is None else int(keys.shape[2])


def _layer_cost(cache: Any, kv_bits: int | None, group: int, start: int) -> LayerCost:
    slots, nbytes = _slots(cache), int(cache.nbytes)
    if slots == 0:
        return LayerCost(constant=nbytes)
    window = getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None)
    quantized = None
    if kv_bits is not None and window is None and hasattr(cache, "to_quantized"):
        converted = cache.to_quantized(group_size=group, bits=kv_bits)
        quantized = -(-int(converted.nbytes) // slots)
    return LayerCost(
        per_slot=-(-nbytes // slots),
        window=window,
        quantized=quantized,
        quantized_from=start,
    )


def measure(
    caches: Sequence[Any],
    *,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = 0,
) -> CacheCost:
    """The cost of caches like these, which hold one sequence of some tokens.

    The keyword arguments are mlx-lm's ``--kv-bits`` and its kin: a cache that
    can be quantized will be, once it has ``quantized_kv_start`` tokens.
    """
    kinds = Counter(
        _layer_cost(cache, kv_bits, kv_group_size, quantized_kv_start)
        for cache in _leaves(caches)
    )
    return CacheCost(tuple(kinds.items()))


@dataclass
class Transients:
    """What a step needs besides the caches, learned from peaks. Bytes.

    A step of many tokens costs so much for each of them, the more the longer
    the context is (on a backend that writes the attention's scores out). A step
    of few tokens costs a constant. The most that was seen holds; where less is
    seen later, it is forgotten slowly. Not thread-safe.

    Attributes:
        steps: how many steps were observed.
    """

    steps: int = 0
    _constant: float = 0.0
    # For each power of two of the context: (context, bytes for each token).
    _per_token: dict[int, tuple[int, float]] = field(default_factory=dict)

    def observe(self, tokens: int, context: int, nbytes: int) -> None:
        """A step of ``tokens`` (rows times length) had ``nbytes`` beside the caches.

        ``context`` is how many tokens the longest row had after it.
        """
        self.steps += 1
        if tokens < TOKENS_MIN:
            self._constant = _remember(self._constant, nbytes)
            return
        bucket = context.bit_length()
        _, before = self._per_token.get(bucket, (0, 0.0))
        self._per_token[bucket] = (context, _remember(before, nbytes / tokens))

    def predict(self, tokens: int, context: int) -> int:
        """What a step will need, with some margin."""
        return int(MARGIN * max(self._constant, tokens * self._for_each(context)))

    def _for_each(self, context: int) -> float:
        points = sorted(self._per_token.values())
        if not points:
            return 0.0
        near = [cost for at, cost in points if at <= context] or [points[0][1]]
        (first, cheap), (last, dear) = points[0], points[-1]
        if context <= last or last == first:
            # Between two: the one above, since the cost grows between them.
            above = [cost for at, cost in points if at >= context][:1]
            return max([*near, *above])
        slope = max(0.0, (dear - cheap) / (last - first))
        return max(near) + slope * (context - last)


def _remember(before: float, seen: float) -> float:
    return max(seen, before + FORGET * (seen - before))


def calibrate(
    model: Callable[..., Any],
    make_cache: Callable[[], list[Any]],
    transients: Transients,
    **quantization: Any,
) -> CacheCost:
    """Reads some hundred tokens with ``model`` and looks at what that took.

    Args:
        model: called as ``model(tokens, cache=caches)``, tokens of shape (1, n).
        make_cache: makes the caches of one sequence, empty.
        transients: is told of two steps, with and without a context.
        quantization: as for `measure`.

    Called on the thread, and with the default stream, that the model runs on.
    """
    import mlx.core as mx

    caches = make_cache()
    context = 0
    for length in (CALIBRATION_TOKENS, 3 * CALIBRATION_TOKENS, CALIBRATION_TOKENS):
        tokens = mx.zeros((1, length), dtype=mx.int32)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        model(tokens, cache=caches)
        mx.eval([cache.state for cache in caches])
        context += length
        after = mx.get_active_memory()
        if length == CALIBRATION_TOKENS:
            used = mx.get_peak_memory() - max(before, after)
            transients.observe(length, context, max(0, used))
        mx.clear_cache()
    cost = measure(caches, **quantization)
    del caches
    mx.clear_cache()
    return cost
