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

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ...kv.format import BLOCK_TOKENS, HEADER_MAX, SNAPSHOT, Node
from .kv_parts import Form, NotKept, Slots, State, Taken, View, leaves, part_of
from .protocols.models import (
    Cache,
)
from .protocols.opaque import (
    Json,
)

__all__ = ["Layout", "Unfit", "own_bytes", "to_bytes"]


class Unfit(Exception):
    """A file holds something else than these caches."""


class Layout:
    """The caches of one model, in order.

    Args:
        make: makes them, empty.
        run: has the model read a token into them; nothing is computed.
        whole: what only grows is of use up to a boundary as well.

    Attributes:
        make: makes them, empty.
        has_blocks: some only grow. has_states: some are kept whole, at boundaries, or
            are of use from there only. moves: some change with each step.

    Raises:
        NotKept: one of them cannot be.
    """

    def __init__(
        self,
        make: Callable[[], list[Cache]],
        run: Callable[[list[Cache]], object],
        whole: bool = False,
    ) -> None:
        self.make = make
        caches = make()
        run(caches)
        self.parts = [part_of(cache) for cache in leaves(caches)]
        if not self.parts:
            raise NotKept("a model without caches")
        self._slots = [p for p in self.parts if isinstance(p, Slots)]
        self._states = [p for p in self.parts if isinstance(p, State)]
        self._forms = [f for part in self._slots for f in part.forms]
        self.has_blocks = bool(self._slots)
        self.moves = bool(self._states)
        self.has_states = self.moves or whole

    @property
    def facts(self) -> list[object]:
        """JSON that is another for other caches."""
        return [
            [*part.fixed, *(f and f.without_slots().listed() for f in part.forms)]
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
            if isinstance(part, Slots)
        )

    def slots(self, view: View, a: int, b: int) -> list[mx.array]:
        """Slots ``a`` to ``b`` of all that grow; not evaluated."""
        return [
            x
            for part, cache in zip(self.parts, leaves(view.caches), strict=True)
            if isinstance(part, Slots)
            for x in part.slots(cache, view, a, b)
        ]

    def snapshot(self, view: View, start: int) -> tuple[Json, list[mx.array]] | None:
        """(what the file says, arrays), not evaluated; None: it cannot be taken.

        Args:
            start: slots from there on are in it.
        """
        arrays = self.slots(view, start, view.done)
        states = []
        for part, cache in zip(self.parts, leaves(view.caches), strict=True):
            if isinstance(part, Slots):
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

    def _listed(self, count: int) -> list[list[str | int]]:
        return [f.of_slots(count).listed() for f in self._forms]

    def about_block(self) -> Json:
        """What a block's file says of itself."""
        return {"arrays": self._listed(BLOCK_TOKENS)}

    # -- and back --------------------------------------------------------------------

    def read(
        self, node: Node, about: object, pieces: Sequence[bytes]
    ) -> tuple[list[mx.array], list[Taken]]:
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

    def blank(self, end: int) -> list[mx.array]:
        """Arrays of ``end`` slots for all that grow, which `put` fills."""
        forms = [f.of_slots(end) for f in self._forms]
        return [mx.zeros(f.shape, getattr(mx, f.dtype)) for f in forms]

    def put(self, into: list[mx.array], made: Sequence[mx.array], start: int) -> None:
        """Slots from ``start`` on go into what `blank` has made.

        In place, as mlx-lm's own caches do it. Joined at the end instead, all parts
        would be left in MLX's pool: there the cache would be twice.
        """
        for x, part in zip(into, made, strict=True):
            if part.size:
                x[..., start : start + part.shape[2], :] = part
        mx.eval(into)

    def caches(
        self, slots: Sequence[mx.array], states: Sequence[Taken], end: int
    ) -> list[Cache]:
        """Caches of ``end`` tokens."""
        made = self.make()
        rest, left = iter(states), iter(slots)
        for part, cache in zip(self.parts, leaves(made), strict=True):
            if isinstance(part, State):
                part.fill(cache, *next(rest))
            else:
                ours = [next(left)[..., :end, :] for _ in part.forms]
                part.fill(cache, ours, end)
        return made


def _form_of(listed: Any) -> Form:
    dtype, *shape = listed
    if not isinstance(dtype, str) or not isinstance(getattr(mx, dtype, None), mx.Dtype):
        raise ValueError("no type")
    if any(type(n) is not int or n < 0 for n in shape):
        raise ValueError("no shape")
    return Form(dtype, tuple(shape))


def own_bytes(x: mx.array) -> mx.array:
    """The bytes of ``x`` in memory of their own; not evaluated.

    What the host looks at moves on CUDA, and its old block stays in MLX's pool (0.32).
    A state, or slots that fill their buffer, would be the cache's own memory else.
    """
    return x.reshape(-1).view(mx.uint8) | 0


def to_bytes(x: mx.array) -> bytes:
    """What `own_bytes` has, evaluated; copied to the host."""
    return bytes(memoryview(x)) if x.size else b""  # type: ignore[arg-type]
