"""Which nodes there are, which of them serve a prompt, and which go for another.

LRU: a node's file has the time of its last use as its mtime, so all servers of a
directory know it. No node is younger than the one it follows, so what goes first is
always the end of a conversation. Without its beginning the rest would be of no use.
"""

from __future__ import annotations

import errno
import heapq
import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..memory.sizes import format_size
from .directory import GONE, Directory, Entry, disk_size, printable
from .format import (
    BLOCK_TOKENS,
    ROOT,
    SNAPSHOT,
    TOKEN_MAX,
    Damaged,
    Node,
    chain,
    decode,
    encode,
)
from .marks import Marks

__all__ = ["DISK_BYTES", "Draft", "Found", "Limits", "Store"]

log = logging.getLogger("mlx_safe.kv")

# How much a directory holds by default.
DISK_BYTES = 20 * 10**9
# What it leaves to others by default.
FREE_BYTES = 10 * 10**9

# Files that are read at once. One core checks 1.8 GB a second, an SSD reads 5 or more.
READERS = 4
# A node's use is written down when the last one is so long ago.
USE_AGAIN_NS = 60 * 10**9
# Of the process, and not of the disk.
_OF_THE_PROCESS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
# Of one file: a link in its place, a socket, or one that another user has made.
_OF_THE_FILE = (*GONE, errno.ELOOP, errno.ENXIO, errno.EACCES, errno.EPERM)


