"""``mlx-safe serve --supervise``: a restart of the server is a pause.

A small parent that never imports MLX. It opens the listening socket and gives it
to the server, a child process. While no server listens the parent accepts itself, and
holds what comes in until the next one takes it. So it does with what the last one had
accepted and not begun to answer (`handover`). What must not wait is answered 503, each
client on a thread of its own, so that a slow one delays no other.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from .. import _core, _output
from .._command import CommandError, Parser
from . import handover, logs, ranks
from .configuration import log_format_of
from .handover import Message
from .holding import GIVES_UP, STOPPING, Holding

__all__ = [
    "LISTEN_FD",
    "Supervisor",
    "cannot_listen",
    "find_address",
    "how_it_ended",
    "is_supervised",
    "main",
    "replace_this_process",
    "start_took",
]

log = logging.getLogger("mlx_safe.supervisor")

LISTEN_FD = "MLX_SAFE_LISTEN_FD"
# Of the server: when it was started, and how long the one before took until its model
# was loaded. In seconds, of the system's monotonic clock.
BORN_S = "MLX_SAFE_BORN_S"
LAST_START_S = "MLX_SAFE_LAST_START_S"

USER_MISTAKE = 2
CRASHES_MAX = 5
BACK_OFF_S = (0.0, 1.0, 2.0, 4.0)
HOLD_S = 60.0
# A server that still lives so long after its channel was closed goes on without it: it
# is not ending. macOS closes a process's files first, and may
# take many seconds to free what a large model had.
END_TIMEOUT_S = 60.0
TURN_S = 0.2
FILES_WANTED = 4096
FIRST_FREE_PORT = 1024  # for others than root
LISTEN_ADVICE = {
    errno.EADDRINUSE: "choose another --port, or stop what listens there",
    errno.EADDRNOTAVAIL: "give --host an address of this machine",
    errno.EACCES: "those below 1024 are root's: choose a larger --port",
}


def replace_this_process(
    arguments: Sequence[str],
    host: str,
    port: int,
    hold_s: float,
    certificate: str | None,
    log_level: str,
    log_format: str,
    log_file: str | None,
) -> None:
    """Becomes the supervisor, in which nothing of mlx_safe is installed.

    Args:
        arguments: for the server, which reads environment and ``--config`` itself. The
            others are those that hold here, wherever they come from.
    """
    arguments = [*arguments, f"--host={host}", f"--port={port}"]
    arguments += [f"--hold-seconds={hold_s}", f"--log-level={log_level}"]
    arguments.append(f"--log-format={log_format}")
    if certificate is not None:
        arguments.append(f"--ssl-certfile={certificate}")
    if log_file is not None:
        arguments.append(f"--log-file={log_file}")
    os.environ["MLX_SAFE_AUTOINSTALL"] = "0"
    _output.flush()
    _core.remove_run_file()  # the end of this process is no crash of a server
    os.execv(sys.executable, [sys.executable, "-m", __name__, *arguments])


def is_supervised() -> bool:
    """Whether this process is the server of a supervisor."""
    return BORN_S in os.environ


def start_took(ready: bool) -> float | None:
    """How long a start takes until the model is loaded, as the server knows it.

    None when it has no parent, or no start was seen to its end.

    Args:
        ready: its model has just been loaded.
    """
    if ready and BORN_S in os.environ:
        return time.monotonic() - float(os.environ[BORN_S])
    last = os.environ.get(LAST_START_S)
    return None if last is None else float(last)


def how_it_ended(status: int) -> str:
    """A process ended: subprocess says by which signal with a negative number."""
    try:
        return f"by {signal.Signals(-status).name}"
    except ValueError:
        return f"with status {status}"


class Supervisor:
    """Runs one server after another on one socket."""

    def __init__(
        self,
        listener: socket.socket,
        command: Sequence[str],
        hold_s: float = HOLD_S,
        accepts: bool = True,
    ) -> None:
        # For good, as its mode is the server's as well: each may find that the
        # other was quicker.
        listener.setblocking(False)
        self._listener = listener
        # Without the certificate there is nothing that it could say to a client. It
        # waits in the socket's own queue then.
        self._accepts = accepts
        self._command = list(command)
        self._child: subprocess.Popen[bytes] | None = None
        self._stopping = False
        self._holding = Holding(hold_s)
        self._crashes = 0
        self._born = 0.0

    def stop(self, number: int, frame: object) -> None:
        """Signal handler: passes the signal on and restarts no more."""
        self._stopping = True
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)

    def run(self) -> int:
        """Returns the exit status for this process."""
        while True:
            status = self._run_child()
            refused = self._holding.server_ended()
            if self._stopping or status in (0, USER_MISTAKE):
                self._holding.refuse_all(STOPPING)
                return max(status, 0)
            # What ended the server is gone with one that is refused; where all that
            # comes ends it, their first deaths count.
            self._crashes += not refused
            if self._crashes > CRASHES_MAX:
                self._holding.refuse_all(GIVES_UP)
                how = how_it_ended(status)
                log.error(
                    "the server has ended %d times in a row without a completed "
                    "request, the last time %s: giving up. The log above says why. "
                    "`mlx-safe reports` lists the crash reports",
                    self._crashes,
                    how,
                )
                return 1
            delay = BACK_OFF_S[min(max(self._crashes, 1), len(BACK_OFF_S)) - 1]
            log.warning(
                "the server has ended %s; starting it again in %.0f s; "
                "%d connections wait for it",
                *(how_it_ended(status), delay, len(self._holding)),
            )
            self._hold_until(time.monotonic() + delay)
            if self._stopping:
                self._holding.refuse_all(STOPPING)
                return 0

    def _hold_until(self, deadline: float) -> None:
        while not self._stopping and (left := deadline - time.monotonic()) > 0:
            self._turn(min(left, TURN_S))

    def _turn(self, seconds: float, channel: socket.socket | None = None) -> bool:
        """Accepts and answers while no server does; whether ``channel`` has a word."""
        wanted = [] if channel is None else [channel]
        if self._accepts and self._holding.may_accept:
            wanted.append(self._listener)
        ready = handover.readable(wanted, seconds)
        if self._listener in ready:
            with contextlib.suppress(OSError):  # the client left again
                self._holding.accept(self._listener.accept()[0])
        self._holding.look_round()
        return channel in ready

    def _run_child(self) -> int:
        fd = self._listener.fileno()
        channel, theirs = socket.socketpair()
        self._born = time.monotonic()
        environment = {
            **os.environ,
            LISTEN_FD: str(fd),
            handover.CHANNEL_FD: str(theirs.fileno()),
            BORN_S: str(self._born),
        }
        if self._holding.last_start_s is not None:
            environment[LAST_START_S] = str(self._holding.last_start_s)
        del environment["MLX_SAFE_AUTOINSTALL"]
        with channel:
            with theirs:  # closed here once the child has it
                try:
                    self._child = subprocess.Popen(
                        self._command,
                        env=environment,
                        pass_fds=(fd, theirs.fileno()),
                        stdin=subprocess.DEVNULL,
                    )
                except OSError as e:  # no memory, no process: that may pass
                    log.error("the server cannot be started: %s", e.strerror)
                    return 1
            if self._stopping:
                self._child.terminate()
            while not self._turn(TURN_S, channel):
                pass
            while self._hear(channel):
                pass
        try:
            return self._child.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            # Its end of the channel is closed, and it goes on.
            self._holding.forget()
            return self._child.wait()

    def _hear(self, channel: socket.socket) -> bool:
        """One message of the server; False when there will be none any more."""
        got = handover.receive(channel)
        if got is None:
            return False
        message, key, files = got
        if message is Message.LISTENS:
            log.info("the server listens")
            self._holding.give_to(channel)
        elif message is Message.READY:
            self._holding.last_start_s = time.monotonic() - self._born
        elif message is Message.WORKED:
            self._crashes = 0
        elif message is Message.HOLD:
            self._holding.keep(key, files)
        elif message is Message.DONE:
            self._holding.drop(key)
        return True


def find_address(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    """The family and the address to listen on.

    Raises:
        CommandError: there is none.
    """
    # getaddrinfo takes any number, and only its last 16 bits count.
    if not 0 <= port <= 65535:
        raise CommandError(f"--port {port}: must be from 0 to 65535")
    try:
        infos = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except socket.gaierror as e:
        raise CommandError(f"--host {host}: {e.strerror}") from e
    except UnicodeError:  # Python's, of a part that is empty or too long for a name
        raise CommandError(f"--host {host}: is no name of a host") from None
    return infos[0][0], infos[0][4]


def cannot_listen(host: str, port: int, error: OSError) -> CommandError:
    """What to say of an address that cannot be bound."""
    # Not the error's own text: socket.create_server adds the address to it.
    why = os.strerror(error.errno) if error.errno else str(error)
    advice = LISTEN_ADVICE.get(error.errno or 0)
    if advice is None or (error.errno == errno.EACCES and port >= FIRST_FREE_PORT):
        advice = "choose another --host or --port"
    return CommandError(f"cannot listen on {host}:{port}: {why}; {advice}")


def _flags(arguments: Sequence[str]) -> argparse.Namespace:
    """Those of the server's that hold for its supervisor as well."""
    parser = Parser(prog="mlx-safe serve", add_help=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--hold-seconds", type=float, default=HOLD_S)
    parser.add_argument("--ssl-certfile")
    parser.add_argument("--log-level", type=str.upper, default="INFO")
    parser.add_argument("--log-format", default="text")
    parser.add_argument("--log-file")
    return parser.parse_known_args(list(arguments))[0]


def _listen(host: str, port: int) -> socket.socket:
    if not ranks.is_first():
        # Only the first rank has clients; here nobody knows the port.
        return socket.create_server(("127.0.0.1", 0))
    family, address = find_address(host, port)
    try:
        return socket.create_server(address[:2], family=family, backlog=512)
    except OSError as e:
        raise cannot_listen(host, port, e) from e


def _allow_many_files() -> None:
    """Two for each connection that is held; macOS allows 256 in all by itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_WANTED if hard == resource.RLIM_INFINITY else min(hard, FILES_WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main(arguments: Sequence[str]) -> int:
    """Opens the socket and runs servers with ``arguments`` on it."""
    try:
        flags = _flags(arguments)
        logs.set_up(flags.log_level, flags.log_format, flags.log_file, "SUPERVISOR")
        listener = _listen(flags.host, flags.port)
    except CommandError as e:
        logs.refuse(str(e), log_format_of(arguments, os.environ))
        return USER_MISTAKE
    command = [sys.executable, "-m", "mlx_safe", "serve", *arguments]
    _allow_many_files()
    # The other ranks have no clients, and so nothing that is encrypted.
    is_plain = flags.ssl_certfile is None or not ranks.is_first()
    supervisor = Supervisor(listener, command, flags.hold_seconds, accepts=is_plain)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # nohup, and shells for what they start in the background, have it ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, supervisor.stop)
    with listener:
        return supervisor.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
