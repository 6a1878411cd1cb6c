"""The directory on disk, which several servers may use at once.

::

    DIR/state          magic, generation, allowance of bytes to write; its lock
    DIR/CACHEDIR.TAG   tells tools for backups to leave the directory out
    DIR/marks/         what is being restored just now, by which process
    DIR/<identity>/    about.json, and a file for each node (`format.Node.name`)

A process that changes anything holds the lock (flock, which ends with it) and adds one
to the generation first, so that all others look again. Reading needs no lock: a node's
file appears complete, by a rename, and an open one stays readable when its name goes.
``tmp-`` files are made under the lock only, so any that is there when the lock is taken
is of a process that died.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import re
import secrets
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import Files, leave_out_of_backups
from .format import BLOCK, BLOCK_TOKENS, ROOT, SNAPSHOT, Node

__all__ = [
    "GONE",
    "Directory",
    "Entry",
    "NotOurs",
    "disk_size",
    "names",
    "node_of",
    "printable",
]

_STATE = struct.Struct("<8sQdd")
_MAGIC = b"mlxskvd1"
TAG = b"""Signature: 8a477f597d28d172789f06886806bc55
# KV caches of mlx-safe: conversations. `mlx-safe kv empty` removes them.
"""
_OWN = ("state", "CACHEDIR.TAG", "marks")
ABOUT = "about.json"
ABOUT_MAX = 1 << 20
_IDENTITY = re.compile(r"[0-9a-f]{32}")
_NAME = re.compile(
    rf"([{BLOCK}{SNAPSHOT}])-(\d{{1,12}})-(\d{{1,12}})-([0-9a-f]{{32}})-([0-9a-f]{{32}})\.kv"
)
# Longer than a write on a slow disk: who holds the lock then has been stopped.
LOCK_WAIT_S = 60.0
LOCK_TURN_S = 0.01
CLOCK_SLACK_NS = 60 * 10**9
_UNIT = 4096  # file systems give space in units of it, or smaller ones
GONE = (errno.ENOENT, errno.ENOTDIR)


class NotOurs(Exception):
    """The directory cannot be used; the message says why and what to do."""


@dataclass
class Entry:
    """A node's file. size: bytes on disk. used: when it last served, ns."""

    node: Node
    size: int
    used: int


