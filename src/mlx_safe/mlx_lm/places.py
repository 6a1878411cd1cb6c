"""Each request of a batch has its own sampler and its own logits processors.

mlx-lm 0.31.3: a batch in which none has any keeps their places when requests end. One
that joins later gets what is in another's place, or nothing, so that its penalties and
its sampler are left out (`findings/mlx-lm-batch-mixes-up-samplers.sh`; 0.32 does not).
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["keep_places"]

_MARK = "_mlx_safe_keeps_places"


def keep_places(cls: Any) -> None:
    """Has ``cls`` (mlx-lm's ``GenerationBatch``) take out their places as well.

    It is not undone. Any thread, while none generates.
    """
    if _MARK in vars(cls):
        return
    take_out = cls.filter

    def filter(self: Any, keep: list[int]) -> None:
        take_out(self, keep)
        # Only where none has any: else they were taken out.
        if len(self.samplers) != len(keep):
            self.samplers = [None] * len(keep)
        if len(self.logits_processors) != len(keep):
            self.logits_processors = [[] for _ in keep]

    cls.filter = filter
    setattr(cls, _MARK, True)
