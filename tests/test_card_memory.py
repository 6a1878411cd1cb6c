"""Memory on a CUDA card, as the server sees it: no card needed.

MLX gives back there what a step has used a moment after it has ended.
"""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mlx_safe.memory.demand import Row
from mlx_safe.memory.estimate import Transients
from mlx_safe.server import headroom
from mlx_safe.server.admission import Ask, Load
from mlx_safe.server.headroom import LOOKS, Headroom, MemoryFlags
from mlx_safe.server.observer import Observer
from mlx_safe.server.prefill import PrefillStep

CEILING = 600
ALONE = Load((Row(prompt=100, total=120),), length=100)


class Card:
    """MLX's counters; each look at what is active takes the next of ``active``."""

    def __init__(self, *active: int) -> None:
        self.active = deque(active)
        self.waits = 0

    def get_active_memory(self) -> int:
        return self.active.popleft() if len(self.active) > 1 else self.active[0]

    def get_cache_memory(self) -> int:
        return 0

    def synchronize(self) -> None:
        self.waits += 1

    def get_peak_memory(self) -> int:
        return 0

    def reset_peak_memory(self) -> None:
        pass


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
    card = Card(900, 900, 500)
    nobody = Load((), length=0)
    ask = Ask(prompt=100, total=120, may_wait=False)
    assert room(monkeypatch, card).admits(ask, nobody).verdict == "admit"
    assert card.waits == 2


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


def test_what_the_model_before_leaves_for_a_moment_is_not_the_next_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card = Card(590, 590, 200)
    found = room(monkeypatch, card)
    monkeypatch.setattr(headroom, "demand_of", lambda *_: found._demand)
    monkeypatch.setattr(headroom, "context_of", lambda *_: None)
    monkeypatch.setattr(found, "_size_up", lambda: None)
    provider: Any = SimpleNamespace(model_key="b", model=object(), tokenizer=object())
    found.model_loaded(provider)
    assert found._baseline == 200


def test_a_failure_teaches_of_a_step_what_it_can_have_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or one of few tokens, by another cause, would let none be read beside others."""
    monkeypatch.setattr("mlx_safe.server.observer.mx", Card(0))
    transients = Transients()
    transients.observe(64, 64, 6_400)
    calibrated = transients.predict(64, 64)
    observer = Observer(transients, learns=False)
    for _ in range(3):
        observer.begin()
        observer.failed(64, 64, there=10**11)
    assert 10 * calibrated < transients.predict(64, 64) < 50 * calibrated
