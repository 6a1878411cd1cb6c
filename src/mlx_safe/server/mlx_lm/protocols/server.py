# mypy: disable-error-code="empty-body"
"""The module ``mlx_lm.server``: its two threads' classes, and its functions."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from queue import Queue
from types import ModuleType
from typing import Any, Protocol

from .generation import BatchGenerator, GenerationResponse, LRUPromptCache
from .models import CliArgs, Model, ModelProvider
from .opaque import (
    Array,
    Json,
    ModelKey,
    Processor,
    Progress,
    Sampler,
    Stops,
    Tokenized,
)
from .requests import (
    CompletionRequest,
    GenerationArguments,
    GenerationContext,
    Response,
    Taken,
)
from .text import Tokenizer

__all__ = ["APIHandler", "ResponseGenerator", "SampleUtils032", "Server"]


class ResponseGenerator:
    """The generation thread and the queue before it."""

    requests: Queue[Taken]  # Overridden by `generator`: who comes in is in flight
    prompt_cache: LRUPromptCache
    model_provider: ModelProvider
    cli_args: CliArgs
    _stop: bool
    _rank: int
    _generation_thread: threading.Thread

    def __init__(
        self, model_provider: ModelProvider, prompt_cache: LRUPromptCache
    ) -> None:
        """Starts the thread."""

    def join(self) -> None: ...

    def generate(
        self,
        request: CompletionRequest,
        generation_args: GenerationArguments,
        progress_callback: Progress | None = None,
    ) -> tuple[GenerationContext, Iterator[Response]]:
        """Handler threads. Overridden by `generator`, which raises `Asked`."""

    def _generate(self) -> None:
        """The thread's loop. Overridden by `generator`: run again after a failure."""

    def _next_request(self, timeout: float | None) -> Taken | None:
        """Every request passes here. Overridden: its queue becomes an `InFlight`."""

    def _share_object(self, obj: object) -> object:
        """With more than one rank. Overridden by none, called: who has left."""

    def _log_cache_stats(self) -> None:
        """Called for each request. Overridden: one line, at DEBUG."""

    def _is_batchable(self, args: GenerationArguments) -> bool:
        """Overridden: asked of the model that is named, not of the one before."""

    def _serve_single(self, request: Taken) -> None:
        """The sequential path. Overridden: a client that left ends it in a step."""

    def _tokenize(
        self,
        tokenizer: Tokenizer,
        request: CompletionRequest,
        args: GenerationArguments,
    ) -> Tokenized:
        """Overridden: limits, admission, and the tokens that a replay has already."""

    def _make_state_machine(
        self, model_key: ModelKey, tokenizer: Tokenizer, stop_words: list[str]
    ) -> Stops:
        """Overridden: stop words of a replay; a failure is the request's own."""


class APIHandler(BaseHTTPRequestHandler):
    """One connection, on a thread of its own."""

    response_generator: Any
    created: int
    body: Json
    stream: bool
    stream_options: Json | None
    requested_model: str
    request_id: str
    object_type: str

    def __init__(
        self, response_generator: ResponseGenerator, *args: object, **kwargs: object
    ) -> None: ...

    def do_GET(self) -> None:
        """Overridden by `handler`: /metrics, one model, 404 and 405."""

    def do_POST(self) -> None:
        """Overridden by `handler`: it reads a body that `schema` has checked."""

    def _validate(self, name: str, *args: object, **more: object) -> None:
        """Overridden by `handler`: up to 20 alternatives."""

    def validate_model_parameters(self) -> None:
        """Overridden by `handler`: ``n``."""

    def handle_completion(
        self, request: CompletionRequest, stop_words: list[str]
    ) -> None:
        """Overridden by `handler`: `answers` makes the answer."""

    def handle_chat_completions(self) -> CompletionRequest:
        """Overridden by `handler`: an image that cannot be fetched is refused."""

    def handle_health_check(self) -> None:
        """Overridden by `handler`: the state of the server."""

    def handle_models_request(self) -> None:
        """Overridden by `handler`: lists what requests may name."""

    def generate_response(
        self,
        text: str,
        finish_reason: str | None,
        prompt_token_count: int | None = None,
        completion_token_count: int | None = None,
        prompt_cache_count: int | None = None,
    ) -> Json:
        """Called by `answers`: the frame of an answer."""

    def completion_usage_response(
        self,
        prompt_token_count: int | None = None,
        completion_token_count: int | None = None,
        prompt_cache_count: int | None = None,
    ) -> Json:
        """Called by `answers`: the last event of a stream."""

    def _set_stream_headers(self, status_code: int) -> None: ...

    def _set_cors_headers(self) -> None:
        """Overridden by `handler`: the last that ends the headers of any answer."""


class Server(Protocol):
    """The module ``mlx_lm.server``. The first nine are replaced by `patch`."""

    logging: ModuleType  # whole requests and answers are in its lines
    Queue: type  # a token's way to its handler

    def run(self, host: str, port: int, model_provider: ModelProvider) -> None: ...
    def load(self, *args: object, **options: object) -> tuple[object, ...]: ...
    def _make_sampler(
        self, args: GenerationArguments, tokenizer: Tokenizer
    ) -> Sampler: ...
    def _make_logits_processors(self, args: GenerationArguments) -> list[Processor]: ...
    def _format_top_logprobs(
        self, logprobs: Array, top_n: int, tokenizer: Tokenizer
    ) -> tuple[Json, ...]: ...
    def BatchGenerator(self, model: Model) -> BatchGenerator: ...
    # Called with `prompt` and `draft_model` by name: `parts` reads them.
    def stream_generate(
        self, *args: object, **kwargs: object
    ) -> Iterator[GenerationResponse]: ...
    def main(self) -> None: ...
    def get_system_fingerprint(self) -> str: ...


class SampleUtils032(Protocol):
    """The module ``mlx_lm.sample_utils``; with this in mlx-lm 0.32."""

    greedy_sampler: Sampler
