"""What the commands share: the parser of their flags, and lines that end well."""

from __future__ import annotations

import argparse
import difflib
import errno
import json
import os
import stat
import sys
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from _typeshed import SupportsWrite

__all__ = [
    *("MLX", "CommandError", "Parser", "endless_in", "in_one_line", "json_value"),
    *("need_mlx", "number", "path_or_name", "read_file", "read_text", "will_print"),
]

# As pip knows it.
MLX = "mlx[cpu]" if sys.platform == "linux" else "mlx"

# Characters of somebody else's message: MLX lists all weights that are missing.
MESSAGE_MAX = 500

# Bytes of a file that somebody writes by hand.
FILE_MAX = 1 << 20


class CommandError(Exception):
    """A user's mistake: one line that says what to do, exit status 2."""


class Parser(argparse.ArgumentParser):
    """Raises `CommandError` for a mistake, where argparse prints its usage."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message}{self._meant(message)}; see {self.prog} --help")

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        if file is None:
            will_print()
        # argparse's own (Python 3.14) says nothing of a disk that is full.
        print(self.format_help(), end="", file=file)

    def _meant(self, message: str) -> str:
        known = list(self._option_string_actions)
        unknown = message.removeprefix("unrecognized arguments: ").split()[0]
        if unknown == message.split()[0] or not unknown.startswith("--"):
            return ""
        near = difflib.get_close_matches(unknown.partition("=")[0], known, 1)
        return f"; did you mean {near[0]}?" if near else ""


def will_print() -> None:
    """Call it before what is asked for is printed.

    A character that the terminal has not becomes "?", and ends nothing.

    Raises:
        CommandError: there is no stdout.
    """
    if sys.stdout is None:
        raise CommandError("there is no stdout to write to")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


def path_or_name(text: str) -> str:
    """An ``argparse`` type: ``text`` itself, if a path or a name can be that."""
    # Empty: a script's variable that is not set. No path or host has the others.
    if not text.strip() or not text.isprintable():
        raise argparse.ArgumentTypeError(f"must be a printable text, not {text!r}")
    return text


def number(text: str) -> float:
    """An ``argparse`` type, which says of another text what is wrong."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, not {text!r}") from None


def json_value(text: str) -> object:
    """An ``argparse`` type: the value of a JSON text."""
    try:
        return json.loads(text)
    except ValueError:
        why = repr(text[:MESSAGE_MAX])
    except RecursionError:
        why = "one with too many brackets in one another"
    raise argparse.ArgumentTypeError(f"must be JSON, not {why}")


def read_file(path: str, given: str) -> bytes:
    """What is in a small file, and in no pipe or device.

    Each start of a supervised server reads it, and a pipe has its contents once; one
    that nobody writes into would let the start wait for ever, without a word.

    Args:
        given: the flag and its value, for the message.

    Raises:
        CommandError: it is no file, too large, or cannot be read.
    """
    try:
        mode = Path(path).stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(mode):
            raise BlockingIOError
        # Linux's /proc/kmsg is a file by its mode; its reader waits for more.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = b""
            while len(found) <= FILE_MAX and (piece := os.read(fd, FILE_MAX)):
                found += piece
        finally:
            os.close(fd)
    except BlockingIOError:
        why = "must be a file; each start reads it again"
        raise CommandError(f"{given}: {why}") from None
    except OSError as e:
        raise CommandError(f"{given}: cannot be read: {e.strerror}") from None
    if len(found) > FILE_MAX:
        raise CommandError(f"{given}: is larger than {FILE_MAX} bytes")
    return found


def read_text(path: str, given: str) -> str:
    """A small file's text, without the mark that some editors begin it with.

    Raises:
        CommandError: as of `read_file`; or it is not UTF-8.
    """
    try:
        return read_file(path, given).decode("utf-8-sig")
    except UnicodeError:
        raise CommandError(f"{given}: is not UTF-8") from None


def endless_in(directory: Path) -> str | None:
    """A name in ``directory`` whose reader might wait for ever; None: there is none.

    A pipe, a socket, a device, or a link to one.
    """
    try:
        entries = sorted(directory.iterdir())
    except OSError:
        return None
    for entry in entries:
        try:
            mode = entry.stat().st_mode
        except OSError:
            continue  # a link to nothing
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            return entry.name
    return None


def in_one_line(error: BaseException) -> str:
    """All of its message in one line; the hub's libraries use many lines."""
    text = " ".join(str(error).split())[:MESSAGE_MAX] or type(error).__name__
    # Says where in the file, and not that it is one.
    if isinstance(error, json.JSONDecodeError):
        return f"a file is not JSON: {text}"
    return f"a file is not text: {text}" if isinstance(error, UnicodeError) else text


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
