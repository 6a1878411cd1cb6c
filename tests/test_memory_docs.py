"""The worked example of docs/memory.md is what the library computes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mlx_safe.memory.ceiling import ceiling
from mlx_safe.memory.estimate import CacheCost, LayerCost
from mlx_safe.memory.machine import Machine
from mlx_safe.memory.sizes import format_size
from mlx_safe.memory.sizing import format_tokens, sizing

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


def rows() -> Iterator[str]:
    for ram, share, name, model, layers in MACHINES:
        total = ram * 2**30
        machine = Machine("darwin", "Apple", True, total, int(share * total))
        # Keys and values, 8 heads, 128 numbers of 2 bytes.
        cost = CacheCost(((LayerCost(per_slot=2 * 8 * 128 * 2), layers),))
        fits = sizing(
            model=int(model * GB),
            ceiling=ceiling(machine, overhead=GB // 2).size,
            cost=cost,
            steps=[(2048, GB)],
        )
        yield (
            f"| {ram} GB | {name}, {model} GB | {format_size(fits.ceiling)} "
            f"| {format_size(fits.prompt_cache)} | {format_tokens(fits.room_tokens)} "
            f"| {fits.room_tokens // 2000 * 1000} |"
        )


def test_the_worked_example() -> None:
    text = DOCS.read_text()
    for row in rows():
        assert row in text
