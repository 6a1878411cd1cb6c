"""KV caches go to disk, and come back: between mlx-lm's caches and `mlx_safe.kv`.

What of them is kept says `kv_layout`; a model with other caches stays in memory, which
one line in the log says. Used by the generation thread only; ``events`` and figures may
be read by any.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import mlx.core as mx

from ... import _core
from ...kv.directory import Directory
from ...kv.format import BLOCK_TOKENS
from ...kv.identity import Identity, describe_model
from ...kv.store import Limits, Store, are_tokens
from ...kv.writer import Writer
from ...memory.sizes import format_size
from ..replies import is_of_all
from . import compat, kv_parts
from .hub import cached_model
from .kv_capture import Capture, End, Kept, Reading
from .kv_layout import Layout
from .kv_parts import NotKept, View
from .kv_restore import Reader, Restore, has_ended
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

CLOSE_S = 2.0
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


Caches = list[Cache] | None  # of a prompt


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
        self._restore = Restore(self.store, self.writer)
        self._capture = Capture(self.store, self.writer, self._restore.read_s)
        self.current: Callable[[], Reader | None] = lambda: None
        self._key: ModelKey = None
        self._kept: list[Kept] = []
        self._readings: dict[int, Reading] = {}
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
        self._restore.model_loaded()
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
            "KV caches are kept in %s, %s; the files hold the conversations",
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
        quantization = compat.kv_quantization(provider.cli_args)
        whole = quantization.get("kv_bits") is not None
        layout = Layout(make, run, whole)
        identity = Identity.of(
            {
                "model": [_describe(name) for name in provider.model_key],
                "mlx": version("mlx"),
                "mlx-lm": version("mlx-lm"),
                "device": str(mx.default_device()),
                "caches": layout.facts,
                "name": Path(str(provider.model_key[0])).name,
                # Where nothing is quantized, 0.1.0 says nothing of it.
                **({"quantization": quantization} if whole else {}),
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
            "restoring": self._restore.count,
            **{name: events[name] for name in (*names, "damaged", "suspects")},
        }

    def _has_failed(self, exc: Exception) -> None:
        why = f"it failed ({type(exc).__name__}); prompts are read whole"
        self.store.turn_off(why, exc)
        self._restore.drop_unproven()

    # -- restoring -------------------------------------------------------------------

    @property
    def has_restored(self) -> bool:
        """A request in flight began from files."""
        return self._restore.is_in_flight

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
        return self._restore.restore(self._kept, self.current(), tokens, have)

    @_spared
    def first_token(self, request: Reader) -> None:
        """``request`` has a token. Called with each of its tokens."""
        reading = self._readings.get(id(request))
        if reading is not None and not reading.has_token:
            reading.has_token, reading.caches = True, None
            if not self.writer.has_held(id(request)):
                del self._readings[id(request)]
        self._restore.first_token(request)

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
        self._restore.read_rate.saw(done - reading.done, now - reading.since)
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
        most = self._restore.blocks_max(kept.layout.block_nbytes, BLOCK_TOKENS)
        if most == 0:
            return
        begun, before = time.monotonic(), self._capture.taken_bytes
        fits = self._capture.take(
            kept, tokens, view, reading, most=most, is_boundary=is_boundary, end=end
        )
        took = time.monotonic() - begun
        if before:  # for the first, MLX compiles a kernel: 0.2 s on an H200 (0.32)
            self._restore.take_rate.saw(self._capture.taken_bytes - before, took)
        for one in self._readings.values():
            one.since += took  # it has read nothing meanwhile
        if not fits and view.row is None and len(self._kept) == 1:
            self._kept = []  # or blocks would be written for nothing
            why = "an empty cache of it has shapes of its own"
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
            ended = [i for i, r in self._readings.items() if has_ended(r.request)]
            for i in ended:
                reading = self._readings.pop(i)  # its memory is to be free
                if reading.has_token:
                    self.writer.let_go(i)
                else:
                    self.writer.release(i)  # it was broken off
        self._restore.forget_ended()

    def fail(self, *, stray: bool) -> None:
        """There was a failure. stray: something may have been written anywhere."""
        for reading in self._readings.values():
            reading.caches, reading.has_token = None, False
        self.writer.fail(all_of_it=stray)
        self.writer.release()
        self._restore.end(drop=stray)

    def withdraw(self) -> None:
        """The process will be replaced: nothing more is written. Any thread."""
        self.writer.fail(all_of_it=True)

    def close(self) -> None:
        """The server stops: what is confirmed is written, if the disk is quick."""
        self._restore.end(drop=False)
        self.writer.release()
        self.writer.close(CLOSE_S)


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
