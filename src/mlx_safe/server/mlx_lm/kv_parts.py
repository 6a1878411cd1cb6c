"""The kinds of caches that are kept on disk, each by itself: see `kv_layout`.

Generation thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from . import compat
from .protocols.models import Cache

__all__ = ["Form", "NotKept", "Slots", "State", "Taken", "View", "leaves", "part_of"]


class NotKept(Exception):
    """Caches of this kind stay in memory; the message says which."""


# mlx-lm's own steps have 2,048 tokens. After a longer one a window stays in memory.
STEP_MAX = 8192

# A state's ints, and its arrays.
Taken = tuple[list[int], list[mx.array | None]]


def leaves(caches: Iterable[Cache]) -> Iterator[Any]:
    """The caches, those inside a list of caches (hybrid models) one by one."""
    for cache in caches:
        if isinstance(cache, CacheList):
            yield from leaves(cache.caches)
        else:
            yield cache


@dataclass(frozen=True)
class Form:
    """An array's type and shape. slots: its third dimension is free."""

    dtype: str
    shape: tuple[int, ...]
    slots: bool = False

    @classmethod
    def of(cls, x: mx.array, slots: bool = False) -> Form:
        return cls(str(x.dtype).rpartition(".")[2], tuple(x.shape), slots)

    def of_slots(self, count: int) -> Form:
        """The same with ``count`` slots."""
        return Form(self.dtype, (*self.shape[:2], count, *self.shape[3:]))

    def without_slots(self) -> Form:
        """The same with none, where they are free."""
        return self.of_slots(0) if self.slots else self

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * int(getattr(mx, self.dtype).size)

    def listed(self) -> list[str | int]:
        """As JSON."""
        return [self.dtype, *self.shape]

    def is_alike(self, other: Form) -> bool:
        """The same, but for slots where they are free."""
        if not self.slots or len(other.shape) != len(self.shape):
            return (self.dtype, self.shape) == (other.dtype, other.shape)
        return self.of_slots(0) == other.of_slots(0)

    def made(self, piece: bytes) -> mx.array:
        """The array whose bytes these are."""
        dtype = getattr(mx, self.dtype)
        if not piece:
            return mx.zeros(self.shape, dtype)
        flat = mx.array(memoryview(piece))  # type: ignore[arg-type]
        return flat.view(dtype).reshape(self.shape)


@dataclass(frozen=True)
class View:
    """Caches as they stand after ``done`` tokens.

    row: which of mlx-lm's batch; None: they are of one text. Between two steps a
    batch has its rows aligned at their ends, with padding before them.
    ahead: a later step has begun: windows and states are those of more tokens.
    """

    caches: Sequence[Cache]
    done: int
    row: int | None = None
    ahead: bool = False


class Slots:
    """A cache that only grows: a slot for each token, which is never changed."""

    def __init__(self, cache: Any) -> None:
        self.forms = [Form.of(x, slots=True) for x in self._arrays(cache)]
        self.fixed = [type(cache).__name__]
        if isinstance(cache, QuantizedKVCache):
            self.fixed += [cache.group_size, cache.bits]
        self._cls = type(cache)

    @staticmethod
    def _arrays(cache: Any) -> list[mx.array]:
        found: list[mx.array] = []
        for x in (cache.keys, cache.values):
            found += [x] if isinstance(x, mx.array) else x
        if any(x.ndim != 4 for x in found):
            raise NotKept(f"{type(cache).__name__} of another shape")
        return found

    def is_at(self, cache: Any, view: View) -> bool:
        if view.row is None:
            return type(cache) is self._cls and cache.offset >= view.done
        return hasattr(cache, "left_padding") and hasattr(cache, "_idx")

    def slots(self, cache: Any, view: View, a: int, b: int) -> list[mx.array]:
        if view.row is None:
            return [x[..., a:b, :] for x in self._arrays(cache)]
        # Not `extract`, which copies all of them.
        pad, row = cache._idx - view.done, view.row
        return [x[row : row + 1, :, pad + a : pad + b] for x in self._arrays(cache)]

    def fill(self, cache: Any, arrays: Sequence[mx.array], end: int) -> None:
        if self._cls is QuantizedKVCache:
            cache.keys, cache.values = tuple(arrays[:3]), tuple(arrays[3:])
        else:
            cache.keys, cache.values = arrays
        cache.offset = end


