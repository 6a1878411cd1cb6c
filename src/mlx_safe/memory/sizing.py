"""From a ceiling and a model to the limits of a server. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .estimate import CacheCost
from .sizes import format_size

__all__ = ["Sizing", "sizing"]

# Of what is left beside the model and one step: the rest is for running requests.
PROMPT_CACHE_SHARE = 0.5
# Of what is left beside the model, for the transient of one step.
STEP_SHARE = 0.25


@dataclass(frozen=True)
class Sizing:
    """What fits. Bytes, and tokens.

    Attributes:
        model: the weights. ceiling: what may be active. step: tokens of a prompt
            that can well be read at once, and transient: what that takes.
            prompt_cache: its limit. room_tokens: tokens of all running requests
            together while the prompt cache is empty.
    """

    model: int
    ceiling: int
    step: int
    transient: int
    prompt_cache: int
    room_tokens: int

    @property
    def needed(self) -> int:
        """What the model and one step take."""
        return self.model + self.transient

    @property
    def room(self) -> int:
        """What is left for caches, those of the prompt cache included."""
        return max(0, self.ceiling - self.needed)

    def __str__(self) -> str:
        return (
            f"model {format_size(self.model)}, ceiling {format_size(self.ceiling)}, "
            f"prompt cache at most {format_size(self.prompt_cache)}, room for "
            f"{format_tokens(self.room_tokens)}"
        )


def format_tokens(tokens: int) -> str:
    """``tokens`` in words, such as ``"210k tokens"``."""
    if tokens >= 2**31 - 1:
        return "any number of tokens"
    return f"{tokens // 1000}k tokens" if tokens >= 10_000 else f"{tokens} tokens"


def sizing(
    *,
    model: int,
    ceiling: int,
    cost: CacheCost,
    steps: Sequence[tuple[int, int]],
    prompt_cache: int | None = None,
) -> Sizing:
    """The limits for a model of ``model`` bytes under ``ceiling`` bytes.

    Args:
        steps: (tokens, bytes of the transient) of the steps that a prompt could
            be read in, the largest first, at least one.
        prompt_cache: the user's own limit; None: half of the room.
    """
    left = max(0, ceiling - model)
    step, transient = next(
        ((n, size) for n, size in steps if size <= STEP_SHARE * left), steps[-1]
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
        room_tokens=cost.tokens_in(room, step=step),
    )
