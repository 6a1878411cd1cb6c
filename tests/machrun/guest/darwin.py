"""Makes this Python say what one on a Mac says, so that branches for macOS are run.

`sys.platform`, `os.uname` and what `platform` makes of them; names that a Mac's Python
lacks are taken away, kqueue is added, and libSystem is the loader's. What stays Linux:
the files of CPython itself, its C code, and what modules of the standard library have
looked up before.
"""

from __future__ import annotations

import ctypes
import os
import select
import selectors  # chooses before kqueue is there
import socket
import sys
import sysconfig
import time
from types import ModuleType

# Those that our code, or that of a library it uses, asks for.
MISSING = {
    os: ("memfd_create", "eventfd", "pidfd_open", "sched_getaffinity"),
    select: ("POLLRDHUP", "epoll"),
    socket: ("TCP_INFO", "TCP_KEEPIDLE"),
    time: ("CLOCK_BOOTTIME",),
}
LIB_SYSTEM = "/usr/lib/libSystem.B.dylib"
EPOLL, RDHUP = select.epoll, select.EPOLLRDHUP

__all__ = ["pretend", "selectors"]


class kevent:
    """Of `select.kevent`, what tells that a peer has closed."""

    def __init__(self, ident: object, filter: int = -1, flags: int = 1) -> None:
        self.ident, self.filter, self.flags = ident, filter, flags


class kqueue:
    """Of `select.kqueue`, one filter: EVFILT_READ, with EV_EOF as kqueue(2) has it."""

    def __init__(self) -> None:
        self._epoll = EPOLL()

    def close(self) -> None:
        self._epoll.close()

    def control(
        self, changes: list[kevent], most: int, timeout: float | None = None
    ) -> list[kevent]:
        for change in changes:
            number = getattr(change.ident, "fileno", lambda c=change: c.ident)()
            if change.flags & select.KQ_EV_DELETE:
                self._epoll.unregister(number)
                continue
            clear = select.EPOLLET if change.flags & select.KQ_EV_CLEAR else 0
            events = select.EPOLLIN | RDHUP | clear
            try:
                self._epoll.register(number, events)
            except FileExistsError:
                self._epoll.modify(number, events)
        found = []
        for number, events in self._epoll.poll(timeout, most) if most else ():
            at_end = events & (RDHUP | select.EPOLLHUP | select.EPOLLERR)
            flags = select.KQ_EV_EOF if at_end else 0
            found.append(kevent(number, select.KQ_FILTER_READ, flags))
        return found


class _Function(ctypes._CFuncPtr):
    _flags_ = 0x1 | 0x8  # C's calling convention, errno kept apart
    _restype_ = ctypes.c_int


class _LibSystem:
    """The loader's shims, which have macOS's ABI."""

    def __getattr__(self, name: str) -> _Function:
        shim = ctypes.c_char.in_dll(ctypes.PyDLL(None), f"mac_{name}")
        return _Function(ctypes.addressof(shim))


GLIBC = ("mallopt",)  # C functions that no Mac has


class _CDLL(ctypes.CDLL):
    def __new__(cls, name: object = None, *more: object, **options: object) -> object:
        if name == LIB_SYSTEM:
            return _LibSystem()
        return super().__new__(cls)

    def __getattr__(self, name: str) -> object:
        if name in GLIBC:
            raise AttributeError(name)
        return super().__getattr__(name)


def _dyld_find(name: str, *_: object) -> str:
    raise ValueError(f"dylib {name} could not be found")


def _add_macholib() -> None:
    """Debian leaves it out of its Python; ctypes.util looks for libraries by it."""
    package = ModuleType("ctypes.macholib")
    dyld = ModuleType("ctypes.macholib.dyld")
    package.__path__, package.dyld, dyld.dyld_find = [], dyld, _dyld_find
    sys.modules.update({"ctypes.macholib": package, "ctypes.macholib.dyld": dyld})


def _uname(version: str) -> os.uname_result:
    major = int(version.partition(".")[0])
    darwin = major + 9 if major < 26 else major - 1
    text = f"Darwin Kernel Version {darwin}.0.0: root:xnu/RELEASE_ARM64_T8112"
    return os.uname_result(("Darwin", "mac.local", f"{darwin}.0.0", text, "arm64"))


def pretend(version: str) -> None:
    """Before anything but the standard library is imported; for the whole process.

    Args:
        version: of macOS, ``"14.0"``; SystemVersion.plist, which lies in the sysroot,
            says 14.0 whatever it is.
    """
    # The file that it is in has Linux in its name.
    data = sysconfig._get_sysconfigdata_name()
    os.environ.setdefault("_PYTHON_SYSCONFIGDATA_NAME", data)
    sys.platform = "darwin"
    answer = _uname(version)
    os.uname = lambda: answer
    socket.TCP_KEEPALIVE = socket.TCP_KEEPIDLE  # by Linux's number
    for module, names in MISSING.items():
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    select.KQ_FILTER_READ, select.KQ_EV_ADD, select.KQ_EV_EOF = -1, 0x1, 0x8000
    select.KQ_EV_DELETE, select.KQ_EV_CLEAR = 0x2, 0x20
    select.kqueue, select.kevent = kqueue, kevent
    ctypes.CDLL = _CDLL
    _add_macholib()
