"""Which mlx-lm this patch fits, and the check that it does.

What differs between versions of mlx-lm is told apart in this module only.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import importlib.util
import inspect
import operator
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..._command import MLX, CommandError, Parser, in_one_line, need_mlx
from ..._mlx_versions import parse_version

__all__ = ["SUPPORTED", "import_server", "missing_seams"]

# Oldest version, and the first that is too new. pyproject.toml says the same.
SUPPORTED = ((0, 31, 3), (0, 33, 0))
REQUIREMENT = "mlx-lm>=0.31.3,<0.33"
INSTALL = f"pip install '{REQUIREMENT}'"
# Module, and the package that has it: what the extra "server" stands for.
NEEDED = {
    "mlx": MLX,
    "mlx_lm": REQUIREMENT,
    "prometheus_client": "prometheus-client>=0.20",
    "pydantic": "pydantic>=2.7",
}

# What the patch relies on: (class or None, name, leading parameters).
SEAMS: tuple[tuple[str | None, str, tuple[str, ...]], ...] = (
    (None, "main", ()),
    (None, "run", ("host", "port", "model_provider")),
    (None, "get_system_fingerprint", ()),
    ("ResponseGenerator", "__init__", ("self", "model_provider", "prompt_cache")),
    ("ResponseGenerator", "_generate", ("self",)),
    ("ResponseGenerator", "_next_request", ("self", "timeout")),
    ("ResponseGenerator", "_tokenize", ("self", "tokenizer", "request", "args")),
    (
        "ResponseGenerator",
        "_make_state_machine",
        ("self", "model_key", "tokenizer", "stop_words"),
    ),
    ("ResponseGenerator", "_is_batchable", ("self", "args")),
    (None, "load", ()),
    (None, "_make_sampler", ("args", "tokenizer")),
    (None, "_make_logits_processors", ("args",)),
    (None, "_format_top_logprobs", ("logprobs", "top_n", "tokenizer")),
    (None, "BatchGenerator", ("model",)),
    ("BatchGenerator", "insert_segments", ("self", "segments")),
    ("BatchGenerator", "next", ("self",)),
    ("BatchGenerator", "remove", ("self", "uids")),
    ("GenerationContext", "stop", ("self",)),
    ("ResponseGenerator", "join", ("self",)),
    ("ResponseGenerator", "generate", ("self", "request", "generation_args")),
    ("ResponseGenerator", "_serve_single", ("self", "request")),
    ("ResponseGenerator", "_share_request", ("self", "request")),
    ("ResponseGenerator", "_share_object", ("self", "obj")),
    ("ResponseGenerator", "stop_and_join", ("self",)),
    ("APIHandler", "__init__", ("self", "response_generator")),
    ("APIHandler", "handle_models_request", ("self",)),
    ("APIHandler", "handle_completion", ("self", "request", "stop_words")),
    ("APIHandler", "handle_chat_completions", ("self",)),
    ("APIHandler", "handle_health_check", ("self",)),
    ("APIHandler", "validate_model_parameters", ("self",)),
    ("APIHandler", "_validate", ("self", "name")),
    (
        "APIHandler",
        "generate_response",
        (
            *("self", "text", "finish_reason"),
            *("prompt_token_count", "completion_token_count", "prompt_cache_count"),
        ),
    ),
    (
        "APIHandler",
        "completion_usage_response",
        (
            "self",
            *("prompt_token_count", "completion_token_count", "prompt_cache_count"),
        ),
    ),
    ("APIHandler", "do_GET", ("self",)),
    ("APIHandler", "do_POST", ("self",)),
    ("APIHandler", "_set_stream_headers", ("self",)),
    ("APIHandler", "_set_cors_headers", ("self",)),
    ("ModelProvider", "load", ("self", "model_path")),
    ("ModelProvider", "_load", ("self", "model_path")),
    ("ModelProvider", "load_default", ("self",)),
    ("LRUPromptCache", "__init__", ("self", "max_size", "max_bytes")),
    ("LRUPromptCache", "fetch_nearest_cache", ("self", "model", "tokens")),
    ("LRUPromptCache", "insert_cache", ("self", "model", "tokens", "prompt_cache")),
    ("LRUPromptCache", "trim_to", ("self",)),
    ("LRUPromptCache.CacheOrder", "push", ("self", "model", "tokens", "cache_type")),
    ("LRUPromptCache.CacheOrder", "remove", ("self", "model", "tokens")),
    ("LRUPromptCache.CacheOrder", "pop", ("self",)),
)
# Fields of its dataclasses.
FIELDS = {
    "CompletionRequest": ("request_type", "prompt", "messages", "tools"),
    "GenerationArguments": (
        *("model", "max_tokens", "stop_words", "logits", "sampling", "seed"),
        *("logprobs", "top_logprobs"),
    ),
    "ModelDescription": ("model", "draft", "adapter"),
    "SamplingArguments": ("top_k",),
    "LogitsProcessorArguments": (
        *("logit_bias", "repetition_penalty"),
        *("presence_penalty", "frequency_penalty"),
    ),
    "GenerationContext": ("prompt", "prompt_cache_count", "tool_parser"),
    "Response": ("text", "token", "logprob", "finish_reason", "top_tokens"),
}
# What objects have once they are made (`_made`, and mlx-lm's own `ModelProvider`).
ATTRIBUTES = {
    "ResponseGenerator": (
        *("requests", "model_provider", "cli_args"),
        *("_stop", "_rank", "_generation_thread"),
    ),
    "BatchGenerator": (
        *("_prompt_batch.prompt_cache", "_generation_batch.prompt_cache"),
        *("_unprocessed_sequences", "prefill_step_size"),
        "_prompt_batch.prefill_step_size",
    ),
    "LRUPromptCache": ("_lru", "_trie.get", "nbytes"),
    "ModelProvider": (
        *("model", "tokenizer", "draft_model", "model_key", "is_batchable"),
        *("cli_args.model", "cli_args.draft_model", "cli_args.adapter_path"),
        "is_distributed",
        *("cli_args.num_draft_tokens", "cli_args.prefill_step_size"),
        *("cli_args.prompt_cache_size", "cli_args.prompt_cache_bytes"),
    ),
}
CACHE_NAMES = (
    *("CacheList", "KVCache", "QuantizedKVCache", "RotatingKVCache"),
    *("can_trim_prompt_cache", "make_prompt_cache", "trim_prompt_cache"),
)
STATE_CACHE_NAMES = ("ArraysCache", "MambaCache")


class _StopsAfter:
    """mlx-lm's stop words, as they stand after some tokens of the answer.

    Has what `GenerationBatch` and `_serve_single` use: ``make_state`` and
    ``match`` (0.31: state machines) and ``matcher`` (0.32: stop sequences).
    """

    def __init__(self, stops: Any, tokens: list[int]) -> None:
        self._stops = stops
        self._tokens = tokens

    def make_state(self) -> Any:
        state = self._stops.make_state()
        for token in self._tokens:
            state, _, _ = self._stops.match(state, token)
        return state

    def match(self, state: Any, token: int) -> Any:
        return self._stops.match(state, token)

    def matcher(self) -> Any:
        matcher = self._stops.matcher()
        for token in self._tokens:
            matcher.advance(token)
        return matcher


def stops_after(stops: Any, tokens: list[int]) -> Any:
    """``stops`` (of `_make_state_machine`) after ``tokens`` of the answer."""
    return _StopsAfter(stops, tokens)


def text_by_state(context: Any) -> Callable[[Any], list[tuple[str | None, str]]]:
    """What a context's responses say, in the order of a call for each.

    The function made takes a ``Response`` and gives (state, text) of its pieces,
    without markers. States are "normal", "reasoning", "tool", and None at a stop
    word (0.31, where the generation thread tells them; in 0.32 the handler does).
    """
    if not hasattr(context, "text_sm"):
        return lambda response: [(response.state, response.text)]
    from mlx_lm.generate import TextStateMachine as Texts

    now = context.text_sm.make_state(context.initial_state)

    def read(response: Any) -> list[tuple[str | None, str]]:
        nonlocal now
        is_end = response.token in context.tokenizer.eos_token_ids
        if response.finish_reason == "stop" and not is_end:
            # What is held back is the beginning of the stop word.
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
    """How the tokens of mlx-lm's ``tokenizer`` are spelled.

    "bytes": in the letters of a byte-level vocabulary. "spm": as text, with a
    lower block for a space. "text": only its ``decode`` knows.
    """
    made = getattr(tokenizer, "_detokenizer", None)  # 0.32
    kind = type(made) if made is not None else tokenizer._detokenizer_class
    name = getattr(kind, "func", kind).__name__  # some are partial functions
    return {
        "BPEStreamingDetokenizer": "bytes",
        "SPMStreamingDetokenizer": "spm",
    }.get(name, "text")


class _GuardedStops:
    """mlx-lm's stop words, each use of which goes by ``run``; see `_StopsAfter`."""

    def __init__(self, stops: Any, run: Callable[..., Any]) -> None:
        self._stops = stops
        self._run = run

    def make_state(self) -> Any:
        return self._run(self._stops.make_state, lambda: None)

    def match(self, state: Any, token: int) -> Any:
        return self._run(
            lambda: self._stops.match(state, token), lambda: (state, None, None)
        )

    def matcher(self) -> Any:
        return _GuardedMatcher(self._run(self._stops.matcher, lambda: None), self._run)


