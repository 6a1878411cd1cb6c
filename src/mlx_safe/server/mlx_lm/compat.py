"""What differs between versions of mlx-lm. No other module asks for its version.

Generation thread, unless a function says otherwise.
"""

from __future__ import annotations

import copy
import functools
import importlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from ..._mlx_versions import parse_version
from ...mlx_lm.places import keep_places
from .protocols.generation import (
    BatchGenerator,
)
from .protocols.models import Cache, CliArgs, Model, ModelProvider
from .protocols.opaque import (
    Array,
    Json,
    Sampler,
    State,
    Tokenized,
    Uid,
)
from .protocols.requests import (
    GenerationContext,
    Response,
    Vision032,
)
from .protocols.text import (
    StopMatcher032,
    StopWords,
    Tokenizer,
)
from .requirements import installed_version

__all__ = [
    *("attends", "batch_caches", "cache_forms", "cache_keys", "chunks_are_exact"),
    *("guarded_stops", "is_shared_sampler", "quantized"),
    *("keep_processors_in_place", "kv_quantization", "load_beside"),
    *(
        "make_cache",
        "meet_on_the_gpu",
        "next_parts",
        "sample_with_this_thread",
        "set_prefill_step",
        "spelling",
    ),
    *("take_over", "takes_images", "takes_xtc", "text_by_state"),
    *("tokenizer_repairs", "try_quantization"),
]


@functools.cache
def _is_032() -> bool:
    """Whether it is mlx-lm 0.32 or newer. Looking takes as long as some tokens."""
    return parse_version(installed_version()) >= (0, 32)


# Calls the first with what follows; when that fails, ends the request and calls the
# second so.
Guard = Callable[..., Any]

# -- stop words -------------------------------------------------------------------
# Asked for the tokens of an answer one by one: by ``make_state`` and ``match`` (0.31,
# state machines) or by a ``matcher`` (0.32, stop sequences). Both classes have both.


class _GuardedStops:
    """Stop words, each use of which goes by ``run``."""

    def __init__(self, stops: StopWords, run: Guard) -> None:
        self._stops = stops
        self._run = run

    def make_state(self) -> State:
        return self._run(self._stops.make_state, lambda: None)

    def match(self, state: State, token: int) -> tuple[State, object, object]:
        found: tuple[State, object, object]
        found = self._run(self._stops.match, _no_match, state, token)
        return found

    def matcher(self) -> StopMatcher032:
        return _GuardedMatcher(self._run(self._stops.matcher, lambda: None), self._run)


def _no_match(state: State, token: int) -> tuple[State, None, None]:
    return state, None, None


class _GuardedMatcher:
    def __init__(self, matcher: StopMatcher032, run: Guard) -> None:
        self._matcher = matcher
        self._run = run

    def advance(self, token: int) -> object:
        return self._run(self._matcher.advance, _not_at_the_end, token)


def _not_at_the_end(token: int) -> bool:
    return False


def guarded_stops(stops: StopWords, run: Guard) -> StopWords:
    """``stops`` (of `_make_state_machine`), whose every use goes by ``run``.

    Args:
        run: is given what to call, what to call instead when that fails, and with
            what.
    """
    return _GuardedStops(stops, run)


# -- text and tokens --------------------------------------------------------------


def text_by_state(
    context: GenerationContext,
) -> Callable[[Response], list[tuple[str | None, str]]]:
    """What a context's responses say, in the order of a call for each. Handler thread.

    The function made takes a ``Response`` and gives (state, text) of its pieces,
    without markers. States are "normal", "reasoning", "tool", and None at the token
    that ends an answer (0.31, where the generation thread finds them).
    """
    if not hasattr(context, "text_sm"):
        return lambda response: [(response.state, response.text)]  # type: ignore[attr-defined]
    return _read_by_text(context)


def _read_by_text(
    context: Any,
) -> Callable[[Response], list[tuple[str | None, str]]]:
    """Of a `GenerationContext032`."""
    from mlx_lm.generate import TextStateMachine as Texts

    now = context.text_sm.make_state(context.initial_state)

    def read(response: Response) -> list[tuple[str | None, str]]:
        nonlocal now
        if (
            response.finish_reason == "stop"
            and response.token not in context.tokenizer.eos_token_ids
        ):
            # It ends after a stop word (`stop_words`).
            now, state = Texts.discard(now)
            return [(state, "")]
        now, pieces = Texts.split(now, response.text)
        if response.finish_reason is not None:
            # mlx-lm drops it at the model's own end as well, such as "<" of "a <".
            now, held_back, state = Texts.flush(now)
            pieces.append((state, held_back))
        return list(pieces)

    return read


