"""KV caches go to disk, and come back: between mlx-lm's caches and `mlx_safe.kv`.

Proven exact, and so kept: models all of whose caches are `KVCache` (mlx-lm 0.31.3 and
0.32.2), without a draft model. Any other stays in memory, which one line in the log
says. Used by the generation thread only; ``events`` and figures may be read by any.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from ... import _core
from ...kv.directory import Directory
from ...kv.format import BLOCK_TOKENS, HEADER_MAX, Node, chain
from ...kv.identity import Identity, describe_model
from ...kv.store import Draft, Found, Limits, Store, are_tokens
from ...kv.writer import Writer
from ...memory.sizes import format_size
from . import compat
from .hub import cached_model

__all__ = ["KVTier"]

log = logging.getLogger("mlx_safe.server")

# How long a restore waits for blocks of its own text that are still being written.
FLUSH_S = 5.0
CLOSE_S = 2.0
# A restore that was too slow is tried again after so many that were not.
TRY_AGAIN_AFTER = 16


@dataclass(frozen=True)
class _Array:
    """One array of a layer, of one token: its heads, width and type."""

    heads: int
    width: int
    dtype: str

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return 1, self.heads, BLOCK_TOKENS, self.width

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * int(getattr(mx, self.dtype).size)


class _Rate:
    """How much of something a second; 0.0: not known."""

    def __init__(self) -> None:
        self.per_s = 0.0

    def saw(self, amount: float, seconds: float) -> None:
        if amount > 0 and seconds > 0:
            now = amount / seconds
            self.per_s = now if not self.per_s else 0.7 * self.per_s + 0.3 * now


@dataclass(eq=False)
class _Restored:
    """What a request began from. mark: lifted with its first token, then None."""

    request: Any
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
        self.current: Callable[[], Any] = lambda: None
        self._model: Any = None
        self._key: Any = None
        self._identity = ""
        self._arrays: list[_Array] = []
        self._restored: list[_Restored] = []
        # On the sequential path: who reads a prompt, which, and into what.
        self._reading: tuple[Any, list[int], list[Any]] | None = None
        self._read_rate, self._restore_rate = _Rate(), _Rate()
        self._progress: tuple[int, int, float] = (0, 0, 0.0)
        self._not_tried = 0
        self.store.open()
        self.writer.start()

    # -- the model -------------------------------------------------------------------

    def model_loaded(self, provider: Any) -> None:
        """Finds out whether the caches of what was just loaded can be kept."""
        if provider.model_key == self._key:
            return
        self._key = provider.model_key
        self._model, self._reading = None, None
        why = self._measure(provider)
        if why is not None:
            log.warning("KV caches of this model stay in memory: %s", why)
            return
        self._model = provider.model
        log.info(
            "KV caches are kept in %s, %s a block of %d tokens; the files hold what "
            "was said",
            self.store.path,
            format_size(sum(a.nbytes for a in self._arrays)),
            BLOCK_TOKENS,
        )

    def _measure(self, provider: Any) -> str | None:
        """Why they cannot be kept; None: they can."""
        if provider.draft_model is not None:
            return "there is a draft model"
        if compat.kv_quantization(provider.cli_args).get("kv_bits") is not None:
            return "--kv-bits"
        caches: list[Any] = compat.make_cache(provider.model)
        kinds = sorted({type(c).__name__ for c in caches if type(c) is not KVCache})
        if kinds or not caches:
            return f"not proven for {', '.join(kinds) or 'a model without caches'}"
        try:
            # Nothing is computed: shapes are known without.
            provider.model(mx.array([[0]]), cache=caches)
            self._arrays = [
                _Array(x.shape[1], x.shape[3], str(x.dtype).rpartition(".")[2])
                for cache in caches
                for x in (cache.keys, cache.values)
            ]
            facts = [_describe(name) for name in provider.model_key]
        except (OSError, AttributeError, IndexError, ValueError) as e:
            return f"{type(e).__name__}: {e}"
        identity = Identity.of(
            {
                "model": facts,
                "mlx": version("mlx"),
                "mlx-lm": version("mlx-lm"),
                "device": str(mx.default_device()),
                "caches": [type(c).__name__ for c in caches],
                "arrays": [[a.heads, a.width, a.dtype] for a in self._arrays],
                "name": Path(str(provider.model_key[0])).name,
            }
        )
        self._identity = identity.digest
        self.store.describe(identity.digest, identity.text)
        return None

    def _is_on(self, model: Any, tokens: Sequence[Any]) -> bool:
        on = self._model is not None and self.store.off is None
        return on and model == self._key and are_tokens(tokens)

    @property
    def _most(self) -> int:
        """Bytes that a block's file can have."""
        return sum(a.nbytes for a in self._arrays) + HEADER_MAX + 4 * BLOCK_TOKENS + 64

    # -- restoring -------------------------------------------------------------------

    def restore(
        self, model: Any, tokens: list[int], have: int
    ) -> tuple[list[Any], list[int]] | None:
        """Caches of the beginning of ``tokens``, and the rest; None: read it.

        The request's claim has counted them as read: nothing is owned by two.

        Args:
            have: tokens that the prompt cache in memory has.
        """
        if not self._is_on(model, tokens):
            return None
        found = self._on_disk(tokens)
        if found is None or found.end - have < BLOCK_TOKENS:
            return None
        if not self._is_cheaper(found, have):
            return None
        mark = self.store.begin_restore(found.nodes)
        if mark is None:
            return None
        self._restored.append(_Restored(self.current(), found.nodes, mark))
        begun, epoch = time.monotonic(), _core.epoch()
        caches = self._load(found.nodes, tokens)
        if caches is None or caches[0].offset <= have or _core.epoch() != epoch:
            return None
        end = caches[0].offset
        self._restore_rate.saw(end, time.monotonic() - begun)
        self.store.events["restored"] += 1
        self.store.events["restored_tokens"] += end
        return caches, tokens[end:]

    def _on_disk(self, tokens: list[int]) -> Found | None:
        keys = chain(self._identity, tokens[:-1])

        def found() -> Found | None:
            return self.store.find(
                self._identity, tokens, len(tokens) - 1, blocks=True, states=False
            )

        best = found()
        end = 0 if best is None else len(best.nodes)
        if end < len(keys):
            following = Node.block(self._identity, keys, end)
            if self.writer.holds(following) and self.writer.flush(FLUSH_S):
                best = found()
        return best

    def _is_cheaper(self, found: Found, have: int) -> bool:
        """Than reading what memory does not have; learned from both speeds."""
        read, restore = self._read_rate.per_s, self._restore_rate.per_s
        if not read or not restore or found.end / restore < (found.end - have) / read:
            return True
        self._not_tried += 1
        return self._not_tried % TRY_AGAIN_AFTER == 0

    def _load(self, nodes: Sequence[Node], tokens: list[int]) -> list[Any] | None:
        """The caches of those of ``nodes`` that are sound, from the first on."""
        parts: list[list[mx.array]] = [[] for _ in self._arrays]
        end = 0
        for node in nodes:
            got = self.store.read(node, tokens, self._most)
            if got is None:
                break
            about, pieces = got
            if about != {"arrays": self._about()} or not self._fit(pieces):
                # Its checksums are right: somebody made it so.
                self.store.drop([node])
                break
            for part, array, piece in zip(parts, self._arrays, pieces, strict=True):
                part.append(_made(piece, array))
            mx.eval([part[-1] for part in parts])
            end = node.end
        if not end:
            return None
        assert self._model is not None
        caches: list[Any] = compat.make_cache(self._model)
        for i, cache in enumerate(caches):
            # One layer at a time is there twice, and no more.
            cache.keys, cache.values = (
                mx.concatenate(parts[n], axis=2) for n in (2 * i, 2 * i + 1)
            )
            cache.offset = end
            mx.eval(cache.keys, cache.values)
            parts[2 * i], parts[2 * i + 1] = [], []
        return caches

    def _fit(self, pieces: Sequence[bytes]) -> bool:
        return [len(p) for p in pieces] == [a.nbytes for a in self._arrays]

    def _about(self) -> list[list[Any]]:
        return [[a.dtype, *a.shape] for a in self._arrays]

    def first_token(self, request: Any) -> None:
        """``request`` has a token: what it began from has killed nobody."""
        for restored in self._restored:
            if restored.request is request and restored.mark is not None:
                self.store.end_restore(restored.mark)
                restored.mark = None

    # -- capturing -------------------------------------------------------------------

    def capture(self, model: Any, tokens: list[int], caches: list[Any]) -> None:
        """Has the blocks of a complete entry written that are not on disk."""
        if any(type(cache) is not KVCache for cache in caches):
            return
        if len(caches) * 2 != len(self._arrays):
            return
        held = min(c.offset for c in caches)
        layers = [x for c in caches for x in (c.keys, c.values)]
        self._capture(
            model, tokens[:held], lambda a, b: [x[..., a:b, :] for x in layers]
        )

    def checkpoint(self, batch: Any, uid: Any, key: Any) -> None:
        """A prompt in mlx-lm's ``batch`` has been read further.

        Args:
            key: its (model, tokens), as the prompt cache has them; or None.
        """
        if key is None or not self._is_on(*key) or uid not in batch._prompt_batch.uids:
            return
        row = batch._prompt_batch.uids.index(uid)
        caches = batch._prompt_batch.prompt_cache
        done = len(batch._prompt_batch.tokens[row])
        if not all(hasattr(c, "left_padding") and hasattr(c, "_idx") for c in caches):
            return
        self._note_progress(id(key[1]), done)

        def slices(a: int, b: int) -> list[mx.array]:
            made = []
            for c in caches:
                pad = c._idx - done
                made += [
                    x[row : row + 1, :, pad + a : pad + b] for x in (c.keys, c.values)
                ]
            return made

        self._capture(key[0], key[1][:done], slices)

    def follow(self, model: Any, tokens: list[int], caches: Any) -> Any:
        """Watches the caches that the sequential path begins with, and makes them."""
        self._reading = None
        request = self.current()
        if request is None or not request.run.alone or not self._is_on(model, tokens):
            return caches
        made = caches or compat.make_cache(self._model)
        self._reading = (request, tokens[:], made)
        return made

    def checkpoint_alone(self) -> None:
        """The sequential path has read its prompt further."""
        if self._reading is not None:
            _, tokens, caches = self._reading
            if caches and type(caches[0]) is KVCache:
                self._note_progress(id(tokens), caches[0].offset)
            self.capture(self._key, tokens, caches)

    def _note_progress(self, text: int, done: int) -> None:
        now = time.monotonic()
        before, length, since = self._progress
        if before == text and done > length:
            self._read_rate.saw(done - length, now - since)
        self._progress = (text, done, now)

    def _capture(
        self, model: Any, tokens: list[int], slices: Callable[[int, int], list[Any]]
    ) -> None:
        if not self._is_on(model, tokens):
            return
        keys = chain(self._identity, tokens)
        nodes = [Node.block(self._identity, keys, i) for i in range(len(keys))]
        size = sum(a.nbytes for a in self._arrays)
        for i, node in enumerate(nodes):
            if self.store.has(node) or self.writer.holds(node):
                continue
            if not self.writer.has_room(size):
                self.store.events["not_written_backlog"] += 1
                return
            epoch = _core.epoch()
            arrays = [mx.contiguous(x) for x in slices(node.start, node.end)]
            mx.eval(arrays)
            pieces = [_bytes(x) for x in arrays]
            if _core.epoch() != epoch or not self._fit(pieces):
                return
            about = {"arrays": self._about()}
            self.writer.offer(
                Draft(node, tokens[: node.end], pieces, about, tuple(nodes[:i])), epoch
            )

    # -- the epoch -------------------------------------------------------------------

    def confirm(self) -> None:
        """The loop is between two steps, and no fault is to be dealt with."""
        if self.writer.unconfirmed:
            mx.synchronize()
            self.writer.confirm(_core.epoch())
        if self._reading is not None and self._reading[0].is_ended:
            self._reading = None  # its memory is to be free
        kept = []
        for restored in self._restored:
            if restored.request is None or restored.request.is_ended:
                if restored.mark is not None:
                    self.store.end_restore(restored.mark)
            else:
                kept.append(restored)
        self._restored = kept

    def fail(self, *, stray: bool) -> None:
        """There was a failure. stray: something may have been written anywhere."""
        self._reading = None
        self.writer.fail(all_of_it=stray)
        if stray:
            for restored in self._restored:
                self.store.drop(restored.nodes)
        for restored in self._restored:
            if restored.mark is not None:
                self.store.end_restore(restored.mark)
        self._restored = []

    def withdraw(self) -> None:
        """The process will be replaced: nothing more is written. Any thread."""
        self.writer.fail(all_of_it=True)

    def close(self) -> None:
        """The server stops: what is confirmed is written, if the disk is quick."""
        for restored in self._restored:
            if restored.mark is not None:
                self.store.end_restore(restored.mark)
        self.writer.close(CLOSE_S)


def _describe(name: Any) -> Any:
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


def _made(piece: bytes, array: _Array) -> mx.array:
    flat = mx.array(memoryview(piece))  # type: ignore[arg-type]
    return flat.view(getattr(mx, array.dtype)).reshape(array.shape)


def _bytes(x: mx.array) -> bytes:
    return bytes(memoryview(x.reshape(-1).view(mx.uint8)))  # type: ignore[arg-type]
