"""The thread that writes, and the rule by which it may.

What a fault of the GPU may have touched must never be published. The generation
thread takes the bytes and says in which epoch (`Writer.offer`). At a later point at
which it is synchronised, and no fault has come in between, it says so (`confirm`). Only
then is a file begun. After a fault it says that as well (`fail`), and when that
returns, nothing that was withdrawn by it appears any more.

What is only of use if its request is broken off is held: it is written when that
happens (`release`), and never when it does not (`let_go`).

The thread touches no object of MLX. With MLX 0.32 an array belongs to the streams of
the thread that made it. On Metal others have seen such writers abort the process.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from .format import SNAPSHOT, Node
from .store import Draft, Store

__all__ = ["BACKLOG", "Writer"]

log = logging.getLogger("mlx_safe.kv")

BACKLOG = 512 << 20


@dataclass(eq=False)
class _Item:
    draft: Draft
    epoch: int
    nbytes: int = field(init=False)
    confirmed: bool = False
    withdrawn: bool = False

    def __post_init__(self) -> None:
        self.nbytes = self.draft.nbytes


class Writer:
    """A queue of drafts, bounded in bytes, and the thread that empties it.

    Args:
        backlog: bytes that may wait; one draft is taken whatever its size.

    Offered, confirmed and failed by one thread, the one that generates.
    """

    def __init__(self, store: Store, backlog: int = BACKLOG) -> None:
        self._store = store
        self._backlog = backlog
        self._changed = threading.Condition()
        self._items: deque[_Item] = deque()
        self._held: dict[int, _Item] = {}  # by whom it is held for
        # Between an item's last look at `withdrawn` and its rename.
        self._gate = threading.Lock()
        self._at_work: _Item | None = None
        self._waiting = 0
        self._closed = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(
            target=self._work, name="mlx-safe KV writer", daemon=True
        )
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Bytes that have been taken and are not yet on disk."""
        return self._waiting

    @property
    def unconfirmed(self) -> bool:
        """Something waits for `confirm`."""
        if self._items and not self._items[-1].confirmed:
            return True
        return bool(self._held) and not all(i.confirmed for i in self._held.values())

    def has_room(self, nbytes: int) -> bool:
        """Whether a draft of so many bytes would be taken now."""
        return self._waiting == 0 or self._waiting + nbytes <= self._backlog

    def offer(self, draft: Draft, epoch: int) -> bool:
        """Has ``draft`` written when it is confirmed; False: there is no room."""
        with self._changed:
            item = _Item(draft, epoch)
            if not self.has_room(item.nbytes) or self._closed:
                self._store.events["not_written_backlog"] += 1
                return False
            self._items.append(item)
            self._waiting += item.nbytes
            return True

    def hold(self, owner: int, draft: Draft, epoch: int) -> bool:
        """Keeps ``draft`` in memory, in the place of what is held for ``owner``.

        What is held takes half of the backlog at most; False: there is no room.
        """
        with self._changed:
            self._held.pop(owner, None)
            item = _Item(draft, epoch)
            held = sum(other.nbytes for other in self._held.values())
            if held + item.nbytes > self._backlog // 2 or self._closed:
                return False
            self._held[owner] = item
            return True

    def has_held(self, owner: int) -> bool:
        """Whether something is held for ``owner``."""
        return owner in self._held

    def let_go(self, owner: int) -> None:
        """What is held for ``owner`` is of no use any more."""
        with self._changed:
            self._held.pop(owner, None)

    def release(self, owner: int | None = None) -> None:
        """What is held for ``owner``, or for all, is written, if it is confirmed."""
        with self._changed:
            for name in [owner] if owner is not None else list(self._held):
                item = self._held.pop(name, None)
                if item is not None and item.confirmed:
                    self._items.append(item)
                    self._waiting += item.nbytes
            self._changed.notify_all()

    def _drafts(self) -> list[Draft]:
        with self._changed:
            at_work = [self._at_work] if self._at_work else []
            return [i.draft for i in (*at_work, *self._items) if not i.withdrawn]

    def holds(self, node: Node) -> bool:
        """Whether it waits to be written, or is being written."""
        return any(draft.node == node for draft in self._drafts())

    def snapshots(self, identity: str, tokens: Sequence[int]) -> list[Node]:
        """The nodes of the text ``tokens`` that wait, and are snapshots."""
        return [
            draft.node
            for draft in self._drafts()
            if draft.node.kind == SNAPSHOT and _is_of(draft, {identity}, tokens)
        ]

    def goes_on(
        self, identities: Collection[str], tokens: Sequence[int], end: int
    ) -> bool:
        """Whether something of this text waits that reaches beyond ``end`` tokens."""
        return any(
            draft.node.end > end and _is_of(draft, identities, tokens)
            for draft in self._drafts()
        )

    def confirm(self, epoch: int) -> None:
        """The GPU is synchronised, in ``epoch``; what is of another one goes."""
        if not self._items and not self._held:  # called with every step
            return
        with self._changed:
            for item in (*self._items, *self._held.values()):
                if item.epoch == epoch:
                    item.confirmed = True
            self._withdraw(lambda item: not item.confirmed)
            self._changed.notify_all()

    def fail(self, *, all_of_it: bool) -> None:
        """There was a fault. Returns when nothing of it can be published any more.

        Args:
            all_of_it: also what was confirmed: something may have been written
                anywhere (codes 9, 0xa, 0xb, CUDA's sticky errors).
        """
        with self._changed:
            self._withdraw(lambda item: all_of_it or not item.confirmed)
        with self._gate:  # a rename that has begun ends
            pass

    def _withdraw(self, which: Callable[[_Item], bool]) -> None:
        for owner in [o for o, item in self._held.items() if which(item)]:
            del self._held[owner]
        kept: deque[_Item] = deque()
        for item in self._items:
            if which(item):
                item.withdrawn = True
                self._waiting -= item.nbytes
                self._store.events["not_written_withdrawn"] += 1
            else:
                kept.append(item)
        self._items = kept
        if self._at_work is not None and which(self._at_work):
            self._at_work.withdrawn = True

    def flush(self, timeout_s: float) -> bool:
        """Waits until all that is confirmed is written; False: not in time."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while self._at_work or (self._items and self._items[0].confirmed):
                left = deadline - time.monotonic()
                if left <= 0 or self._closed:
                    return False
                self._changed.wait(left)
        return True

    def close(self, timeout_s: float) -> None:
        """Writes what is confirmed, if that takes no longer, and ends the thread."""
        self.flush(timeout_s)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)

    # -- the writer's thread -------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._closed and not self._next_is_confirmed():
                    self._changed.wait()
                if self._closed:
                    return
            self.write_one()

    def _next_is_confirmed(self) -> bool:
        return bool(self._items) and self._items[0].confirmed

    def write_one(self) -> bool:
        """Writes the first draft, if it is confirmed; whether there was one."""
        with self._changed:
            if not self._next_is_confirmed():
                return False
            item = self._at_work = self._items.popleft()

        def may_publish(rename: Callable[[], None]) -> bool:
            with self._gate:
                if item.withdrawn:
                    return False
                rename()
                return True

        try:
            self._store.publish(item.draft, may_publish)
            self._store.tell()
        except Exception:
            # Not of the disk: the thread goes on, and the next draft is another.
            log.exception("a KV cache could not be written")
        finally:
            with self._changed:
                self._at_work = None
                self._waiting -= item.nbytes
                self._changed.notify_all()
        return True


def _is_of(draft: Draft, identities: Collection[str], tokens: Sequence[int]) -> bool:
    end = draft.node.end
    return (
        draft.node.identity in identities
        and end <= len(tokens)
        and list(draft.tokens[:end]) == list(tokens[:end])
    )
