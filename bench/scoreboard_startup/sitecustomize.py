"""In each server that the scoreboard starts: its models are counted, faults strike.

``SCOREBOARD_DIR`` names a directory. Each file ``plan-N`` in it is a plan of
`mlx_safe.testing.parse_plan`. The process that takes the file counts from then on, so
what is planned while a server starts again strikes the next one. ``fired-PID`` has a
line for each fault that struck, with its time. With ``SCOREBOARD_CEILING`` the GPU has
that many bytes; ``memory-PID`` has the most that a step needed, and how many failed.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

LOOK_EVERY_S = 0.01


def follow(directory: Path, ceiling: str | None) -> None:
    from mlx_safe import testing

    limit = testing.gpu_ceiling(ceiling) if ceiling else None
    planned: list[testing.Injection] = []
    steps = 0
    while True:
        time.sleep(LOOK_EVERY_S)
        for one in directory.iterdir():
            if one.name.startswith("plan-"):
                taken = one.rename(directory / f"taken-{one.name}")
                planned += [
                    testing.inject(**plan)
                    for plan in testing.parse_plan(taken.read_text())
                ]
        struck = [plan for plan in planned if plan.fired]
        if struck:
            with (directory / f"fired-{os.getpid()}").open("a") as file:
                file.writelines(f"{time.time():.3f} {plan}\n" for plan in struck)
            planned = [plan for plan in planned if not plan.fired]
        if limit is not None and limit.steps != steps:
            steps = limit.steps
            told = directory / f"telling-{os.getpid()}"
            told.write_text(f"{limit.peak} {limit.struck} {limit.steps}")
            told.rename(directory / f"memory-{os.getpid()}")


def start() -> None:
    given = Path(os.environ["SCOREBOARD_DIR"]), os.environ.get("SCOREBOARD_CEILING")
    threading.Thread(target=follow, args=given, daemon=True).start()


if "SCOREBOARD_DIR" in os.environ:
    from mlx_safe import testing as _testing

    # MLX is imported by who computes; a helper process takes no plan.
    _testing.attach_all(start)
