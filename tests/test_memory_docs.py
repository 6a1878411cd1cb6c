"""The worked example of docs/memory.md is what the library computes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from mlx_safe.memory.budget import Situation, decide
from mlx_safe.memory.ceiling import ceiling
from mlx_safe.memory.demand import Demand, Row, step_sizes
from mlx_safe.memory.estimate import MARGIN, CacheCost, LayerCost, Transients
from mlx_safe.memory.machine import Machine
from mlx_safe.memory.sizes import format_size
from mlx_safe.memory.sizing import ANSWER, Sizing, format_tokens, sizing

DOCS = Path(__file__).parent.parent / "docs" / "memory.md"
GB = 10**9
# RAM in GiB, the recommended share of it, the model in words and GB, its layers.
MACHINES = (
    (16, 2 / 3, "4B, 4 bit", 2.3, 36),
    (36, 3 / 4, "8B, 8 bit", 8.7, 36),
    (48, 3 / 4, "8B, 8 bit", 8.7, 36),
    (64, 3 / 4, "32B, 4 bit", 18.4, 64),
    (128, 3 / 4, "32B, 8 bit", 34.8, 64),
)


STEPS = partial(step_sizes, 2048)


def examples() -> Iterator[tuple[str, Sizing, Demand]]:
    """The rows of the table, and what they were computed from."""
    for ram, share, name, model, layers in MACHINES:
        total = ram * 2**30
        machine = Machine("darwin", "Apple", True, total, int(share * total))
        # Keys and values, 8 heads, 128 numbers of 2 bytes.
        cost = CacheCost(((LayerCost(per_slot=2 * 8 * 128 * 2), layers),))
        transients = Transients()
        transients.observe(2048, 2048, int(GB / MARGIN))
        demand = Demand(cost, transients)
        fits = sizing(
            model=int(model * GB),
            ceiling=ceiling(machine, overhead=GB // 2).size,
            demand=demand,
            steps=STEPS,
        )
        row = (
            f"| {ram} GB | {name}, {model} GB | {format_size(fits.ceiling)} "
            f"| {format_size(fits.prompt_cache)} | {format_tokens(fits.room_tokens)} "
            f"| {fits.prompt_tokens()} |"
        )
        yield row, fits, demand


def test_the_worked_example() -> None:
    text = DOCS.read_text()
    for row, _, _ in examples():
        assert row in text


@pytest.mark.parametrize("is_reading", [True, False], ids=["reading", "answering"])
def test_two_at_once_are_admitted(is_reading: bool) -> None:
    """The second one, while the prompt of the first is read, and afterwards."""
    for _, fits, demand in examples():
        prompt = fits.prompt_tokens()
        assert prompt is not None
        first = Row(prompt, prompt + ANSWER, is_reading)
        second = Row(prompt, prompt + ANSWER)
        held = 0 if is_reading else demand.cost.nbytes(prompt)
        now = Situation(
            ceiling=fits.ceiling, later=fits.ceiling, active=fits.model + held
        )
        options = demand.to_the_end([first, second], held, STEPS)
        assert decide(now, options).verdict == "admit"
