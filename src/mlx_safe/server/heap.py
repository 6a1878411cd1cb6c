"""glibc's malloc gives back what large requests have freed.

A thread allocates in one of eight arenas for each core. Once a large block was freed,
glibc (2.36) keeps up to twice its size, 64 MiB at most, at the end of each arena.
``malloc_trim`` leaves that there. A request of 8 MB leaves 24 MB: 0.4 GB on two cores,
3 GB on sixteen.
"""

from __future__ import annotations

import ctypes

__all__ = ["KEPT", "give_back_what_is_free"]

# Bytes that an arena keeps at its end.
KEPT = 4 * 2**20

# <malloc.h>. Either ends the growth of both; the second is as far as that goes, so that
# no other block than before is mapped on its own.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_THRESHOLD_MAX = -1, -3, 32 * 2**20


def give_back_what_is_free() -> None:
    """For the rest of the process. Nothing where malloc is not glibc's."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # macOS and musl have none
        mallopt(_MMAP_THRESHOLD, _MMAP_THRESHOLD_MAX)
        mallopt(_TRIM_THRESHOLD, KEPT)
