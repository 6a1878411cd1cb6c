# mypy: disable-error-code="empty-body"
"""A request and its answer: dataclasses of ``mlx_lm.server``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from .opaque import Item, Json
from .text import TextStateMachine, Tokenizer

__all__ = [
    "AnsweredContext",
    "Answers",
    "CompletionRequest",
    "GenerationArguments",
    "GenerationContext",
    "GenerationContext032",
    "LogitsProcessorArguments",
    "ModelDescription",
    "Response",
    "Response031",
    "SamplingArguments",
    "Taken",
    "Vision032",
]


class Answers(Protocol):
    """The queue of one request; `InFlight` stands in for it."""

    def put(self, item: Item) -> None: ...


class CompletionRequest(Protocol):
    """What its handler makes of a body; ``messages`` are changed while it is read."""

    request_type: str  # "chat" or "text"
    prompt: str
    messages: list[Json]
    tools: list[Json] | None


class ModelDescription(Protocol):
    """Names as the request has them; "default_model" where it has none."""

    model: str
    draft: str | None
    adapter: str | None


class SamplingArguments(Protocol):
    """How tokens are drawn."""

    temperature: float
    top_k: int


class LogitsProcessorArguments(Protocol):
    """How logits are changed before one is drawn."""

    logit_bias: dict[int, float] | None
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float


class GenerationArguments(Protocol):
    """What is to be generated. ``max_tokens`` and ``model`` are put right here."""

    model: ModelDescription
    sampling: SamplingArguments
    logits: LogitsProcessorArguments
    stop_words: list[str]
    max_tokens: int
    logprobs: bool
    top_logprobs: int
    seed: int | None
    chat_template_kwargs: Json | None


# What `generate` puts into the queue of `ResponseGenerator`, for its thread.
Taken = tuple[Answers, CompletionRequest, GenerationArguments]


class Vision032(Protocol):
    """Images of a prompt; the last that `_tokenize` returns (mlx-lm 0.32)."""

    cache_key: list[int]


class GenerationContext(Protocol):
    """What a handler gets before the tokens; ``stop`` ends the generation."""

    prompt: list[int]
    prompt_cache_count: int
    tool_parser: Callable[[str, list[Json] | None], object]

    def stop(self) -> None:
        """Replaced for each request, so that its end is noticed at once."""


class GenerationContext032(GenerationContext, Protocol):
    """With what the handler finds that out with (mlx-lm 0.32)."""

    text_sm: TextStateMachine
    initial_state: str


class AnsweredContext(GenerationContext, Protocol):
    """A context once `InFlight` has passed it on, with what this server adds."""

    tokenizer: Tokenizer


class Response(Protocol):
    """One token of an answer, and the text that it completes."""

    text: str
    token: int
    logprob: float
    finish_reason: str | None
    top_tokens: tuple[Json, ...]


class Response031(Response, Protocol):
    """With what the generation thread says of the text (mlx-lm 0.31)."""

    state: str | None
