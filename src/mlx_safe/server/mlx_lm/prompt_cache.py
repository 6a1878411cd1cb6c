"""mlx-lm's prompt cache, whose entries are complete and hold what they count.

mlx-lm stores what it is given: lazy slices. Each keeps the buffer of a whole batch
alive (33.6 MB for 1.6 MB counted, with eight requests), and may be computed, or fail,
much later. Here an entry is copied out and evaluated when it is stored. It is marked
with the epoch it was complete in, so that after a fault it is known which entries were
there before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models.cache import (
    KVCache,
    QuantizedKVCache,
    can_trim_prompt_cache,
    trim_prompt_cache,
)

from ... import _core
from ...kv.format import BLOCK_TOKENS
from ..recorder import breadcrumb
from .bases import CacheOrder, LRUPromptCache
from .kv_parts import leaves
from .kv_tier import KVTier
from .protocols.models import (
    Cache,
)
from .protocols.opaque import ModelKey

__all__ = ["PromptCache"]

NO_LIMIT = 1 << 63  # mlx-lm's


@dataclass(eq=False)
class _Entry:
    """What is known of one entry; ``epoch``: the one it was complete in."""

    model: ModelKey
    tokens: list[int]
    cache_type: str
    epoch: int = -1
    trimmable: bool = False
    protected: bool = False

    def is_for(self, model: ModelKey, tokens: list[int]) -> bool:
        return bool(self.model == model) and self.tokens == tokens

    def reusable(self, model: ModelKey, tokens: list[int]) -> int:
        """How many of ``tokens`` a request with this prompt need not read."""
        if self.model != model:
            return 0
        common = _common_prefix(self.tokens, tokens[:-1])  # the last is always read
        return common if self.trimmable or common == len(self.tokens) else 0


class _Order(CacheOrder):
    """Which entry goes next. mlx-lm takes every decision here.

    The order is mlx-lm's own (the oldest answer before the oldest prompt before
    the oldest system prompt, unless there are few of them). But an entry that was used
    is young again, and a protected one stays.
    """

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[_Entry] = []
        self.chosen: _Entry | None = None
        # Called with the entry that goes next, while it is evicted.
        self.evicted: Callable[[ModelKey, list[int]], None] | None = None

    def push(
        self, model: ModelKey, tokens: list[int], cache_type: str = "assistant"
    ) -> None:
        super().push(model, tokens, cache_type)
        self.entries.append(_Entry(model, tokens, cache_type))

    def remove(self, model: ModelKey, tokens: list[int]) -> None:
        super().remove(model, tokens)
        self.entries = [e for e in self.entries if not e.is_for(model, tokens)]

    def pop(self) -> tuple[ModelKey, list[int]]:
        chosen, self.chosen = self.chosen, None
        if chosen is None:
            held = [e for e in self.entries if e.protected]
            for entry in held:
                super().remove(entry.model, entry.tokens)
            model, tokens = super().pop()
            for entry in held:
                super().push(entry.model, entry.tokens, entry.cache_type)
        else:
            model, tokens = chosen.model, chosen.tokens
        self.remove(model, tokens)
        if self.evicted is not None:
            self.evicted(model, tokens)
        return model, tokens

    def touch(self, entry: _Entry) -> None:
        """``entry`` becomes the youngest."""
        super().remove(entry.model, entry.tokens)
        super().push(entry.model, entry.tokens, entry.cache_type)


class PromptCache(LRUPromptCache):
    """`LRUPromptCache` with a limit in bytes that holds at every moment.

    Used by the generation thread only; ``len()``, ``nbytes`` and ``events`` may be
    read by any.

    Args:
        max_size: entries at most.
        max_bytes: bytes of all entries at most; None: no limit. An entry that is
            larger by itself is not stored.

    Attributes:
        events: how often so far: ``hits``, ``misses``, ``evictions``,
            ``too_large`` (not stored), ``dropped`` (after a failure), and
            ``reused_tokens``, which requests did not have to read.
        may_store: called with the bytes of a new entry, and of those that it
            replaces, before it is stored; False: it is not stored. May evict others.
        gives_away: called when an entry is used; True: it leaves the cache with that.
        disk: keeps on disk what is stored, and restores what is not here; or None.
    """

    def __init__(self, max_size: int = 10, max_bytes: int | None = None) -> None:
        super().__init__(max_size, NO_LIMIT if max_bytes is None else max_bytes)
        self._lru: _Order = _Order()
        self.events: Counter[str] = Counter()
        self.may_store: Callable[[int, int], bool] = lambda size, given: True
        self.gives_away: Callable[[], bool] = lambda: False
        self.disk: KVTier | None = None

    # -- what mlx-lm calls -----------------------------------------------------

    def fetch_nearest_cache(
        self, model: ModelKey, tokens: list[int]
    ) -> tuple[list[Cache] | None, list[int]]:
        """A copy of the entry that saves most, and the tokens still to read.

        There is always one: mlx-lm cannot go on from an entry that has the whole
        prompt (0.31.3: IndexError, 0.32.2: ValueError, and its loop ends).
        """
        if self.disk is None:
            return self._fetch(model, tokens)
        have = self.reusable_tokens(model, tokens)
        restored = self.disk.restore(model, tokens, have)
        if restored is None:
            cache, rest = self._fetch(model, tokens)
        else:
            cache, rest = restored
            self.events["hits"] += 1
            self.events["reused_tokens"] += len(tokens) - len(rest)
        begun = len(tokens) - len(rest)
        return self.disk.follow(model, tokens, cache, begun), rest

    def _fetch(
        self, model: ModelKey, tokens: list[int]
    ) -> tuple[list[Cache] | None, list[int]]:
        cache, rest = super().fetch_nearest_cache(model, tokens)
        if cache is not None and not rest:
            if can_trim_prompt_cache(cache):
                trim_prompt_cache(cache, 1)
            else:
                cache, rest = super().fetch_nearest_cache(model, tokens[:-1])
            rest = [*rest, tokens[-1]]
        if cache is None:
            self.events["misses"] += 1
            return cache, rest
        self.events["hits"] += 1
        self.events["reused_tokens"] += len(tokens) - len(rest)
        nearest = self._nearest(model, tokens)
        if nearest is not None and self.gives_away():
            # The copy shares its arrays; now they are the request's own.
            self._drop(nearest)
        elif nearest is not None:
            self._lru.touch(nearest)
        return cache, rest

    def insert_cache(
        self,
        model: ModelKey,
        tokens: list[int],
        prompt_cache: list[Cache],
        *,
        cache_type: str = "assistant",
    ) -> None:
        """Stores ``prompt_cache``, complete and without what it does not need.

        Changes the objects in ``prompt_cache`` and empties it. mlx-lm does not use it
        again, but its loop's variables refer to it until the next request. Memory that
        an evicted entry had would not be free.

        Raises:
            RuntimeError: MLX could not compute it; nothing is stored.
        """
        stored = list(prompt_cache)
        prompt_cache.clear()
        self._insert(model, _held(stored, tokens), stored, cache_type)

    def _insert(
        self,
        model: ModelKey,
        tokens: list[int],
        prompt_cache: list[Cache],
        cache_type: str,
    ) -> None:
        for cache in leaves(prompt_cache):
            _trim_to_offset(cache)
        if self.disk is not None:
            self.disk.capture(model, tokens, prompt_cache)
        if not self._store(model, tokens, prompt_cache, cache_type):
            self.events["too_large"] += 1
            self._leaves(model, tokens, prompt_cache)

    def _store(
        self,
        model: ModelKey,
        tokens: list[int],
        prompt_cache: list[Cache],
        cache_type: str,
    ) -> bool:
        """False: there is no room for it."""
        size = sum(cache.nbytes for cache in prompt_cache)
        if size > self.max_bytes or self.max_size < 1:
            return False
        # Room is made first: not even for a moment is there more than the limit.
        trimmable = can_trim_prompt_cache(prompt_cache)
        replaced = [
            old
            for old in self._lru.entries
            if old.is_for(model, tokens) or (trimmable and _begins(old, model, tokens))
        ]
        if not self._may_replace(replaced, size):
            return False
        for old in replaced:
            self._drop(old)
        self.trim_to(n_sequences=self.max_size - 1, n_bytes=self.max_bytes - size)
        epoch = _core.epoch()
        for cache in leaves(prompt_cache):
            # One by one, so that at most one layer is there twice.
            _make_own(cache)
        if _core.epoch() != epoch:
            return True  # the generator sees the new epoch as well
        super().insert_cache(model, tokens, prompt_cache, cache_type=cache_type)
        entry = self._lru.entries[-1]
        entry.epoch, entry.trimmable = epoch, trimmable
        return True

    def _may_replace(self, replaced: list[_Entry], size: int) -> bool:
        """Whether ``size`` bytes may come for these; none of them is evicted for it."""
        given = sum(self._nbytes_of(old) for old in replaced)
        for old in replaced:
            old.protected = True
        try:
            return self.may_store(size, given)
        finally:
            for old in replaced:
                old.protected = False

    def trim_to(
        self, *, n_sequences: int | None = None, n_bytes: int | None = None
    ) -> None:
        """Evicts until so much is left, or only what is protected."""
        entries = NO_LIMIT if n_sequences is None else max(0, n_sequences)
        size = NO_LIMIT if n_bytes is None else max(0, n_bytes)
        while len(self) > entries or self.nbytes > size:
            if not self.evict_oldest():
                return

    # -- what the server calls ---------------------------------------------------

    @property
    def is_limited(self) -> bool:
        """There is a limit in bytes."""
        return bool(self.max_bytes < NO_LIMIT)

    def limit_bytes(self, max_bytes: int) -> None:
        """Sets the limit, and evicts at once what is over it."""
        self.max_bytes = max_bytes
        self.trim_to(n_bytes=max_bytes)

    def evict_oldest(self) -> int:
        """Evicts the entry that goes next; the bytes it had, 0 when there is none."""
        if all(entry.protected for entry in self._lru.entries):
            return 0
        before = self.nbytes
        self._lru.evicted = self._leaves if self.disk is not None else None
        try:
            super().trim_to(n_sequences=len(self) - 1)
        finally:
            self._lru.evicted = None
        self.events["evictions"] += 1
        freed = int(before - self.nbytes)
        breadcrumb("evict", "prompt cache entry", bytes=freed, left=len(self))
        return freed

    def _leaves(
        self, model: ModelKey, tokens: list[int], caches: list[Cache] | None = None
    ) -> None:
        """Memory has this entry no more: the disk takes what it has not yet.

        But not of a text that memory has all of, or all but less than a block, in
        another entry: the conversation has gone on from there.
        """
        most = len(tokens) - BLOCK_TOKENS
        goes_on = any(
            e.model == model and _common_prefix(e.tokens, tokens) > most
            for e in self._lru.entries
        )
        if self.disk is not None and not goes_on:
            caches = caches or self._trie.get(model, tokens).prompt_cache
            self.disk.capture(model, tokens, caches, leaves=True)

    def forget(self, model: ModelKey, tokens: list[int], used: int) -> None:
        """Drops what a request with this prompt used, and what it stored of it.

        Args:
            used: how many of ``tokens`` it did not have to read.
        """
        stored = [e for e in self._lru.entries if _begins(e, model, tokens)]
        dropped = [e for e in stored if len(e.tokens) > used]
        for entry in dropped:
            self._drop(entry)
        # Now it is the nearest again, unless it has gone meanwhile.
        nearest = self._nearest(model, tokens)
        if nearest is not None and nearest.reusable(model, tokens) == used:
            self._drop(nearest)
            dropped.append(nearest)
        self.events["dropped"] += len(dropped)

    def reusable_tokens(self, model: ModelKey, tokens: list[int]) -> int:
        """How many tokens of a prompt need not be read; all but one at most."""
        nearest = self._nearest(model, tokens)
        return 0 if nearest is None else nearest.reusable(model, tokens)

    def reusable_bytes(self, model: ModelKey, tokens: list[int]) -> int:
        """What the entry holds that this prompt would use; 0 when there is none."""
        nearest = self._nearest(model, tokens)
        if nearest is None:
            return 0
        return self._nbytes_of(nearest)

    def _nbytes_of(self, entry: _Entry) -> int:
        return int(self._trie.get(entry.model, entry.tokens).nbytes)

    @contextmanager
    def protecting(self, model: ModelKey, tokens: list[int]) -> Iterator[None]:
        """Meanwhile the entry that this prompt would use is not evicted."""
        nearest = self._nearest(model, tokens)
        if nearest is None:
            yield
            return
        nearest.protected = True
        try:
            yield
        finally:
            nearest.protected = False

    def keep_clean(self, epoch: int) -> None:
        """Drops every entry that was not complete in ``epoch``, or before it.

        What was complete before a fault is not touched by it. MLX writes into a buffer
        in place only when nothing else refers to it (`is_donatable` in mlx/array.h,
        0.31.2 and 0.32). A request works on copies that share the arrays
        of the entry, which so are referred to twice.
        """
        for entry in list(self._lru.entries):
            if entry.epoch > epoch:
                self._drop(entry)
                self.events["dropped"] += 1

    def clear(self) -> None:
        """Drops every entry."""
        self.events["dropped"] += len(self)
        super().trim_to(n_sequences=0)

    def _drop(self, entry: _Entry) -> None:
        self._lru.chosen = entry
        super().trim_to(n_sequences=len(self) - 1)

    def _nearest(self, model: ModelKey, tokens: list[int]) -> _Entry | None:
        """The entry that mlx-lm's search would choose.

        Found here: mlx-lm's search returns the tokens to read, and not the entry.
        """
        if not self._lru.entries:
            return None
        # Of two that save as much mlx-lm takes the shorter.
        best = max(
            self._lru.entries,
            key=lambda e: (e.reusable(model, tokens), -len(e.tokens)),
        )
        return best if best.reusable(model, tokens) > 0 else None


def _common_prefix(a: list[int], b: list[int]) -> int:
    """Length of the common prefix; by halves, as comparing slices is fast."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _begins(entry: _Entry, model: ModelKey, tokens: list[int]) -> bool:
    size = len(entry.tokens)
    return bool(entry.model == model) and tokens[:size] == entry.tokens


