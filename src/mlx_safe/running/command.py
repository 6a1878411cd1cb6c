"""The command ``mlx-safe run``."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
from pathlib import Path

from .. import _core, _output
from .._command import CommandError, Parser, in_one_line

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["environment", "run"]

STARTUP = str(Path(__file__).resolve().parent / "startup")
FD = "{fd}"
PORT_MAX = 65535


def _parser() -> Parser:
    parser = Parser(
        prog="mlx-safe run",
        usage="mlx-safe run [options] -- COMMAND [ARGUMENT ...]",
        allow_abbrev=False,
        description="Runs a Python program with the GPU's faults caught in it, in its "
        "children, and in what it executes instead of itself. The program is not "
        "changed. Python's -I, -E and -S switch this off.",
    )
    parser.add_argument(
        "--asgi",
        action="store_true",
        help="what uvicorn serves answers faults as mlx_safe.asgi.protect does",
    )
    parser.add_argument(
        "--replay",
        action="store_true",
        help="batches of mlx-lm's BatchGenerator are begun again after a fault, as "
        "mlx_safe.mlx_lm.protect does",
    )
    parser.add_argument(
        "--no-signals",
        action="store_true",
        help="no crash reports for SIGSEGV and its like",
    )
    parser.add_argument(
        "--supervise",
        action="store_true",
        help="start the program again when it ends with status 75 or by a signal",
    )
    parser.add_argument(
        "--listen",
        metavar="[HOST:]PORT",
        help=f"with --supervise: open a socket that stays open over restarts, and put "
        f"its descriptor where {FD} stands in the command, as in uvicorn --fd {FD}",
    )
    parser.add_argument("command", nargs="...", help="the program and its arguments")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Becomes the program, or its supervisor; returns the exit status.

    Raises:
        CommandError: it cannot be started; the message says what to do.
    """
    own, command = _split(list(arguments))
    asked = _parser().parse_args(own)
    if not command:
        raise CommandError("no program is named: mlx-safe run [options] -- COMMAND ...")
    program = _find(command[0])
    listens = asked.listen is not None
    if listens and not asked.supervise:
        raise CommandError("--listen needs --supervise")
    if listens != any(FD in word for word in command):
        raise CommandError(
            f"--listen needs {FD} in the command, and {FD} needs --listen"
        )
    words = [
        *([] if asked.no_signals else ["signals"]),
        *(["asgi"] if asked.asgi else []),
        *(["replay"] if asked.replay else []),
    ]
    env = environment(os.environ, words)
    # What becomes of this process is no crash of a program that uses MLX.
    _core.remove_run_file()
    if not asked.supervise:
        _output.flush()
        try:
            os.execve(program, command, env)
        except OSError as e:
            raise _cannot_start(command[0], e) from e
    from . import restarts

    with contextlib.ExitStack() as stack:
        listener = None
        if listens:
            listener = stack.enter_context(_listen(asked.listen))
            fd = str(listener.fileno())
            command = [word.replace(FD, fd) for word in command]
        try:
            return restarts.Restarts([program, *command[1:]], env, listener).run()
        except OSError as e:
            raise _cannot_start(command[0], e) from e


def _find(name: str) -> str:
    """The program's path."""
    program = shutil.which(name)
    if program is not None:
        return program
    if name.startswith("-"):
        raise CommandError(
            f"{name}: no command begins with a dash; put options of mlx-safe run "
            "before the --, and run a module as: python -m MODULE"
        )
    if Path(name).is_file():
        raise CommandError(f"{name}: is no program; a script runs as: python {name}")
    raise CommandError(f"{name or repr(name)}: no such command")


def _cannot_start(name: str, error: OSError) -> CommandError:
    """What is said of a program that is there and cannot be executed."""
    if error.errno == errno.ENOEXEC:
        why = "has no #! line, and is no program of this machine"
    elif error.errno == errno.ENOENT:
        why = "the interpreter that its first line names is not there"
    else:
        why = in_one_line(error)
    return CommandError(f"{name}: cannot be started: {why}")


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Our options and the program's words; the ``--`` between them may be left out."""
    if "--" in arguments:
        at = arguments.index("--")
        return arguments[:at], arguments[at + 1 :]
    own: list[str] = []
    while arguments and arguments[0].startswith("-"):
        own.append(arguments.pop(0))
        if own[-1] == "--listen" and arguments:
            own.append(arguments.pop(0))
    return own, arguments


def environment(base: Mapping[str, str], words: Sequence[str]) -> dict[str, str]:
    """``base`` with what protects a Python that is started in it."""
    before = base.get("PYTHONPATH", "").split(os.pathsep)
    path = [STARTUP, *(entry for entry in before if entry not in ("", STARTUP))]
    return {
        **base,
        "PYTHONPATH": os.pathsep.join(path),
        "MLX_SAFE_RUN": ",".join(words),
    }


def _listen(where: str) -> socket.socket:
    from ..server import supervisor

    host, colon, port = where.rpartition(":")
    is_ipv6 = host.startswith("[") and host.endswith("]")
    host = host.strip("[]") if colon else "127.0.0.1"
    is_plain = bool(host) and (is_ipv6 or ":" not in host)
    if not is_plain or not port.isdecimal() or int(port) > PORT_MAX:
        raise CommandError(
            f"--listen {where}: must be a port, or HOST:PORT, such as [::1]:8000"
        )
    try:
        family, address = supervisor.find_address(host, int(port))
    except CommandError as e:
        why = str(e).removeprefix(f"--host {host}: ")
        raise CommandError(f"--listen {where}: {why}") from e
    try:
        listener = socket.create_server(address[:2], family=family, backlog=512)
    except OSError as e:
        why = os.strerror(e.errno) if e.errno else str(e)
        raise CommandError(f"--listen {where}: {why}") from e
    listener.set_inheritable(True)
    return listener
