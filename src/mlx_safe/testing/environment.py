"""Faults in a program that no test can reach: planned by its environment.

``MLX_SAFE_INJECT``: plans, as `plans.parse_plan` reads them.
``MLX_SAFE_INJECT_CEILING``: the size of the GPU, such as ``2G``.
``MLX_SAFE_INJECT_LOG``: a file to which each process adds a line for each model that it
attaches (``attached PID CLASS``) and each fault that strikes (``fired PID PLAN``).
"""

from __future__ import annotations

import os

from .. import _output
from . import ceilings, models, plans

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["follow", "plan_from_environment", "tell_unfired"]

_planned: list[plans.Injection | ceilings.GPUCeiling] = []
_has_followed = False


def _on_stderr(line: str) -> None:
    _output.complain(f"mlx-safe: {line}")


_tell: Callable[[str], None] = _on_stderr


def follow(tell: Callable[[str], None] | None = None) -> None:
    """Plans what the environment asks for, and attaches each model that is loaded.

    Called when mlx_safe is imported; once is enough. At the end of a program that
    has imported ``mlx.nn`` each plan that has not struck is reported.

    Args:
        tell: how, each by a line; None: as before, at first on stderr.

    Raises:
        ValueError: the environment cannot be read; with one line that says how.
    """
    global _has_followed, _tell
    _tell = tell or _tell
    if _has_followed:
        return
    size = os.environ.get(ceilings.ENVIRONMENT)
    planned = plans.parse_plan(os.environ.get(plans.ENVIRONMENT, ""))
    _check_log()
    if size:
        try:
            _planned.append(ceilings.gpu_ceiling(size))
        except ValueError as e:
            raise ValueError(f"{ceilings.ENVIRONMENT} {e}") from None
    _planned.extend(plans.inject(**plan) for plan in planned)
    _has_followed = bool(_planned)
    if _planned:
        models.attach_all(_watch_the_end)


def _check_log() -> None:
    """Or the first model could not be attached, and would seem to be at fault."""
    try:
        with plans.opened_log():
            pass
    except OSError as e:
        raise ValueError(f"{plans.LOG}: cannot be written: {e.strerror}") from None


def _watch_the_end() -> None:
    import atexit

    atexit.register(tell_unfired)


def tell_unfired() -> None:
    """Names the plans of the environment that have not struck, a line each."""
    while _planned:
        one = _planned.pop()
        if not (one.fired if isinstance(one, plans.Injection) else one.steps):
            name = (
                plans.ENVIRONMENT
                if isinstance(one, plans.Injection)
                else ceilings.ENVIRONMENT
            )
            _tell(f"{name}: {one.why_not()}")


def plan_from_environment() -> list[plans.Injection]:
    """The plans that ``MLX_SAFE_INJECT`` asks for; an empty list when unset.

    They hold since mlx_safe was imported.
    """
    follow()
    return [one for one in _planned if isinstance(one, plans.Injection)]
