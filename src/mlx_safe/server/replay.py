"""Going on in the middle of an answer.

`Resumed` makes mlx-lm do it. The tokens that the client has become part of the prompt.
Whatever mlx-lm derives from tokens one by one (text, stop words, the sampler's random
state) is brought to where it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..mlx_lm.sequences import segments_with
from ..mlx_lm.stops import stops_after
from .in_flight import InFlight
from .mlx_lm import compat
from .mlx_lm.protocols.opaque import (
    Array,
    Processor,
    Sampler,
    Stops,
    Tokenized,
)
from .mlx_lm.protocols.requests import GenerationArguments
from .mlx_lm.protocols.text import (
    Detokenizer,
    Tokenizer,
)
from .stop_words import StopsAtWords

__all__ = ["Resumed"]


class Resumed:
    """Where in its answer the request is that mlx-lm is about to start.

    mlx-lm tokenizes a request and then makes its state machine, its sampler, its
    logits processors and its detokenizer, all on the generation thread, before it
    looks at the next.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        # Of the logits of the model that is loaded, if it is known.
        self.width: int | None = None
        # What mlx-lm is given to begin with: prompt and tokens.
        self._prompt: list[int] = []
        # Of the request whose text mlx-lm is about to begin.
        self._stops: StopsAtWords | None = None

    def prompt(
        self,
        found: Tokenized,
        request: InFlight,
        args: GenerationArguments,
        drafts: bool,
    ) -> Tokenized:
        """What `_tokenize` found, with the tokens that the client has.

        ``drafts``: with speculative decoding the number of draws is not that of
        the tokens. With a seed such an answer is made again from its first token,
        and what the client has is not sent again.
        """
        self.tokens = list(request.produced)
        self._prompt = [*found[0], *self.tokens]
        if not self.tokens:
            return found
        if drafts and _is_seeded(args):
            request.begin_again()
            args.max_tokens += len(self.tokens)
            self.tokens, self._prompt = [], list(found[0])
            return found
        prompt, segments, *rest = found
        segments = segments_with(segments, self.tokens)
        keys = compat.cache_keys(found)
        if keys is not prompt:
            keys.extend(self.tokens)
        return ([*prompt, *self.tokens], segments, *rest)

    def state_machine(self, made: Stops, stop_words: list[str]) -> Stops:
        """What `_make_state_machine` made, as it was after those tokens.

        ``stop_words`` end the answer as well.
        """
        stops, *rest = made
        self._stops = StopsAtWords(stops, stop_words) if stop_words else None
        return (stops_after(self._stops or stops, list(self.tokens)), *rest)

    def sampler(
        self, sampler: Sampler, args: GenerationArguments, tokenizer: Tokenizer
    ) -> Sampler:
        """``sampler``, after it has drawn once for each of those tokens.

        Only a request with a seed has a random state that can be had again.
        """
        if self.tokens and _is_seeded(args):
            import mlx.core as mx

            width = self.width or 1 + max(tokenizer.get_vocab().values())
            logprobs = mx.zeros((1, width))
            for _ in self.tokens:
                mx.eval(sampler(logprobs))
        return sampler

    def processors(self, made: list[Processor]) -> list[Processor]:
        """Logits processors of the sequential path, as the batched one has them.

        A penalty looks at the prompt and the answer. mlx-lm's sequential path shows
        it less: of the prompt, only what was not in the prompt cache. In 0.31.3, and
        with speculative decoding, it shows its last token alone. So the answer would
        depend on the cache, and on how often the request was run.
        """
        prompt = self._prompt
        return [_Shown(processor, prompt) for processor in made]

    def watch(
        self, tokenizer: Tokenizer, guarded: Callable[[Detokenizer], Detokenizer]
    ) -> None:
        """Makes ``tokenizer.detokenizer`` begin after those tokens.

        ``guarded``: returns the detokenizer that is used in the place of mlx-lm's.
        """
        cls: Any = type(tokenizer)
        if getattr(cls, "_mlx_safe_resumes", False):
            return

        def detokenizer(this: Tokenizer) -> Detokenizer:
            made = guarded(cls.detokenizer.fget(this))
            if self._stops is not None:
                made, self._stops = self._stops.reading(made), None
            for token in self.tokens:
                made.add_token(token)
                _ = made.last_segment  # what was read before is not new
            return made

        tokenizer.__class__ = type(
            cls.__name__,
            (cls,),
            {
                "detokenizer": property(detokenizer),
                **compat.tokenizer_repairs(cls),
                "__module__": cls.__module__,
                "_mlx_safe_resumes": True,
            },
        )


class _Shown:
    """A logits processor that is shown the whole prompt before the answer."""

    def __init__(self, processor: Processor, prompt: list[int]) -> None:
        self._processor = processor
        self._prompt: Array = prompt
        # How many of the tokens mlx-lm shows are the prompt's: all, at first.
        self._of_prompt: int | None = None

    def __call__(self, tokens: Array, logits: Array) -> Array:
        import mlx.core as mx

        if self._of_prompt is None:
            self._of_prompt = len(tokens)
            self._prompt = mx.array(self._prompt, dtype=tokens.dtype)
        shown = mx.concatenate([self._prompt, tokens[self._of_prompt :]])
        return self._processor(shown, logits)


def _is_seeded(args: GenerationArguments) -> bool:
    return args.seed is not None and args.sampling.temperature > 0
