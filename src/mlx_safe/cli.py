"""The command ``mlx-safe``."""

from __future__ import annotations

import errno
import os
import signal
import sys

from ._command import CommandError, Parser, will_print
from ._output import complain, keep_numbers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["main"]

USAGE = """\
usage: mlx-safe [--version] COMMAND ...

commands:
  serve    mlx_lm.server, protected: takes every flag of it
  run      any Python program that uses MLX, protected: run -- COMMAND ...
  doctor   what this machine is, and what fits; --model PATH sizes the flags
  top      what a server does now, in a terminal
  status   what is active on this machine, and for what is not, why
  reports  the crash reports: list, show, export, prune
  kv       KV caches on disk: list, check, empty

mlx-safe COMMAND --help says more of each.
"""


def _serve(arguments: Sequence[str]) -> int:
    from .server.serve import serve

    return serve(arguments)


def _run_program(arguments: Sequence[str]) -> int:
    from .running.command import run

    return run(arguments)


def _doctor(arguments: Sequence[str]) -> int:
    from .doctor import doctor

    return doctor(arguments)


def _status(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="mlx-safe status",
        allow_abbrev=False,
        description="What is active on this machine, and for what is not, why.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    asked = parser.parse_args(list(arguments))
    import json

    from . import install
    from .checks import backend

    active = install()
    found = active.as_dict()
    found["backend"], lacks = backend(active.mlx_version, active.runtime)
    found["reasons"] = [*lacks, *active.reasons]
    if asked.json:
        print(json.dumps(found, indent=2))
        return 0
    for name, value in sorted(found.items()):
        lines = value if isinstance(value, list) else [value]
        for i, line in enumerate(lines or ["none"]):
            print(f"{'' if i else name:18} {line}")
    return 0


def _top(arguments: Sequence[str]) -> int:
    from .top import top

    return top(arguments)


def _reports(arguments: Sequence[str]) -> int:
    from .forensics.command import reports

    return reports(arguments)


def _kv(arguments: Sequence[str]) -> int:
    from .kv.command import kv

    return kv(arguments)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "serve": _serve,
    "run": _run_program,
    "doctor": _doctor,
    "top": _top,
    "status": _status,
    "reports": _reports,
    "kv": _kv,
}

# They begin something that works without; the others are there for what they print.
WITHOUT_STDOUT = ("serve", "run")
# What a write may meet at a file: a full disk, quota or limit, a terminal that has
# gone, a descriptor that is only for reading.
OF_A_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    keep_numbers()
    try:
        status = _run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except BrokenPipeError:
        _no_more_output()  # such as `mlx-safe status | head -1`
        return 128 + signal.SIGPIPE
    except OSError as e:
        if e.errno not in OF_A_WRITE or e.filename is not None:
            raise
        _no_more_output()
        complain(f"mlx-safe: stdout: {e.strerror}")
        return 2


def _no_more_output() -> None:
    # At its end Python would write what is left again, and complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: Sequence[str]) -> int:
    try:
        if not arguments or arguments[0] not in WITHOUT_STDOUT:
            will_print()
        if not arguments or arguments[0] in ("-h", "--help"):
            print(USAGE, end="")
            return 0 if arguments else 2
        if arguments[0] == "--version":
            from ._version import __version__

            print(f"mlx-safe {__version__}")
            return 0
        command = COMMANDS.get(arguments[0])
        if command is None:
            known = ", ".join(COMMANDS)
            raise CommandError(f"no command {arguments[0]!r}; there are: {known}")
        return command(arguments[1:])
    except CommandError as e:
        complain(f"mlx-safe: {e}")
        return 2
    except KeyboardInterrupt:
        return 130
