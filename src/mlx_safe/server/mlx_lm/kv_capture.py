"""What of caches goes to disk: full blocks, snapshots, and what comes after the last.

Generation thread.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ... import _core
from ...kv.format import BLOCK_TOKENS, HEADER_MAX, Node, chain
from ...kv.store import Draft, Store
from ...kv.writer import Writer
from .kv_layout import Layout, own_bytes, to_bytes
from .kv_parts import View
from .protocols.models import Cache

__all__ = ["Capture", "Kept", "Reading"]

# A snapshot is written where more than this share of the text would be read again
# without it.
SHARE = 0.1
# And a tail, which is what comes after the last full block, where more than this.
TAIL_SHARE = 0.02
# A tail was written in vain when its block is full. All of them together are no more
# than this share of the blocks, and a block: with the files' heads less than a tenth.
# But for those of texts that leave memory, of which the disk has all.
TAILS = 0.07
# A snapshot whose tokens can be read again in less than this waits so long for the next
# one of its text, which comes in its place. Each is written whole, and a state has the
# size of some thousand tokens.
WAIT_S = 10.0


class End(enum.Enum):
    """What the tokens that are taken end with."""

    NONE = "a step of a prompt"
    OF_PART = "a part of the prompt, or the answer"
    LEAVES = "the same; memory has it no more"


@dataclass(frozen=True)
class Kept:
    """Caches that are kept, and under which identity."""

    layout: Layout
    identity: str


@dataclass(eq=False)
class Reading:
    """How far a request's prompt has been read.

    passing: a snapshot in the midst of it, in whose place the next one comes. (A
    snapshot that is not worth its bytes is held in memory, for as long as it runs.)
    begun: tokens that its run did not have to read. tokens, caches: on the sequential
    path. has_token: all of it has been read.
    """

    request: Any
    done: int = 0
    since: float = 0.0
    passing: Node | None = None
    begun: int = 0
    tokens: Sequence[int] = ()
    caches: list[Cache] | None = None
    has_token: bool = False


@dataclass(frozen=True)
class _Text:
    """Caches of a text, and the files that it can have.

    blocks: the full ones. node: of the snapshot at its end. known: the snapshots of it
    that are on disk, or on their way there.
    """

    kept: Kept
    tokens: Sequence[int]
    view: View
    blocks: list[Node]
    node: Node
    known: list[Node]


class Capture:
    """Takes bytes of caches and gives them to the writer.

    Args:
        read_s: how long it takes to read so many tokens.

    Attributes:
        taken_bytes: so far.
    """

    def __init__(
        self, store: Store, writer: Writer, read_s: Callable[[int], float]
    ) -> None:
        self._store = store
        self._writer = writer
        self._read_s = read_s
        self.taken_bytes = 0
        # Bytes that may be spent on tails.
        self._tails = 0.0

    def begin(self, kept: Sequence[Kept]) -> None:
        """Another model."""
        self._tails = float(max(k.layout.block_nbytes for k in kept))

    def take(
        self,
        kept: Kept,
        tokens: Sequence[int],
        view: View,
        reading: Reading | None,
        *,
        most: int | None,
        is_boundary: bool,
        end: End,
    ) -> bool:
        """Has written of ``tokens``, which ``view`` has, what is not on disk.

        Args:
            most: blocks at most; None: all.
            is_boundary: another turn may begin with them.
            end: what they end with.

        Returns False when windows or states have other shapes than they can have.
        """
        if view.done < BLOCK_TOKENS:
            return True
        layout = kept.layout
        keys = chain(kept.identity, tokens)
        blocks = [Node.block(kept.identity, keys, i) for i in range(len(keys))]
        blocks = blocks if layout.has_blocks else []
        known = self._store.snapshots(kept.identity, keys, tokens)
        known += self._writer.snapshots(kept.identity, tokens)
        node = Node.snapshot(kept.identity, keys, tokens)
        text = _Text(kept, tokens, view, blocks, node, known)
        missing = [i for i in range(len(blocks)) if not self._is_kept(blocks[i])]
        if not all(self._take_block(text, i) for i in missing[:most]):
            return True
        if most is not None and len(missing) > most:
            return True
        if layout.has_states:
            if layout.moves and view.ahead:
                return True
            return self._take_snapshot(text, reading, is_boundary, end)
        if end is not End.NONE:
            self._take_tail(text, end)
        return True

    def _is_kept(self, node: Node) -> bool:
        """It is on disk, or will be."""
        return self._store.has(node) or self._writer.holds(node)

    def _take_block(self, text: _Text, i: int) -> bool:
        """Whether it will be on disk."""
        node, layout = text.blocks[i], text.kept.layout
        if not self._has_room(layout.block_nbytes):
            return False
        arrays = layout.slots(text.view, node.start, node.end)
        # What was kept of it while it was not full serves nobody now.
        tails = [] if layout.has_states else _after(text, node.start)
        about = layout.about_block()
        offered = self._offer(self._draft(text, node, arrays, about, i, tails))
        self._tails += TAILS * layout.block_nbytes * offered
        return offered

    def _take_tail(self, text: _Text, end: End) -> None:
        node, done = text.node, text.view.done
        tails = _after(text, node.start)
        last = max([tail.end for tail in tails], default=node.start)
        size = text.kept.layout.block_nbytes * (done - node.start) // BLOCK_TOKENS
        if done - last <= TAIL_SHARE * done:
            return
        if end is not End.LEAVES and size > self._tails:
            return
        taken = text.kept.layout.snapshot(text.view, node.start)
        if taken is None or not self._has_room(size):
            return
        about, arrays = taken
        made = self._draft(text, node, arrays, about, len(text.blocks), tails)
        offered = self._offer(made)
        if offered and end is not End.LEAVES:
            self._tails -= size

    def _take_snapshot(
        self, text: _Text, reading: Reading | None, is_boundary: bool, end: End
    ) -> bool:
        """Takes one, unless there is one that is as good but for less than a block.

        Where it would save a small share of the text only it is not written, but held
        until its request has ended: it may be broken off. Where it would save a few
        seconds only it is held for a while, as the next one may come in its place.
        """
        node, layout = text.node, text.kept.layout
        passing = reading.passing if reading is not None else None
        if is_boundary and reading is not None:
            reading.passing = None  # it, or what comes in its place, stays
        leaves, done = end is End.LEAVES, text.view.done
        last = max([known.end for known in text.known], default=0)
        due = self._writer.due(text.kept.identity, text.tokens)
        gain = done - max([last, *(held.end for held in due)])
        if leaves:
            self._writer.hurry(text.kept.identity, text.tokens)
        is_worth_it = leaves or gain > SHARE * done
        if gain < BLOCK_TOKENS or (reading is None and not is_worth_it):
            return True
        taken = layout.snapshot(text.view, node.start)
        if taken is None:
            self._store.events["not_written_unfit"] += 1
            return False
        about, arrays = taken
        size = sum(x.nbytes for x in arrays)
        # What is larger than a file may be would be taken for damaged.
        if size > layout.most(node) - HEADER_MAX:
            return True
        gone = [passing] if passing is not None and passing != node else []
        drafted = self._draft(text, node, arrays, about, len(text.blocks), gone)
        if drafted is None:
            return True
        owner = id(reading.request) if reading is not None else None
        may_wait = not leaves and self._read_s(done - last) < WAIT_S
        # In the midst of a prompt the next step's takes its place, or its end's.
        wait_s = WAIT_S if is_worth_it and end is not End.NONE else math.inf
        held = (may_wait or not is_worth_it) and self._writer.hold(
            *drafted, owner, wait_s
        )
        if held or not is_worth_it:
            return True
        offered = self._writer.offer(*drafted, owner)
        if offered and reading is not None and not is_boundary:
            reading.passing = node
        return True

    def _has_room(self, nbytes: int) -> bool:
        if self._writer.has_room(nbytes):
            return True
        self._store.events["not_written_backlog"] += 1
        return False

    def _offer(self, drafted: tuple[Draft, int] | None) -> bool:
        return drafted is not None and self._writer.offer(*drafted)

    def _draft(
        self,
        text: _Text,
        node: Node,
        arrays: Sequence[mx.array],
        about: object,
        after: int,
        instead_of: Sequence[Node],
    ) -> tuple[Draft, int] | None:
        """Bytes of ``arrays``, and their epoch; None: there was a fault meanwhile.

        Args:
            after: how many blocks it is of no use without.
        """
        epoch = _core.epoch()
        own = [own_bytes(x) for x in arrays]
        mx.eval(own)
        pieces = [to_bytes(x) for x in own]
        self.taken_bytes += sum(map(len, pieces))
        if _core.epoch() != epoch:
            return None
        before, gone = tuple(text.blocks[:after]), tuple(instead_of)
        tokens = text.tokens[: node.end]
        return Draft(node, tokens, pieces, about, before, gone), epoch


def _after(text: _Text, start: int) -> list[Node]:
    """The snapshots of it that come after its blocks up to ``start``."""
    return [node for node in text.known if node.start == start]
