"""What the command's rooms share."""

from __future__ import annotations

import argparse
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

__all__ = ["MLX", "CommandError", "Parser", "in_one_line", "need_mlx", "path_or_name"]

# As pip knows it.
MLX = "mlx[cpu]" if sys.platform == "linux" else "mlx"

# Characters of somebody else's message: MLX lists all weights that are missing.
MESSAGE_MAX = 500


class CommandError(Exception):
    """A user's mistake: one line that says what to do, exit status 2."""


class Parser(argparse.ArgumentParser):
    """Raises `CommandError` for a mistake, where argparse prints its usage."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message}; see {self.prog} --help")


def path_or_name(text: str) -> str:
    """An ``argparse`` type: ``text`` itself, if a path or a name can be that."""
    # Empty: a script's variable that is not set. No path or host has the others.
    if not text.strip() or not text.isprintable():
        raise argparse.ArgumentTypeError(f"must be a printable text, not {text!r}")
    return text


def in_one_line(error: BaseException) -> str:
    """All of its message in one line; the hub's libraries use many lines."""
    return " ".join(str(error).split())[:MESSAGE_MAX] or type(error).__name__


def need_mlx() -> None:
    """Imports MLX.

    Raises:
        CommandError: it is not there, or broken; whatever it raises, such as
            ImportError for a library that is not there.
    """
    try:
        import mlx.core  # noqa: F401
    except Exception as e:
        if isinstance(e, ModuleNotFoundError) and e.name in ("mlx", "mlx.core"):
            raise CommandError(f"mlx is not installed: pip install '{MLX}'") from e
        # MLX's CUDA backend (0.32) is linked with the driver's library.
        if "libcuda.so" in str(e):
            raise CommandError(
                "this machine has no NVIDIA driver (libcuda.so.1), which the installed "
                "MLX needs: install the driver, or MLX for the CPU: pip uninstall "
                f"mlx-cuda-12 mlx-cuda-13; pip install --force-reinstall '{MLX}'"
            ) from e
        raise CommandError(
            f"mlx cannot be imported ({in_one_line(e)}): pip install --upgrade '{MLX}'"
        ) from e
