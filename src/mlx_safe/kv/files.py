"""The operations of the file system that the store uses, each by its own name.

A test has its own `Files`, in which the process dies at the n-th byte, or the power
fails. All names are relative to an open directory.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

__all__ = ["Files", "leave_out_of_backups"]

# Not through a link, and not waiting for the other end of a pipe.
_SAFE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK

BACKUP_ATTRIBUTE = b"com.apple.metadata:com_apple_backup_excludeItem"


class Files:
    """Any thread. Each raises OSError."""

    def create(self, name: str, at: int) -> int:
        """A new file that the owner may read and write."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _SAFE
        return os.open(name, flags, 0o600, dir_fd=at)

    def open(self, name: str, at: int, write: bool = False) -> int:
        return os.open(name, (os.O_RDWR if write else os.O_RDONLY) | _SAFE, dir_fd=at)

    def directory(self, name: str, at: int, make: bool = False) -> int:
        """Opens the directory ``name``, no link, and makes it where it is not."""
        if make:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=at)
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY | _SAFE, dir_fd=at)

    def write(self, fd: int, data: Any) -> None:
        """All of ``data``."""
        view = memoryview(data).cast("B")
        while view:
            view = view[os.write(fd, view) :]

    def sync(self, fd: int) -> None:
        """A file's bytes, or a directory's names, are to survive a power failure."""
        os.fsync(fd)

    def date(self, fd: int, ns: int) -> None:
        os.utime(fd, ns=(ns, ns))

    def date_name(self, name: str, at: int, ns: int) -> None:
        os.utime(name, ns=(ns, ns), dir_fd=at, follow_symlinks=False)

    def rename(self, old: str, new: str, at: int) -> None:
        os.rename(old, new, src_dir_fd=at, dst_dir_fd=at)

    def remove(self, name: str, at: int) -> None:
        os.unlink(name, dir_fd=at)

    def free_bytes(self, at: int) -> tuple[int, int]:
        """Bytes that are free to this user, and of the whole volume."""
        found = os.fstatvfs(at)
        return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize


def leave_out_of_backups(path: str) -> bool:
    """Asks Time Machine not to back up ``path``, as ``tmutil addexclusion`` does.

    Python has no setxattr on macOS, so libc's is called. True when it was set; not
    tried on a Mac.
    """
    if sys.platform != "darwin":
        return False
    import ctypes
    import plistlib

    value = plistlib.dumps("com.apple.backupd", fmt=plistlib.FMT_BINARY)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.setxattr.argtypes = (
        *(ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p),
        *(ctypes.c_size_t, ctypes.c_uint32, ctypes.c_int),
    )
    made = libc.setxattr(os.fsencode(path), BACKUP_ATTRIBUTE, value, len(value), 0, 0)
    return bool(made == 0)
