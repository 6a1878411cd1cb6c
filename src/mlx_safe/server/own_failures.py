"""Failures that are one request's own: it ends, and the others do not notice.

mlx-lm runs some code for each request of a batch by itself: its sampler, its logits
processors, its stop words, its detokenizer, its log-probabilities, and what makes
them. An exception there would end the whole batch. Here it ends the request that it
belongs to: what is called goes on with a value that harms nobody, and the batch drops
the request before its next step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import mlx.core as mx

from .mlx_lm import compat
from .mlx_lm.protocols.opaque import Json, Processor, Sampler
from .mlx_lm.protocols.text import Detokenizer, StopWords
from .replies import is_of_all
from .request import Request

__all__ = ["OwnFailures"]

T = TypeVar("T")
P = ParamSpec("P")

# Called with the request and what it failed with.
End = Callable[[Any, Exception], None]


class OwnFailures:
    """Wraps what belongs to one request. Used by the generation thread only.

    Args:
        current: the request that mlx-lm is about to start; None: not known, then
            nothing is wrapped.
        end: ends a request.

    Attributes:
        answers: whose text was asked for last; None: not known.
    """

    def __init__(self, current: Callable[[], Request | None], end: End) -> None:
        self._current = current
        self._end = end
        self.answers: Request | None = None

    def make(self, make: Callable[[], T], instead: Callable[[], T]) -> T:
        """What ``make`` returns; when it fails, what ``instead`` does."""
        request = self._current()
        try:
            return make()
        except Exception as e:
            if request is None or is_of_all(e):
                raise
            self._end(request, e)
            return instead()

    def sampler(self, sampler: Sampler) -> Sampler:
        """``sampler``; the likeliest token when it fails."""
        if compat.is_shared_sampler(sampler):
            return sampler
        return self._guarded(sampler, lambda logprobs: mx.argmax(logprobs, axis=-1))

    def processor(self, processor: Processor) -> Processor:
        """``processor``; the logits as they are when it fails."""
        return self._guarded(processor, lambda tokens, logits: logits)

    def stops(self, stops: StopWords) -> StopWords:
        """``stops`` (of `_make_state_machine`); none is seen when they fail."""
        request = self._current()
        if request is None:
            return stops
        return compat.guarded_stops(stops, functools.partial(self.run, request))

    def top_logprobs(self, top: Callable[[], tuple[Json, ...]]) -> tuple[Json, ...]:
        """What ``top`` returns for the token that was turned into text last."""
        return top() if self.answers is None else self.run(self.answers, top, tuple)

    def detokenizer(self, detokenizer: Detokenizer) -> Detokenizer:
        """``detokenizer``, which has no more text when it has failed."""
        request = self._current()
        if request is None:
            return detokenizer
        # Its text is a property, which is no variable to mypy.
        return cast(Detokenizer, _Detokenizer(detokenizer, self, request))

    def _guarded(self, call: Callable[P, T], instead: Callable[P, T]) -> Callable[P, T]:
        request = self._current()
        if request is None:
            return call

        def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return call(*args, **kwargs)
            except Exception as e:
                self.failed(request, e)
                return instead(*args, **kwargs)

        return guarded

    def run(
        self,
        request: Request,
        call: Callable[P, T],
        instead: Callable[P, T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """What ``call`` returns of the rest; ends ``request`` when it fails, once.

        Called some times for each token. A request that has ended has no further step,
        so it may fail once more in this one.
        """
        try:
            return call(*args, **kwargs)
        except Exception as e:
            self.failed(request, e)
            return instead(*args, **kwargs)

    def failed(self, request: Request, exc: Exception) -> None:
        """What belongs to ``request`` raised ``exc``, which is now handled.

        Raises:
            Exception: it again, as it is about the GPU or memory.
        """
        if is_of_all(exc):
            raise exc
        if not request.is_ended:
            self._end(request, exc)


class _Detokenizer:
    """A detokenizer of mlx-lm's; ``last_segment`` is read after each token."""

    def __init__(self, made: Detokenizer, own: OwnFailures, request: Request) -> None:
        self._made = made
        self._own = own
        self._request = request

    def add_token(self, token: int) -> None:
        try:
            self._made.add_token(token)
        except Exception as e:
            self._own.failed(self._request, e)

    def finalize(self) -> None:
        try:
            self._made.finalize()
        except Exception as e:
            self._own.failed(self._request, e)

    @property
    def last_segment(self) -> str:
        # mlx-lm (0.31, 0.32) asks for the log-probabilities next.
        self._own.answers = self._request
        try:
            return self._made.last_segment
        except Exception as e:
            self._own.failed(self._request, e)
            return ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._made, name)
