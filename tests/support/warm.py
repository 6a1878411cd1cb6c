"""Servers forked from a Python that has imported transformers already.

A server's start is 0.8 s of processor time, of which 0.5 s are the imports of
transformers, numpy and pydantic, and the suite starts hundreds. What is of MLX, mlx-lm
or mlx-safe each server imports itself. MLX_SAFE_TEST_COLD=1: each is a Python of its
own from the beginning.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

from support import child
from support.programs import program

SET_CHILD_SUBREAPER = 36  # of Linux's prctl
# Of the variables these may differ: Python and what is imported already have read the
# others. The last is set by mlx-lm, in who imports it.
OWN = ("MLX_", "KV_", "PYTEST_", "TRANSFORMERS_NO_ADVISORY_WARNINGS")


def read_early(environment: Mapping[str, str]) -> dict[str, str]:
    return {k: v for k, v in environment.items() if not k.startswith(OWN)}


class Forks:
    """The process that forks, and the socket to it. Any thread."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = read_early(environment)
        self._lock = threading.Lock()
        self._asks, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        number = theirs.fileno()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", program("forks_servers"), str(number)],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # transformers misses PyTorch
                pass_fds=[number],
                # numpy has no threads then, which would not be in a fork.
                env={**environment, "OPENBLAS_NUM_THREADS": "1"},
            )
        atexit.register(self.end)

    def start(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        streams: Sequence[int],
    ) -> int:
        """The pid of a child of this process, which has these streams."""
        message = json.dumps([list(command), dict(environment)]).encode()
        prctl = ctypes.CDLL(None).prctl
        with self._lock:
            prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            try:
                socket.send_fds(self._asks, [message], streams)
                pid = int(self._asks.recv(100))
                assert self._asks.recv(100)
            finally:
                prctl(SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        return pid

    def end(self) -> None:
        self._asks.close()
        self._process.wait(60)


class Forked:
    """Of a `subprocess.Popen` with all its pipes, what a `Server` needs."""

    returncode: Any = None
    stdin: IO[bytes]
    stdout: IO[bytes]

    def __init__(self, command: Sequence[str], pid: int) -> None:
        self.args, self.pid = command, pid
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        with self._lock:
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        pause = 0.0005
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(9)


@functools.cache
def forks() -> Forks | None:
    """None on macOS, whose libraries forbid it, and where coverage is measured."""
    measured = any(name.startswith("COVERAGE_") for name in os.environ)
    cold = os.environ.get("MLX_SAFE_TEST_COLD") == "1"
    if sys.platform != "linux" or measured or cold:
        return None
    return Forks({**os.environ, "HF_HUB_OFFLINE": "1"})


def forks_for(command: Sequence[str], environment: Mapping[str, str]) -> Forks | None:
    """None where that would be another Python than the command's."""
    if command[0] != sys.executable or (found := forks()) is None:
        return None
    return found if read_early(environment) == found.environment else None


def start(
    command: Sequence[str], environment: Mapping[str, str]
) -> subprocess.Popen[bytes] | Forked:
    """Runs a command of this Python, with pipes for its standard streams."""
    if (found := forks_for(command, environment)) is None:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    (stdin, writes), (reads, stdout) = os.pipe(), os.pipe()
    try:
        pid = found.start(command, environment, (stdin, stdout, stdout))
    finally:
        os.close(stdin)
        os.close(stdout)
    forked = Forked(command, pid)
    forked.stdin = open(writes, "wb")  # noqa: SIM115, PTH123
    forked.stdout = open(reads, "rb")  # noqa: SIM115, PTH123
    return forked


def run(
    code: str, /, *arguments: str, timeout: float = 300.0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`child.run` of what starts a server; of the hub nothing is asked."""
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    if (found := forks_for(command, variables)) is None:
        return child.run(code, *arguments, timeout=timeout, **variables)
    with (
        open(os.devnull) as stdin,  # noqa: PTH123
        tempfile.TemporaryFile("w+") as stdout,
        tempfile.TemporaryFile("w+") as stderr,
    ):
        streams = [stream.fileno() for stream in (stdin, stdout, stderr)]
        forked = Forked(command, found.start(command, variables, streams))
        try:
            status = forked.wait(timeout)
        except BaseException:
            forked.kill()
            forked.wait(60)
            raise
        said = [(stream.seek(0), stream.read())[1] for stream in (stdout, stderr)]
    return subprocess.CompletedProcess(command, status, *said)
