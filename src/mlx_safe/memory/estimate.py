"""What a request will need: its caches, and the transient of one step.

Nothing is computed from a model's configuration: the cache objects of the loaded
model are filled with a few tokens and looked at (`calibrate`). All caches of
mlx-lm 0.31 and 0.32 share the attributes for that: ``nbytes``, ``update_and_fetch``,
and ``keys`` with its slots on axis 2 (quantized: a tuple of arrays). Those with a
window have ``max_size`` or ``chunk_size``, those made of others ``caches``. A cache
without ``keys`` keeps a state, mostly of a fixed size; by how much it grows all the
same (``LayerCache`` of deepseek_v41) shows while it reads.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = ["CacheCost", "LayerCost", "Transients", "calibrate", "measure"]

# Caches grow by blocks of 256 slots (`KVCache.step` and its kin), counted from the
# tokens they have, so up to a block less one is unused. When that number is a
# multiple of 256, what was unused before is kept as well (mlx-lm 0.31 and 0.32).
BLOCK = 256
UNUSED = 2 * (BLOCK - 1)
# Too few tokens tell nothing about the cost of each: constants prevail.
TOKENS_MIN = 32
MARGIN = 1.1
REMEMBERED = 8
# `calibrate`: steps of so many tokens, or of so few where that would take longer, and
# the context of one of them. Behind it there is room for few tokens: many make the
# caches grow, which copies them. That is part of what a step of many takes.
CALIBRATION_STEPS = (64, 2)
CALIBRATION_STEP_S = 2.0
CALIBRATION_CONTEXT = 4 * BLOCK - 16


@dataclass(frozen=True)
class LayerCost:
    """What one layer's cache costs for one sequence. Bytes.

    Attributes:
        per_slot: bytes of one token's place.
        constant: bytes in any case.
        window: places kept at most; None when all tokens are.
        quantized: bytes of one place after the cache was quantized, which
            happens at ``quantized_from`` tokens; None when it is not.
        rough: ``per_slot`` is what a token takes at most; it may be nothing.
    """

    per_slot: int = 0
    constant: int = 0
    window: int | None = None
    quantized: int | None = None
    quantized_from: int = 0
    rough: bool = False

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

    def at_least(self, tokens: int) -> int:
        """At least so many bytes, without what is allocated ahead."""
        if self.rough:
            return 0
        slots = tokens if self.window is None else min(tokens, self.window)
        each = self.per_slot
        if self.quantized is not None and tokens >= self.quantized_from:
            each = self.quantized
        return slots * each


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

    def at_least(self, tokens: int) -> int:
        """At least so many bytes for one sequence."""
        return sum(n * layer.at_least(tokens) for layer, n in self.layers)

    def growth(self, tokens: int) -> int:
        """At most so many bytes more for one sequence after one step of ``tokens``."""
        slots = tokens + BLOCK - 1
        return sum(n * (x.per_slot * slots + x.constant) for x, n in self.layers)

    @property
    def per_token(self) -> int:
        """Bytes of one more token while no window is full."""
        return sum(
            n * (layer.per_slot if layer.quantized is None else layer.quantized)
            for layer, n in self.layers
        )


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


def _states(caches: Sequence[Any]) -> list[int]:
    """Bytes of each cache, 0 of those that have keys."""
    return [0 if _slots(cache) else int(cache.nbytes) for cache in _leaves(caches)]


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


class Transients:
    """What a step needs besides the caches, learned from peaks. Bytes.

    A step of many tokens costs so much for each of them, and more the longer the
    context is (on a backend that writes the attention's scores out). The cost is a
    line: fitted to the last observations at contexts of each order of magnitude, and
    raised until none is above it. A step of few tokens costs a constant; while no other
    was seen, one of many costs as much for each token. Not thread-safe.
    """

    def __init__(self) -> None:
        self._constants: deque[int] = deque([0], maxlen=4 * REMEMBERED)
        # For each power of two of the context: (context, bytes for each token).
        self._seen: dict[int, deque[tuple[int, float]]] = {}
        self._base, self._slope = 0.0, 0.0
        self._has_seen_many = False

    def observe(self, tokens: int, context: int, nbytes: int) -> None:
        """A step of ``tokens`` (rows times length) had ``nbytes`` beside the caches.

        ``context`` is how many tokens the longest row had after it.
        """
        if tokens < TOKENS_MIN:
            self._constants.append(nbytes)
            if self._has_seen_many:
                return
        elif not self._has_seen_many:
            self._has_seen_many = True
            self._seen.clear()
        seen = self._seen.setdefault(context.bit_length(), deque(maxlen=REMEMBERED))
        seen.append((context, nbytes / tokens))
        self._fit()

    def _fit(self) -> None:
        points = [point for seen in self._seen.values() for point in seen]
        n = len(points)
        mean_x = sum(x for x, _ in points) / n
        mean_y = sum(y for _, y in points) / n
        spread = sum((x - mean_x) ** 2 for x, _ in points)
        together = sum((x - mean_x) * (y - mean_y) for x, y in points)
        self._slope = max(0.0, together / spread) if spread else 0.0
        self._base = max(y - self._slope * x for x, y in points)

    def predict(self, tokens: int, context: int) -> int:
        """What a step will need, with some margin."""
        each = max(0.0, self._base + self._slope * context)
        return int(MARGIN * max([tokens * each, *self._constants]))


def calibrate(
    model: Callable[..., Any],
    make_cache: Callable[[], list[Any]],
    transients: Transients,
    *,
    held_back: bool = False,
    **quantization: Any,
) -> CacheCost:
    """Reads a few tokens with ``model`` and looks at what that took.

    Eight tokens tell the cost of the caches. The cost of a step is read off some,
    most of them behind a long context. That is of zeros, put into the caches, since to
    read it would take a slow model minutes.

    Args:
        model: called as ``model(tokens, cache=caches)``, tokens of shape (1, n).
        make_cache: makes the caches of one sequence, empty.
        transients: gets each step.
        held_back: what is asked for is what a step takes at least, when MLX waits for
            what is under way before it takes more (`Limits.holds_mlx_back`).
        quantization: as for `measure`.

    Called on the thread, and with the default stream, that the model runs on.
    """
    import mlx.core as mx

    caches = make_cache()
    read = 0

    def step(length: int) -> float:
        nonlocal read
        tokens = mx.zeros((1, length), dtype=mx.int32)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        begin = time.perf_counter()
        model(tokens, cache=caches)
        with _memory_limit(0 if held_back else None):
            mx.eval([cache.state for cache in caches])
        seconds = time.perf_counter() - begin
        read += length
        peak, after = mx.get_peak_memory(), mx.get_active_memory()
        transients.observe(length, read, max(0, peak - max(before, after)))
        mx.clear_cache()
        return seconds

    few = CALIBRATION_STEPS[-1]
    step(few)  # with what the first step ever has to prepare
    each = min(step(few) for _ in range(3)) / few
    cost = measure(caches, **quantization)
    # Many tokens at once take less time for each.
    length = next((n for n in CALIBRATION_STEPS if n * each <= CALIBRATION_STEP_S), few)
    looks = [_states(caches)]
    step(length)
    looks.append(_states(caches))
    for cache in _leaves(caches):
        _lengthen(cache, CALIBRATION_CONTEXT)
    mx.eval([cache.state for cache in caches])
    read += CALIBRATION_CONTEXT
    for _ in range(3):  # what counts is the dearest of them
        step(length)
        looks.append(_states(caches))
    caches.clear()
    mx.clear_cache()
    return CacheCost(cost.layers + _growing_states(looks, 4 * length))


@contextmanager
def _memory_limit(limit: int | None) -> Iterator[None]:
    """MLX's own meanwhile, in bytes; None: as it is."""
    import mlx.core as mx

    if limit is None:
        yield
        return
    before = mx.set_memory_limit(limit)
    try:
        yield
    finally:
        mx.set_memory_limit(before)


def _growing_states(
    looks: Sequence[Sequence[int]], tokens: int
) -> tuple[tuple[LayerCost, int], ...]:
    """What states cost beside what they had first. Bytes of each, look for look.

    One that grows up to a window, or by fits and starts, is thought to go on as it did
    on the whole, over ``tokens`` tokens. 4 * 64 are a whole number of the groups that
    such states are made of. Between them it had what it had most.
    """
    kinds: Counter[LayerCost] = Counter()
    for sizes in zip(*looks, strict=True):
        grown, most = sizes[-1] - sizes[0], max(sizes) - sizes[0]
        if most > 0:
            each = max(0, -(-grown // tokens))
            kinds[LayerCost(each, constant=most, rough=True)] += 1
    return tuple(kinds.items())


def _lengthen(cache: Any, tokens: int) -> None:
    """Puts ``tokens`` zeros into a cache, unless its size does not depend on them."""
    import mlx.core as mx

    if getattr(getattr(cache, "keys", None), "ndim", None) != 4:
        return
    cache.update_and_fetch(
        *(
            mx.zeros((*x.shape[:2], tokens, x.shape[3]), x.dtype)
            for x in (cache.keys, cache.values)
        )
    )