class State:
    """A cache that is kept whole: with ints and arrays of these names.

    A subclass says which numbers of its own are right.
    """

    ints: tuple[str, ...] = ()

    def __init__(self, cache: Any) -> None:
        self._cls = type(cache)
        self.fixed: list[str | int] = [type(cache).__name__]
        self.forms = [None if x is None else self._form(x) for x in self._arrays(cache)]

    def _form(self, x: mx.array) -> Form:
        return Form.of(x, slots=True)

    def _arrays(self, cache: Any) -> list[mx.array | None]:
        return [cache.keys, cache.values]

    def most(self) -> int:
        """Bytes that it can have."""
        raise NotImplementedError

    def take(self, cache: Any, view: View) -> Taken | None:
        """Its ints and arrays; None: it does not stand where the others do."""
        if view.row is not None:
            if any(x is None for x in getattr(cache, "cache", ())):
                return None  # mlx-lm cannot take its row out
            cache = cache.extract(view.row)
        if type(cache) is not self._cls:
            return None
        ints = [int(getattr(cache, name)) for name in self.ints]
        arrays = self._arrays(cache)
        found = [None if x is None else Form.of(x) for x in arrays]
        if not self._is_right(ints, found, view.done):
            return None
        return self._cut(ints, arrays)

    def _cut(self, ints: list[int], arrays: list[mx.array | None]) -> Taken:
        return ints, arrays

    def is_right(self, ints: object, forms: Sequence[Form | None], end: int) -> bool:
        """Whether a file may say so."""
        if not isinstance(ints, list) or len(ints) != len(self.ints):
            return False
        if any(type(n) is not int for n in ints) or len(forms) != len(self.forms):
            return False
        return self._is_right(ints, forms, end)

    def _is_right(
        self, ints: list[int], forms: Sequence[Form | None], end: int
    ) -> bool:
        return all(
            known == found if known is None or found is None else known.is_alike(found)
            for known, found in zip(self.forms, forms, strict=True)
        )

    def fill(self, cache: Any, ints: list[int], arrays: list[mx.array | None]) -> None:
        for name, value in zip(self.ints, ints, strict=True):
            setattr(cache, name, value)
        cache.keys, cache.values = arrays


class _Slots(State):
    """One slot for each of the last ``_size`` tokens, which a subclass sets."""

    _size: int

    def most(self) -> int:
        slots = self._size + STEP_MAX
        return sum(f.of_slots(slots).nbytes for f in self.forms if f is not None)


class _Window(_Slots):
    """`RotatingKVCache`: the last slots, in turn; after a step of a prompt more.

    What comes out of a batch has forgotten ``keep``, and so has memory's entry.
    """

    ints = ("offset", "_idx", "keep")

    def __init__(self, cache: Any) -> None:
        super().__init__(cache)
        self._size, self._keep = int(cache.max_size), int(cache.keep)
        self.fixed += [self._size, self._keep]

    def _is_right(
        self, ints: list[int], forms: Sequence[Form | None], end: int
    ) -> bool:
        if not super()._is_right(ints, forms, end) or None in forms:
            return False
        offset, index, keep = ints
        slots = {f.shape[2] for f in forms if f is not None}
        if len(slots) != 1 or offset != end or keep not in (0, self._keep):
            return False
        (count,) = slots
        return 0 <= index <= count and count >= min(offset, self._size)

    def _cut(self, ints: list[int], arrays: list[mx.array | None]) -> Taken:
        """Without what no step looks at: as mlx-lm itself does with the next one."""
        offset, index, keep = ints
        kept = [x for x in arrays if x is not None]
        count = kept[0].shape[2]
        if offset <= self._size and index == offset:
            return ints, [x[..., :offset, :] for x in kept]
        # Not where the first slots stay: a batch takes others then.
        if index == count > self._size and not keep:
            return [offset, self._size, keep], [x[..., -self._size :, :] for x in kept]
        return ints, arrays


class _Chunk(_Slots):
    """`ChunkedKVCache` of 0.32: the slots since ``start_position``."""

    ints = ("offset", "start_position")

    def __init__(self, cache: Any) -> None:
        super().__init__(cache)
        self._size = int(cache.chunk_size)
        self.fixed.append(self._size)

    def _is_right(
        self, ints: list[int], forms: Sequence[Form | None], end: int
    ) -> bool:
        if not super()._is_right(ints, forms, end) or None in forms:
            return False
        offset, start = ints
        slots = {f.shape[2] for f in forms if f is not None}
        return (
            len(slots) == 1
            and offset == end
            and 0 <= start <= end <= start + min(slots)
        )

    def _cut(self, ints: list[int], arrays: list[mx.array | None]) -> Taken:
        held = ints[0] - ints[1]
        return ints, [None if x is None else x[..., :held, :] for x in arrays]


class _Recurrent(State):
    """`ArraysCache`: states of a shape that does not change."""

    def _form(self, x: mx.array) -> Form:
        return Form.of(x)

    def _arrays(self, cache: Any) -> list[mx.array | None]:
        return list(cache.cache)

    def most(self) -> int:
        return sum(f.nbytes for f in self.forms if f is not None)

    def take(self, cache: Any, view: View) -> Taken | None:
        alone = view.row is None
        if alone and (cache.left_padding is not None or cache.lengths is not None):
            return None
        return super().take(cache, view)

    def fill(self, cache: Any, ints: list[int], arrays: list[mx.array | None]) -> None:
        cache.cache = arrays


def part_of(cache: Any) -> Slots | State:
    kinds: dict[type, Callable[[Any], Slots | State]] = {
        KVCache: Slots,
        QuantizedKVCache: Slots,
        RotatingKVCache: _Window,
        ArraysCache: _Recurrent,
    }
    if compat.chunks_are_exact():
        kinds[ChunkedKVCache] = _Chunk
    kind = kinds.get(type(cache))
    if kind is None:
        raise NotKept(f"not proven for {type(cache).__name__}")
    return kind(cache)
