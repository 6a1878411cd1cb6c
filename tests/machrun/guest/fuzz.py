"""Loads damaged images: fuzz.py FILE…

Each is loaded by a child of this process, which looks its symbols up and ends. Prints a
JSON object: {file: [status, what it said]}, the status of a signal negative.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys

import machpy

LIMIT_S = 60  # SIGALRM: it hangs


class Symbol(ctypes.Structure):
    """What dladdr writes (<dlfcn.h>)."""

    _fields_ = (
        ("image", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def load(path: str) -> None:
    image = machpy._load(os.fsencode(path))
    start = machpy._symbol(image, b"_check")
    machpy._symbol(image, b"_no_such_name")
    dladdr = ctypes.CDLL(None).mac_dladdr
    found = Symbol()
    for at in range(0, 0x8000, 0x400):
        dladdr(ctypes.c_void_p((start or 0) + at), ctypes.byref(found))


def outcome(path: str) -> tuple[int, str]:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 1)
        os.dup2(write, 2)
        signal.alarm(LIMIT_S)
        load(path)
        os._exit(0)
    os.close(write)
    said = b""
    while part := os.read(read, 65536):
        said += part
    os.close(read)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), said.decode(errors="replace")


if __name__ == "__main__":
    # What they all need, once.
    import mlx.core  # noqa: F401

    print(json.dumps({path: outcome(path) for path in sys.argv[1:]}))
