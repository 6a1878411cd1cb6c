"""File layers that fail, for tests of the KV store, and what its files should hold."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from mlx_safe.kv.directory import Directory, disk_size
from mlx_safe.kv.files import Files
from mlx_safe.kv.format import BLOCK, Node, chain
from mlx_safe.kv.store import Draft, Limits, Store

IDENTITY = "0123456789abcdef" * 2
PLENTY = Limits(10**9, free=0)


class Died(BaseException):
    """The process has died here."""


class MortalFiles(Files):
    """A process that dies after so many operations and bytes.

    Args:
        power: the machine loses its power with it: of what was not synchronised,
            bytes are missing and renames have not been.
    """

    def __init__(self) -> None:
        self.left: int | None = None
        self.power: random.Random | None = None
        self._unsynced: dict[tuple[int, int], int] = {}  # a file's inode: a descriptor
        self._renames: list[tuple[str, str, int]] = []

    def die_after(self, steps: int, power: random.Random | None) -> None:
        self.left, self.power = steps, power

    def _step(self, size: int = 1) -> int:
        """How much of it is still done; the process dies when that is not all."""
        if self.left is None:
            return size
        done = min(size, self.left)
        self.left -= done
        return done

    def _or_die(self) -> None:
        if self._step() == 0:
            self._die()

    def _die(self) -> None:
        self.left = 0
        if self.power is not None:
            for fd in self._unsynced.values():
                size = os.fstat(fd).st_size
                os.ftruncate(fd, self.power.randint(0, size))
            for old, new, at in reversed(self._renames):
                if self.power.random() < 0.5:
                    os.rename(new, old, src_dir_fd=at, dst_dir_fd=at)
        self.forget()
        raise Died

    def forget(self) -> None:
        for fd in [*self._unsynced.values(), *(at for _, _, at in self._renames)]:
            os.close(fd)
        self._unsynced.clear()
        self._renames.clear()

    def create(self, name: str, at: int) -> int:
        self._or_die()
        return super().create(name, at)

    def write(self, fd: int, data: Any) -> None:
        view = memoryview(data).cast("B")
        found = os.fstat(fd)
        if (inode := (found.st_dev, found.st_ino)) not in self._unsynced:
            self._unsynced[inode] = os.dup(fd)
        done = self._step(len(view))
        super().write(fd, view[:done])
        if done < len(view):
            self._die()

    def sync(self, fd: int) -> None:
        self._or_die()
        found = os.fstat(fd)
        if (kept := self._unsynced.pop((found.st_dev, found.st_ino), None)) is not None:
            os.close(kept)
            return
        for _, _, at in self._renames:
            os.close(at)
        self._renames.clear()

    def date(self, fd: int, ns: int) -> None:
        self._or_die()
        super().date(fd, ns)

    def date_name(self, name: str, at: int, ns: int) -> None:
        self._or_die()
        super().date_name(name, at, ns)

    def rename(self, old: str, new: str, at: int) -> None:
        self._or_die()
        super().rename(old, new, at)
        self._renames.append((old, new, os.dup(at)))

    def remove(self, name: str, at: int) -> None:
        self._or_die()
        super().remove(name, at)


class HookedFiles(Files):
    """Calls ``hook`` with the name of each operation, before it is done."""

    def __init__(self, hook: Callable[[str], None]) -> None:
        self.hook = hook

    def create(self, name: str, at: int) -> int:
        self.hook("create")
        return super().create(name, at)

    def open(self, name: str, at: int, write: bool = False) -> int:
        self.hook("open")
        return super().open(name, at, write)

    def directory(self, name: str, at: int, make: bool = False) -> int:
        self.hook("directory")
        return super().directory(name, at, make)

    def write(self, fd: int, data: Any) -> None:
        self.hook("write")
        super().write(fd, data)

    def sync(self, fd: int) -> None:
        self.hook("sync")
        super().sync(fd)

    def date(self, fd: int, ns: int) -> None:
        self.hook("date")
        super().date(fd, ns)

    def rename(self, old: str, new: str, at: int) -> None:
        self.hook("rename")
        super().rename(old, new, at)

    def remove(self, name: str, at: int) -> None:
        self.hook("remove")
        super().remove(name, at)

    def free_bytes(self, at: int) -> tuple[int, int]:
        self.hook("free_bytes")
        return super().free_bytes(at)


def opened(path: Path, limits: Limits = PLENTY, files: Files | None = None) -> Store:
    store = Store(Directory(path, files), limits)
    store.open()
    return store


def content(node: Node) -> list[bytes]:
    """The pieces of ``node``: others for every node."""
    seed = sha256(node.key.encode()).digest()
    return [seed * 20, seed[:3], b"", seed * 2]


def drafts(
    tokens: Sequence[int], *, snapshot: bool = False, identity: str = IDENTITY
) -> list[Draft]:
    """What is to be written of a text: its blocks, and a snapshot at its end."""
    keys = chain(identity, tokens)
    nodes = [Node.block(identity, keys, i) for i in range(len(keys))]
    made = [
        Draft(node, tokens, content(node), {"of": node.end}, tuple(nodes[:i]))
        for i, node in enumerate(nodes)
    ]
    if snapshot:
        last = Node.snapshot(identity, keys, tokens)
        made.append(Draft(last, tokens, content(last), {"of": last.end}, tuple(nodes)))
    return made


def restored(
    store: Store, tokens: Sequence[int], *, states: bool = False
) -> list[Node]:
    """What ``store`` gives for a text; fails when a byte of it is another."""
    found = store.find(IDENTITY, tokens, len(tokens), blocks=True, states=states)
    given = []
    nodes = [(node, 1 << 20) for node in (found.nodes if found else ())]
    for node, about, pieces in store.read(nodes, tokens):
        assert about == {"of": node.end}
        assert pieces == content(node), "restored wrongly"
        assert node.kind == BLOCK or node.end <= len(tokens)
        given.append(node)
    return given


def on_disk(path: Path) -> int:
    """Bytes of all nodes' files, half-written ones too."""
    files = [*path.glob("*/*.kv"), *path.glob("*/tmp-*")]
    return sum(disk_size(f.lstat().st_size) for f in files if not f.is_symlink())
