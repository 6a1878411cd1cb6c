"""``mlx-safe serve --supervise``: the port stays open while the server dies.

A small parent that never imports MLX. It opens the listening socket and gives it
to the server, a child process. Until the server says that it listens, the parent
answers 503 itself, each client on a thread of its own: none is refused a
connection, none waits in silence, and a slow one keeps nobody waiting.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO, Any

from .. import _core
from .._command import CommandError, Parser

__all__ = [
    "LISTEN_FD",
    "Supervisor",
    "cannot_listen",
    "find_address",
    "main",
    "replace_this_process",
    "tell_that_it_listens",
]

LISTEN_FD = "MLX_SAFE_LISTEN_FD"
# The writing end of a pipe: a byte says that the server listens, and its end that
# there is no such server any more.
LISTENS_FD = "MLX_SAFE_LISTENS_FD"

USER_MISTAKE = 2
# A server that lived so long had a life of its own; what came before is
# forgotten.
HEALTHY_AFTER_S = 60.0
CRASHES_MAX = 5
BACK_OFF_S = (0.0, 1.0, 2.0, 4.0)
RETRY_AFTER_S = 5
# For one client, from its connection to its end; beyond so many at a time, the
# others wait in the socket's queue.
ANSWER_TIMEOUT_S = 10.0
ANSWERED_AT_ONCE_MAX = 64

BODY = (
    b'{"error": {"message": "The server is starting.", '
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


def tell_that_it_listens() -> None:
    """Called by the server: from now on it accepts connections itself.

    Without effect when there is no supervisor.
    """
    fd = os.environ.pop(LISTENS_FD, None)
    if fd is not None:
        with contextlib.suppress(BrokenPipeError), os.fdopen(int(fd), "wb") as pipe:
            pipe.write(b"1")  # broken: the supervisor was killed


def say(text: str) -> None:
    """One line on stderr, where the server logs."""
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    print(f"{now} - SUPERVISOR - {text}", file=sys.stderr, flush=True)


def _how(status: int) -> str:
    """A process ended: subprocess says by which signal with a negative number."""
    try:
        return f"by {signal.Signals(-status).name}"
    except ValueError:
        return f"with status {status}"


class Supervisor:
    """Runs one server after another on one socket."""

    def __init__(self, listener: socket.socket, command: Sequence[str]) -> None:
        # For good, as its mode is the server's as well: each may find that the
        # other was quicker.
        listener.setblocking(False)
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
                    f"{_how(status)}: giving up. Its log above says why, and "
                    "`mlx-safe reports` lists the crash reports"
                )
                return 1
            delay = BACK_OFF_S[min(crashes, len(BACK_OFF_S)) - 1]
            say(
                f"the server has ended {_how(status)}; starting it again "
                f"in {delay:.0f} s"
            )
            self._answer_until(time.monotonic() + delay)
            if self._stopping:
                return 0

    def _run_child(self) -> int:
        fd = self._listener.fileno()
        listens, told = os.pipe()
        environment = {**os.environ, LISTEN_FD: str(fd), LISTENS_FD: str(told)}
        del environment["MLX_SAFE_AUTOINSTALL"]
        with os.fdopen(listens, "rb", buffering=0) as pipe:
            with os.fdopen(told, "wb"):  # closed here once the child has it
                self._child = subprocess.Popen(
                    self._command,
                    env=environment,
                    pass_fds=(fd, told),
                    stdin=subprocess.DEVNULL,
                )
            if self._stopping:
                self._child.terminate()
            if self._answer_until(math.inf, pipe) and pipe.read(1):
                say("the server listens")
        return self._child.wait()

    def _answer_until(self, deadline: float, *pipes: IO[bytes]) -> bool:
        """Answers 503 to whoever comes; True when one of ``pipes`` ended it."""
        while not self._stopping and (left := deadline - time.monotonic()) > 0:
            may_accept = threading.active_count() <= ANSWERED_AT_ONCE_MAX
            wanted: list[IO[bytes] | socket.socket] = [*pipes]
            wanted += [self._listener] if may_accept else []
            ready, _, _ = select.select(wanted, [], [], min(left, 0.2))
            if any(pipe in ready for pipe in pipes):
                return True
            if ready:
                with contextlib.suppress(OSError):  # the client left again
                    connection, _ = self._listener.accept()
                    threading.Thread(
                        target=_answer, args=(connection,), daemon=True
                    ).start()
        return False


def _answer(connection: socket.socket) -> None:
    """Sends the 503 once the client has begun to ask."""
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    asked = False
    with connection, contextlib.suppress(OSError):
        while (left := deadline - time.monotonic()) > 0:
            connection.settimeout(left)
            # What was sent is read to its end: closing over unread data resets
            # the connection, and the client would not see the answer.
            if not connection.recv(1 << 16):
                return
            if not asked:
                connection.sendall(ANSWER)
                connection.shutdown(socket.SHUT_WR)
                asked = True


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
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # nohup, and shells for what they start in the background, have it ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, supervisor.stop)
    with listener:
        return supervisor.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