class _GuardedMatcher:
    def __init__(self, matcher: Any, run: Callable[..., Any]) -> None:
        self._matcher = matcher
        self._run = run

    def advance(self, token: int) -> Any:
        return self._run(lambda: self._matcher.advance(token), lambda: False)


def guarded_stops(stops: Any, run: Callable[..., Any]) -> Any:
    """``stops`` (of `_make_state_machine`), whose every use goes by ``run``.

    Args:
        run: is given what to call, and what to call instead when that fails.
    """
    return _GuardedStops(stops, run)


def is_shared_sampler(sampler: Any) -> bool:
    """Whether it is the greedy one of mlx-lm 0.32, which is no request's own.

    Those of a batch who have it are sampled in one call.
    """
    from mlx_lm import sample_utils

    return sampler is getattr(sample_utils, "greedy_sampler", None)


def sample_with_this_thread() -> None:
    """Makes mlx-lm's samplers draw from the calling thread's random state.

    They are compiled for the state of the thread that imports them. MLX 0.31.2 has
    one for each thread, so that of the main thread stayed as it was: every token of
    every sampled answer was drawn with the same key, and a seed changed nothing.
    From MLX 0.32 all threads share one.
    """
    from mlx_lm import sample_utils

    # `make_sampler`, which the server has by name, looks them up in this module.
    importlib.reload(sample_utils)


