"""``mlx-safe serve --supervise``: the port stays open while the server dies.

A small parent that never imports MLX. It opens the listening socket and gives it
to the server, a child process, so the kernel keeps clients waiting while a new
server starts; while it waits before a restart, the parent answers 503 itself. No
client is ever refused a connection.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from .. import _core
from .._command import CommandError, Parser

__all__ = [
    "LISTEN_FD",
    "Supervisor",
    "cannot_listen",
    "find_address",
    "main",
    "replace_this_process",
]

LISTEN_FD = "MLX_SAFE_LISTEN_FD"

USER_MISTAKE = 2
# A server that lived so long had a life of its own; what came before is
# forgotten.
HEALTHY_AFTER_S = 60.0
CRASHES_MAX = 5
BACK_OFF_S = (0.0, 1.0, 2.0, 4.0)
RETRY_AFTER_S = 5
ANSWER_TIMEOUT_S = 2.0

BODY = (
    b'{"error": {"message": "The server is being restarted.", '
    b'"type": "service_unavailable_error", "param": null, "code": "unavailable", '
    b'"retry_after": %d}}' % RETRY_AFTER_S
)
ANSWER = (
    b"HTTP/1.0 503 Service Unavailable\r\nContent-Type: application/json\r\n"
    b"Retry-After: %d\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b"
    % (RETRY_AFTER_S, len(BODY), BODY)
)


def replace_this_process(arguments: Sequence[str]) -> None:
    """Becomes the supervisor, in which nothing of mlx_safe is installed."""
    os.environ["MLX_SAFE_AUTOINSTALL"] = "0"
    sys.stdout.flush()
    _core.remove_run_file()  # its end tells nothing of a server's
    os.execv(sys.executable, [sys.executable, "-m", __name__, *arguments])


def say(text: str) -> None:
    """One line on stderr, where the server logs."""
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    print(f"{now} - SUPERVISOR - {text}", file=sys.stderr, flush=True)


class Supervisor:
    """Runs one server after another on one socket."""

    def __init__(self, listener: socket.socket, command: Sequence[str]) -> None:
        self._listener = listener
        self._command = list(command)
        self._child: subprocess.Popen[bytes] | None = None
        self._stopping = False

    def stop(self, number: int, frame: object) -> None:
        """Signal handler: passes the signal on and restarts no more."""
        self._stopping = True
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)

    def run(self) -> int:
        """Returns the exit status for this process."""
        crashes = 0
        while True:
            born = time.monotonic()
            status = self._run_child()
            if self._stopping or status in (0, USER_MISTAKE):
                return max(status, 0)
            if time.monotonic() - born > HEALTHY_AFTER_S:
                crashes = 0
            crashes += 1
            if crashes > CRASHES_MAX:
                say(
                    f"the server has ended {crashes} times in a row, the last time "
                    f"with status {status}: giving up. Its log above says why, and "
                    "`mlx-safe reports` lists the crash reports"
                )
                return 1
            delay = BACK_OFF_S[min(crashes, len(BACK_OFF_S)) - 1]
            say(
                f"the server has ended with status {status}; starting it again "
                f"in {delay:.0f} s"
            )
            self._answer_for(delay)

    def _run_child(self) -> int:
        fd = self._listener.fileno()
        environment = {**os.environ, LISTEN_FD: str(fd)}
        del environment["MLX_SAFE_AUTOINSTALL"]
        self._child = subprocess.Popen(
            self._command, env=environment, pass_fds=(fd,), stdin=subprocess.DEVNULL
        )
        if self._stopping:
            self._child.terminate()
        return self._child.wait()

    def _answer_for(self, seconds: float) -> None:
        """Answers 503 to whoever comes in the next ``seconds``."""
        self._listener.setblocking(False)
        deadline = time.monotonic() + seconds
        while not self._stopping and (left := deadline - time.monotonic()) > 0:
            ready, _, _ = select.select([self._listener], [], [], min(left, 0.2))
            if ready:
                with contextlib.suppress(OSError):  # the client left again
                    connection, _ = self._listener.accept()
                    self._answer(connection)
        self._listener.setblocking(True)

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(ANSWER_TIMEOUT_S)
            # What was sent is read: closing over unread data resets the
            # connection, and the client would not see the answer.
            connection.recv(1 << 16)
            connection.sendall(ANSWER)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 16):
                pass


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
    return infos[0][0], infos[0][4]


def cannot_listen(host: str, port: int, error: OSError) -> CommandError:
    """What to say of an address that cannot be bound."""
    # Not the error's own text: socket.create_server adds the address to it.
    why = os.strerror(error.errno) if error.errno else str(error)
    return CommandError(
        f"cannot listen on {host}:{port}: {why}; choose another --port, or stop what "
        "listens there"
    )


def _listen(arguments: Sequence[str]) -> socket.socket:
    parser = Parser(prog="mlx-safe serve", add_help=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    known, _ = parser.parse_known_args(list(arguments))
    family, address = find_address(known.host, known.port)
    try:
        return socket.create_server(address[:2], family=family, backlog=512)
    except OSError as e:
        raise cannot_listen(known.host, known.port, e) from e


def main(arguments: Sequence[str]) -> int:
    """Opens the socket and runs servers with ``arguments`` on it."""
    try:
        listener = _listen(arguments)
    except CommandError as e:
        print(f"mlx-safe: {e}", file=sys.stderr)
        return USER_MISTAKE
    command = [sys.executable, "-m", "mlx_safe", "serve", *arguments]
    supervisor = Supervisor(listener, command)
    signal.signal(signal.SIGTERM, supervisor.stop)
    signal.signal(signal.SIGINT, supervisor.stop)
    with listener:
        return supervisor.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
