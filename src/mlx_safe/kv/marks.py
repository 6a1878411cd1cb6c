"""What is being restored just now: a node that kills its process is not tried twice.

A mark is a file in DIR/marks that names nodes, locked (flock) by the process that
restores them. It goes when the first token is there. One that can be locked is of a
process that died meanwhile.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import stat
from collections.abc import Iterator, Sequence

from .directory import Directory, names, node_of
from .format import Node

__all__ = ["Marks"]

SIZE_MAX = 4 << 20


class Marks:
    """The marks of one directory. The generation thread and the writer's."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._files = directory.files
        self._own: dict[str, int] = {}

    def set(self, nodes: Sequence[Node]) -> str:
        """These are being restored from now on; returns the mark's name."""
        name = f"{os.getpid()}-{secrets.token_hex(8)}"
        # Locked before it has its name, so that nobody takes it for a dead one's.
        fd = self._files.create(f".{name}", self._directory.marks)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            listed = [[node.identity, node.name] for node in nodes]
            self._files.write(fd, json.dumps(listed).encode())
            self._files.sync(fd)
            self._files.rename(f".{name}", name, self._directory.marks)
            self._files.sync(self._directory.marks)
        except BaseException:
            os.close(fd)
            with contextlib.suppress(OSError):
                self._files.remove(f".{name}", self._directory.marks)
            raise
        self._own[name] = fd
        return name

    def lift(self, name: str) -> None:
        """They have been restored, and used: nothing happened."""
        fd = self._own.pop(name, None)
        if fd is None:
            return
        try:
            with contextlib.suppress(FileNotFoundError):
                self._files.remove(name, self._directory.marks)
        finally:
            os.close(fd)

    def of_dead(self) -> Iterator[tuple[str, list[Node]]]:
        """The marks of processes that died, and the nodes that each names."""
        for name in names(self._directory.marks):
            if name in self._own or name.startswith("."):
                continue
            try:
                fd = self._files.open(name, self._directory.marks)
            except OSError:
                continue  # lifted meanwhile, or no mark
            try:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if _is_mark(fd):
                        yield name, _parse(os.read(fd, SIZE_MAX))
            finally:
                os.close(fd)

    def forget(self, name: str) -> None:
        """A dead process's mark goes; its nodes have gone."""
        with contextlib.suppress(FileNotFoundError):
            self._files.remove(name, self._directory.marks)

    def close(self) -> None:
        """Lets go of all without lifting them, as the end of the process does."""
        while self._own:
            os.close(self._own.popitem()[1])


def _is_mark(fd: int) -> bool:
    """Not one that was lifted between its opening and its lock; and a plain file."""
    found = os.fstat(fd)
    return found.st_nlink > 0 and stat.S_ISREG(found.st_mode)


def _parse(data: bytes) -> list[Node]:
    try:
        listed = json.loads(data)
        found = [node_of(str(identity), str(name)) for identity, name in listed]
    except (ValueError, TypeError, RecursionError):
        return []
    return [node for node in found if node is not None]
