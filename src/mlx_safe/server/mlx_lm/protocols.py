# mypy: disable-error-code="empty-body"
"""All that this server relies on in mlx-lm, as types. This is the one list of it.

Two things compare it with the world: mypy with what the code uses, and `seams`, when
the server starts, with the mlx-lm that is installed. A class here has the name of
mlx-lm's class, or says what it stands for. A parameter that stands here is one that
this server passes, or mlx-lm passes to an override, by its place or its name.

What this server subclasses is a class, since mypy refuses calls of a protocol's method
by ``super()``; everything else is a protocol. Attributes that only one version of
mlx-lm has are in classes that end with that version.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler
from typing import Any, Protocol

# Opaque to this server: it passes them on.
Uid = Hashable  # of a request in a batch
ModelKey = Any  # what the prompt cache knows a model by
Array = Any  # `mx.array`: MLX ships no types that mypy may follow here
Json = dict[str, Any]
Progress = Callable[[int, int], None]  # tokens of a prompt read, and all
Sampler = Callable[[Array], Array]
Processor = Callable[[Array, Array], Array]

# -- what a request is: dataclasses of mlx_lm.server ------------------------------


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


class GenerationContext(Protocol):
    """What a handler gets before the tokens; ``stop`` ends the generation."""

    prompt: list[int]
    prompt_cache_count: int
    tool_parser: Callable[[str, Any], Any]

    def stop(self) -> None:
        """Replaced for each request, so that its end is noticed at once."""


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


class GenerationContext032(GenerationContext, Protocol):
    """With what the handler finds that out with (mlx-lm 0.32)."""

    text_sm: TextStateMachine
    initial_state: str


# -- models and their files -------------------------------------------------------


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


class Cache(Protocol):
    """What one layer keeps of a text."""

    nbytes: int


class KVCache(Cache, Protocol):
    """Keys and values of all tokens; ``keys`` is None before the first."""

    keys: Any
    values: Any
    offset: int  # tokens

    def is_trimmable(self) -> bool: ...
    def trim(self, n: int) -> int: ...
    def to_quantized(self, group_size: int, bits: int) -> Cache: ...


class BatchKVCache(Cache, Protocol):
    """The same of a batch: a row's tokens end at ``_idx``, before them is padding."""

    keys: Any
    values: Any
    left_padding: Any
    _idx: int


class RotatingKVCache(Cache, Protocol):
    """Of the last ``max_size`` tokens."""

    max_size: int


class ChunkedKVCache(Cache, Protocol):
    """Of the last ``chunk_size`` tokens, in other models."""

    chunk_size: int


class CacheList(Cache, Protocol):
    """Several caches of one layer (hybrid models)."""

    caches: Sequence[Any]


class Model(Protocol):
    """A model of mlx-lm: a module of MLX, each of a class of its own."""

    layers: list[Any]

    def __call__(self, tokens: Array, *, cache: list[Cache]) -> Array:
        """Logits, (rows, tokens, width). Replaced for a draft model (`speculative`)."""

    def parameters(self) -> Any:
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

    processor: Any


class TokenizerWrapper(Protocol):
    """mlx-lm's wrapper, and what it passes on to transformers' tokenizer."""

    tool_call_start: str | None
    tool_call_end: str | None
    detokenizer: Detokenizer  # a new one for each answer

    def rfind_think_start(
        self, tokens: Sequence[int], start: int | None, end: int | None
    ) -> int:
        """Replaced by `compat` for short prompts (0.31.3)."""


class Tokenizer031(TokenizerWrapper, Protocol):
    """With the class of its detokenizers (mlx-lm 0.31)."""

    _detokenizer_class: Any


class Tokenizer032(TokenizerWrapper, Protocol):
    """With the detokenizer that is copied for each answer (mlx-lm 0.32)."""

    _detokenizer: Any


class Detokenizer(Protocol):
    """``StreamingDetokenizer``: text of the tokens of one answer."""

    last_segment: str

    def add_token(self, token: int) -> None: ...
    def finalize(self) -> None: ...


class Vision032(Protocol):
    """Images of a prompt; the last that `_tokenize` returns (mlx-lm 0.32)."""

    cache_key: list[int]


class Tokenizer(TokenizerWrapper, Protocol):
    """What the wrapper passes on to transformers, whose names these are."""

    eos_token_ids: set[int]
    added_tokens_decoder: dict[int, Any]
    model_max_length: int | None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, tokens: list[int]) -> str: ...
    def convert_ids_to_tokens(self, token: int) -> str | None: ...
    def get_vocab(self) -> dict[str, int]: ...


class StopWords031(Protocol):
    """What `_make_state_machine` makes of stop words (mlx-lm 0.31)."""

    def make_state(self) -> Any: ...
    def match(self, state: Any, x: int) -> Any: ...


class StopWords032(Protocol):
    """The same of mlx-lm 0.32."""

    def matcher(self) -> StopMatcher032: ...


class StopMatcher032(Protocol):
    """How far in a stop word an answer is."""

    def advance(self, token: int) -> Any: ...


