"""From a ceiling and a model to the limits of a server. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from .demand import Demand, Steps
from .sizes import format_size

__all__ = ["ANSWER", "Sizing", "sizing"]

# Of what is left beside the model and one step: the rest is for running requests.
PROMPT_CACHE_SHARE = 0.5
# Of what is left beside the model, for the transient of one step.
STEP_SHARE = 0.25
# Tokens of an answer for which its request asks for no number (mlx-lm's default).
ANSWER = 512


@dataclass(frozen=True)
class Sizing:
    """What fits. Bytes, and tokens.

    Attributes:
        model: the weights.
        ceiling: what may be active.
        step: tokens of a prompt
            that can well be read at once, and transient: what that takes.
            prompt_cache: its limit.
        room_tokens: the longest request that is served, prompt and answer
            together, while nothing else runs.
        two_tokens: the same for each of
            two that come at once.
        context: tokens that the model was made for; None: no limit is known.
    """

    model: int
    ceiling: int
    step: int
    transient: int
    prompt_cache: int
    room_tokens: int
    two_tokens: int
    context: int | None = None

    @property
    def room(self) -> int:
        """What is left for caches, those of the prompt cache included."""
        return max(0, self.ceiling - self.model - self.transient)

    def prompt_tokens(self) -> int | None:
        """A ``--max-prompt-tokens`` with which two fit at once; None: none would.

        Round, and with room for answers of `ANSWER` tokens.
        """
        tokens = min(self.two_tokens, self.context or self.two_tokens) - ANSWER
        if tokens < ANSWER:
            return None
        return tokens // 1000 * 1000 if tokens >= 10_000 else tokens // 100 * 100

    def __str__(self) -> str:
        return (
            f"model {format_size(self.model)}, ceiling {format_size(self.ceiling)}, "
            f"prompt cache at most {format_size(self.prompt_cache)}, room for "
            f"{format_tokens(self.room_tokens)}{self._model_takes()}"
        )

    def _model_takes(self) -> str:
        if self.context is None or self.context >= self.room_tokens:
            return ""
        return f", of which the model takes {self.context}"


def format_tokens(tokens: int) -> str:
    """``tokens`` in words, such as ``"210k tokens"``."""
    if tokens >= 2**31 - 1:
        return "any number of tokens"
    return f"{tokens // 1000}k tokens" if tokens >= 10_000 else f"{tokens} tokens"


def sizing(
    *,
    model: int,
    ceiling: int,
    demand: Demand,
    steps: Steps,
    prompt_cache: int | None = None,
    kv_limit: int | None = None,
    context: int | None = None,
) -> Sizing:
    """The limits for a model of ``model`` bytes under ``ceiling`` bytes.

    Args:
        steps: the sizes of the steps that prompts could be read in.
        prompt_cache: the user's own limit; None: half of the room.
        kv_limit: ``--max-active-kv-bytes``; None: none.
        context: tokens that the model was made for; None: no limit is known.
    """
    left = max(0, ceiling - model)
    sizes = [(n, demand.transients.predict(n, n)) for n in steps(1)]
    step, transient = next(
        ((n, size) for n, size in sizes if size <= STEP_SHARE * left), sizes[-1]
    )
    room = max(0, left - transient)
    if prompt_cache is None:
        prompt_cache = int(PROMPT_CACHE_SHARE * room)
    return Sizing(
        model=model,
        ceiling=ceiling,
        step=step,
        transient=transient,
        prompt_cache=min(prompt_cache, room),
        room_tokens=demand.longest(left, steps, kv_limit),
        two_tokens=demand.longest(left, steps, kv_limit, rows=2),
        context=context,
    )
