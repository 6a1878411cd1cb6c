"""What mlx-lm makes for one request: its sampler, its stop words, its place in a batch.

Each goes on where an answer was interrupted (`replay`), and a failure in it ends the
request that it belongs to alone (`own_failures`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import mlx.core as mx

from .batches import paced, watched
from .headroom import Headroom
from .in_flight import InFlight
from .logprobs import top_logprobs
from .mlx_lm.kv_tier import KVTier
from .mlx_lm.protocols.generation import BatchGenerator, GenerationResponse
from .mlx_lm.protocols.models import Model
from .mlx_lm.protocols.opaque import (
    Array,
    Json,
    Processor,
    Sampler,
    Stops,
)
from .mlx_lm.protocols.requests import GenerationArguments
from .mlx_lm.protocols.text import Tokenizer
from .mlx_lm.speculative import Reading
from .not_numbers import Numbers
from .own_failures import OwnFailures
from .prefill import PrefillStep
from .replay import Resumed
from .scheduler import Scheduler
from .step import Step

__all__ = ["Parts"]


class Parts:
    """Makes them. Generation thread only.

    Args:
        share: mlx-lm's ``_share_object``; None: there is one rank. With more a
            failure is nobody's own: what is mended on each of them would differ from
            then on, such as what they draw.
        on_read: with a draft model, called between two steps of a prompt, as
            `Reading` calls its own.
        is_awaited: whether a request waits that mlx-lm may have now.
    """

    def __init__(
        self,
        scheduler: Scheduler[InFlight],
        headroom: Headroom,
        prefill: PrefillStep,
        step: Step,
        end_alone: Callable[[InFlight, Exception], None],
        disk: KVTier | None,
        share: Callable[[object], object] | None,
        on_read: Callable[[InFlight, int, int, bool], None],
        is_awaited: Callable[[], bool],
    ) -> None:
        self._is_awaited = is_awaited
        self._on_read = on_read
        self._reading: Reading | None = None
        self._scheduler = scheduler
        self._headroom = headroom
        self._prefill = prefill
        self._step = step
        self._disk = disk
        self._share = share
        self.own = OwnFailures(self._current, end_alone)
        self._numbers = Numbers(self.own.failed if share is None else None)
        self.resumed = Resumed()

    def _current(self) -> InFlight | None:
        """The request that mlx-lm is about to start."""
        return self._scheduler.current if self._share is None else None

    def batch(
        self, cls: type[BatchGenerator], *args: object, **kwargs: object
    ) -> BatchGenerator:
        """Stands in for ``mlx_lm.server.BatchGenerator``, which is ``cls``."""
        if self._share is not None:  # each would see other requests to leave
            cls = paced(cls, self._prefill, self._step, self._share)
        else:
            cls = watched(
                cls,
                self._scheduler,
                lambda: self._headroom.observer,
                self.own,
                self._numbers,
                self._prefill,
                self._step,
                self._is_awaited,
                self._disk,
            )
        batch = cls(*args, **kwargs)
        return self._headroom.watch(self._prefill.watch(batch))

    def state_machine(self, make: Callable[[], Stops], stop_words: list[str]) -> Stops:
        """Stands in for ``_make_state_machine``, which ``make`` calls without any."""
        made = make()
        stops, *rest = self.own.make(
            lambda: self.resumed.state_machine(made, stop_words), lambda: made
        )
        return (self.own.stops(stops), *rest)

    def sampler(
        self,
        make: Callable[[GenerationArguments, Tokenizer], Sampler],
        args: GenerationArguments,
        tokenizer: Tokenizer,
    ) -> Sampler:
        """Stands in for ``mlx_lm.server._make_sampler``, which is ``make``."""
        likeliest: Sampler = partial(mx.argmax, axis=-1)
        made = self.own.make(
            lambda: self.resumed.sampler(make(args, tokenizer), args, tokenizer),
            lambda: likeliest,
        )
        return self.own.sampler(made)

    def processors(
        self,
        make: Callable[[GenerationArguments], list[Processor]],
        args: GenerationArguments,
    ) -> list[Processor]:
        """Stands in for ``_make_logits_processors``, which is ``make``."""
        made: list[Processor] = self.own.make(lambda: make(args), list)
        current = self._scheduler.current
        if current is not None and current.run.alone:
            made = self.resumed.processors(made)
        return [self.own.processor(processor) for processor in made]

    def top_logprobs(
        self, logprobs: Array, top_n: int, tokenizer: Tokenizer
    ) -> tuple[Json, ...]:
        """Stands in for ``mlx_lm.server._format_top_logprobs``."""
        return self.own.top_logprobs(lambda: top_logprobs(logprobs, top_n, tokenizer))

    def model_called(self, tokens: int) -> None:
        """A model that has a draft, or the draft, is called with so many tokens."""
        if self._reading is not None:
            self._reading.calls(tokens)

    def stream_alone(
        self,
        made: Iterator[GenerationResponse],
        *,
        prompt: Sequence[int],
        draft_model: Model | None = None,
        **more: object,
    ) -> Iterator[GenerationResponse]:
        """Stands in for ``mlx_lm.server.stream_generate``, which gave ``made``."""
        current = self._scheduler.current
        self._reading = None
        if draft_model is not None and current is not None:
            self._reading = Reading(len(prompt), partial(self._on_read, current))
        return made if current is None else self._looked_at(current, made)

    def _looked_at(
        self, request: InFlight, made: Iterator[GenerationResponse]
    ) -> Iterator[GenerationResponse]:
        for response in made:
            self._numbers.token(request, response)
            yield response
