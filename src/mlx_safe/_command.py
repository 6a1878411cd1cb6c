"""What the command's rooms share."""

from __future__ import annotations

import argparse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

__all__ = ["CommandError", "Parser", "in_one_line"]

# Characters of somebody else's message: MLX lists all weights that are missing.
MESSAGE_MAX = 500


class CommandError(Exception):
    """A user's mistake: one line that says what to do, exit status 2."""


class Parser(argparse.ArgumentParser):
    """Raises `CommandError` for a mistake, where argparse prints its usage."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message}; see {self.prog} --help")


def in_one_line(error: BaseException) -> str:
    """All of its message that can be told; the hub's libraries use many lines."""
    return " ".join(str(error).split())[:MESSAGE_MAX] or type(error).__name__
