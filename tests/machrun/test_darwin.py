"""The branches of our Python code that only a Mac takes, taken.

The guest pretends to be on a Mac (guest/darwin.py), everywhere in these tests. Here
each branch is called by name, and has an answer that the others have not.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .runner import Machine
from .setup.places import ROOT

SOURCES = ROOT / "src" / "mlx_safe"
# What asks for the system, or for what only one of them has.
ASKS = re.compile(
    r"(?<!`)sys\.platform|platform\.(system|mac_ver)\(|os\.name\b|"
    r"(has|get)attr\((os|select|socket|time|signal|resource|fcntl), |"
    r"getattr\(ctypes\."
)

KEPT = """
        import socket
        from mlx_safe.server.lifeline import Lifeline
        one = socket.socket()
        lifeline = Lifeline.__new__(Lifeline)
        lifeline._peers = {}
        lifeline._keep(1, one)
        names = ("TCP_KEEPALIVE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
        values = (one.getsockopt(socket.IPPROTO_TCP, getattr(socket, n)) for n in names)
        print(hasattr(socket, "TCP_KEEPIDLE"), *values)
"""
# By file and line: Python code that prints what the branch for macOS says.
BRANCHES = {
    ("_command.py", 'MLX = "mlx[cpu]" if sys.platform == "linux" else "mlx"'): """
        from mlx_safe import _command
        print(_command.MLX)
    """,
    ("_paths.py", 'if sys.platform != "linux":'): """
        import os, time
        from mlx_safe import _paths
        since_boot = time.time() - _paths._began(os.getpid())
        print(abs(since_boot - time.monotonic()) < 5)
    """,
    ("_paths.py", 'if sys.platform == "darwin":'): """
        import os
        os.environ.pop("XDG_STATE_HOME", None)
        del os.environ["MLX_SAFE_REPORT_DIR"]
        os.environ["HOME"] = "/Users/ada"
        from mlx_safe import _paths
        print(_paths.report_dir())
    """,
    ("_reports.py", 'if sys.platform != "darwin":'): """
        from mlx_safe import _reports
        print(_reports._machine()["os"])
    """,
    ("checks.py", "found = platform.mac_ver()[0]"): """
        from mlx_safe import checks
        print(*checks.built_check())
    """,
    ("doctor.py", 'if platform.system() == "Darwin":'): """
        from mlx_safe import doctor
        print(doctor._system())
    """,
    ("doctor.py", 'return f"macOS {platform.mac_ver()[0]} {platform.machine()}"'): """
        from mlx_safe import doctor
        print(doctor._system())
    """,
    (
        "doctor.py",
        'return f"{platform.system()} {platform.release()} {platform.machine()}"',
    ): """
        from mlx_safe import doctor
        print(doctor._system())
    """,
    # Only that it can be called: no volume here knows Time Machine's attribute.
    ("kv/files.py", 'if sys.platform != "darwin":'): """
        import tempfile
        from mlx_safe.kv import files
        print(files.leave_out_of_backups(tempfile.mkdtemp()) in (True, False))
    """,
    ("server/heap.py", 'mallopt = getattr(ctypes.CDLL(None), "mallopt", None)'): """
        import ctypes
        from mlx_safe.server import heap
        heap.give_back_what_is_free()
        print(getattr(ctypes.CDLL(None), "mallopt", None))
    """,
    ("memory/machine.py", "system=sys.platform,"): """
        from mlx_safe.memory import machine
        print(machine.read_machine().system)
    """,
    ("memory/machine.py", 'if sys.platform != "darwin":'): """
        from mlx_safe.memory import machine
        names = ("hw.memsize", "iogpu.wired_limit_mb", "no.such.name")
        print(*map(machine.sysctl, names), machine.read_machine().total)
    """,
    (
        "server/disconnects.py",
        'self._happenings = _Epoll() if hasattr(select, "epoll") else _Kqueue()',
    ): """
        import socket, threading
        from types import SimpleNamespace
        from mlx_safe.server.disconnects import Disconnects
        one, other = socket.socketpair()
        left = threading.Event()
        watched = Disconnects()
        with watched.watching("a", one):
            watched.bind("a", SimpleNamespace(disconnect=left.set))
            other.send(b"the next request")
            before = left.wait(0.2)
            other.close()
            print(before, left.wait(30), type(watched._happenings).__name__)
    """,
    ("server/disconnects.py", 'RDHUP = getattr(select, "POLLRDHUP", None)'): """
        import socket
        from mlx_safe.server import disconnects
        one, other = socket.socketpair()
        other.send(b"the next request")
        before = disconnects._has_left(one)
        other.close()
        print(disconnects.RDHUP, before, disconnects._has_left(one))
    """,
    ("server/lifeline.py", "if hasattr(socket, name):"): KEPT,
    (
        "server/lifeline.py",
        "connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)",
    ): KEPT,
    ("server/request_file.py", 'if hasattr(os, "memfd_create"):'): """
        import os
        from mlx_safe.server.request_file import RequestFile
        file = RequestFile.make()
        print("deleted" in os.readlink(f"/proc/self/fd/{file.fd}"), file.size)
    """,
    ("server/request_file.py", 'if not hasattr(socket, "TCP_INFO"):'): """
        import socket
        from mlx_safe.server import request_file
        one, other = socket.socketpair()
        other.send(b"piece")
        left = request_file._was_taken(one, 0, b"piece")
        one.recv(5)
        taken = request_file._was_taken(one, 0, b"piece")
        print(request_file._count_taken(one), left, taken)
    """,
}
SAYS = {
    "_command.py": ["mlx"],
    "_paths.py": [
        "True",
        "/Users/ada/Library/Application Support/mlx-safe/reports",
    ],
    "_reports.py": ["macOS 14.0"],
    "checks.py": ["libmlx.dylib for macOS 14.0: they fit macOS 14.0"],
    "doctor.py": ["macOS 14.0 arm64"] * 3,
    "kv/files.py": ["True"],
    "memory/machine.py": ["darwin", f"{16 << 30} 0 None {16 << 30}"],
    "server/heap.py": ["None"],
    "server/disconnects.py": ["False True _Kqueue", "None False True"],
    "server/lifeline.py": ["False 5 2 3"] * 2,
    "server/request_file.py": ["True 0", "-1 False True"],
}


def asking() -> set[tuple[str, str]]:
    """(file, line) of all our code that asks for the system."""
    return {
        (str(file.relative_to(SOURCES)), line.strip())
        for file in SOURCES.rglob("*.py")
        for line in file.read_text().splitlines()
        if ASKS.search(line)
    }


def test_every_branch_for_macos_is_listed() -> None:
    assert asking() == set(BRANCHES), "list it in BRANCHES, and say what it answers"


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What each says, of one process that forks for each."""
    code = "import os, sys, textwrap\nimport mlx.core, mlx_safe\n"
    for branch in BRANCHES.values():
        code += (
            "child = os.fork()\n"
            "if child == 0:\n"
            f"    exec(textwrap.dedent({branch!r}))\n"
            "    sys.stdout.flush()\n"
            "    os._exit(0)\n"
            "os.waitpid(child, 0)\n"
        )
    directory = tmp_path_factory.mktemp("reports")
    done = Machine(server=True).run(code, MLX_SAFE_REPORT_DIR=str(directory))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(BRANCHES), done.stdout + done.stderr
    return lines


@pytest.mark.parametrize("file", SAYS)
def test_it_says_what_only_a_mac_says(file: str, said: list[str]) -> None:
    found = [s for (name, _), s in zip(BRANCHES, said, strict=True) if name == file]
    assert found == SAYS[file]


def test_the_same_branches_are_not_taken_on_linux(private_reports: Path) -> None:
    """The control: without the pretence these answers are others."""
    done = Machine(platform="linux").run("""
        from mlx_safe import _command, _reports
        from mlx_safe.memory import machine
        print(_command.MLX, _reports._machine()["os"][:5], machine.sysctl("hw.memsize"))
    """)
    assert done.stdout.split() == ["mlx[cpu]", "Linux", "None"], done.stderr
