"""How sure a figure of several runs is."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence

__all__ = ["interval"]


def interval(found: Sequence[float]) -> tuple[float, float, float]:
    """The median, and its 95 % interval by bootstrap: (median, lower, upper)."""
    draw = random.Random(1)
    medians = sorted(
        statistics.median(draw.choices(found, k=len(found))) for _ in range(2000)
    )
    return statistics.median(found), medians[50], medians[-51]
