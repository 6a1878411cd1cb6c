# mypy: disable-error-code="empty-body"
"""What the generation thread has: the batch and the prompt cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from .models import Cache
from .opaque import Array, ModelKey, Processor, Uid

__all__ = [
    "AnswerBatch",
    "AnswerResponse",
    "BatchGenerator",
    "CacheEntry",
    "CacheOrder",
    "CacheTrie",
    "GenerationResponse",
    "LRUPromptCache",
    "PromptBatch",
    "PromptResponse",
]


class PromptBatch(Protocol):
    """Prompts that are being read: ``mlx_lm.generate.PromptProcessingBatch``."""

    prompt_cache: list[Cache]
    prefill_step_size: int
    # Row by row; tokens: those that are in the caches.
    uids: list[Uid]
    tokens: list[list[int]]


class AnswerBatch(Protocol):
    """Answers that are being written: ``mlx_lm.generate.GenerationBatch``."""

    prompt_cache: list[Cache]
    logits_processors: list[list[Processor]]

    def filter(self, keep: list[int]) -> None:
        """Replaced by `compat` (0.31.3): penalties stay with their request."""


class PromptResponse(Protocol):
    """What a step says of a prompt: ``PromptProcessingBatch.Response``."""

    uid: Uid
    progress: tuple[int, int]
    end_of_segment: bool
    end_of_prompt: bool


class AnswerResponse(Protocol):
    """What a step says of an answer: ``GenerationBatch.Response``."""

    uid: Uid
    token: int
    finish_reason: str | None
    logprobs: Array  # replaced by `batches` where nobody asked for them


class GenerationResponse(Protocol):
    """One token of the sequential path: ``mlx_lm.generate.GenerationResponse``."""

    token: int
    finish_reason: str | None
    logprobs: Array  # replaced by `parts` where nobody asked for them


class BatchGenerator:
    """The batch; one at a time, of one model. Generation thread."""

    prefill_step_size: int
    prefill_batch_size: int
    _prompt_batch: PromptBatch
    _generation_batch: AnswerBatch
    # Their uids come first, their prompts in parts second.
    _unprocessed_sequences: Sequence[Sequence[object]]
    # What is left of their prompts, in parts, comes first.
    _currently_processing: Sequence[Sequence[object]]

    def insert_segments(
        self, segments: object, *args: object, **kwargs: object
    ) -> Sequence[Uid]:
        """Overridden by `batches`: a failure is the request's own."""

    def next(self) -> tuple[Sequence[PromptResponse], Sequence[AnswerResponse]]:
        """Overridden by `batches`: asks for memory before each step."""

    def remove(self, uids: Sequence[Uid], *args: object, **kwargs: object) -> object:
        """Overridden by `batches`, which forgets them as well."""


class CacheEntry(Protocol):
    """One entry, as its trie has it."""

    prompt_cache: list[Cache]
    nbytes: int


class CacheTrie(Protocol):
    """Finds an entry by its tokens."""

    def get(self, model: ModelKey, tokens: list[int]) -> CacheEntry: ...


class CacheOrder:
    """``LRUPromptCache.CacheOrder``: which entry goes next."""

    def push(self, model: ModelKey, tokens: list[int], cache_type: str) -> None:
        """Overridden by `prompt_cache`, which notes the entry."""

    def remove(self, model: ModelKey, tokens: list[int]) -> None:
        """Overridden by `prompt_cache`."""

    def pop(self) -> tuple[ModelKey, list[int]]:
        """Overridden by `prompt_cache`: one that is protected stays."""


class LRUPromptCache:
    """Prompts that were read, and their caches. Generation thread."""

    max_size: int
    max_bytes: int
    nbytes: int
    _lru: CacheOrder
    _trie: CacheTrie

    def __init__(self, max_size: int, max_bytes: int) -> None: ...
    def __len__(self) -> int: ...

    def fetch_nearest_cache(
        self, model: ModelKey, tokens: list[int]
    ) -> tuple[list[Cache] | None, list[int]]:
        """Overridden by `prompt_cache`: there is always a token left to read."""

    def insert_cache(
        self,
        model: ModelKey,
        tokens: list[int],
        prompt_cache: list[Cache],
        *,
        cache_type: str = "assistant",
    ) -> None:
        """Overridden by `prompt_cache`: entries are complete and have their size."""

    def trim_to(
        self, *, n_sequences: int | None = None, n_bytes: int | None = None
    ) -> None:
        """Overridden by `prompt_cache`, which counts what is evicted."""
