"""One request of a batch: what was inserted and produced, and how to go on with it.

Generation thread. ``segments``: lists of token ids, the parts in which mlx-lm reads a
prompt.
"""

from __future__ import annotations

import copy

from .callables import reads
from .stops import stops_after

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

__all__ = ["Kept", "leaves", "segments_with"]


def segments_with(
    segments: Sequence[Sequence[int]], produced: Sequence[int]
) -> list[list[int]]:
    """``segments`` of a prompt, with the tokens that its answer has so far."""
    *first, last = segments
    return [*map(list, first), [*last, *produced]]


class Kept:
    """What is kept of one request.

    Attributes:
        uid: mlx-lm's.
        produced: tokens that `next` returned. made: those since it was last begun.
        attempts: how often it was begun again.
        is_drawn: its sampler may draw.
        seeded: MLX was seeded for it.
        why_not: why it cannot be begun again; None: it can.
    """

    __slots__ = (
        *("uid", "produced", "made", "attempts", "is_drawn", "seeded", "why_not"),
        *("_segments", "_max_tokens", "_cache", "_tokens", "_sampler", "_processors"),
        *("_stops", "_read", "_is_read", "_total", "_reads", "_is_again"),
    )

    def __init__(self, entry: Sequence[Any]) -> None:
        """``entry``: of the generator's ``_unprocessed_sequences``, just inserted."""
        uid, segments, max_tokens, cache, tokens, sampler, processors, stops = entry
        self.uid = uid
        self.produced: list[int] = []
        self.made = 0
        self.attempts = 0
        self.is_drawn = False
        self.seeded = False
        self.why_not: str | None = None
        # mlx-lm takes the outer list apart, and adds to the tokens.
        self._segments = [list(segment) for segment in segments]
        self._total = sum(map(len, self._segments))
        self._tokens = list(tokens)
        self._max_tokens = max_tokens
        self._cache = cache
        self._sampler = sampler
        self._processors = processors
        self._stops = stops
        self._reads = self._what_it_reads()
        self._read = 0
        self._is_read = False
        self._is_again = False

    def _what_it_reads(self) -> list[Any]:
        found = (self._sampler, *(self._processors or ()))
        return [reads(one) for one in found if one is not None]

    def has_changed(self) -> bool:
        """Whether its sampler or a processor reads another value than at first."""
        return self._what_it_reads() != self._reads

    # -- the cache that it comes with ------------------------------------------------

    def forget_cache(self, cache: Any) -> None:
        """Begins from ``cache``, which is empty, after all of its tokens."""
        self._cache = copy.deepcopy(cache)
        # Before the first segment: no end of a segment is added.
        self._segments[0] = [*self._tokens, *self._segments[0]]
        self._tokens = []

    def keep_cache(self) -> None:
        """Begins from the cache that it came with. Its arrays are shared."""
        self._cache = copy.deepcopy(self._cache)

    @property
    def cache(self) -> Any:
        """One for each layer."""
        return self._cache

    @property
    def is_explained(self) -> bool:
        """Whether its cache has as many tokens as the generator knows of."""
        found = [offset(cache) for cache in leaves(self._cache)]
        known = [n for n in found if n is not None]
        return bool(known) and all(n == len(self._tokens) for n in known)

    # -- going on --------------------------------------------------------------------

    def entry(self) -> tuple[Any, ...]:
        """What the generator's ``_unprocessed_sequences`` gets, to go on with it."""
        self.made = 0
        self._is_again = True
        segments = segments_with(self._segments, self.produced)
        # As `insert_segments` leaves them: the last one is the last token.
        last = segments.pop()
        segments += [part for part in (last[:-1], last[-1:]) if part]
        return (
            self.uid,
            segments,
            self._max_tokens - len(self.produced),
            copy.deepcopy(self._cache),
            list(self._tokens),
            self._sampler,
            self._processors,
            stops_after(self._stops, self.produced),
        )

    def tell_read(self, response: Any) -> None:
        """A step has read of its prompt: what was reported before is not repeated.

        Its progress goes on, so a caller that waits for it sees that something is done.
        """
        done = response.progress[0]
        if not self._is_again:
            self._read = done
            self._is_read = self._is_read or response.end_of_prompt
            return
        ahead = sum(map(len, self._segments)) - self._total
        done = min(done - ahead, self._total)
        if self._is_read or done <= self._read:
            response.end_of_segment = response.end_of_prompt = False
        self._read = max(done, self._read)
        self._is_read = self._is_read or response.end_of_prompt
        response.progress = (self._read, self._total)


def leaves(caches: Any) -> Iterator[Any]:
    """The caches among ``caches`` that hold arrays, lists of caches taken apart."""
    for cache in caches:
        if hasattr(cache, "caches"):
            yield from leaves(cache.caches)
        else:
            yield cache


def offset(cache: Any) -> int | None:
    """How many tokens ``cache`` has read; None: it does not say."""
    found = getattr(cache, "offset", None)
    if isinstance(found, int):
        return found
    empty: Callable[[], bool] | None = getattr(cache, "empty", None)
    return 0 if empty is not None and empty() else None
