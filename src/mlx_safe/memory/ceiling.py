"""How much memory may be active, and where each number comes from."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from .machine import Machine
from .sizes import format_size

__all__ = ["Ceiling", "LearnedCeiling", "Limit", "ceiling"]

# Of what Metal recommends: MLX itself gives its pool back from 95 % on
# (gc_limit, MLX 0.29 to 0.32), and the last command buffers need room as well.
GPU_SHARE = 0.90
# Of the RAM, for what MLX holds, when it shares it with everything else.
CPU_SHARE = 0.75
# Of the RAM, for the whole process on a machine with a GPU: above, the system
# swaps or kills (jetsam compares the footprint).
FOOTPRINT_SHARE = 0.90

# The law of the learned ceiling; see `LearnedCeiling`.
LOWERED_TO = 0.80
FLOOR = 0.25
HOLD_S = 300.0
RETURN_S = 3600.0


@dataclass(frozen=True)
class Limit:
    """One reason for a ceiling: bytes, a short name, and the source in words."""

    name: str
    size: int
    source: str


@dataclass(frozen=True)
class Ceiling:
    """The limits that hold, the smallest first."""

    limits: tuple[Limit, ...]

    @property
    def size(self) -> int:
        """Bytes that may be active."""
        return self.limits[0].size

    @property
    def reason(self) -> Limit:
        """The limit that decides."""
        return self.limits[0]


def ceiling(
    machine: Machine,
    *,
    explicit: int | None = None,
    overhead: int = 0,
    learned: int | None = None,
    card_share: int | None = None,
) -> Ceiling:
    """The ceiling of this machine.

    Args:
        explicit: ``--max-active-memory-bytes``. It replaces the shares below, but
            not what they are shares of.
        overhead: what the process holds beside MLX's memory (`Usage.overhead`).
        learned: the value of a `LearnedCeiling`, if it has one.
        card_share: what other programs leave of a CUDA card (`Usage.card_share`);
            None: not looked at, as for what may fit later.
    """
    limits = []
    if explicit is not None:
        limits.append(Limit("flag", explicit, "--max-active-memory-bytes"))
    for name, size, source in (
        (
            "device",
            machine.recommended,
            "the working set that Metal recommends (recommendedMaxWorkingSetSize)",
        ),
        ("wired", machine.wired_limit, "sysctl iogpu.wired_limit_mb"),
        ("card", machine.card, "the memory of the card"),
        (
            "free",
            card_share,
            "what is free on the card now, with what this process holds there",
        ),
    ):
        if size is not None:
            part = GPU_SHARE if explicit is None else 1.0
            words = f"{part:.0%} of {format_size(size)}: {source}"
            limits.append(Limit(name, int(part * size), words))
    share = FOOTPRINT_SHARE if machine.gpu else CPU_SHARE
    share = share if explicit is None else 1.0
    # What MLX holds on a card takes no RAM.
    if machine.total and machine.card is None:
        source = f"{share:.0%} of {format_size(machine.total)} of RAM"
        if overhead:
            source += f", less {format_size(overhead)} that the process holds besides"
        limits.append(
            Limit("ram", max(0, int(share * machine.total) - overhead), source)
        )
    if learned is not None:
        limits.append(
            Limit("learned", learned, "lowered after the GPU ran out of memory")
        )
    if not limits:
        # Nothing is known about this machine; nothing is limited.
        limits.append(Limit("none", 2**63 - 1, "nothing is known of this machine"))
    return Ceiling(tuple(sorted(limits, key=lambda limit: limit.size)))


class LearnedCeiling:
    """What out-of-memory faults have taught. Thread-safe.

    Of the static ceiling C, B bytes are in use with nothing running (the weights).
    A fault says that N bytes were too much: what was there where that is known, else
    the most that was held in the step that failed. N is at most what the ceiling was:
    by estimate the step stayed below it, and the estimate was short. It sets the
    ceiling to B + 0.8 (N - B), so that each fault lowers it. It never goes
    below B + 0.25 (C - B): what fails there fails for what others hold, and to refuse
    everything would help nobody. There it stays for 5 minutes, then goes back to C
    within an hour, evenly; then it is forgotten.

    Args:
        clock: seconds, monotonic; tests bring their own.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._low: int | None = None
        self._since = 0.0

    def fault(self, too_much: int, baseline: int, static: int) -> int:
        """Lowers it after a fault with ``too_much`` bytes; returns the new value."""
        room = max(0, static - baseline)
        with self._lock:
            before = self._value(static)
            most = static if before is None else before
            wanted = baseline + int(LOWERED_TO * (min(too_much, most) - baseline))
            self._low = min(max(wanted, baseline + int(FLOOR * room)), most)
            self._since = self._clock()
            return self._low

    def value(self, static: int) -> int | None:
        """The learned ceiling now, at most ``static``; None when it has none."""
        with self._lock:
            return self._value(static)

    @property
    def remaining(self) -> float:
        """Seconds until what was learned is forgotten; 0 when nothing is known."""
        with self._lock:
            if self._low is None:
                return 0.0
            return max(0.0, self._since + HOLD_S + RETURN_S - self._clock())

    def _value(self, static: int) -> int | None:
        if self._low is None:
            return None
        returning = (self._clock() - self._since - HOLD_S) / RETURN_S
        if returning >= 1 or self._low >= static:
            self._low = None
            return None
        return self._low + int((static - self._low) * max(0.0, returning))
