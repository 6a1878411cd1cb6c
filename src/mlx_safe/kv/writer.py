"""The thread that writes, and the rule by which it may.

What a fault of the GPU may have touched must never be published. The generation
thread takes the bytes and says in which epoch (`Writer.offer`). At a later point at
which it is synchronised, and no fault has come in between, it says so (`confirm`). Only
then is a file begun. After a fault it says that as well (`fail`), and when that
returns, nothing that was withdrawn by it appears any more.

What is cheap to make again is held: the next of its text takes its place, so that the
bytes of most are never written. It is written when its request is broken off
(`release`), and when nothing has taken its place for a while, if that was asked for.

The thread touches no object of MLX. With MLX 0.32 an array belongs to the streams of
the thread that made it. On Metal others have seen such writers abort the process.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

from .format import SNAPSHOT, Node
from .store import Draft, Store

__all__ = ["BACKLOG", "Writer"]

log = logging.getLogger("mlx_safe.kv")

BACKLOG = 512 << 20


@dataclass(eq=False)
class _Item:
    """owner: whom it is held for. due: when it is written; of those that are held."""

    draft: Draft
    epoch: int
    owner: int | None = None
    due: float = math.inf
    nbytes: int = field(init=False)
    confirmed: bool = False
    withdrawn: bool = False

    def __post_init__(self) -> None:
        self.nbytes = self.draft.nbytes


class Writer:
    """A queue of drafts, bounded in bytes, and the thread that empties it.

    Args:
        backlog: bytes that may wait; one draft is taken whatever its size.
        clock: seconds.

    Offered, confirmed and failed by one thread, the one that generates.
    """

    def __init__(
        self,
        store: Store,
        backlog: int = BACKLOG,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._backlog = backlog
        self._clock = clock
        self._changed = threading.Condition()
        self._items: deque[_Item] = deque()
        self._held: list[_Item] = []
        # Between an item's last look at `withdrawn` and its rename.
        self._gate = threading.Lock()
        self._at_work: _Item | None = None
        self._waiting = 0
        self._closed = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(
            target=self._work, name="mlx-safe-kv-writer", daemon=True
        )
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Bytes that have been taken, are not yet on disk, and will be."""
        due = [item.nbytes for item in self._held[:] if item.due < math.inf]
        return self._waiting + sum(due)

    @property
    def unconfirmed(self) -> bool:
        """Something waits for `confirm`."""
        if self._items and not self._items[-1].confirmed:
            return True
        return bool(self._held) and not all(item.confirmed for item in self._held)

    def has_room(self, nbytes: int) -> bool:
        """Whether a draft of so many bytes would be taken now."""
        return self._waiting == 0 or self._waiting + nbytes <= self._backlog

    def offer(self, draft: Draft, epoch: int, owner: int | None = None) -> bool:
        """Has ``draft`` written when it is confirmed; False: there is no room.

        Args:
            owner: what is held for it goes, as does what is held of this text.
        """
        with self._changed:
            item = _Item(draft, epoch)
            if not self.has_room(item.nbytes) or self._closed:
                self._store.events["not_written_backlog"] += 1
                return False
            if draft.node.kind == SNAPSHOT:
                item.draft = self._in_place(draft, owner, due=0.0)
            self._items.append(item)
            self._waiting += item.nbytes
            return True

    def hold(
        self, draft: Draft, epoch: int, owner: int | None, wait_s: float = math.inf
    ) -> bool:
        """Keeps ``draft`` in memory, in the place of what is held for ``owner``.

        And of what is held for nobody, if ``draft`` goes on with its text. All that is
        held takes half of the backlog at most; False: there is no room.

        Args:
            owner: who may be broken off; None: nobody. wait_s: it is written after so
                many seconds.
        """
        with self._changed:
            item = _Item(draft, epoch, owner, self._clock() + wait_s)
            item.draft = self._in_place(draft, owner, item.due)
            held = sum(other.nbytes for other in self._held)
            if held + item.nbytes > self._backlog // 2 or self._closed:
                return False
            self._held.append(item)
            return True

    def _in_place(self, draft: Draft, owner: int | None, due: float) -> Draft:
        """``draft``; what it comes in the place of is held no more."""

        def is_replaced(old: _Item) -> bool:
            if due == math.inf > old.due:
                return False  # it is to be written, and ``draft`` may never be
            if old.owner is None:
                return _continues(draft, old.draft)
            return old.owner == owner

        gone = [item for item in self._held if is_replaced(item)]
        self._held = [item for item in self._held if item not in gone]
        more = [n for item in gone for n in item.draft.instead_of if n != draft.node]
        return replace(draft, instead_of=(*draft.instead_of, *more)) if more else draft

    def has_held(self, owner: int) -> bool:
        """Whether something is held for ``owner``."""
        return any(item.owner == owner for item in self._held)

    def due(self, identity: str, tokens: Sequence[int]) -> list[Node]:
        """The nodes of the text ``tokens`` that are held, and will be written."""
        return [item.draft.node for item in self._due(identity, tokens)]

    def hurry(self, identity: str, tokens: Sequence[int]) -> None:
        """These are written now."""
        with self._changed:
            for item in self._due(identity, tokens):
                item.due = 0.0
            self._release(lambda item: item.due <= 0.0)
            self._changed.notify_all()

    def _due(self, identity: str, tokens: Sequence[int]) -> list[_Item]:
        return [
            item
            for item in self._held[:]
            if item.due < math.inf and _is_of(item.draft, {identity}, tokens)
        ]

    def let_go(self, owner: int) -> None:
        """``owner`` was not broken off: what is not to be written otherwise goes."""
        with self._changed:
            others = [item for item in self._held if item.owner != owner]
            ours = [
                item
                for item in self._held
                if item.owner == owner
                and item.due < math.inf
                and not any(_continues(o.draft, item.draft) for o in others)
            ]
            for item in ours:
                item.owner = None
            self._held = others + ours

    def release(self, owner: int | None = None) -> None:
        """What is held for ``owner``, or for all, is written, if it is confirmed."""
        with self._changed:
            self._release(lambda item: owner in (None, item.owner))
            self._held = [i for i in self._held if owner not in (None, i.owner)]
            self._changed.notify_all()

    def _release(self, which: Callable[[_Item], bool]) -> None:
        chosen = [item for item in self._held if item.confirmed and which(item)]
        # Another list, as some look at it without the lock.
        self._held = [item for item in self._held if item not in chosen]
        self._items.extend(chosen)
        self._waiting += sum(item.nbytes for item in chosen)

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
            for item in (*self._items, *self._held):
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
        self._held = [item for item in self._held if not which(item)]
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
                    # What is held and not confirmed is waited for by `confirm`.
                    due = [item.due for item in self._held if item.confirmed]
                    left = min(due, default=math.inf) - self._clock()
                    self._changed.wait(None if left == math.inf else left)
                if self._closed:
                    return
            self.write_one()

    def _next_is_confirmed(self) -> bool:
        now = self._clock() if self._held else 0.0
        self._release(lambda item: item.due <= now)
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


def _continues(draft: Draft, other: Draft) -> bool:
    """Whether the text of ``draft`` is that of ``other``, or goes on with it."""
    return _is_of(other, {draft.node.identity}, draft.tokens)
