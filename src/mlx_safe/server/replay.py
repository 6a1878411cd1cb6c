"""Running requests again after a fault, with less.

`Replays` decides which request is run again, when, and how carefully. `Resumed`
makes mlx-lm go on in the middle of an answer: the tokens that the client has
become part of the prompt, and whatever mlx-lm derives from tokens one by one
(text, stop words, the sampler's random state) is brought to where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from .. import errors
from ..memory.demand import STEP_MIN
from .mlx_lm import compat
from .prefill import PrefillStep
from .replies import is_allocation_failure
from .tickets import Flight, Ticket

__all__ = ["Replays", "Resumed"]

# Faults of the GPU in a row, without a token between them and not a minute
# apart: from here on wait before the next try, and from there on refuse new work
# for a while. Other failures do not count: a client can cause them at will.
BACK_OFF_AFTER = 2
BACK_OFF_MAX_S = 1.0
REFUSE_AFTER = 12
REFUSE_FOR_S = 10.0
IN_A_ROW_S = 60.0


class Replays:
    """The requests that wait to be run again, and how many at a time.

    Used by the generation thread only.
    """

    def __init__(self, flight: Flight, attempts_max: int, prefill: PrefillStep) -> None:
        self._flight = flight
        self._attempts_max = attempts_max
        self._prefill = prefill
        self._waiting: list[Ticket] = []
        # How many requests may run at a time; None: as many as mlx-lm likes.
        self._limit: int | None = None
        self._tokens_at_last_fault = -1
        self._last_fault_at = 0.0
        self.faults_without_progress = 0

    def sort(
        self, fault: errors.GPUError | None, exc: BaseException
    ) -> tuple[list[Ticket], list[Ticket]]:
        """(those to be run again, those that end) of the requests in flight.

        With a fault that may pass: all with attempts left. With one that must not be
        tried again: none. With an exception that is no fault: all, one by one, so
        that only the one that causes it ends; and that one when it is alone. Those
        that still wait for their turn, here or at mlx-lm, had no part in any of it:
        they are run again, and lose no attempt.
        """
        tickets = self._flight.running()
        for ticket in [t for t in tickets if t.finished]:
            ticket.complete()
            tickets.remove(ticket)
        if self._attempts_max == 0:
            return [], tickets
        running = [t for t in tickets if t not in self._waiting]
        running = [t for t in running if t.begun] or running
        memory = isinstance(fault, errors.OutOfMemoryError)
        memory = memory or (fault is None and is_allocation_failure(exc))
        if fault is not None and not fault.retryable:
            ending = running
        elif fault is not None or memory:
            ending = [t for t in running if t.attempts >= self._attempts_max]
            for ticket in running:
                ticket.attempts += ticket not in ending
        else:
            ending = running if len(running) == 1 else []
            self._limit = 1
        again = [t for t in tickets if t not in ending]
        if fault is not None or memory:
            less = memory or isinstance(fault, errors.MetalInteractivityError)
            self._be_careful(again, less)
        return again, ending

    def _be_careful(self, again: list[Ticket], less: bool) -> None:
        """One at a time the last time, so that one cannot take others along.

        ``less``: and before that with fewer at a time, in smaller steps.
        """
        if not again:
            return
        level = max(ticket.attempts for ticket in again)
        if level >= min(2, self._attempts_max):
            self._limit = 1
        elif less:
            self._limit = max(1, len(again) // 2)
        if less:
            step = max(STEP_MIN, self._prefill.full // 4**level)
            self._prefill.limit("fault", step)

    def line_up(self, tickets: list[Ticket]) -> None:
        """``tickets`` are run again, oldest first."""
        for ticket in tickets:
            ticket.claim = None  # it asks anew
        self._waiting = tickets

    def next(self) -> Ticket | None:
        """The request to run again now; None when there is none, or not yet."""
        self._waiting = [t for t in self._waiting if not t.stopped]
        if not self._waiting or not self._has_room():
            return None
        return self._waiting.pop(0)

    def may_take_new(self) -> bool:
        """Whether new requests may be taken; ends the careful time when over."""
        if self._waiting:
            return False
        if self._limit is None:
            return True
        if self._flight.running():
            return False
        self._limit = None
        self._prefill.limit("fault", None)
        return True

    def _has_room(self) -> bool:
        running = len(self._flight.running()) - len(self._waiting)
        return self._limit is None or running < self._limit

    def back_off(self) -> bool:
        """After a fault: waits when they come in a row.

        Returns True when new work must be refused for a while.
        """
        now = time.monotonic()
        if (
            self._flight.tokens != self._tokens_at_last_fault
            or now - self._last_fault_at > IN_A_ROW_S
        ):
            self.faults_without_progress = 0
        self.faults_without_progress += 1
        self._tokens_at_last_fault = self._flight.tokens
        self._last_fault_at = now
        beyond = self.faults_without_progress - BACK_OFF_AFTER
        if beyond > 0:
            time.sleep(min(0.05 * 2**beyond, BACK_OFF_MAX_S))
        return self.faults_without_progress >= REFUSE_AFTER


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

    def prompt(self, found: Any, ticket: Ticket | None, args: Any, drafts: bool) -> Any:
        """What `_tokenize` found, with the tokens that the client has.

        ``drafts``: with speculative decoding the number of draws is not that of
        the tokens. With a seed such an answer is made again from its first token,
        and what the client has is not sent again.
        """
        self.tokens = list(ticket.produced) if ticket is not None else []
        self._prompt = [*found[0], *self.tokens]
        if not self.tokens:
            return found
        if ticket is not None and drafts and _is_seeded(args):
            ticket.begin_again()
            args.max_tokens += len(self.tokens)
            self.tokens, self._prompt = [], list(found[0])
            return found
        prompt, segments, *rest = found
        segments = [*segments[:-1], [*segments[-1], *self.tokens]]
        keys = compat.cache_keys(found)
        if keys is not prompt:
            keys.extend(self.tokens)
        return ([*prompt, *self.tokens], segments, *rest)

    def state_machine(self, made: Any) -> Any:
        """What `_make_state_machine` made, as it was after those tokens."""
        if not self.tokens:
            return made
        stops, *rest = made
        return (compat.stops_after(stops, list(self.tokens)), *rest)

    def sampler(self, sampler: Any, args: Any, tokenizer: Any) -> Any:
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

    def processors(self, made: list[Any]) -> list[Any]:
        """Logits processors of the sequential path, as the batched one has them.

        A penalty looks at the prompt and the answer. mlx-lm's sequential path shows
        it less: of the prompt, only what was not in the prompt cache, and in 0.31.3
        and with speculative decoding its last token alone. So the answer would
        depend on the cache, and on how often the request was run.
        """
        prompt = self._prompt
        return [_Shown(processor, prompt) for processor in made]

    def watch(self, tokenizer: Any, guarded: Callable[[Any], Any]) -> None:
        """Makes ``tokenizer.detokenizer`` begin after those tokens.

        ``guarded``: returns the detokenizer that is used in the place of mlx-lm's.
        """
        cls = type(tokenizer)
        if getattr(cls, "_mlx_safe_resumes", False):
            return

        def detokenizer(this: Any) -> Any:
            made = guarded(cls.detokenizer.fget(this))
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

    def __init__(self, processor: Any, prompt: list[int]) -> None:
        self._processor = processor
        self._prompt: Any = prompt
        # How many of the tokens mlx-lm shows are the prompt's: all, at first.
        self._of_prompt: int | None = None

    def __call__(self, tokens: Any, logits: Any) -> Any:
        import mlx.core as mx

        if self._of_prompt is None:
            self._of_prompt = len(tokens)
            self._prompt = mx.array(self._prompt, dtype=tokens.dtype)
        shown = mx.concatenate([self._prompt, tokens[self._of_prompt :]])
        return self._processor(shown, logits)


def _is_seeded(args: Any) -> bool:
    return args.seed is not None and args.sampling.temperature > 0
