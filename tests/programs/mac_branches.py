"""Each function prints what a branch of ours for macOS says; `test_darwin` calls them.

On a Mac that is emulated, each in a child of its own.
"""

import ctypes
import os
import socket
import tempfile
import threading
import time
from types import SimpleNamespace
from typing import Any


def what_pip_installs():
    from mlx_safe import _command

    print(_command.MLX)


def when_a_process_began():
    from mlx_safe import _paths

    since_boot = time.time() - _paths._began(os.getpid())
    print(abs(since_boot - time.monotonic()) < 5)


def where_reports_go():
    os.environ.pop("XDG_STATE_HOME", None)
    del os.environ["MLX_SAFE_REPORT_DIR"]
    os.environ["HOME"] = "/Users/ada"
    from mlx_safe import _paths

    print(_paths.report_dir())


def what_reports_call_the_system():
    from mlx_safe import _reports

    print(_reports._machine()["os"])


def which_macos_mlx_is_for():
    from mlx_safe import checks

    print(*checks.built_check())


def which_system_it_is():
    from mlx_safe import doctor

    print(doctor._system())


def what_backups_leave_out():
    from mlx_safe.kv import files

    print(files.leave_out_of_backups(tempfile.mkdtemp()) in (True, False))


def whether_malloc_takes_options():
    from mlx_safe.server import heap

    heap.give_back_what_is_free()
    print(getattr(ctypes.CDLL(None), "mallopt", None))


def which_system_the_memory_is_of():
    from mlx_safe.memory import machine

    print(machine.read_machine().system)


def what_sysctl_says():
    from mlx_safe.memory import machine

    names = ("hw.memsize", "iogpu.wired_limit_mb", "no.such.name")
    print(*map(machine.sysctl, names), machine.read_machine().total)


def whether_a_client_that_leaves_is_noticed():
    from mlx_safe.server.disconnects import Disconnects

    one, other = socket.socketpair()
    left = threading.Event()
    watched = Disconnects()
    request: Any = SimpleNamespace(disconnect=left.set)
    held: Any = None
    with watched.watching("a", one, held):
        watched.bind("a", request)
        other.send(b"the next request")
        before = left.wait(0.2)
        other.close()
        print(before, left.wait(30), type(watched._happenings).__name__)


def whether_one_has_left():
    from mlx_safe.server import disconnects

    one, other = socket.socketpair()
    other.send(b"the next request")
    before = disconnects._has_left(one)
    other.close()
    print(disconnects.RDHUP, before, disconnects._has_left(one))


def how_connections_are_kept():
    from mlx_safe.server.lifeline import Lifeline

    one = socket.socket()
    lifeline = Lifeline.__new__(Lifeline)
    lifeline._peers = {}
    lifeline._keep(1, one)
    names = ("TCP_KEEPALIVE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
    values = (one.getsockopt(socket.IPPROTO_TCP, getattr(socket, n)) for n in names)
    print(hasattr(socket, "TCP_KEEPIDLE"), *values)


def whether_the_file_has_a_name():
    from mlx_safe.server.request_file import RequestFile

    file = RequestFile.make()
    print("deleted" in os.readlink(f"/proc/self/fd/{file.fd}"), file.size)


def how_much_was_taken_and_sent():
    from mlx_safe.server import request_file, tcp

    one, other = socket.socketpair()
    other.send(b"piece")
    left = request_file._was_taken(one, 0, b"piece")
    one.recv(5)
    taken = request_file._was_taken(one, 0, b"piece")
    print(tcp.count_taken(one), tcp.count_sent(one), left, taken)