class TextStateMachine(Protocol):
    """``mlx_lm.generate.TextStateMachine`` (0.32): text, reasoning, tool calls."""

    def make_state(self, initial: str) -> Any: ...
    @staticmethod
    def split(state: Any, text: str) -> tuple[Any, list[tuple[str, str]]]: ...
    @staticmethod
    def flush(state: Any) -> tuple[Any, str, str]: ...
    @staticmethod
    def discard(state: Any) -> tuple[Any, str]: ...


# -- the batch --------------------------------------------------------------------


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
    finish_reason: str | None


class BatchGenerator:
    """The batch; one at a time, of one model. Generation thread."""

    prefill_step_size: int
    prefill_batch_size: int
    _prompt_batch: PromptBatch
    _generation_batch: AnswerBatch
    # Their uids come first.
    _unprocessed_sequences: Sequence[Sequence[Any]]

    def insert_segments(self, segments: Any, *args: Any, **kwargs: Any) -> Any:
        """Overridden by `batches`: a failure is the request's own."""

    def next(self) -> tuple[Sequence[PromptResponse], Sequence[AnswerResponse]]:
        """Overridden by `batches`: asks for memory before each step."""

    def remove(self, uids: Sequence[Uid], *args: Any, **kwargs: Any) -> Any:
        """Overridden by `batches`, which forgets them as well."""


# -- the prompt cache -------------------------------------------------------------


class CacheEntry(Protocol):
    """One entry, as its trie has it."""

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
        prompt_cache: list[Any],
        *,
        cache_type: str = "assistant",
    ) -> None:
        """Overridden by `prompt_cache`: entries are complete and have their size."""

    def trim_to(
        self, *, n_sequences: int | None = None, n_bytes: int | None = None
    ) -> None:
        """Overridden by `prompt_cache`, which counts what is evicted."""


# -- threads and handlers ---------------------------------------------------------


class ResponseGenerator:
    """The generation thread and the queue before it."""

    requests: Any  # a queue. Overridden by `generator`: who comes in is in flight
    prompt_cache: Any
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

    def _next_request(self, timeout: float | None) -> Any:
        """Every request passes here. Overridden: its queue becomes an `InFlight`."""

    def _share_request(self, request: Any) -> Any:
        """With more than one rank. Overridden: one too deeply nested is refused."""

    def _share_object(self, obj: Any) -> Any:
        """With more than one rank. Overridden by none, called: who has left."""

    def _log_cache_stats(self) -> None:
        """Called for each request. Overridden: one line, at DEBUG."""

    def _is_batchable(self, args: GenerationArguments) -> bool:
        """Overridden: asked of the model that is named, not of the one before."""

    def _serve_single(self, request: Any) -> None:
        """The sequential path. Overridden: a client that left ends it in a step."""

    def _tokenize(
        self,
        tokenizer: Tokenizer,
        request: CompletionRequest,
        args: GenerationArguments,
    ) -> tuple[Any, ...]:
        """Overridden: limits, admission, and the tokens that a replay has already."""

    def _make_state_machine(
        self, model_key: ModelKey, tokenizer: Tokenizer, stop_words: list[str]
    ) -> tuple[Any, ...]:
        """Overridden: stop words of a replay; a failure is the request's own."""


class APIHandler(BaseHTTPRequestHandler):
    """One connection, on a thread of its own."""

    response_generator: Any
    created: int
    body: Any
    stream: bool
    stream_options: Json | None
    requested_model: str
    request_id: str
    object_type: str

    def __init__(self, response_generator: Any, *args: Any, **kwargs: Any) -> None: ...

    def do_GET(self) -> None:
        """Overridden by `handler`: /metrics, one model, 404 and 405."""

    def do_POST(self) -> None:
        """Overridden by `handler`: it reads a body that `schema` has checked."""

    def _validate(self, name: str, *args: Any, **more: Any) -> None:
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


# -- modules ----------------------------------------------------------------------


class Server(Protocol):
    """The module ``mlx_lm.server``. The first seven are replaced by `patch`."""

    logging: Any  # whole requests and answers are in its lines

    def run(self, host: str, port: int, model_provider: ModelProvider) -> None: ...
    def load(self, *args: Any, **options: Any) -> tuple[Any, ...]: ...
    def _make_sampler(
        self, args: GenerationArguments, tokenizer: Tokenizer
    ) -> Sampler: ...
    def _make_logits_processors(self, args: GenerationArguments) -> list[Processor]: ...
    def _format_top_logprobs(
        self, logprobs: Array, top_n: int, tokenizer: Tokenizer
    ) -> tuple[Json, ...]: ...
    def BatchGenerator(self, model: Model) -> BatchGenerator: ...
    def main(self) -> None: ...
    def get_system_fingerprint(self) -> str: ...


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


class SampleUtils032(Protocol):
    """The module ``mlx_lm.sample_utils``; with this in mlx-lm 0.32."""

    greedy_sampler: Sampler


class Utils(Protocol):
    """The module ``mlx_lm.utils``."""

    MODEL_REMAPPING: dict[str, str]
