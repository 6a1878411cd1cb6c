"""KV caches go to disk, and come back: between mlx-lm's caches and `mlx_safe.kv`.

What of them is kept says `kv_layout`; a model with other caches stays in memory, which
one line in the log says. Used by the generation thread only; ``events`` and figures may
be read by any.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import mlx.core as mx

from ... import _core
from ...kv.directory import Directory
from ...kv.format import BLOCK_TOKENS, Node
from ...kv.identity import Identity, describe_model
from ...kv.store import Found, Limits, Store, are_tokens
from ...kv.writer import Writer
from ...memory.sizes import format_size
from ..recorder import breadcrumb
from ..replies import is_of_all
from . import compat, kv_parts
from .hub import cached_model
from .kv_capture import Capture, End, Kept, Reading
from .kv_layout import Layout, Unfit
from .kv_parts import NotKept, View
from .protocols.generation import (
    BatchGenerator,
)
from .protocols.models import (
    Cache,
    ModelProvider,
)
from .protocols.opaque import (
    Json,
    ModelKey,
    Uid,
)

__all__ = ["KVTier"]

log = logging.getLogger("mlx_safe.server")

# How long a restore waits for what of its own text is still being written.
FLUSH_S = 5.0
CLOSE_S = 2.0
# A restore that was too slow is tried again after so many that were not.
TRY_AGAIN_AFTER = 16
# What is damaged goes, and what is left may serve: looked at so often.
LOADS_MAX = 4
T = TypeVar("T")
P = ParamSpec("P")


def _spared(
    call: Callable[Concatenate[KVTier, P], T],
) -> Callable[Concatenate[KVTier, P], T | None]:
    """``call``, which harms no request: what fails in it turns the tier off.

    But a fault of the GPU, or the want of memory, is no failure of the tier's.
    """

    @functools.wraps(call)
    def spared(self: KVTier, /, *args: P.args, **kwargs: P.kwargs) -> T | None:
        try:
            return call(self, *args, **kwargs)
        except Exception as e:
            if is_of_all(e):
                raise
            self._has_failed(e)
            return None

    return spared


class _Rate:
    """How much of something a second; 0.0: not known.

    The last few count, each by its amount: the end of a prompt is a step of few tokens.
    """

    def __init__(self) -> None:
        self.per_s = self._amount = self._seconds = 0.0

    def saw(self, amount: float, seconds: float) -> None:
        if amount > 0 and seconds > 0:
            self._amount = 0.7 * self._amount + amount
            self._seconds = 0.7 * self._seconds + seconds
            self.per_s = self._amount / self._seconds


Caches = list[Cache] | None  # of a prompt


class Run(Protocol):
    """One run of a request; `alone`: on the sequential path."""

    alone: bool


class Reader(Protocol):
    """What is asked of a request in flight, whose prompt is read."""

    prompt_key: tuple[ModelKey, list[int]] | None

    @property
    def run(self) -> Run: ...
    @property
    def is_ended(self) -> bool: ...
    @property
    def cached_tokens(self) -> int | None: ...


@dataclass(eq=False)
class _Restored:
    """What a request began from. mark: lifted with its first token, then None."""

    request: Reader | None
    nodes: tuple[Node, ...]
    mark: str | None


class KVTier:
    """The tier of one server.

    Args:
        directory: where the files are.
        limits: how many bytes there, and how they may be written.

    Attributes:
        store: `kv.store.Store`, with its ``events``.
        current: the request that mlx-lm is about to start; None: nobody's.
    """

    def __init__(self, directory: Directory, limits: Limits) -> None:
        self.store = Store(directory, limits)
        self.writer = Writer(self.store)
        self._capture = Capture(self.store, self.writer, self._read_s)
        self.current: Callable[[], Reader | None] = lambda: None
        self._key: ModelKey = None
        self._kept: list[Kept] = []
        self._restored: list[_Restored] = []
        self._readings: dict[int, Reading] = {}
        self._read_rate, self._restore_rate = _Rate(), _Rate()
        self._not_tried = 0
        self._confirmed = 0.0  # when
        self.store.open()
        self.writer.start()

    # -- the model -------------------------------------------------------------------

    def model_loaded(self, provider: ModelProvider) -> None:
        """Finds out whether the caches of what was just loaded can be kept."""
        if provider.model_key == self._key:
            return
        self._key = provider.model_key
        self._kept, self._readings = [], {}
        self.writer.release()
        self._read_rate = _Rate()
        try:
            self._kept = [self._keep(provider, n) for n in compat.cache_forms(provider)]
        except NotKept as e:
            log.warning("KV caches of this model stay in memory: %s", e)
            return
        except Exception as e:  # whatever a model raises; it is served all the same
            why = f"{type(e).__name__}: {e}"
            log.warning("KV caches of this model stay in memory: %s", why)
            return
        layout = self._kept[0].layout
        self._capture.begin(self._kept)
        log.info(
            "KV caches are kept in %s, %s; the files hold what was said",
            self.store.path,
            " and ".join(
                [f"{format_size(layout.block_nbytes)} a block of {BLOCK_TOKENS} tokens"]
                * layout.has_blocks
                + ["windows and states at boundaries"] * layout.has_states
            ),
        )

    def _keep(self, provider: ModelProvider, quantized: bool) -> Kept:
        target, draft = provider.model, provider.draft_model
        assert target is not None

        def make() -> list[Cache]:
            made = compat.make_cache(target)
            if draft is not None:  # mlx-lm has both in one list
                made += compat.make_cache(draft)
            return compat.quantized(made, provider.cli_args) if quantized else made

        def run(caches: list[Cache]) -> None:
            # Nothing is computed: shapes are known without. Of a few tokens, as some
            # states grow at first (longcat_flash_ngram's last tokens).
            tokens = mx.zeros((1, 16), mx.int32)
            own = len(compat.make_cache(target))
            target(tokens, cache=caches[:own])
            if draft is not None:
                draft(tokens, cache=caches[own:])

        # Quantized as it is read, a text has other bits after other steps: it is
        # the same only from where memory would have gone on.
        whole = compat.kv_quantization(provider.cli_args).get("kv_bits") is not None
        layout = Layout(make, run, whole)
        identity = Identity.of(
            {
                "model": [_describe(name) for name in provider.model_key],
                "mlx": version("mlx"),
                "mlx-lm": version("mlx-lm"),
                "device": str(mx.default_device()),
                "caches": layout.facts,
                "quantization": compat.kv_quantization(provider.cli_args),
                "name": Path(str(provider.model_key[0])).name,
            }
        )
        self.store.describe(identity.digest, identity.text)
        return Kept(layout, identity.digest)

    def _is_on(self, model: ModelKey, tokens: Sequence[object]) -> bool:
        on = bool(self._kept) and self.store.off is None
        return on and model == self._key and are_tokens(tokens)

    def figures(self) -> Json:
        """For crash reports; JSON-able, no text of anybody's. Any thread."""
        events = self.store.events
        names = ("restored", "restored_tokens", "written", "written_bytes")
        return {
            "off": self.store.off,
            "files": len(self.store),
            "bytes": self.store.nbytes,
            "limit": self.store.limits.size,
            "waiting_bytes": self.writer.waiting,
            # Between a restore and its first token.
            "restoring": sum(r.mark is not None for r in self._restored[:]),
            **{name: events[name] for name in (*names, "damaged", "suspects")},
        }

    def _has_failed(self, exc: Exception) -> None:
        why = f"it failed ({type(exc).__name__}); prompts are read"
        self.store.turn_off(why, exc)
        # They may be the cause.
        for restored in self._restored:
            if restored.mark is not None:
                self.store.drop(restored.nodes)
                self._lift(restored)

    # -- restoring -------------------------------------------------------------------

    @property
    def has_restored(self) -> bool:
        """A request in flight began from files."""
        return any(not _has_ended(r.request) for r in self._restored)

    @_spared
    def restore(
        self, model: ModelKey, tokens: list[int], have: int
    ) -> tuple[list[Cache], list[int]] | None:
        """Caches of the beginning of ``tokens``, and the rest; None: read it.

        The request's claim has counted them as read: nothing is owned by two.

        Args:
            have: tokens that the prompt cache in memory has.
        """
        if not self._is_on(model, tokens):
            return None
        for _ in range(LOADS_MAX):
            best = self._best(tokens)
            if best is None or best[1].end - have < BLOCK_TOKENS:
                return None
            kept, found = best
            if not self._is_cheaper(found, have):
                return None
            begun = time.monotonic()
            caches, end = self._load_marked(kept, found, tokens)
            if caches is not None and end > have:
                seconds = time.monotonic() - begun
                self._restore_rate.saw(found.nbytes, seconds)
                breadcrumb("kv", "restored", tokens=end, ms=round(1000 * seconds))
                self.store.events["restored"] += 1
                self.store.events["restored_tokens"] += end
                return caches, tokens[end:]
            if not kept.layout.has_states:
                return None  # from its beginning on nothing is sound
        return None

    def _load_marked(
        self, kept: Kept, found: Found, tokens: list[int]
    ) -> tuple[list[Cache] | None, int]:
        mark = self.store.begin_restore(found.nodes)
        if mark is None:
            return None, 0
        restored = _Restored(self.current(), found.nodes, mark)
        self._restored.append(restored)
        epoch = _core.epoch()
        caches, end = self._load(kept, found.nodes, tokens)
        if caches is None or _core.epoch() != epoch:
            self._restored.remove(restored)
            self.store.end_restore(mark)
            return None, 0
        return caches, end

    def _best(self, tokens: list[int]) -> tuple[Kept, Found] | None:
        """What saves most of what is on disk, or will be in a moment."""

        def look() -> list[tuple[Kept, Found]]:
            most = len(tokens) - 1  # the last is always read
            found = [(k, self._find(k, tokens, most)) for k in self._kept]
            return [(k, f) for k, f in found if f is not None]

        found = look()
        end = max([f.end for _, f in found], default=0)
        identities = {k.identity for k in self._kept}
        if self.writer.goes_on(identities, tokens, end) and self.writer.flush(FLUSH_S):
            found = look()
        return max(found, key=lambda pair: pair[1].end, default=None)

    def _find(self, kept: Kept, tokens: Sequence[int], most: int) -> Found | None:
        return self.store.find(
            kept.identity,
            tokens,
            most,
            blocks=kept.layout.has_blocks,
            states=kept.layout.has_states,
        )

    def _is_cheaper(self, found: Found, have: int) -> bool:
        """Than reading what memory does not have; learned from both speeds."""
        read, restore = self._read_rate.per_s, self._restore_rate.per_s
        if not read or not restore:
            return True
        if found.nbytes / restore < (found.end - have) / read:
            return True
        self._not_tried += 1
        self.store.events["not_cheaper"] += 1
        return self._not_tried % TRY_AGAIN_AFTER == 0

    def _read_s(self, tokens: int) -> float:
        """How long they take to be read; for ever while that is not known."""
        return tokens / self._read_rate.per_s if self._read_rate.per_s else math.inf

    def _load(
        self, kept: Kept, nodes: Sequence[Node], tokens: list[int]
    ) -> tuple[list[Cache] | None, int]:
        """Caches of those of ``nodes`` that are sound, from the first on."""
        layout, states, end = kept.layout, None, 0
        slots: list[list[mx.array]] = []
        missing = len(nodes)
        for node in nodes:
            got = self.store.read(node, tokens, layout.most(node))
            if got is None:
                break
            try:
                made, found = layout.read(node, *got)
            except Unfit as e:
                # Its checksums are right: somebody made it so.
                log.warning("a file of KV caches is not used: %s: %s", node.name, e)
                self.store.drop([node])
                break
            del got
            slots = slots or [[] for _ in made]
            for part, x in zip(slots, made, strict=True):
                part.append(x)
            states, end = found or states, node.end
            missing -= 1
        # A snapshot may end where the block before it does: ends do not tell.
        if not end or (layout.has_states and missing):
            return None, 0
        return layout.caches(slots, states or [], end), end

    @_spared
    def first_token(self, request: Reader) -> None:
        """``request`` has a token: what it began from has killed nobody.

        Called with each of its tokens.
        """
        reading = self._readings.get(id(request))
        if reading is not None and not reading.has_token:
            reading.has_token, reading.caches = True, None
            if not self.writer.has_held(id(request)):
                del self._readings[id(request)]
        for restored in self._restored:
            if restored.request is request:
                self._lift(restored)

    def _lift(self, restored: _Restored) -> None:
        if restored.mark is not None:
            self.store.end_restore(restored.mark)
            restored.mark = None

    # -- capturing -------------------------------------------------------------------

    @_spared
    def capture(
        self,
        model: ModelKey,
        tokens: list[int],
        caches: list[Cache],
        *,
        leaves: bool = False,
    ) -> None:
        """Has of a complete entry written what is not on disk.

        Args:
            leaves: memory has it no more.
        """
        if self._is_on(model, tokens):
            offsets = [
                getattr(c, "offset", len(tokens)) for c in kv_parts.leaves(caches)
            ]
            done = min([len(tokens), *offsets])
            view = View(caches, done, ahead=max([done, *offsets]) > done)
            end = End.LEAVES if leaves else End.OF_PART
            self._take(tokens[:done], view, None, is_boundary=True, end=end)

    @_spared
    def checkpoint(
        self, batch: BatchGenerator, uid: Uid, request: Reader, *, is_boundary: bool
    ) -> None:
        """A prompt in mlx-lm's ``batch`` has been read further.

        Args:
            is_boundary: a part of it ends here: the next turn may begin with it.
        """
        key = request.prompt_key
        if key is None or not self._is_on(*key) or uid not in batch._prompt_batch.uids:
            return
        row = batch._prompt_batch.uids.index(uid)
        done = len(batch._prompt_batch.tokens[row])
        reading = self._progress(request, done, request.cached_tokens)
        view = View(batch._prompt_batch.prompt_cache, done, row)
        self._take(
            key[1][:done],
            view,
            reading,
            is_boundary=is_boundary,
            end=End.OF_PART if is_boundary else End.NONE,
        )

    def follow(
        self, model: ModelKey, tokens: list[int], caches: Caches, begun: int
    ) -> Caches:
        """Watches the caches that the sequential path begins with, and makes them.

        Args:
            begun: how many of ``tokens`` they have.
        """
        return self._follow(model, tokens, caches, begun) or caches

    @_spared
    def _follow(
        self, model: ModelKey, tokens: list[int], caches: Caches, begun: int
    ) -> Caches:
        request = self.current()
        if request is None or not request.run.alone or not self._is_on(model, tokens):
            return caches
        reading = self._progress(request, begun)
        reading.tokens, reading.begun = tokens[:], begun
        reading.caches = caches or self._kept[0].layout.make()
        return reading.caches

    @_spared
    def checkpoint_alone(self, request: Reader, read: int | None) -> None:
        """The sequential path has read ``read`` tokens of its prompt.

        Args:
            read: None: with a draft model, which reads all of it before the target
                begins. What both have read is kept: mlx-lm begins both at one token.
        """
        reading = self._readings.get(id(request))
        if reading is None or reading.caches is None:
            return
        if not self._is_on(self._key, reading.tokens):
            return
        total = len(reading.tokens)
        parts = kv_parts.leaves(reading.caches)
        offsets = [getattr(c, "offset", None) for c in parts]
        end = total if read is None else reading.begun + read
        done = min([end, *(n for n in offsets if n is not None)])
        # mlx-lm (0.31, 0.32) tells that it has read the last token when the step of the
        # next has begun.
        view = View(reading.caches, done, ahead=end >= total)
        self._progress(request, done)
        # No boundaries are known here; at the end another turn may differ in the last
        # tokens, so the one before that stays.
        is_end = done >= total - 1
        if is_end:
            reading.passing = None
        tokens = reading.tokens[:done]
        part = End.OF_PART if is_end else End.NONE
        self._take(tokens, view, reading, is_boundary=False, end=part)

    def _progress(
        self, request: Reader, done: int, begun: int | None = None
    ) -> Reading:
        """Args: begun: tokens that it had before the step that ends now, its first."""
        now = time.monotonic()
        reading = self._readings.get(id(request))
        if reading is None:
            reading = Reading(request, done if begun is None else begun)
            reading.since = self._confirmed
            self._readings[id(request)] = reading
        self._read_rate.saw(done - reading.done, now - reading.since)
        reading.done, reading.since = done, now
        return reading

    def _take(
        self,
        tokens: Sequence[int],
        view: View,
        reading: Reading | None,
        *,
        is_boundary: bool,
        end: End,
    ) -> None:
        """See `Capture.take`."""
        kept = next((k for k in self._kept if k.layout.is_at(view)), None)
        if kept is None:
            return
        fits = self._capture.take(
            kept, tokens, view, reading, is_boundary=is_boundary, end=end
        )
        if not fits and view.row is None and len(self._kept) == 1:
            self._kept = []  # or blocks would be written for nothing
            why = "their shapes are not those of an empty text"
            log.warning("KV caches of this model stay in memory: %s", why)

    # -- the epoch -------------------------------------------------------------------

    @_spared
    def confirm(self) -> None:
        """The loop is between two steps, and no fault is to be dealt with.

        Called with every step: what is not to be done costs nothing.
        """
        self._confirmed = time.monotonic()
        if self.writer.unconfirmed:
            mx.synchronize()
            self.writer.confirm(_core.epoch())
        if self._readings:
            ended = [i for i, r in self._readings.items() if _has_ended(r.request)]
            for i in ended:
                reading = self._readings.pop(i)  # its memory is to be free
                if reading.has_token:
                    self.writer.let_go(i)
                else:
                    self.writer.release(i)  # it was broken off
        if self._restored:
            for restored in self._restored:
                if _has_ended(restored.request):
                    self._lift(restored)
            self._restored = [r for r in self._restored if not _has_ended(r.request)]

    def fail(self, *, stray: bool) -> None:
        """There was a failure. stray: something may have been written anywhere."""
        for reading in self._readings.values():
            reading.caches, reading.has_token = None, False
        self.writer.fail(all_of_it=stray)
        self.writer.release()
        for restored in self._restored:
            if stray:
                self.store.drop(restored.nodes)
            self._lift(restored)
        self._restored = []

    def withdraw(self) -> None:
        """The process will be replaced: nothing more is written. Any thread."""
        self.writer.fail(all_of_it=True)

    def close(self) -> None:
        """The server stops: what is confirmed is written, if the disk is quick."""
        for restored in self._restored:
            self._lift(restored)
        self.writer.release()
        self.writer.close(CLOSE_S)


def _has_ended(request: Reader | None) -> bool:
    return request is None or request.is_ended


def _describe(name: object) -> object:
    """The files behind one of mlx-lm's names; None for none.

    Raises:
        OSError: they are not to be found.
    """
    if name is None:
        return None
    path = Path(str(name))
    found = path if path.is_dir() else cached_model(str(name))
    if found is None:
        raise FileNotFoundError(f"no files of {name}")
    return describe_model(found)
