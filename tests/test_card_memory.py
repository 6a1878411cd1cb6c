"""Memory on a CUDA card, as the server sees it: no card needed.

MLX keeps below the ceiling by itself there, as far as it can. It gives back what a step
has used a moment after it has ended.
"""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mlx_safe.memory.demand import Row
from mlx_safe.memory.estimate import Transients
from mlx_safe.server import headroom, observer
from mlx_safe.server.admission import Load
from mlx_safe.server.headroom import LOOKS, Headroom, MemoryFlags
from mlx_safe.server.observer import Observer
from mlx_safe.server.prefill import PrefillStep

CEILING = 600
ALONE = Load((Row(prompt=100, total=120),), length=100)


class Card:
    """MLX's counters; each look at what is active takes the next of ``active``."""

    def __init__(self, *active: int) -> None:
        self.active = deque(active)
        self.peak = 0
        self.waits = 0

    def get_active_memory(self) -> int:
        return self.active.popleft() if len(self.active) > 1 else self.active[0]

    def get_cache_memory(self) -> int:
        return 0

    def get_peak_memory(self) -> int:
        return self.peak

    def reset_peak_memory(self) -> None:
        self.peak = 0

    def synchronize(self) -> None:
        self.waits += 1


def room(monkeypatch: pytest.MonkeyPatch, card: Card, is_card: bool = True) -> Headroom:
    settings: Any = SimpleNamespace(prefill_step_size=64)
    empty: Any = SimpleNamespace(nbytes=0, is_limited=False, max_bytes=0)
    made = Headroom(MemoryFlags(), empty, PrefillStep(settings))
    ceiling = SimpleNamespace(size=CEILING)
    made.limits = cast(
        Any,
        SimpleNamespace(
            holds_mlx_back=is_card, now=lambda: ceiling, static=lambda: ceiling
        ),
    )
    monkeypatch.setattr(headroom, "mx", card)
    monkeypatch.setattr(headroom, "LOOK_AGAIN_S", 0.0)
    return made


def test_what_a_step_leaves_behind_for_a_moment_ends_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card = Card(900, 900, 500)
    assert room(monkeypatch, card).single_step(ALONE) == "fits"
    assert card.waits == 2
    card = Card(900, 500)
    assert room(monkeypatch, card).steps_with_room(ALONE) == 1
    assert card.waits == 1


def test_what_does_not_fit_is_looked_at_for_so_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card = Card(900)
    assert room(monkeypatch, card).single_step(ALONE) == "none"
    assert card.waits == LOOKS
    # Elsewhere the first look tells all there is to know.
    card = Card(900, 500)
    assert room(monkeypatch, card, is_card=False).single_step(ALONE) == "none"
    assert card.waits == 0


@pytest.mark.parametrize(("peak", "learned"), [(550, 0), (900, 800)])
def test_a_peak_above_what_mlx_keeps_below_is_what_a_step_needs(
    monkeypatch: pytest.MonkeyPatch, peak: int, learned: int
) -> None:
    """Below it MLX takes what there is. Above it has waited for all else."""
    card, transients = Card(100), Transients()
    monkeypatch.setattr(observer, "mx", card)
    seen = Observer(transients, limit=lambda: CEILING)
    seen.begin()
    card.peak = peak
    seen.end(64, 200)
    assert seen.peak == peak
    # With the margin of a prediction.
    assert learned <= transients.predict(64, 200) <= 1.3 * learned


def test_a_ceiling_that_falls_during_a_step_says_nothing_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card, transients, ceiling = Card(100), Transients(), [CEILING]
    monkeypatch.setattr(observer, "mx", card)
    seen = Observer(transients, limit=lambda: ceiling[0])
    seen.begin()
    card.peak, ceiling[0] = 550, 300
    seen.end(64, 200)
    assert transients.predict(64, 200) == 0
