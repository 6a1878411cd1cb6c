"""``mlx-safe serve --supervise``: the port stays open while the server dies.

A small parent that never imports MLX. It opens the listening socket and gives it
to the server, a child process, so the kernel keeps clients waiting while a new
server starts; while it waits before a restart, the parent answers 503 itself. No
client is ever refused a connection.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from .. import _core

__all__ = ["LISTEN_FD", "Supervisor", "main", "replace_this_process"]

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


def main(arguments: Sequence[str]) -> int:
    """Opens the socket and runs servers with ``arguments`` on it."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    known, _ = parser.parse_known_args(list(arguments))
    try:
        infos = socket.getaddrinfo(
            known.host, known.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        listener = socket.create_server(
            infos[0][4][:2], family=infos[0][0], backlog=512
        )
    except (OSError, OverflowError) as e:
        print(
            f"mlx-safe: cannot listen on {known.host}:{known.port}: {e}; choose "
            "another --port, or stop what listens there",
            file=sys.stderr,
        )
        return USER_MISTAKE
    command = [sys.executable, "-m", "mlx_safe", "serve", *arguments]
    supervisor = Supervisor(listener, command)
    signal.signal(signal.SIGTERM, supervisor.stop)
    signal.signal(signal.SIGINT, supervisor.stop)
    with listener:
        return supervisor.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
