"""The shims of libSystem, by what a program for macOS sees of them."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from .runner import load
from .setup import native
from .setup.places import HERE


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """guest/shims.c, with the values and layouts of Apple's headers."""
    path = tmp_path_factory.mktemp("shims") / "shims.dylib"
    options = [*native.MACOS, "-O1", "-Wall", "-Wextra", "-Werror", "-shared"]
    native.zig("cc", *options, HERE / "guest" / "shims.c", into=path)
    return path


def test_what_they_do(program: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = load(program, call=["run", str(tmp_path), str(port)])
    assert done.returncode == 0, done.stderr
    *failed, last = done.stdout.splitlines()
    assert failed == []
    # All of it has been run.
    assert last.startswith("checks ") and int(last.split()[1]) > 100


def test_output_that_is_lost_is_told(program: Path, tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = load(program, call=["run", str(tmp_path), "0"], output=full)
    said = "machrun: command: its output cannot be written\n"
    assert (done.returncode, done.stderr) == (2, said)


@pytest.mark.parametrize(
    ("function", "line"),
    [
        ("unknown_open", "open with the unknown flags 0x8000"),
        ("unknown_fcntl", "fcntl with the unknown command 999"),
        ("unknown_send", "send with the unknown flags 0x40000"),
        ("unknown_mmap", "mmap with the unknown flags 0x800"),
        ("unknown_clock", "the unknown clock 99"),
        ("unknown_attributes", "pthread_create with attributes"),
        ("unknown_option", "setsockopt of level 0xffff with the unknown option 0x40"),
        ("unknown_level", "setsockopt of level 0x29 with the unknown option 0x1b"),
        ("unknown_signal", "raise of the signal 7, which Linux has not"),
        ("unknown_handle", "dlsym with the handle -1"),
        ("absent", "fcopyfile is called, and nobody has written it"),
    ],
)
def test_what_they_do_not_know_ends_the_process_by_name(
    function: str, line: str, program: Path
) -> None:
    done = load(program, call=[function])
    assert (done.returncode, done.stderr) == (2, f"machrun: libSystem: {line}\n")
