"""The branches of our Python code that only a Mac takes, taken.

The guest pretends to be on a Mac (guest/darwin.py), everywhere in these tests. Here
each branch is called by name, and has an answer that the others have not.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.programs import program

from .runner import Machine
from .setup.places import ROOT

SOURCES = ROOT / "src" / "mlx_safe"
# What asks for the system, or for what only one of them has.
ASKS = re.compile(
    r"(?<!`)sys\.platform|platform\.(system|mac_ver)\(|os\.name\b|"
    r"(has|get)attr\((os|select|socket|time|signal|resource|fcntl), |"
    r"getattr\(ctypes\."
)

# By file and line: the function of programs/mac_branches.py that prints what the branch
# for macOS says.
BRANCHES = {
    (
        "_command.py",
        'MLX = "mlx[cpu]" if sys.platform == "linux" else "mlx"',
    ): "what_pip_installs",
    ("_paths.py", 'if sys.platform != "linux":'): "when_a_process_began",
    ("_paths.py", 'if sys.platform == "darwin":'): "where_reports_go",
    ("_reports.py", 'if sys.platform != "darwin":'): "what_reports_call_the_system",
    ("checks.py", "found = platform.mac_ver()[0]"): "which_macos_mlx_is_for",
    ("doctor.py", 'if platform.system() == "Darwin":'): "which_system_it_is",
    (
        "doctor.py",
        'return f"macOS {platform.mac_ver()[0]} {platform.machine()}"',
    ): "which_system_it_is",
    (
        "doctor.py",
        'return f"{platform.system()} {platform.release()} {platform.machine()}"',
    ): "which_system_it_is",
    # Only that it can be called: no volume here knows Time Machine's attribute.
    ("kv/files.py", 'if sys.platform != "darwin":'): "what_backups_leave_out",
    (
        "server/heap.py",
        'mallopt = getattr(ctypes.CDLL(None), "mallopt", None)',
    ): "whether_malloc_takes_options",
    ("memory/machine.py", "system=sys.platform,"): "which_system_the_memory_is_of",
    ("memory/machine.py", 'if sys.platform != "darwin":'): "what_sysctl_says",
    (
        "server/disconnects.py",
        'self._happenings = _Epoll() if hasattr(select, "epoll") else _Kqueue()',
    ): "whether_a_client_that_leaves_is_noticed",
    (
        "server/disconnects.py",
        'RDHUP = getattr(select, "POLLRDHUP", None)',
    ): "whether_one_has_left",
    ("server/lifeline.py", "if hasattr(socket, name):"): "how_connections_are_kept",
    (
        "server/lifeline.py",
        "connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)",
    ): "how_connections_are_kept",
    (
        "server/request_file.py",
        'if hasattr(os, "memfd_create"):',
    ): "whether_the_file_has_a_name",
    (
        "server/tcp.py",
        'if not hasattr(socket, "TCP_INFO"):',
    ): "how_much_was_taken_and_sent",
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
    "server/request_file.py": ["True 0"],
    "server/tcp.py": ["-1 -1 False True"],
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
    code = program("mac_branches") + "import mlx.core, mlx_safe\n"
    for branch in BRANCHES.values():
        code += (
            "child = os.fork()\n"
            "if child == 0:\n"
            f"    {branch}()\n"
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