def _held(prompt_cache: list[Cache], tokens: list[int]) -> list[int]:
    """Those of ``tokens`` that all caches hold; caches with more are cut to them.

    Speculative decoding has not read the last token or two when it ends, and its draft
    model not the same ones. But mlx-lm (0.31.3 and 0.32.2) stores both under all: the
    next request with that prompt reads on at wrong positions.
    """
    parts = list(leaves(prompt_cache))
    found = [getattr(cache, "offset", None) for cache in parts]
    offsets = [n for n in found if isinstance(n, int)]
    if len(offsets) < len(parts):
        return tokens
    held = min([len(tokens), *offsets])
    if max([held, *offsets]) > held:
        if not can_trim_prompt_cache(prompt_cache):
            return tokens
        for cache, offset in zip(parts, offsets, strict=True):
            cache.trim(offset - held)
    return tokens[:held]


def _trim_to_offset(cache: Cache) -> None:
    """Leaves off what these two kinds allocate ahead, in steps of 256 tokens."""
    if isinstance(cache, KVCache | QuantizedKVCache) and cache.keys is not None:
        cache.keys, cache.values = tree_map(
            lambda x: x[..., : cache.offset, :], (cache.keys, cache.values)
        )


def _make_own(cache: Cache) -> None:
    """Evaluates the arrays of ``cache`` into buffers of their own.

    ``mx.contiguous`` copies, unless the array fills its buffer but for 16 KB
    (`Contiguous::eval_gpu`, 0.31.2 to 0.32).
    """
    made: list[mx.array] = []

    def own(value: object) -> object:
        if not isinstance(value, mx.array):
            return value
        made.append(mx.contiguous(value))
        return made[-1]

    for name, value in list(vars(cache).items()):
        setattr(cache, name, tree_map(own, value))
    mx.eval(made)