def spelling(tokenizer: Any) -> str:
    """How the tokens of mlx-lm's ``tokenizer`` are spelled. Any thread.

    Returns:
        "bytes": in the letters of a byte-level vocabulary. "spm": as text, with a
        lower block for a space. "text": only its ``decode`` knows.
    """
    made = getattr(tokenizer, "_detokenizer", None)  # 0.32
    kind = type(made) if made is not None else tokenizer._detokenizer_class  # 0.31
    name = getattr(kind, "func", kind).__name__  # some are partial functions
    return {
        "BPEStreamingDetokenizer": "bytes",
        "SPMStreamingDetokenizer": "spm",
    }.get(name, "text")


def tokenizer_repairs(cls: type[Tokenizer]) -> Json:
    """Methods for a subclass of ``cls``, mlx-lm's tokenizer.

    `_tokenize` looks for a thought in the last 11 tokens of a prompt. With less of
    them 0.31.3 counts on from the other end, and ends with an IndexError.
    """

    def rfind_think_start(
        this: Tokenizer,
        tokens: Sequence[int],
        start: int | None = None,
        end: int | None = None,
    ) -> int:
        return cls.rfind_think_start(this, tokens, max(start or 0, 0), end)

    return {"rfind_think_start": rfind_think_start}


# -- samplers and processors ------------------------------------------------------


def is_shared_sampler(sampler: Sampler) -> bool:
    """Whether it is the greedy one of mlx-lm 0.32, which is no request's own.

    Those of a batch who have it are sampled in one call.
    """
    from mlx_lm import sample_utils

    return sampler is getattr(sample_utils, "greedy_sampler", None)


def sample_with_this_thread() -> None:
    """Makes mlx-lm's samplers draw from the calling thread's random state.

    They are compiled for the state of the thread that imports them. MLX 0.31.2 has one
    for each thread, so that of the main thread stayed as it was. Every token of every
    sampled answer was drawn with the same key, and a seed changed nothing. From MLX
    0.32 all threads share one.
    """
    from mlx_lm import sample_utils

    # `make_sampler`, which the server has by name, looks them up in this module.
    importlib.reload(sample_utils)


def keep_processors_in_place() -> None:
    """Lets each request of a batch keep its own penalties and biases (0.31.3).

    See `mlx_safe.mlx_lm.places`.
    """
    if _is_032():
        return
    from mlx_lm.generate import GenerationBatch

    keep_places(GenerationBatch)


def takes_xtc() -> bool:
    """Whether the server's XTC works: 0.31.3 gives the sampler a list in a list."""
    return _is_032()


# -- caches -----------------------------------------------------------------------


def meet_on_the_gpu() -> None:
    """Lets mlx-lm's ranks meet where NCCL can.

    `sharded_load` ends with a sum on the CPU's stream (0.31.3 to 0.32.2). MLX's NCCL
    backend takes that for one of the card's, and raises "There is no Stream(gpu, 1) in
    current thread" on any thread (0.32.4).
    """
    import mlx.core as mx

    all_sum = mx.distributed.all_sum

    @functools.wraps(all_sum)
    def on_the_gpu(x: Array, *, group: Any = None, stream: Any = None) -> Array:
        # MLX's types raise when they are compared with another's, such as None.
        of_a_device = isinstance(stream, mx.Device) and stream.type == mx.cpu
        if of_a_device or stream is mx.cpu:
            stream = None
        return all_sum(x, group=group, stream=stream)

    mx.distributed.all_sum = on_the_gpu


def make_cache(model: Model) -> list[Cache]:
    """The caches of one sequence, empty, as every path of mlx-lm makes them."""
    from mlx_lm.models.cache import make_prompt_cache

    made: list[Cache] = make_prompt_cache(model)
    return made


def attends(model: Model) -> bool:
    """Whether a layer of ``model`` looks back at tokens; a state space has none."""
    from mlx_lm.models.cache import ArraysCache

    return not all(isinstance(made, ArraysCache) for made in make_cache(model))


def cache_keys(found: Tokenized) -> list[int]:
    """What the prompt cache knows a prompt by, of what `_tokenize` found.

    Its tokens; with images (mlx-lm 0.32) a list of its own.
    """
    images: Vision032 = found[-1]
    return images.cache_key if hasattr(images, "cache_key") else found[0]


