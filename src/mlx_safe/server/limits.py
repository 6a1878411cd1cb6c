"""The ceiling of one server: the machine, the flag, and what faults have taught."""

from __future__ import annotations

import logging
import time

import mlx.core as mx

from ..memory.ceiling import HOLD_S, RETURN_S, Ceiling, LearnedCeiling, ceiling
from ..memory.machine import read_machine, usage
from ..memory.sizes import format_size
from .recorder import breadcrumb

__all__ = ["Limits"]

log = logging.getLogger("mlx_safe.server")

# What the process holds besides MLX's memory changes slowly.
MAX_AGE_S = 1.0
# What other programs hold on a card may change at any time. The driver (NVML, through
# MLX) can take milliseconds to answer, and Python stands still meanwhile. It is asked
# at most so often, and for at most this share of the time.
CARD_MAX_AGE_S = 0.1
CARD_SHARE_MAX = 0.005
# Other programs have taken memory when our share is less than so much of what it was.
OTHERS_TOOK = 0.95


class Limits:
    """How much may be active. `out_of_memory` is the generation thread's.

    Args:
        explicit: ``--max-active-memory-bytes``; None: not given.
    """

    def __init__(self, explicit: int | None) -> None:
        self.machine = read_machine()
        self._explicit = explicit
        self._learned = LearnedCeiling()
        self._static: Ceiling | None = None
        self._static_at = 0.0
        self._card_share: int | None = None
        self._card_until = 0.0
        self._told: int | None = None
        self._warn_of_too_large_a_flag()

    def _warn_of_too_large_a_flag(self) -> None:
        found = self.static()
        if self._explicit is None or found.reason.name == "flag":
            return
        usual = self._look(None, explicit=None)
        log.warning(
            "--max-active-memory-bytes %d is more than this machine has: the ceiling "
            "is %s (%s), with no margin; without the flag it is %s",
            self._explicit,
            format_size(found.size),
            found.reason.source,
            format_size(usual.size),
        )

    def static(self) -> Ceiling:
        """The ceiling as it will be when what was learned is forgotten."""
        now = time.monotonic()
        if self._static is None or now - self._static_at > MAX_AGE_S:
            self._static = self._look(None, explicit=self._explicit)
            self._static_at = now
        return self._static

    def present(self) -> Ceiling:
        """The ceiling with what other programs leave, without what was learned."""
        return self._with(None)

    def now(self) -> Ceiling:
        """The ceiling that holds now."""
        found = self._with(self._learned.value(self.static().size))
        if self.holds_mlx_back:
            self._tell_mlx(found.size)
        return found

    @property
    def holds_mlx_back(self) -> bool:
        """Whether MLX itself keeps below the ceiling, as it has the number: on a card.

        MLX keeps the temporaries of up to ten graphs that are under way, each of a
        hundred operations or of 1 GB, and all that was freed. Above its limit it waits
        for those graphs, and gives back of its pool what the next array needs. But its
        limit is 95 % of the whole card, whatever others hold (`eval_impl`,
        `CudaAllocator::malloc_async` and `CommandEncoder::needs_commit`, 0.32).
        """
        return self.machine.card is not None

    def _tell_mlx(self, size: int) -> None:
        if size != self._told:
            mx.set_memory_limit(size)
            self._told = size

    def _with(self, learned: int | None) -> Ceiling:
        share = self._share_of_card()
        if learned is None and share is None:
            return self.static()
        return self._look(learned, explicit=self._explicit, card_share=share)

    def _share_of_card(self) -> int | None:
        asked = time.monotonic()
        if self.machine.card is not None and asked >= self._card_until:
            self._card_share = usage().card_share
            answered = time.monotonic()
            took_s = answered - asked
            self._card_until = answered + max(CARD_MAX_AGE_S, took_s / CARD_SHARE_MAX)
        return self._card_share

    def _look(
        self,
        learned: int | None,
        *,
        explicit: int | None,
        card_share: int | None = None,
    ) -> Ceiling:
        return ceiling(
            self.machine,
            explicit=explicit,
            overhead=usage().overhead if self.machine.card is None else 0,
            learned=learned,
            card_share=card_share,
        )

    @property
    def lowered(self) -> str | None:
        """For clients: that a fault has lowered the ceiling; None when none has."""
        static = self.static().size
        low = self._learned.value(static)
        if low is None:
            return None
        return (
            "the GPU ran out of memory: requests that run together may have "
            f"{format_size(low)} instead of {format_size(static)}, and all of it again "
            f"in {-(-self._learned.remaining // 60):.0f} min"
        )

    def out_of_memory(self, held: int, baseline: int) -> int | None:
        """A fault or an allocation failure.

        Of a card it is known what was there for us. What we held says little: what was
        asked for on top is not counted, and may have been most of it. When other
        programs have taken memory since the last look, that is why, and the next step
        is measured by what they leave: nothing is learned.

        Args:
            held: bytes, the most in the step that failed.
            baseline: what is active when nothing runs.

        Returns:
            What was there; None where that is not known, or was more when the step
            was let in.
        """
        expected = self._card_share
        self._card_until = 0.0
        there = self.present().size
        share = self._card_share
        why = (
            f"it stays there for {HOLD_S / 60:.0f} min, and rises to "
            f"{format_size(there)} in the {RETURN_S / 60:.0f} min after that"
        )
        if share is None:
            found, value = None, self._learned.fault(held, baseline, there)
        elif expected is not None and share < OTHERS_TOOK * expected:
            found, value = None, self.now().size
            why = "other programs have taken the rest of the card"
        else:
            found, value = there, self._learned.fault(there, baseline, there)
        breadcrumb("ceiling", "out of memory", active=held, bytes=value)
        # The failure has its own line, a warning; this is what follows from it.
        log.info(
            "out of memory with up to %s active: the ceiling is %s now (%s)",
            format_size(held),
            format_size(value),
            why,
        )
        return found
