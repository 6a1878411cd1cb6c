"""What caches a model has, and how they become arrays of files and come back.

Proven exact, with state, greedy text and logits, and so kept:

| class of mlx-lm | 0.31.3 | 0.32.2 | kept as |
|---|---|---|---|
| `KVCache` | yes | yes | slots: blocks, which are never written twice |
| `QuantizedKVCache` (``--kv-bits``) | none in the server | yes | slots |
| `RotatingKVCache` | yes | yes | whole, at boundaries |
| `ArraysCache` | yes | yes | whole, at boundaries |
| `ChunkedKVCache` | no: another text | yes | whole, at boundaries |
| `CacheList` of these | yes | yes | its parts |

Any other, a model's own or a subclass, stays in memory. Generation thread.
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

from ...kv.format import BLOCK_TOKENS, HEADER_MAX, SNAPSHOT, Node
from . import compat

__all__ = ["Form", "Layout", "NotKept", "Unfit", "View", "leaves", "to_bytes"]


class NotKept(Exception):
    """Caches of this kind stay in memory; the message says which."""


class Unfit(Exception):
    """A file holds something else than these caches."""


def leaves(caches: Iterable[Any]) -> Iterator[Any]:
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

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * int(getattr(mx, self.dtype).size)

    def listed(self) -> list[Any]:
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
    """

    caches: Sequence[Any]
    done: int
    row: int | None = None


class _Slots:
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


class _State:
    """A cache that is kept whole: with ints and arrays of these names.

    A subclass says which numbers of its own are right.
    """

    ints: tuple[str, ...] = ()

    def __init__(self, cache: Any) -> None:
        self._cls = type(cache)
        self.fixed: list[Any] = [type(cache).__name__]
        self.forms = [None if x is None else self._form(x) for x in self._arrays(cache)]

    def _form(self, x: mx.array) -> Form:
        return Form.of(x, slots=True)

    def _arrays(self, cache: Any) -> list[mx.array | None]:
        return [cache.keys, cache.values]

    def most(self) -> int:
        """Bytes that it can have."""
        raise NotImplementedError

    def take(
        self, cache: Any, view: View
    ) -> tuple[list[int], list[mx.array | None]] | None:
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

    def _cut(
        self, ints: list[int], arrays: list[mx.array | None]
    ) -> tuple[list[int], list[mx.array | None]]:
        return ints, arrays

    def is_right(self, ints: Any, forms: Sequence[Form | None], end: int) -> bool:
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


class _Window(_State):
    """`RotatingKVCache`: the last slots, in turn; after a step of a prompt more.

    What comes out of a batch has forgotten ``keep``, and so has memory's entry.
    """

    ints = ("offset", "_idx", "keep")

    def __init__(self, cache: Any) -> None:
        super().__init__(cache)
        self._size, self._keep = int(cache.max_size), int(cache.keep)
        self.fixed += [self._size, self._keep]

    def most(self) -> int:
        # mlx-lm's own steps have 2,048 tokens; a longer one is left in memory.
        slots = self._size + max(8192, BLOCK_TOKENS)
        return sum(f.of_slots(slots).nbytes for f in self.forms if f is not None)

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

    def _cut(
        self, ints: list[int], arrays: list[mx.array | None]
    ) -> tuple[list[int], list[mx.array | None]]:
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


class _Chunk(_State):
    """`ChunkedKVCache` of 0.32: the slots since ``start_position``."""

    ints = ("offset", "start_position")

    def __init__(self, cache: Any) -> None:
        super().__init__(cache)
        self._size = int(cache.chunk_size)
        self.fixed.append(self._size)

    def most(self) -> int:
        slots = self._size + 8192
        return sum(f.of_slots(slots).nbytes for f in self.forms if f is not None)

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

    def _cut(
        self, ints: list[int], arrays: list[mx.array | None]
    ) -> tuple[list[int], list[mx.array | None]]:
        held = ints[0] - ints[1]
        return ints, [None if x is None else x[..., :held, :] for x in arrays]