def tokenizer_repairs(cls: type[Any]) -> dict[str, Any]:
    """Methods for a subclass of ``cls``, mlx-lm's tokenizer.

    `_tokenize` looks for a thought in the last 11 tokens of a prompt. With less of
    them 0.31.3 counts on from the other end, and ends with an IndexError.
    """

    def rfind_think_start(
        this: Any, tokens: Any, start: Any = None, end: Any = None
    ) -> Any:
        return cls.rfind_think_start(this, tokens, max(start or 0, 0), end)

    return {"rfind_think_start": rfind_think_start}


def make_cache(model: Any) -> list[Any]:
    """The caches of one sequence, empty, as every path of mlx-lm makes them."""
    from mlx_lm.models.cache import make_prompt_cache

    made: list[Any] = make_prompt_cache(model)
    return made


def keep_processors_in_place() -> None:
    """Lets each request of a batch keep its own penalties and biases (0.31.3).

    There a batch in which nobody has any forgets to take out the place of one that
    ends: who joins later has his at another's place, or at none.
    """
    if parse_version(_version()) >= (0, 32):
        return
    from mlx_lm.generate import GenerationBatch

    take_out = GenerationBatch.filter

    def filter_all(self: Any, keep: list[int]) -> None:
        take_out(self, keep)
        if not any(self.logits_processors):
            self.logits_processors = [[] for _ in keep]

    GenerationBatch.filter = filter_all


def attends(model: Any) -> bool:
    """Whether a layer of ``model`` looks back at tokens; a state space has none."""
    from mlx_lm.models import cache

    states = tuple(
        getattr(cache, name) for name in STATE_CACHE_NAMES if hasattr(cache, name)
    )
    return not all(isinstance(made, states) for made in make_cache(model))


def takes_xtc() -> bool:
    """Whether the server's XTC works: 0.31.3 gives the sampler a list in a list."""
    return parse_version(_version()) >= (0, 32)


def takes_images(provider: Any) -> bool:
    """Whether the model of ``provider`` reads images (mlx-lm 0.32), or may."""
    if not hasattr(provider, "processor"):
        return False
    return provider.processor is not None or provider.model is None