def disk_size(length: int) -> int:
    """What a file of ``length`` bytes takes, all but its name."""
    return -(-length // _UNIT) * _UNIT


class Directory:
    """An open directory of KV caches. Any thread, one at a time under `lock`.

    Raises:
        NotOurs: it is somebody else's, or cannot be made.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        files: Files | None = None,
        *,
        make: bool = True,
    ) -> None:
        if not os.fspath(path):  # pathlib takes it for the working directory
            raise NotOurs("an empty name is no directory")
        self.path = Path(path)
        self.files = files or Files()
        self._mutex = threading.RLock()
        self._open: list[int] = []
        try:
            if make:
                self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._open.append(self.fd)
            if os.fstat(self.fd).st_uid != os.geteuid():
                raise NotOurs(f"{self.path}: belongs to another user")
            self._state = self._open_state(make)
            self._open.append(self._state)
            self._make_private()  # not before it is known to be ours
            self.marks = self.files.directory("marks", self.fd, make=True)
            self._open.append(self.marks)
        except OSError as e:
            self.close()
            is_none = isinstance(e, (FileExistsError, NotADirectoryError))
            why = "is no directory" if is_none else f"cannot be used: {e.strerror}"
            inside = f"/{e.filename}" if e.filename in _OWN else ""
            raise NotOurs(f"{self.path}{inside}: {why}") from e
        except BaseException:
            self.close()
            raise

    def _make_private(self) -> None:
        if not self.is_private:
            # Where modes are kept; some file systems know none.
            with contextlib.suppress(OSError):
                os.fchmod(self.fd, 0o700)

    @property
    def is_private(self) -> bool:
        """Others can neither list nor read it."""
        return not stat.S_IMODE(os.fstat(self.fd).st_mode) & 0o077

    @property
    def is_removed(self) -> bool:
        """It has no name any more."""
        return bool(self._open) and not os.fstat(self.fd).st_nlink

    def _open_state(self, make: bool) -> int:
        try:
            fd = self.files.open("state", self.fd, write=True)
        except FileNotFoundError:
            self._refuse_others(is_any_enough=not make)
            fd = self._make_state()
        try:
            is_file = stat.S_ISREG(os.fstat(fd).st_mode)
            head = os.pread(fd, len(_MAGIC), 0) if is_file else b"?"
            if not head:  # its writer may have died before its first byte
                self._refuse_others()
            if not _MAGIC.startswith(head):
                raise NotOurs(
                    f"{self.path}: is of another version of mlx-safe; "
                    "give an empty directory, or remove what is in this one"
                )
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _refuse_others(self, *, is_any_enough: bool = False) -> None:
        """Raises `NotOurs` if there are other things in it, or if it only might be."""
        # Another server may be making it just now.
        others = [
            n
            for n in names(self.fd)
            if n[0] != "." and n not in _OWN and not _IDENTITY.fullmatch(n)
        ]
        if others or is_any_enough:
            why = f" ({printable(others[0])} is in it)" if others else ""
            what_to_do = "" if is_any_enough else "; give an empty one"
            raise NotOurs(f"{self.path}: is no directory of KV caches{why}{what_to_do}")

    def _make_state(self) -> int:
        with contextlib.suppress(FileExistsError):
            os.close(self.files.create("state", self.fd))
        with contextlib.suppress(FileExistsError):
            fd = self.files.create("CACHEDIR.TAG", self.fd)
            try:
                self.files.write(fd, TAG)
            finally:
                os.close(fd)
        leave_out_of_backups(str(self.path))
        return self.files.open("state", self.fd, write=True)

    def close(self) -> None:
        """Closes all; the lock ends, too."""
        while self._open:
            os.close(self._open.pop())

    # -- the lock and the state --------------------------------------------------

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Nobody else changes the directory meanwhile; may take as long as a write.

        Raises:
            OSError: another process has held it for `LOCK_WAIT_S`, or its file is gone.
        """
        with self._mutex:
            self._take_lock()
            try:
                yield
            finally:
                # After `close`, as by a test's process that died, it has none.
                if self._open:
                    fcntl.flock(self._state, fcntl.LOCK_UN)

    def _take_lock(self) -> None:
        deadline = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(self._state, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    why = "another process holds the lock and does not go on"
                    raise TimeoutError(errno.ETIMEDOUT, why) from None
                time.sleep(LOCK_TURN_S)
        if not os.fstat(self._state).st_nlink:
            # Another server has made another one, and does not wait for us.
            fcntl.flock(self._state, fcntl.LOCK_UN)
            raise FileNotFoundError(errno.ENOENT, "somebody has removed it", "state")

    def _read_state(self) -> tuple[int, float, float]:
        data = os.pread(self._state, _STATE.size, 0)
        if len(data) < _STATE.size:
            return 0, 0.0, 0.0  # a new one: from 1970 on there is all the allowance
        _, generation, allowance, since = _STATE.unpack(data)
        if not (math.isfinite(allowance) and math.isfinite(since)):
            return generation, 0.0, 0.0  # damaged
        return generation, allowance, since

    def generation(self) -> int:
        """Another one after every change of anybody's."""
        return self._read_state()[0]

    def begin_change(self) -> int:
        """Called under the lock before anything is changed; the new generation."""
        generation, allowance, since = self._read_state()
        generation = (generation + 1) % (1 << 64)  # whatever was in the file
        self._write_state(generation, allowance, since)
        return generation

    def allowance(self, per_hour: int, spend: int = 0) -> float:
        """Bytes that all servers together may write now; under the lock.

        It grows by ``per_hour`` bytes an hour, to that many at most, over restarts.
        """
        generation, allowance, since = self._read_state()
        now = time.time()
        passed = max(0.0, now - since)  # the clock may have been set back
        allowance = min(per_hour, max(0.0, allowance) + passed / 3600 * per_hour)
        allowance = max(0.0, allowance - spend)
        self._write_state(generation, allowance, now)
        return allowance

    def _write_state(self, generation: int, allowance: float, since: float) -> None:
        state = _STATE.pack(_MAGIC, generation, allowance, since)
        os.pwrite(self._state, state, 0)

    # -- what is in it -----------------------------------------------------------

    def identities(self) -> list[str]:
        """Whose nodes there are, or were."""
        return sorted(n for n in names(self.fd) if _IDENTITY.fullmatch(n))

    def scan(self, clean: bool = False) -> dict[tuple[str, str], Entry]:
        """All nodes' files, by identity and name.

        Args:
            clean: under the lock: what died processes left half written goes.
        """
        found: dict[tuple[str, str], Entry] = {}
        for identity in self.identities():
            try:
                fd = self.files.directory(identity, self.fd)
            except OSError as e:
                if e.errno in (*GONE, errno.ELOOP):
                    continue  # gone, or a link, behind which nothing is ours
                raise
            try:
                found.update(self._scan_one(identity, fd, clean))
            finally:
                os.close(fd)
        return found

    def _scan_one(
        self, identity: str, at: int, clean: bool
    ) -> Iterator[tuple[tuple[str, str], Entry]]:
        with os.scandir(at) as listed:
            items = list(listed)
        for item in items:
            if item.name.startswith("tmp-"):
                if clean and not item.is_dir(follow_symlinks=False):
                    self._remove(item.name, at)
                continue
            node = node_of(identity, item.name)
            if node is None:
                continue
            try:
                status = item.stat(follow_symlinks=False)
            except OSError as e:
                if e.errno in GONE:
                    continue
                raise
            if stat.S_ISREG(status.st_mode):
                size = disk_size(status.st_size)
                used = _when(status.st_mtime_ns)
                yield (identity, item.name), Entry(node, size, used)

    def open_node(self, node: Node) -> int:
        """Opens the node's file for reading.

        Raises:
            OSError: it is not there, or no plain file of this user.
        """
        at = self.files.directory(node.identity, self.fd)
        try:
            fd = self.files.open(node.name, at)
        finally:
            os.close(at)
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            os.close(fd)
            raise OSError(errno.ENOENT, "not a plain file of this user")
        return fd

    # -- changes, under the lock ---------------------------------------------------

    def publish(
        self,
        node: Node,
        chunks: Sequence[Any],
        used: int,
        may_publish: Callable[[Callable[[], None]], bool],
    ) -> bool:
        """Writes the node's file; it is there wholly or not at all.

        Args:
            may_publish: calls what it is given, the rename, unless it no longer may.

        Returns whether it did.
        """
        at = self.files.directory(node.identity, self.fd, make=True)
        temporary = _temporary()
        try:
            fd = self.files.create(temporary, at)
            try:
                for chunk in chunks:
                    self.files.write(fd, chunk)
                self.files.date(fd, used)
                self.files.sync(fd)
            finally:
                os.close(fd)
            published = may_publish(lambda: self.files.rename(temporary, node.name, at))
            if published:
                self.files.sync(at)
            return published
        finally:
            # After a rename there is none.
            with contextlib.suppress(OSError):
                self._remove(temporary, at)
            os.close(at)

    def describe(self, identity: str, text: str) -> None:
        """Says in words whose nodes those of ``identity`` are."""
        at = self.files.directory(identity, self.fd, make=True)
        try:
            fd = self.files.create(temporary := _temporary(), at)
            try:
                self.files.write(fd, text.encode())
            finally:
                os.close(fd)
            self.files.rename(temporary, ABOUT, at)
            self.files.sync(self.fd)
        finally:
            os.close(at)

    def description(self, identity: str) -> str | None:
        """What `describe` was given; None where it cannot be read."""
        try:
            at = self.files.directory(identity, self.fd)
            try:
                fd = self.files.open(ABOUT, at)
            finally:
                os.close(at)
        except OSError:
            return None
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return None
            return os.read(fd, ABOUT_MAX).decode(errors="replace")
        except OSError:
            return None
        finally:
            os.close(fd)

    def remove(self, node: Node) -> None:
        """The node's file goes, if it is there."""
        try:
            at = self.files.directory(node.identity, self.fd)
        except OSError as e:
            if e.errno in GONE:
                return
            raise
        try:
            self._remove(node.name, at)
        finally:
            os.close(at)

    def used(self, node: Node) -> int | None:
        """When the node was used last, ns; None: its file is not there."""
        try:
            name = f"{node.identity}/{node.name}"
            found = os.stat(name, dir_fd=self.fd, follow_symlinks=False)
            return _when(found.st_mtime_ns)
        except OSError as e:
            if e.errno in GONE:
                return None
            raise

    def date(self, nodes: Sequence[Node], used: int) -> None:
        """These were used at ``used``; needs no lock."""
        for node in nodes:
            with contextlib.suppress(FileNotFoundError):
                at = self.files.directory(node.identity, self.fd)
                try:
                    self.files.date_name(node.name, at, used)
                finally:
                    os.close(at)

    def _remove(self, name: str, at: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.files.remove(name, at)


def names(fd: int) -> list[str]:
    """What is in the open directory ``fd``; pathlib cannot list one."""
    return os.listdir(fd)


def printable(name: object) -> str:
    """What somebody has named so, in one line of a log or a terminal."""
    return "".join(c for c in str(name)[:200] if c.isprintable())


def _when(ns: int) -> int:
    """When a file with that date was used, ns; 0: long ago.

    The clock may have been set back. What seems to be of the future would outlive
    whatever is used from now on.
    """
    return ns if ns <= time.time_ns() + CLOCK_SLACK_NS else 0


def _temporary() -> str:
    return f"tmp-{os.getpid()}-{secrets.token_hex(8)}"


def node_of(identity: str, name: str) -> Node | None:
    """The node whose file in the directory of ``identity`` has this name; or None."""
    match = _NAME.fullmatch(name)
    if match is None or not _IDENTITY.fullmatch(identity):
        return None
    kind, start, end, parent, key = match.groups()
    node = Node(identity, kind, parent, int(start), int(end), key)
    return node if node.name == name and _is_possible(node) else None


def _is_possible(node: Node) -> bool:
    """Whether any text has such a node: a name may have been made up."""
    most = BLOCK_TOKENS if node.kind == BLOCK else BLOCK_TOKENS - 1
    return (
        node.start % BLOCK_TOKENS == 0
        and (node.start == 0) == (node.parent == ROOT)
        and (most if node.kind == BLOCK else 0) <= node.end - node.start <= most
    )