@dataclass(frozen=True)
class Limits:
    """Bytes. size: of all files. per_hour: written. free: left on the volume.

    free: None: `FREE_BYTES`, or a tenth of the volume, so that a small one is of use.
    """

    size: int
    per_hour: int = 64 * 10**9
    free: int | None = None

    def floor(self, volume: int) -> int:
        """What is left free on a volume of so many bytes."""
        return min(FREE_BYTES, volume // 10) if self.free is None else self.free


@dataclass(frozen=True, eq=False)
class Draft:
    """A node that is to be written.

    tokens: the text up to its end, or further. pieces: contiguous buffers, not to be
    changed. about: JSON-able. before: the nodes that it is of no use without.
    instead_of: those that go when it is there.
    """

    node: Node
    tokens: Sequence[int]
    pieces: Sequence[Any]
    about: Any
    before: Sequence[Node]
    instead_of: Sequence[Node] = ()

    @property
    def nbytes(self) -> int:
        return sum(memoryview(piece).nbytes for piece in self.pieces)


@dataclass(frozen=True)
class Found:
    """What serves a prompt. nodes: in order. end: tokens that they reach to.

    nbytes: of their files.
    """

    nodes: tuple[Node, ...]
    end: int
    nbytes: int


class Store:
    """The nodes of a directory, as one server sees them. Any thread.

    Nothing here raises because of the disk: what fails turns the store off, which
    one WARNING tells, and then it finds nothing and takes nothing.

    Attributes:
        off: why it is off; None: it is not.
        events: how often so far: ``written``, ``written_bytes``, ``restored``,
            ``restored_tokens``, ``restored_bytes``, ``evicted``, ``damaged``,
            ``dropped``, ``suspects`` (were being restored when a process died),
            and ``not_written_…`` with why.
    """

    def __init__(self, directory: Directory, limits: Limits) -> None:
        self._directory = directory
        self.limits = limits
        self._marks = Marks(directory)
        self._mutex = threading.Lock()
        self._index: dict[tuple[str, str], Entry] = {}
        self._snapshots: dict[tuple[str, str], set[Node]] = {}
        self._total = 0
        # The generation that was looked at, and the one after our own last change.
        self._seen = -1
        self._settled = -1
        # Removed by us without the lock: the others are to look again.
        self._untold = False
        self._banned: set[Node] = set()
        self._said_full = False
        self.off: str | None = None
        self.events: Counter[str] = Counter()

    def open(self) -> None:
        """Looks what is there, and removes what is over the limit or suspect."""
        try:
            with self._directory.lock():
                self._look(clean=True)
                self._bury()
                self._make_room(0, ())
        except OSError as e:
            self._turn_off(e)

    def close(self) -> None:
        """Of what is being restored just now nothing is said: as when it dies."""
        self._marks.close()
        self._directory.close()

    def _turn_off(self, e: OSError) -> None:
        if e.errno in _OF_THE_PROCESS:
            return
        what = f" ({printable(e.filename)})" if isinstance(e.filename, str) else ""
        gone = "somebody has removed it" if self._directory.is_removed else ""
        self.turn_off(gone or (e.strerror or str(e)) + what)

    def turn_off(self, why: str, exc: Exception | None = None) -> None:
        """Nothing is found or written from now on; one WARNING says ``why``.

        Args:
            exc: whose traceback goes with it.
        """
        if self.off is None:
            self.off = why
            log.warning(
                "KV caches are no longer kept on disk, nor taken from it: %s: %s",
                self._directory.path,
                why,
                exc_info=exc,
            )

    # -- what is there -------------------------------------------------------------

    @property
    def path(self) -> Path:
        """Of the directory."""
        return self._directory.path

    def __len__(self) -> int:
        return len(self._index)

    @property
    def nbytes(self) -> int:
        """Of all files in the directory, when they were looked at last."""
        return self._total

    def _look(self, clean: bool = False) -> None:
        """Looks again if anybody has changed anything. clean: under the lock."""
        generation = self._directory.generation()
        with self._mutex:
            # Half-written files may have been left by any change of another's.
            if generation == (self._settled if clean else self._seen):
                return
            self._index.clear()
            self._snapshots.clear()
            self._total = 0
            for entry in self._directory.scan(clean).values():
                self._add(entry)
            # Not before: without descriptors it is looked at again.
            self._seen = generation
            if clean:
                self._settled = generation

    def _change(self) -> None:
        """Under the lock, before anything changes and after it."""
        self._seen = self._settled = self._directory.begin_change()

    def _add(self, entry: Entry) -> None:
        node = entry.node
        self._forget(node)
        self._index[node.identity, node.name] = entry
        self._total += entry.size
        if node.kind == SNAPSHOT:
            self._snapshots.setdefault((node.identity, node.parent), set()).add(node)

    def _forget(self, node: Node) -> None:
        entry = self._index.pop((node.identity, node.name), None)
        if entry is not None:
            self._total -= entry.size
            self._snapshots.get((node.identity, node.parent), set()).discard(node)

    def _entry(self, node: Node) -> Entry | None:
        if node in self._banned:
            return None
        return self._index.get((node.identity, node.name))

    def has(self, node: Node) -> bool:
        """Whether it is there, as far as is known."""
        with self._mutex:
            return self.off is None and self._entry(node) is not None

    def find(
        self,
        identity: str,
        tokens: Sequence[int],
        most: int,
        *,
        blocks: bool,
        states: bool,
    ) -> Found | None:
        """What serves a text best; no file is read.

        Args:
            most: tokens that may be taken from here.
            blocks, states: which kinds of caches the model has. With states, blocks
                are of use up to a snapshot only; without, a snapshot is what comes
                after the last block.
        """
        if self.off is not None or not are_tokens(tokens):
            return None
        try:
            self._look()
            self._ban_suspects()
        except OSError as e:
            self._turn_off(e)
            return None
        keys = chain(identity, tokens[:most])
        with self._mutex:
            run = self._run(identity, keys) if blocks else len(keys)
            nodes = [Node.block(identity, keys, i) for i in range(run)]
            last = self._last_snapshot(
                identity, keys, range(run, -1 if states else run - 1, -1), tokens, most
            )
            if last is not None:
                nodes = nodes[: last.start // BLOCK_TOKENS] if blocks else []
                nodes.append(last)
            elif states:
                return None
            if not nodes:
                return None
            sizes = [self._index[n.identity, n.name].size for n in nodes]
        return Found(tuple(nodes), nodes[-1].end, sum(sizes))

    def _run(self, identity: str, keys: Sequence[str]) -> int:
        for i in range(len(keys)):
            if self._entry(Node.block(identity, keys, i)) is None:
                return i
        return len(keys)

    def _last_snapshot(
        self,
        identity: str,
        keys: Sequence[str],
        blocks: Iterable[int],
        tokens: Sequence[int],
        most: int,
    ) -> Node | None:
        """The longest after so many blocks, in the order in which they are tried."""
        for i in blocks:
            fitting = [
                node
                for node in self._snapshots_after(identity, keys, i, tokens)
                if node.end <= most
            ]
            if fitting:
                return max(fitting, key=lambda node: node.end)
        return None

    def _snapshots_after(
        self, identity: str, keys: Sequence[str], blocks: int, tokens: Sequence[int]
    ) -> list[Node]:
        """Those of this text that follow so many blocks."""
        parent = keys[blocks - 1] if blocks else ROOT
        return [
            node
            for node in self._snapshots.get((identity, parent), ())
            if node.end <= len(tokens)
            and self._entry(node) is not None
            and Node.snapshot(identity, keys, tokens[: node.end]) == node
        ]

    def snapshots(
        self, identity: str, keys: Sequence[str], tokens: Sequence[int]
    ) -> list[Node]:
        """All of the text ``tokens``, as far as is known; ``keys``: its chain."""
        with self._mutex:
            return [
                node
                for i in range(len(keys) + 1)
                for node in self._snapshots_after(identity, keys, i, tokens)
            ]

    # -- restoring -----------------------------------------------------------------

    def begin_restore(self, nodes: Sequence[Node]) -> str | None:
        """Marks them, in case they kill the process; the mark, None: they may not.

        `end_restore` lifts it, when the first token is there.
        """
        try:
            mark = self._marks.set(nodes)
            now = time.time_ns()
            with self._mutex:
                entries = [e for n in nodes if (e := self._entry(n)) is not None]
                old = [e for e in entries if e.used < now - USE_AGAIN_NS]
                for entry in old:
                    entry.used = now
            self._directory.date([entry.node for entry in old], now)
            return mark
        except OSError as e:
            self._turn_off(e)
            return None

    def end_restore(self, mark: str) -> None:
        try:
            self._marks.lift(mark)
        except OSError as e:
            self._turn_off(e)

    def read(
        self, nodes: Sequence[tuple[Node, int]], tokens: Sequence[int]
    ) -> Generator[tuple[Node, Any, list[bytes]]]:
        """What `Draft.about` and its pieces were, of one node after another.

        Ends with the first that is not to be had. Nothing in a file is trusted: what is
        not right in every byte is removed. `READERS` files are read at once, or their
        checksums would take longer than the disk; no more are in memory.

        Args:
            nodes: with how many bytes each can have. tokens: the text that they should
                be of.
        """
        ahead: deque[tuple[Node, Future[tuple[Any, list[bytes]]]]] = deque()
        rest = iter(nodes)
        with ThreadPoolExecutor(
            READERS, thread_name_prefix="mlx-safe-kv-reader"
        ) as readers:
            while self.off is None:
                for node, most in islice(rest, READERS - len(ahead)):
                    job = readers.submit(self._decode, node, tokens, most)
                    ahead.append((node, job))
                if not ahead:
                    return
                node, job = ahead.popleft()
                got = self._sound(node, job)
                if got is None:
                    return
                self.events["restored_bytes"] += sum(map(len, got[1]))
                yield node, *got
                del got, job  # not while the next is waited for

    def _decode(
        self, node: Node, tokens: Sequence[int], most: int
    ) -> tuple[Any, list[bytes]]:
        fd = self._directory.open_node(node)
        try:
            return decode(fd, node, tokens, most)
        finally:
            os.close(fd)

    def _sound(
        self, node: Node, job: Future[tuple[Any, list[bytes]]]
    ) -> tuple[Any, list[bytes]] | None:
        try:
            return job.result()
        except Damaged as e:
            log.warning(
                "a KV cache on disk is damaged and is removed: %s: %s", node.name, e
            )
            self.events["damaged"] += 1
            self.drop([node])
        except OSError as e:
            self._unreadable(node, e)
        return None

    def _unreadable(self, node: Node, e: OSError) -> None:
        if e.errno in _OF_THE_FILE:
            self.drop([node])
        else:
            self._turn_off(e)

    def drop(self, nodes: Iterable[Node]) -> None:
        """These are not used again, by nobody."""
        for node in nodes:
            with self._mutex:
                self._banned.add(node)
                self._forget(node)
                self._untold = True
            try:
                # Without the lock, which another may hold for a while.
                self._directory.remove(node)
            except OSError as e:
                # What cannot be removed stays banned.
                if e.errno not in (*_OF_THE_FILE, errno.EISDIR):
                    self._turn_off(e)
                continue
            with self._mutex:
                self._banned.discard(node)
            self.events["dropped"] += 1

    def _ban_suspects(self) -> None:
        for _, nodes in self._marks.of_dead():
            with self._mutex:
                self._banned.update(nodes)

    def _bury(self) -> None:
        """Under the lock: what processes that died were restoring goes."""
        for mark, nodes in self._marks.of_dead():
            self._change()
            for node in nodes:
                self._directory.remove(node)
                with self._mutex:
                    self.events["suspects"] += self._entry(node) is not None
                    self._forget(node)
                    self._banned.discard(node)
            self._marks.forget(mark)

    # -- writing -------------------------------------------------------------------

    def publish(
        self,
        draft: Draft,
        may_publish: Callable[[Callable[[], None]], bool] | None = None,
    ) -> bool:
        """Writes ``draft``, in the place of what was used least.

        Args:
            may_publish: calls what it is given, unless it may no longer be published.
                None: it may.

        Returns whether it is there now.
        """
        if self.off is not None:
            return False
        try:
            chunks = encode(draft.node, draft.tokens, draft.pieces, draft.about)
            size = disk_size(sum(memoryview(chunk).nbytes for chunk in chunks))
            with self._directory.lock():
                self._look(clean=True)
                self._bury()
                return self._publish(draft, chunks, size, may_publish or _always)
        except IsADirectoryError:
            return self._not_written("in_the_way")
        except OSError as e:
            if e.errno in _OF_THE_PROCESS:
                return self._not_written("no_descriptor")
            self._turn_off(e)
            return False

    def _publish(
        self,
        draft: Draft,
        chunks: Sequence[Any],
        size: int,
        may_publish: Callable[[Callable[[], None]], bool],
    ) -> bool:
        if self.has(draft.node):
            return True
        if not all(self.has(node) for node in draft.before):
            return self._not_written("orphan")
        if self._directory.allowance(self.limits.per_hour) < size:
            return self._not_written("hourly")
        if not self._make_room(size, draft.before):
            return self._not_written("no_room")
        used = self._use(draft.before)
        self._change()
        if not self._directory.publish(draft.node, chunks, used, may_publish):
            return self._not_written("withdrawn")
        self._directory.allowance(self.limits.per_hour, size)
        for node in draft.instead_of:
            self._directory.remove(node)
        self._change()
        with self._mutex:
            self._add(Entry(draft.node, size, used))
            for node in draft.instead_of:
                self._forget(node)
        self.events["written"] += 1
        self.events["written_bytes"] += size
        return True

    def _not_written(self, why: str) -> bool:
        self.events[f"not_written_{why}"] += 1
        return False

    def describe(self, identity: str, text: str) -> None:
        """Says in words which model ``identity`` is."""
        try:
            with self._directory.lock():
                if self._directory.description(identity) != text:
                    self._directory.describe(identity, text)
        except IsADirectoryError:  # in its place; nothing but a name is missing
            return
        except OSError as e:
            self._turn_off(e)

    def _use(self, before: Sequence[Node]) -> int:
        """When a node after these was used: not after the one it follows."""
        now = time.time_ns()
        with self._mutex:
            entries = [e for n in before if (e := self._entry(n)) is not None]
            if not entries:
                return now
            if entries[-1].used > now - USE_AGAIN_NS:
                return entries[-1].used
            for entry in entries:
                entry.used = now
        self._directory.date(before, now)
        return now

    def _make_room(self, size: int, keep: Sequence[Node]) -> bool:
        """Under the lock: evicts until ``size`` bytes more are within the limits."""
        free, volume = self._directory.files.free_bytes(self._directory.fd)
        floor = self.limits.floor(volume)
        with self._mutex:
            needed = max(self._total + size - self.limits.size, floor + size - free)
            if needed <= 0:
                return True
            kept = set(keep)
            oldest = [
                (e.used, -e.node.start, e.node.name, e.node.identity)
                for e in self._index.values()
                if e.node not in kept
            ]
            sizes = sum(self._index[i, name].size for _, _, name, i in oldest)
        if size and sizes < needed:
            if floor + size > free + sizes and not self._said_full:
                self._said_full = True
                log.warning(
                    "KV caches are not written: %s free on the volume of --kv-dir, and "
                    "--kv-free-bytes leaves %s to others",
                    *(format_size(free), format_size(floor)),
                )
            return False
        self._change()
        heapq.heapify(oldest)
        while oldest and needed > 0:
            used, start, name, identity = heapq.heappop(oldest)
            entry = self._index.get((identity, name))
            if entry is None:  # dropped meanwhile
                continue
            later = self._directory.used(entry.node)
            if later is not None and later > used:  # by another server
                entry.used = later
                heapq.heappush(oldest, (later, start, name, identity))
                continue
            self._directory.remove(entry.node)
            with self._mutex:
                self._forget(entry.node)
            needed -= entry.size
            self.events["evicted"] += 1
        return needed <= 0

    def tell(self) -> None:
        """Lets the other servers know what was dropped. Takes the lock."""
        if not self._untold or self.off is not None:
            return
        try:
            with self._directory.lock():
                self._look(clean=True)
                self._untold = False
                self._change()
        except OSError as e:
            self._turn_off(e)


def _always(rename: Callable[[], None]) -> bool:
    rename()
    return True


def are_tokens(tokens: Sequence[Any]) -> bool:
    """Whether all are tokens; images have keys of their own in mlx-lm 0.32."""
    return not tokens or (
        set(map(type, tokens)) == {int}  # a long prompt's, with each of its steps
        and min(tokens) >= 0
        and max(tokens) < TOKEN_MAX
    )