def cache_keys(found: Any) -> list[Any]:
    """What the prompt cache knows a prompt by, of what `_tokenize` found.

    Its tokens; with images (mlx-lm 0.32) a list of its own.
    """
    keys: list[Any] = getattr(found[-1], "cache_key", found[0])
    return keys


def kv_quantization(cli_args: Any) -> dict[str, Any]:
    """mlx-lm 0.32's ``--kv-bits`` and its kin; empty when there are none."""
    names = ("kv_bits", "kv_group_size", "quantized_kv_start")
    return {name: getattr(cli_args, name) for name in names if hasattr(cli_args, name)}


# What `ModelProvider._load` makes: with images (mlx-lm 0.32) a processor as well.
LOADED = ("model", "tokenizer", "processor", "draft_model")


def load_lazily(server: Any) -> None:
    """Has mlx-lm's ``load`` leave the weights in their files until they are wanted."""
    server.load = functools.partial(server.load, lazy=True)


def load_beside(provider: Any, *named: Any) -> Any:
    """A `ModelProvider` that has loaded ``named``; ``provider`` keeps what it has.

    mlx-lm's own way to load, on a copy. After `load_lazily` it reads the heads of
    files only, and yet fails on what would fail on the whole of them.
    """
    beside = copy.copy(provider)
    type(provider)._load(beside, *named)
    return beside


def take_over(provider: Any, loaded: Any) -> None:
    """``provider`` has what the other has loaded; with None, nothing."""
    for name in (*LOADED, "model_key"):
        if hasattr(provider, name):
            setattr(provider, name, getattr(loaded, name, None))
    provider.is_batchable = loaded is not None and loaded.is_batchable


def knows_model_type(config: dict[str, Any]) -> bool:
    """Whether mlx-lm has a module for a model with this config. Imports none."""
    from mlx_lm import utils

    kind = config["model_type"]
    if not isinstance(kind, str):
        return False
    kind = utils.MODEL_REMAPPING.get(kind, kind)
    try:
        return importlib.util.find_spec(f"mlx_lm.models.{kind}") is not None
    except (ImportError, ValueError):
        return False


def is_hub_name(name: str) -> bool:
    """Whether the hub could have a model of this name."""
    from huggingface_hub import utils
    from huggingface_hub.errors import HFValidationError

    try:
        utils.validate_repo_id(name)  # type: ignore[attr-defined]
    except HFValidationError:
        return False
    return True