def kv_quantization(cli_args: CliArgs) -> Json:
    """mlx-lm 0.32's ``--kv-bits`` and its kin; empty when there are none."""
    names = ("kv_bits", "kv_group_size", "quantized_kv_start")
    return {name: getattr(cli_args, name) for name in names if hasattr(cli_args, name)}


def try_quantization(caches: Iterable[Cache], quantization: Json) -> None:
    """Quantizes ``caches``, which are empty, as mlx-lm does past the start.

    Raises:
        NotImplementedError: one of them cannot be, such as one with a window (0.32).
    """
    bits = quantization.get("kv_bits")
    for cache in caches if bits is not None else ():
        if hasattr(cache, "to_quantized"):
            cache.to_quantized(group_size=quantization["kv_group_size"], bits=bits)


def cache_forms(provider: ModelProvider) -> list[bool]:
    """In which forms a prompt's caches can be: quantized or not.

    With a draft model mlx-lm 0.32.2 quantizes copies of the list, and what it stores
    is empty.
    """
    bits = kv_quantization(provider.cli_args).get("kv_bits")
    return (
        [False] if bits is None or provider.draft_model is not None else [False, True]
    )


def quantized(caches: list[Cache], cli_args: CliArgs) -> list[Cache]:
    """``caches``, which are empty, as mlx-lm has them past the start."""
    found = kv_quantization(cli_args)
    return [
        cache.to_quantized(group_size=found["kv_group_size"], bits=found["kv_bits"])
        if hasattr(cache, "to_quantized")
        else cache
        for cache in caches
    ]


def chunks_are_exact() -> bool:
    """Whether a `ChunkedKVCache` with equal fields goes on with the same text.

    0.31.3 looks at the length that is allocated, and throws live tokens away.
    """
    return _is_032()


def batch_caches(batch: BatchGenerator) -> tuple[int, list[Uid]]:
    """(bytes of the caches in ``batch``, uids that it has not begun with).

    Its own `prompt_cache_nbytes` counts the caches of those that wait as well, which
    share the prompt cache's arrays.
    """
    begun = (batch._prompt_batch, batch._generation_batch)
    nbytes = sum(cache.nbytes for part in begun for cache in part.prompt_cache)
    return int(nbytes), [sequence[0] for sequence in batch._unprocessed_sequences]


def next_parts(batch: BatchGenerator) -> list[int]:
    """Tokens of the part of each prompt that the next step of ``batch`` may read.

    One whose last token alone is left is no prompt any more: it begins to write.
    """
    begun = [sequence[0] for sequence in batch._currently_processing]
    room = batch.prefill_batch_size - len(begun)
    joining = itertools.islice(batch._unprocessed_sequences, max(room, 0))
    prompts = cast(
        "list[list[list[int]]]", begun + [sequence[1] for sequence in joining]
    )
    return [len(parts[0]) for parts in prompts if len(parts) > 1 or len(parts[0]) > 1]


def set_prefill_step(batch: BatchGenerator, size: int) -> None:
    """``batch`` reads prompts in steps of ``size`` tokens from now on.

    It takes so many tokens at a time. The part of it that reads them cuts them once
    more, by the size that was set when the batch was made (0.31 to 0.32).
    """
    batch.prefill_step_size = batch._prompt_batch.prefill_step_size = size


# -- models -----------------------------------------------------------------------

# What `ModelProvider._load` makes: with images (mlx-lm 0.32) a processor as well.
LOADED = ("model", "tokenizer", "processor", "draft_model")


def takes_images(provider: ModelProvider) -> bool:
    """Whether the model of ``provider`` reads images (mlx-lm 0.32), or may.

    Any thread.
    """
    if not hasattr(provider, "processor"):
        return False
    return provider.processor is not None or provider.model is None


def load_beside(provider: ModelProvider, *named: str | None) -> ModelProvider:
    """A `ModelProvider` that has loaded ``named``; ``provider`` keeps what it has.

    mlx-lm's own way to load, on a copy. After `patch` it reads the heads of
    files only, and yet fails on what would fail on the whole of them.

    Raises:
        Exception: whatever mlx-lm, transformers or safetensors raise.
    """
    beside = copy.copy(provider)
    load: Callable[..., None] = type(provider)._load
    load(beside, *named)
    return beside


def take_over(provider: ModelProvider, loaded: ModelProvider | None) -> None:
    """``provider`` has what the other has loaded; with None, nothing."""
    for name in (*LOADED, "model_key"):
        if hasattr(provider, name):
            setattr(provider, name, getattr(loaded, name, None))
    provider.is_batchable = loaded is not None and loaded.is_batchable
