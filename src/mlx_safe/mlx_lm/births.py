"""Caches know which faults were before them.

A server that reads a prompt outside the generator does so with a cache that it has made
for it. A fault that was counted before that is not of its work.
"""

from __future__ import annotations

from .. import _core

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

__all__ = ["are_younger_than_faults", "note_births"]

_BORN = "_mlx_safe_born"


def note_births() -> None:
    """Has mlx-lm's caches (0.31.3 to 0.32) note the epoch at which they are made.

    It is not undone. Any thread, while none generates.
    """
    from mlx_lm.models.cache import _BaseCache

    if "__new__" in vars(_BaseCache):
        return

    def __new__(cls: Any, *_: Any, **__: Any) -> Any:
        cache = object.__new__(cls)
        setattr(cache, _BORN, _core.epoch())
        return cache

    _BaseCache.__new__ = __new__


def are_younger_than_faults(caches: Iterable[Any]) -> bool:
    """Whether no fault has been counted since ``caches``, of one prompt, were made.

    A copy is as old as what it is of. One of a class that is not mlx-lm's, which some
    layers of a prompt may have (fusion-mlx 0.10 quantises them), does not say; then
    those beside it do.
    """
    born = [getattr(cache, _BORN, None) for cache in caches]
    found = {epoch for epoch in born if epoch is not None}
    return found == {_core.epoch()}