def cached_model(name: str) -> Path | None:
    """Where the hub's cache has the model ``name``. Goes to no hub."""
    from huggingface_hub import try_to_load_from_cache

    if not is_hub_name(name):
        return None
    config = try_to_load_from_cache(name, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def cached_names() -> list[str]:
    """The models that the hub's cache has, of whatever kind."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repositories = scan_cache_dir().repos
    except (CacheNotFound, OSError):
        return []
    return sorted(r.repo_id for r in repositories if r.repo_type == "model")


def try_quantization(caches: list[Any], quantization: dict[str, Any]) -> None:
    """Quantizes ``caches``, which are empty, as mlx-lm does past the start.

    Raises:
        NotImplementedError: one of them cannot be, such as one with a window (0.32).
    """
    bits = quantization.get("kv_bits")
    for cache in caches if bits is not None else ():
        if hasattr(cache, "to_quantized"):
            cache.to_quantized(group_size=quantization["kv_group_size"], bits=bits)


def batch_caches(batch: Any) -> tuple[int, list[Any]]:
    """(bytes of the caches in ``batch``, uids that it has not begun with).

    ``batch`` is a `BatchGenerator`. Its own `prompt_cache_nbytes` counts the
    caches of those that wait as well, which share the prompt cache's arrays.
    """
    begun = (batch._prompt_batch, batch._generation_batch)
    nbytes = sum(cache.nbytes for part in begun for cache in part.prompt_cache)
    return int(nbytes), [sequence[0] for sequence in batch._unprocessed_sequences]


def set_prefill_step(batch: Any, size: int) -> None:
    """``batch``, a `BatchGenerator`, reads prompts in steps of ``size`` from now on.

    It takes so many tokens at a time, and the part of it that reads them cuts them
    once more, by the size that was set when the batch was made (0.31 to 0.32).
    """
    batch.prefill_step_size = batch._prompt_batch.prefill_step_size = size


def tell_mistakes_in_one_line(server: Any) -> None:
    """Lets ``server.main`` parse with our `Parser` (it makes its own, of argparse).

    Without effect where a later mlx-lm makes it in another way.
    """
    server.argparse = types.SimpleNamespace(
        **{**vars(argparse), "ArgumentParser": Parser}
    )


def missing_seams(server: Any) -> list[str]:
    """One line for each thing that ``server`` does not have as expected."""
    missing = []
    for owner, name, parameters in SEAMS:
        label = f"mlx_lm.server.{owner + '.' if owner else ''}{name}"
        holder = server
        for part in owner.split(".") if owner else ():
            holder = getattr(holder, part, None)
        found = getattr(holder, name, None)
        if found is None:
            missing.append(f"{label} is gone")
            continue
        has = tuple(inspect.signature(found).parameters)[: len(parameters)]
        if has != parameters:
            missing.append(f"{label} takes ({', '.join(has)}), not {parameters}")
    for owner, fields in FIELDS.items():
        found = getattr(server, owner, None)
        has = tuple(inspect.signature(found).parameters) if found else ()
        missing += [f"{owner}.{name} is gone" for name in fields if name not in has]
    told = (("GenerationContext", "text_sm"), ("Response", "state"))  # 0.32, 0.31
    if not any(
        name in inspect.signature(getattr(server, owner)).parameters
        for owner, name in told
        if hasattr(server, owner)
    ):
        missing.append("nothing tells text from reasoning and tool calls")
    from mlx_lm.models import cache

    missing += [
        f"mlx_lm.models.cache.{name} is gone"
        for name in CACHE_NAMES
        if not hasattr(cache, name)
    ]
    return missing or _missing_of_made(server)


def _missing_of_made(server: Any) -> list[str]:
    class Idle(server.ResponseGenerator):  # type: ignore[misc]
        def _generate(self) -> None:
            """Nothing, so that its thread ends."""

    try:
        return [
            *_missing_attributes(
                "ResponseGenerator", Idle(types.SimpleNamespace(cli_args=None), None)
            ),
            *_missing_attributes("BatchGenerator", server.BatchGenerator(None)),
            *_missing_attributes("LRUPromptCache", server.LRUPromptCache()),
        ]
    except Exception as e:
        return [f"an object cannot be made: {in_one_line(e)}"]


def _missing_attributes(name: str, made: Any) -> list[str]:
    missing = []
    for path in ATTRIBUTES[name]:
        try:
            operator.attrgetter(path)(made)
        except AttributeError:
            missing.append(f"{name}.{path} is gone")
    return missing


def check_provider(provider: Any) -> None:
    """Looks at mlx-lm's `ModelProvider`, which only its ``main`` can make.

    Raises:
        CommandError: it does not have what the patch needs.
    """
    _refuse(_missing_attributes("ModelProvider", provider))


def _refuse(missing: list[str]) -> None:
    if missing:
        raise CommandError(
            f"mlx-lm {_version()} does not fit this mlx-safe ({'; '.join(missing)}): "
            f"{INSTALL}"
        )


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("mlx-lm")
    except PackageNotFoundError:
        from mlx_lm import __version__

        return str(__version__)


def import_server(*, allow_untested: bool = False) -> Any:
    """The module ``mlx_lm.server``, checked.

    Raises:
        CommandError: mlx or mlx-lm is missing, too old or too new; the one
            line says what to install.
    """
    for module, package in NEEDED.items():
        if importlib.util.find_spec(module) is None:
            name = module.replace("_", "-")
            raise CommandError(f"{name} is not installed: pip install '{package}'")
    need_mlx()
    found = _version()
    oldest, too_new = SUPPORTED
    if parse_version(found) < oldest:
        raise CommandError(f"mlx-lm {found} is too old: {INSTALL}")
    if parse_version(found) >= too_new and not allow_untested:
        raise CommandError(
            f"mlx-lm {found} is newer than this mlx-safe knows: {INSTALL}, or try "
            "it with --allow-untested-mlx-lm"
        )
    try:
        import mlx_lm.server as server
    except Exception as e:  # also what it imports may be broken
        raise CommandError(
            f"mlx-lm {found} cannot be imported ({in_one_line(e)}): {INSTALL}"
        ) from e
    _refuse(missing_seams(server))
    return server
