"""Learns from each step of the model what it takes, by MLX's own counters.

Used by the generation thread only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

import mlx.core as mx

from ..memory.estimate import TOKENS_MIN, Transients
from .mlx_lm.protocols.generation import (
    AnswerResponse,
    PromptResponse,
)
from .mlx_lm.protocols.opaque import (
    Uid,
)

__all__ = ["Observer"]

# A failure teaches that a step takes at most so many times what was calibrated: on an
# H200 steps of 768 tokens had the peaks of steps of 6,144. One that had another cause,
# as another program's moment, would else let no prompt be read beside anything.
LESSON_MAX = 32


class Observer:
    """The windows between two readings of MLX's peak, which each resets.

    A window is one step, or some of a batch that only writes and stays as it is.

    Args:
        learns: False: the peak is no measure of what a step needs, as where MLX takes
            what there is (`Limits.holds_mlx_back`). Nor is one above MLX's limit: on an
            H200 steps of 768 tokens had the peaks of steps of 6,144.

    Attributes:
        peak: bytes, the most that was active since the server started.
    """

    def __init__(
        self, transients: Transients, peak: int = 0, *, learns: bool = True
    ) -> None:
        self.transients = transients
        self._calibrated = copy.deepcopy(transients)
        self._learns = learns
        self.peak = peak
        self._before = 0
        self._last_peak = 0
        # What the last step of a batch read and how far: {uid: tokens}.
        self._read: dict[Uid, int] = {}
        self._steady = False
        # (tokens, context) of the window's first step, if it was learned from and more
        # like it may follow.
        self._learned: tuple[int, int] | None = None

    def begin(self, unchanged: bool = False) -> None:
        """A step begins.

        Args:
            unchanged: those since the last `begin` were of the same batch.
        """
        self._last_peak = int(mx.get_peak_memory())
        self.peak = max(self.peak, self._last_peak)
        active = int(mx.get_active_memory())
        if unchanged and self._learned is not None:
            used = self._last_peak - max(self._before, active)
            self.transients.observe(*self._learned, max(0, used))
        self._before, self._learned = active, None
        mx.reset_peak_memory()

    def recent_peak(self) -> int:
        """The most that was active in this window and the one before.

        MLX reports a failure of the GPU one step later, when its memory is free again.
        """
        return max(self._last_peak, int(mx.get_peak_memory()))

    def failed(self, tokens: int, context: int, there: int) -> None:
        """A step of prompts ran out of memory, of which ``there`` bytes were there."""
        if tokens >= TOKENS_MIN:
            took = max(there, self.recent_peak()) - self._before
            most = LESSON_MAX * self._calibrated.predict(tokens, context)
            self.transients.observe(tokens, context, max(0, min(took, most)))

    def end(self, tokens: int, context: int) -> None:
        """It has ended, and had ``tokens`` tokens (rows times length)."""
        peak, after = int(mx.get_peak_memory()), int(mx.get_active_memory())
        self.peak = max(self.peak, peak)
        if self._learns:
            used = max(0, peak - max(self._before, after))
            self.transients.observe(tokens, context, used)

    def end_of_batch_step(
        self,
        prompts: Iterable[PromptResponse],
        generated: Sequence[AnswerResponse],
        lengths: Callable[[], dict[Uid, int]],
    ) -> None:
        """A step of mlx-lm's `BatchGenerator` has ended with these responses.

        Only of steps between which the batch did not change. What joins or leaves is
        copied (merge, extend, filter, split), lazily in the next step, and would be
        taken for the cost of tokens.

        Args:
            lengths: gives the tokens of each row's prompt, those of the prompt cache
                included, by uid.
        """
        prompts = list(prompts)
        reading = {r.uid: int(r.progress[0]) for r in prompts if not r.end_of_prompt}
        steady = len(reading) == len(prompts) and reading.keys() == self._read.keys()
        steady = steady and all(r.finish_reason is None for r in generated)
        if steady and self._steady and (reading or generated):
            self._learn(reading, prompts, lengths())
        else:
            self.peak = max(self.peak, int(mx.get_peak_memory()))
        self._read, self._steady = reading, steady

    def _learn(
        self,
        reading: dict[Uid, int],
        prompts: list[PromptResponse],
        lengths: dict[Uid, int],
    ) -> None:
        chunk = max((reading[u] - self._read[u] for u in reading), default=1)
        cached = [lengths.get(r.uid, 0) - int(r.progress[1]) for r in prompts]
        context = max(
            (c + reading[r.uid] for c, r in zip(cached, prompts, strict=True)),
            default=max(lengths.values(), default=1),
        )
        size = max(len(reading), 1) * max(chunk, 1), max(context, 1)
        self.end(*size)
        if self._learns and not reading:
            # Of a step that reads there is one look: of the last few looks a failure's
            # is one, and two for each step would drive it out.
            self._learned = size
