"""What the command's rooms share."""

from __future__ import annotations

import argparse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

__all__ = ["CommandError", "Parser"]


class CommandError(Exception):
    """A user's mistake: one line that says what to do, exit status 2."""


class Parser(argparse.ArgumentParser):
    """Raises `CommandError` for a mistake, where argparse prints its usage."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message}; see {self.prog} --help")
