"""KV caches come back from the disk: which, where that is quicker, and until when.

Used by the generation thread only; `Restore.count` by any.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

from ... import _core
from ...kv.format import BLOCK_TOKENS, Node
from ...kv.store import Found, Store
from ...kv.writer import Writer
from ..recorder import breadcrumb
from .kv_capture import Kept
from .kv_layout import Unfit
from .protocols.models import Cache
from .protocols.opaque import ModelKey

__all__ = ["Rate", "Reader", "Restore", "has_ended"]

log = logging.getLogger("mlx_safe.server")

# How long a restore waits for what of its own text is still being written.
FLUSH_S = 5.0
# What was too slow, a restore or a copy, is tried again after so many that were not.
TRY_AGAIN_AFTER = 16
# Of the time that reading takes, what is kept may delay the first token by so much.
TAKING_MAX = 1 / 4
# A single measurement counts as so many times slower than those before, at most.
SLOWER_MAX = 4
# What is damaged goes, and what is left may serve: looked at so often.
LOADS_MAX = 4


class Rate:
    """How much of something a second; 0.0: not known.

    The last few count, each by its amount: the end of a prompt is a step of few tokens.
    """

    def __init__(self) -> None:
        self.per_s = self._amount = self._seconds = 0.0

    def saw(self, amount: float, seconds: float) -> None:
        if amount > 0 and seconds > 0:
            if self.per_s:  # one that was held up says little of the next
                seconds = min(seconds, SLOWER_MAX * amount / self.per_s)
            self._amount = 0.7 * self._amount + amount
            self._seconds = 0.7 * self._seconds + seconds
            self.per_s = self._amount / self._seconds


class Run(Protocol):
    """One run of a request; `alone`: on the sequential path."""

    alone: bool


class Reader(Protocol):
    """What is asked of a request in flight, whose prompt is read."""

    prompt_key: tuple[ModelKey, list[int]] | None

    @property
    def run(self) -> Run: ...
    @property
    def is_ended(self) -> bool: ...
    @property
    def cached_tokens(self) -> int | None: ...


def has_ended(request: Reader | None) -> bool:
    return request is None or request.is_ended


@dataclass(eq=False)
class _Restored:
    """What a request began from. mark: lifted with its first token, then None."""

    request: Reader | None
    nodes: tuple[Node, ...]
    mark: str | None


class Restore:
    """What requests in flight began from.

    Until a request has its first token, a mark on the disk names its files: should the
    process die meanwhile, the next one takes them for the cause.

    Attributes:
        read_rate: tokens of prompts a second; set by the reader.
        take_rate: bytes a second that are copied out of caches; set by who does it.
        restore_rate: bytes a second.
    """

    def __init__(self, store: Store, writer: Writer) -> None:
        self._store = store
        self._writer = writer
        self._restored: list[_Restored] = []
        self.read_rate, self.take_rate, self.restore_rate = Rate(), Rate(), Rate()

    def model_loaded(self) -> None:
        """Another model reads at a speed of its own."""
        self.read_rate = Rate()

    @property
    def is_in_flight(self) -> bool:
        """A request in flight began from files."""
        return any(not has_ended(r.request) for r in self._restored)

    @property
    def count(self) -> int:
        """Requests between their restore and their first token. Any thread."""
        return sum(r.mark is not None for r in self._restored[:])

    def restore(
        self,
        models: Sequence[Kept],
        request: Reader | None,
        tokens: list[int],
        have: int,
    ) -> tuple[list[Cache], list[int]] | None:
        """See `KVTier.restore`. models: the forms of the model's caches."""
        for _ in range(LOADS_MAX):
            best = self._best(models, tokens)
            if best is None or best[1].end - have < BLOCK_TOKENS:
                return None
            kept, found = best
            if not self._is_cheaper(found, have):
                return None
            begun = time.monotonic()
            caches, end = self._load_marked(request, kept, found, tokens)
            if caches is not None and end > have:
                seconds = time.monotonic() - begun
                self.restore_rate.saw(found.nbytes, seconds)
                breadcrumb("kv", "restored", tokens=end, ms=round(1000 * seconds))
                self._store.events["restored"] += 1
                self._store.events["restored_tokens"] += end
                return caches, tokens[end:]
            if not kept.layout.has_states:
                return None  # from its beginning on nothing is sound
        return None

    def _load_marked(
        self, request: Reader | None, kept: Kept, found: Found, tokens: list[int]
    ) -> tuple[list[Cache] | None, int]:
        mark = self._store.begin_restore(found.nodes)
        if mark is None:
            return None, 0
        restored = _Restored(request, found.nodes, mark)
        self._restored.append(restored)
        epoch = _core.epoch()
        caches, end = self._load(kept, found.nodes, tokens)
        if caches is None or _core.epoch() != epoch:
            self._restored.remove(restored)
            self._store.end_restore(mark)
            return None, 0
        return caches, end

    def _best(
        self, models: Sequence[Kept], tokens: list[int]
    ) -> tuple[Kept, Found] | None:
        """What saves most of what is on disk, or will be in a moment."""

        def look() -> list[tuple[Kept, Found]]:
            most = len(tokens) - 1  # the last is always read
            found = [(k, self._find(k, tokens, most)) for k in models]
            return [(k, f) for k, f in found if f is not None]

        found = look()
        end = max([f.end for _, f in found], default=0)
        identities = {k.identity for k in models}
        writer = self._writer
        # Waiting is not to take longer than reading.
        wait_s = min(FLUSH_S, self.read_s(len(tokens) - end))
        is_worth_it = self._pays(models[0].layout.block_nbytes, BLOCK_TOKENS)
        if (
            is_worth_it
            and writer.goes_on(identities, tokens, end)
            and writer.flush(wait_s)
        ):
            found = look()
        return max(found, key=lambda pair: pair[1].end, default=None)

    def _find(self, kept: Kept, tokens: Sequence[int], most: int) -> Found | None:
        return self._store.find(
            kept.identity,
            tokens,
            most,
            blocks=kept.layout.has_blocks,
            states=kept.layout.has_states,
        )

    def _is_cheaper(self, found: Found, have: int) -> bool:
        """Than reading what memory does not have; learned from both speeds."""
        read, restore = self.read_rate.per_s, self.restore_rate.per_s
        if not read or not restore:
            return True
        is_cheaper = found.nbytes / restore < (found.end - have) / read
        return is_cheaper or self._is_tried("not_cheaper")

    def blocks_max(self, nbytes: int, tokens: int) -> int | None:
        """How many blocks, of ``nbytes`` and ``tokens`` each, may be taken now.

        None: all, as it is quicker to take and restore one than to read it, and taking
        it delays a first token by little: that is paid for each prompt, and only some
        are restored. Else now and then one, or it is never learned that it pays again.
        An H200 reads 16,000 tokens of a small model in 0.26 s, and took 0.45 when each
        try was of all that was missing.
        """
        if self._pays(nbytes, tokens):
            return None
        return int(self._is_tried("not_written_dear"))

    def _is_tried(self, event: str) -> bool:
        """One of so many that do not pay."""
        self._store.events[event] += 1
        return self._store.events[event] % TRY_AGAIN_AFTER == 0

    def _pays(self, nbytes: int, tokens: int) -> bool:
        read, take = self.read_rate.per_s, self.take_rate.per_s
        if not read or not take:
            return True
        read_s, take_s = tokens / read, nbytes / take
        restore = self.restore_rate.per_s  # 0: not known yet
        restore_s = nbytes / restore if restore else 0.0
        return take_s <= TAKING_MAX * read_s and take_s + restore_s < read_s

    def read_s(self, tokens: int) -> float:
        """How long they take to be read; for ever while that is not known."""
        return tokens / self.read_rate.per_s if self.read_rate.per_s else math.inf

    def _load(
        self, kept: Kept, nodes: Sequence[Node], tokens: list[int]
    ) -> tuple[list[Cache] | None, int]:
        """Caches of those of ``nodes`` that are sound, from the first on."""
        layout, states, end = kept.layout, None, 0
        slots = layout.blank(nodes[-1].end)
        missing = len(nodes)
        wanted = [(node, layout.most(node)) for node in nodes]
        with closing(self._store.read(wanted, tokens)) as read:
            for node, about, pieces in read:
                try:
                    made, found = layout.read(node, about, pieces)
                except Unfit as e:
                    # Its checksums are right: somebody made it so.
                    log.warning("a file of KV caches is not used: %s: %s", node.name, e)
                    self._store.drop([node])
                    break
                del about, pieces
                layout.put(slots, made, node.start)
                del made
                states, end = found or states, node.end
                missing -= 1
        # A snapshot may end where the block before it does: ends do not tell.
        if not end or (layout.has_states and missing):
            return None, 0
        return layout.caches(slots, states or [], end), end

    def first_token(self, request: Reader) -> None:
        """``request`` has a token: what it began from has killed nobody."""
        for restored in self._restored:
            if restored.request is request:
                self._lift(restored)

    def forget_ended(self) -> None:
        """Called with every step."""
        if self._restored:
            for restored in self._restored:
                if has_ended(restored.request):
                    self._lift(restored)
            self._restored = [r for r in self._restored if not has_ended(r.request)]

    def drop_unproven(self) -> None:
        """Those that have no token yet may be the cause of a failure."""
        for restored in self._restored:
            if restored.mark is not None:
                self._store.drop(restored.nodes)
                self._lift(restored)

    def end(self, *, drop: bool) -> None:
        """Nothing in flight has begun from files any more. drop: they are removed."""
        for restored in self._restored:
            if drop:
                self._store.drop(restored.nodes)
            self._lift(restored)
        self._restored = []

    def _lift(self, restored: _Restored) -> None:
        if restored.mark is not None:
            self._store.end_restore(restored.mark)
            restored.mark = None
