# mypy: disable-error-code="empty-body"
"""Models, what their layers keep of a text, and who loads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from .opaque import Array, Json, ModelKey
from .text import Tokenizer

__all__ = [
    "ArraysCache",
    "BatchKVCache",
    "BatchRotatingKVCache",
    "Cache",
    "CacheList",
    "Caches",
    "ChunkedKVCache",
    "CliArgs",
    "KVCache",
    "Model",
    "ModelProvider",
    "ModelProvider032",
    "QuantizedKVCache",
    "RotatingKVCache",
    "Utils",
]


class CliArgs(Protocol):
    """What mlx-lm's parser has found."""

    model: str | None
    adapter_path: str | None
    draft_model: str | None
    trust_remote_code: bool
    num_draft_tokens: int
    prefill_step_size: int  # set here; the sequential path reads it
    prompt_cache_size: int
    prompt_cache_bytes: int | None
    prompt_concurrency: int
    decode_concurrency: int
    allowed_origins: list[str]
    chat_template: str


class Cache(Protocol):
    """What one layer keeps of a text."""

    nbytes: int


class KVCache(Cache, Protocol):
    """Keys and values of all tokens; ``keys`` is None before the first."""

    keys: Array
    values: Array
    offset: int  # tokens

    def is_trimmable(self) -> bool: ...
    def trim(self, n: int) -> int: ...
    def to_quantized(self, group_size: int, bits: int) -> Cache: ...


class BatchKVCache(Cache, Protocol):
    """The same of a batch: a row's tokens end at ``_idx``, before them is padding."""

    keys: Array
    values: Array
    left_padding: Array
    _idx: int


class QuantizedKVCache(Cache, Protocol):
    """``keys`` and ``values`` are three arrays each; ``--kv-bits``."""

    keys: Array
    values: Array
    offset: int
    group_size: int
    bits: int


class RotatingKVCache(Cache, Protocol):
    """Of the last ``max_size`` tokens, and the first ``keep``; the next is ``_idx``."""

    keys: Array
    values: Array
    offset: int
    max_size: int
    keep: int
    _idx: int


class BatchRotatingKVCache(Cache, Protocol):
    """The same of a batch."""

    def extract(self, idx: int) -> RotatingKVCache: ...


class ChunkedKVCache(Cache, Protocol):
    """Of the last ``chunk_size`` tokens, in other models."""

    keys: Array
    values: Array
    offset: int
    chunk_size: int
    start_position: int


class ArraysCache(Cache, Protocol):
    """States, of one text or of a batch."""

    cache: list[Array | None]
    left_padding: Array
    lengths: Array

    def extract(self, idx: int) -> ArraysCache: ...


class CacheList(Cache, Protocol):
    """Several caches of one layer (hybrid models)."""

    caches: Sequence[Cache]


class Model(Protocol):
    """A model of mlx-lm: a module of MLX, each of a class of its own."""

    layers: list[object]

    def __call__(self, tokens: Array, *, cache: list[Cache]) -> Array:
        """Logits, (rows, tokens, width). Replaced for a draft model (`speculative`)."""

    def parameters(self) -> object:
        """The weights, in dictionaries and lists."""

    def clear(self) -> None:
        """A module is the dictionary of its parts."""


class ModelProvider(Protocol):
    """What is loaded. Only mlx-lm's ``main`` can make it."""

    cli_args: CliArgs
    model: Model | None
    tokenizer: Tokenizer
    draft_model: Model | None
    model_key: ModelKey
    is_batchable: bool
    is_distributed: bool

    def load(self, model_path: str, *more: str | None) -> tuple[Model, Tokenizer]:
        """Replaced by `generator`: what is loaded stays until the next can be."""

    def _load(self, model_path: str, *more: str | None) -> None:
        """Replaced by `generator`: `model_loading` loads beside what is there."""

    def load_default(self) -> None:
        """Replaced by `generator` once it has been called."""


class ModelProvider032(ModelProvider, Protocol):
    """With what reads images (mlx-lm 0.32)."""

    processor: object


class Caches(Protocol):
    """The module ``mlx_lm.models.cache``."""

    CacheList: type
    KVCache: type
    QuantizedKVCache: type
    RotatingKVCache: type
    ChunkedKVCache: type
    ArraysCache: type  # of state spaces

    def make_prompt_cache(self, model: Model) -> list[Cache]: ...
    def can_trim_prompt_cache(self, cache: list[Cache]) -> bool: ...
    def trim_prompt_cache(self, cache: list[Cache], num_tokens: int) -> int: ...


class Utils(Protocol):
    """The module ``mlx_lm.utils``."""

    MODEL_REMAPPING: dict[str, str]

    def load_model(self, model_path: Path) -> tuple[Model, Json]: ...