class _Recurrent(_State):
    """`ArraysCache`: states of a shape that does not change."""

    def _form(self, x: mx.array) -> Form:
        return Form.of(x)

    def _arrays(self, cache: Any) -> list[mx.array | None]:
        return list(cache.cache)

    def most(self) -> int:
        return sum(f.nbytes for f in self.forms if f is not None)

    def take(
        self, cache: Any, view: View
    ) -> tuple[list[int], list[mx.array | None]] | None:
        alone = view.row is None
        if alone and (cache.left_padding is not None or cache.lengths is not None):
            return None
        return super().take(cache, view)

    def fill(self, cache: Any, ints: list[int], arrays: list[mx.array | None]) -> None:
        cache.cache = arrays


def _part(cache: Any) -> _Slots | _State:
    kinds: dict[type, Callable[[Any], _Slots | _State]] = {
        KVCache: _Slots,
        QuantizedKVCache: _Slots,
        RotatingKVCache: _Window,
        ArraysCache: _Recurrent,
    }
    if compat.chunks_are_exact():
        kinds[ChunkedKVCache] = _Chunk
    kind = kinds.get(type(cache))
    if kind is None:
        raise NotKept(f"not proven for {type(cache).__name__}")
    return kind(cache)


class Layout:
    """The caches of one model, in order.

    Args:
        make: makes them, empty.
        run: has the model read a token into them; nothing is computed.
        whole: what only grows is of use up to a boundary as well.

    Attributes:
        make: makes them, empty.
        has_blocks: some only grow. has_states: some are kept whole, at boundaries.

    Raises:
        NotKept: one of them cannot be.
    """

    def __init__(
        self,
        make: Callable[[], list[Any]],
        run: Callable[[list[Any]], Any],
        whole: bool = False,
    ) -> None:
        self.make = make
        caches = make()
        run(caches)
        self.parts = [_part(cache) for cache in leaves(caches)]
        if not self.parts:
            raise NotKept("a model without caches")
        self._slots = [p for p in self.parts if isinstance(p, _Slots)]
        self._states = [p for p in self.parts if isinstance(p, _State)]
        self._forms = [f for part in self._slots for f in part.forms]
        self.has_blocks = bool(self._slots)
        self.has_states = bool(self._states) or whole

    @property
    def facts(self) -> list[Any]:
        """JSON that is another for other caches."""
        return [
            [*part.fixed, *(f and [f.dtype, *f.of_slots(0).shape] for f in part.forms)]
            if isinstance(part, _Slots | _Window | _Chunk)
            else [*part.fixed, *(f and f.listed() for f in part.forms)]
            for part in self.parts
        ]

    @property
    def block_nbytes(self) -> int:
        """Of the arrays of a block."""
        return sum(f.of_slots(BLOCK_TOKENS).nbytes for f in self._forms)

    def most(self, node: Node) -> int:
        """Bytes that the file of ``node`` can have."""
        states = sum(p.most() for p in self._states) if node.kind == SNAPSHOT else 0
        return self.block_nbytes + states + HEADER_MAX + 4 * node.end + 64

    def is_at(self, view: View) -> bool:
        """Whether these are such caches, with all of ``view.done`` tokens."""
        found = list(leaves(view.caches))
        return len(found) == len(self.parts) and all(
            part.is_at(cache, view)
            for part, cache in zip(self.parts, found, strict=True)
            if isinstance(part, _Slots)
        )

    def slots(self, view: View, a: int, b: int) -> list[mx.array]:
        """Slots ``a`` to ``b`` of all that grow; not evaluated."""
        return [
            x
            for part, cache in zip(self.parts, leaves(view.caches), strict=True)
            if isinstance(part, _Slots)
            for x in part.slots(cache, view, a, b)
        ]

    def snapshot(self, view: View, start: int) -> tuple[Any, list[mx.array]] | None:
        """(what the file says, arrays), not evaluated; None: it cannot be taken.

        Args:
            start: slots from there on are in it.
        """
        arrays = self.slots(view, start, view.done)
        states = []
        for part, cache in zip(self.parts, leaves(view.caches), strict=True):
            if isinstance(part, _Slots):
                continue
            taken = part.take(cache, view)
            if taken is None:
                return None
            ints, found = taken
            states.append(
                [ints, [x is not None and Form.of(x).listed() for x in found]]
            )
            arrays += [x for x in found if x is not None]
        return {"arrays": self._listed(view.done - start), "states": states}, arrays

    def _listed(self, count: int) -> list[list[Any]]:
        return [f.of_slots(count).listed() for f in self._forms]

    def about_block(self) -> dict[str, Any]:
        """What a block's file says of itself."""
        return {"arrays": self._listed(BLOCK_TOKENS)}

    # -- and back --------------------------------------------------------------------

    def read(
        self, node: Node, about: Any, pieces: Sequence[bytes]
    ) -> tuple[list[mx.array], list[tuple[list[int], list[mx.array | None]]]]:
        """(slots, states) of a file whose checksums are right.

        Raises:
            Unfit: it is of other caches.
        """
        if not isinstance(about, dict) or len(about) != 1 + (node.kind == SNAPSHOT):
            raise Unfit("it tells of other things")
        count = node.end - node.start
        if about.get("arrays") != self._listed(count):
            raise Unfit("it has other arrays")
        states = self._states_of(about.get("states", []), node)
        forms = [f.of_slots(count) for f in self._forms]
        forms += [f for _, found in states for f in found if f is not None]
        if [f.nbytes for f in forms] != [len(piece) for piece in pieces]:
            raise Unfit("its arrays are not as long as they should be")
        made = [f.made(piece) for f, piece in zip(forms, pieces, strict=True)]
        mx.eval(made)
        rest = iter(made[len(self._forms) :])
        return made[: len(self._forms)], [
            (ints, [None if f is None else next(rest) for f in found])
            for ints, found in states
        ]

    def _states_of(
        self, listed: Any, node: Node
    ) -> list[tuple[list[int], list[Form | None]]]:
        if node.kind != SNAPSHOT:
            return []
        found = []
        try:
            for part, (ints, forms) in zip(self._states, listed, strict=True):
                made = [None if f is False else _form_of(f) for f in forms]
                if not part.is_right(ints, made, node.end):
                    raise Unfit("its states are of another shape")
                found.append((ints, made))
        except (TypeError, ValueError) as e:
            raise Unfit("its states make no sense") from e
        return found

    def caches(
        self,
        slots: list[list[mx.array]],
        states: Sequence[tuple[list[int], list[mx.array | None]]],
        end: int,
    ) -> list[Any]:
        """Caches of ``end`` tokens. Empties ``slots``: the parts of each array.

        One layer at a time is there twice, and no more.
        """
        made = self.make()
        rest = iter(states)
        at = 0
        for part, cache in zip(self.parts, leaves(made), strict=True):
            if isinstance(part, _State):
                part.fill(cache, *next(rest))
                continue
            ours = slots[at : at + len(part.forms)]
            joined = [x[0] if len(x) == 1 else mx.concatenate(x, axis=2) for x in ours]
            mx.eval(joined)
            part.fill(cache, joined, end)
            slots[at : at + len(part.forms)] = [[] for _ in ours]
            at += len(part.forms)
            del ours
        return made


def _form_of(listed: Any) -> Form:
    dtype, *shape = listed
    if not isinstance(dtype, str) or not isinstance(getattr(mx, dtype, None), mx.Dtype):
        raise ValueError("no type")
    if any(type(n) is not int or n < 0 for n in shape):
        raise ValueError("no shape")
    return Form(dtype, tuple(shape))


def to_bytes(x: mx.array) -> bytes:
    """The bytes of an evaluated array, copied."""
    if not x.size:
        return b""
    return bytes(memoryview(x.reshape(-1).view(mx.uint8)))  # type: ignore[arg-type]
