"""More than one rank (``mlx.launch``): all take the same steps, or all end.

mlx-lm shares each request with every rank, each runs the same loop, and the layers
of the model meet in collectives. A rank that takes another step than the others,
or none, leaves them waiting in a collective: up to MLX 0.32.0, and with RDMA, for
ever, even when its process is gone; later the ring backend raises "connection to a
peer was lost". So whatever only one rank knows may not change its steps: either it
is shared first, or this process ends, and with it the others.

Nothing here imports MLX: the supervisor's parent asks, too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

__all__ = ["AllStop", "is_one_of_many"]

# mlx.launch sets the first for ring, jaccl and nccl; Open MPI and MPICH theirs.
RANK_VARIABLES = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


@dataclass(frozen=True)
class AllStop:
    """Shared in place of a request: every rank ends its loop at the same turn."""


def is_one_of_many() -> bool:
    """Whether this process was started as a rank; its group may not exist yet."""
    return any(name in os.environ for name in RANK_VARIABLES)
