"""What ``import mlx_safe`` does by itself.

It installs, and plans the faults that the environment asks for. Both may have something
to say. ``mlx-safe serve`` does them itself, as soon as its log has its format.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["begin", "begin_or_exit", "is_serve"]


def begin(tell: Callable[[str], None] | None = None) -> None:
    """Installs, and plans faults, as the environment says; again it changes nothing.

    Args:
        tell: told at the end of each plan that has not struck; None: a line on stderr.

    Raises:
        ValueError: a plan cannot be read; with one line that says how.
    """
    wanted = os.environ.get("MLX_SAFE_AUTOINSTALL", "1").lower()
    if wanted not in ("0", "false", "no", "off", ""):
        from ._install import install

        install()
    names = ("MLX_SAFE_INJECT", "MLX_SAFE_INJECT_CEILING")
    if any(os.environ.get(name) for name in names):
        from .testing import environment

        environment.follow(tell)


def begin_or_exit() -> None:
    """`begin`; a plan that cannot be read ends the program with status 2.

    A test that went on without its fault would show nothing.
    """
    try:
        begin()
    except ValueError as e:
        print(f"mlx-safe: {e}", file=sys.stderr)
        sys.exit(2)


def is_serve() -> bool:
    """Whether this process is ``mlx-safe serve``, or ``python -m mlx_safe serve``."""
    # A program that embeds Python may have none.
    words: list[str] = getattr(sys, "argv", [])
    if words[1:2] != ["serve"]:
        return False
    if words[0] == "-m":  # so it is until Python has found what to run
        return sys.orig_argv[-len(words)].endswith("mlx_safe")
    return words[0].rpartition("/")[2] == "mlx-safe"
