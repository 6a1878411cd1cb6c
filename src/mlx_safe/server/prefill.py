"""How many tokens of a prompt mlx-lm reads in one step: one setting, one place.

Between two steps requests are cancelled, memory is looked at, and the watchdog sees
that it goes on. So steps are sized by time as well, once it is known what one takes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

from .._failures import SMALLEST
from ..memory.demand import STEP_MIN, step_sizes
from .mlx_lm import compat
from .mlx_lm.protocols.generation import BatchGenerator
from .mlx_lm.protocols.models import CliArgs

__all__ = ["PROBE", "TELLING", "PrefillStep", "width"]

# Tokens of a step that tells what a token takes: shorter ones tell of the step itself.
TELLING = 256
# Of the first step of a model, which has to tell. With TELLING it took 55 s where a
# token takes 0.2; the next is longer, and tells more.
PROBE = 32
# Of a step that reads several prompts, so much may be padding.
PADDING_MAX = 1 / 4


def width(parts: Sequence[int]) -> int:
    """How many tokens of each prompt a step reads, so that little of it is padding.

    mlx-lm reads the next parts of several prompts as rows of one step, each as long as
    the longest (0.31 to 0.32). The model computes padding as it computes tokens, so a
    long prompt made each short one beside it as long. Cut to the length of a short
    one, a step ends that one, and the rest of the long one comes in the next.

    Args:
        parts: tokens of each part, one or more.
    """
    rows, found = len(parts), min(parts)
    for most in sorted(parts):
        read = sum(min(most, tokens) for tokens in parts)
        if rows * most - read <= PADDING_MAX * rows * most:
            found = most
    return max(found, STEP_MIN)


class PrefillStep:
    """``--prefill-step-size``, and the smaller ones that others ask for meanwhile.

    Used by the generation thread only. mlx-lm's sequential path reads the setting
    when a request begins, the batched one at each step.

    Args:
        aim_s: seconds that a step is to take at most; 0: as long as it takes.
    """

    def __init__(self, cli_args: CliArgs, aim_s: float = 0.0) -> None:
        self.aim_s = aim_s
        self._token_s: float | None = None  # seconds for a token
        self.full = max(1, int(cli_args.prefill_step_size))
        self._cli_args = cli_args
        self._comfortable = self.full
        self._limits: dict[str, int] = {}
        self._is_last = False  # after faults, the last try
        self._reading = 0  # tokens of the step that comes next or goes on
        self._lacked = 0  # of the last step that had not the memory
        self._batch: weakref.ref[BatchGenerator] | None = None

    @property
    def size(self) -> int:
        """Tokens, for each row of a batch."""
        return int(self._cli_args.prefill_step_size)

    def sizes(self, rows: int = 1) -> list[int]:
        """What can be asked for: the full size and its halves, largest first.

        Args:
            rows: prompts that are read together; a step reads so many tokens of
                each, and has no more in all than suits the memory.
        """
        rows = max(rows, 1)
        found = step_sizes(self.full, rows)
        if self._comfortable == self.full:
            return found
        return [n for n in found if n * rows <= self._comfortable] or found[-1:]

    def settle(self, size: int | None) -> None:
        """The largest size from now on; None: the full one."""
        self._comfortable = self.full if size is None else size
        self.limit("memory", size)

    def limit(self, who: str, size: int | None) -> None:
        """``who`` asks for steps of at most ``size`` tokens; None: does not mind."""
        self._limits.pop(who, None)
        if size is not None:
            self._limits[who] = size
        self._cli_args.prefill_step_size = min([self.full, *self._limits.values()])
        batch = self._batch() if self._batch is not None else None
        if batch is not None:
            compat.set_prefill_step(batch, self.size)

    def be_careful(self, level: int | None) -> None:
        """Smaller steps after ``level`` tries that were in vain; 0, None: as usual.

        `SMALLEST`: there is no other try, so they stay well below what was too much.
        """
        self._is_last = level == SMALLEST
        if level is None:
            self._lacked = 0
        size = max(STEP_MIN, self.full // 4**level) if level else None
        self.limit("fault", size)

    def went_well(self) -> None:
        """A step of a prompt has been read: the next may be twice as large."""
        size = self._limits.get("fault")
        if size is None or (self._is_last and 2 * size > self._lacked // 4):
            return
        self.limit("fault", 2 * size if 2 * size < self.full else None)

    def reads(self, tokens: int) -> None:
        """The step that comes next reads so many, all rows together; 0: of no prompt.

        Said once more where it turns out to be narrower than was thought.
        """
        self._reading = tokens

    def lacked_memory(self) -> int:
        """That step had not the memory; how many tokens it was to read."""
        self._lacked = self._reading
        return self._lacked

    # -- by time ----------------------------------------------------------------------

    def model_loaded(self) -> None:
        """Another model: what a step of it takes is not known."""
        self._token_s = None
        self.limit("time", None)

    def took(self, tokens: int, seconds: float, at_least: bool = False) -> None:
        """A step has read so many tokens, all rows together.

        Args:
            at_least: it was the draft model's, and the target's take longer.
        """
        # One that was short says more of what a step takes than of its tokens.
        is_telling = 2 * tokens >= min(self.size, TELLING) or seconds > self.aim_s
        if tokens > 0 and is_telling:
            known = self._token_s or 0.0
            token_s = seconds / tokens
            self._token_s = max(token_s, known) if at_least else token_s

    def fit(self, rows: int = 1, *, probe: int | None = None) -> int:
        """Sizes the next steps, of ``rows`` prompts together; returns the size.

        Args:
            probe: tokens of a step that is to tell, while nothing is known.
        """
        self.limit("time", self._fitting(max(rows, 1), probe))
        return self.size

    def agree(
        self, share: Callable[[object], object], rows: int = 1, *, probe: int = PROBE
    ) -> int:
        """`fit` of the first rank, by whose clock all go. All ranks, at the same turn.

        Args:
            share: mlx-lm's ``_share_object``: the first rank's object, on each.
        """
        size = share(self.fit(rows, probe=probe))
        assert isinstance(size, int)
        self.limit("time", size if size < self.full else None)
        return self.size

    def _fitting(self, rows: int, probe: int | None) -> int | None:
        if not self.aim_s:
            return None
        if self._token_s is None:
            # Who asks for steps that are short anyway has them.
            return probe if probe and self.full > TELLING else None
        most = int(self.aim_s / self._token_s) // rows
        size = self.full
        while size > max(most, 1):
            size = -(-size // 2)
        return size if size < self.full else None

    def watch(self, batch: BatchGenerator) -> BatchGenerator:
        """Remembers mlx-lm's batch generator, whose steps follow; returns it."""
        self._batch = weakref.ref(batch)
        return batch
