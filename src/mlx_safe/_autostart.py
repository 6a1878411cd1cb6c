"""What ``import mlx_safe`` does by itself.

It installs, and plans the faults that the environment asks for. Both may have something
to say. ``mlx-safe serve`` does them itself, as soon as its log has its format, and
``mlx-safe reports`` does not.
"""

from __future__ import annotations

import os
import sys

from . import _output

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["begin", "begin_or_exit", "is_left_to_the_command"]


def begin(tell: Callable[[str], None] | None = None) -> None:
    """Installs, and plans faults, as the environment says; again it changes nothing.

    Args:
        tell: called at the end for each plan that has not struck; None: a line on
            stderr.

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
        _output.complain(f"mlx-safe: {e}")
        sys.exit(2)


# Of ``mlx-safe``: one begins when its log has its format, the other makes no directory
# that it is only to read.
_LEFT_TO = ("serve", "reports")


def is_left_to_the_command() -> bool:
    """Whether this is ``mlx-safe`` or ``python -m mlx_safe`` with one of `_LEFT_TO`."""
    # A program that embeds Python may have none.
    words: list[str] = getattr(sys, "argv", [])
    if not set(words[1:2]) & set(_LEFT_TO):
        return False
    if words[0] == "-m":  # so it is until Python has found what to run
        return sys.orig_argv[-len(words)].endswith("mlx_safe")
    return words[0].rpartition("/")[2] == "mlx-safe"
