"""Which mlx-lm this patch fits, and the check that it does.

What differs between versions of mlx-lm is told apart in this module only.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import operator
import types
from typing import Any

from .._command import MLX, CommandError, Parser, in_one_line, need_mlx
from .._mlx_versions import parse_version

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
    (None, "_make_sampler", ("args", "tokenizer")),
    (None, "_make_logits_processors", ("args",)),
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
    ("APIHandler", "handle_health_check", ("self",)),
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
    "CompletionRequest": ("request_type", "prompt", "messages"),
    "GenerationArguments": ("max_tokens", "stop_words", "logits", "sampling", "seed"),
    "LogitsProcessorArguments": ("logit_bias",),
    "GenerationContext": ("prompt",),
    "Response": ("token", "finish_reason"),
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
        *("model", "draft_model", "model_key"),
        *("cli_args.model", "cli_args.draft_model"),
        *("cli_args.num_draft_tokens", "cli_args.prefill_step_size"),
        *("cli_args.prompt_cache_size", "cli_args.prompt_cache_bytes"),
    ),
}
CACHE_NAMES = (
    *("CacheList", "KVCache", "QuantizedKVCache", "RotatingKVCache"),
    *("can_trim_prompt_cache", "make_prompt_cache", "trim_prompt_cache"),
)


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


def make_cache(model: Any) -> list[Any]:
    """The caches of one sequence, empty, as every path of mlx-lm makes them."""
    from mlx_lm.models.cache import make_prompt_cache

    made: list[Any] = make_prompt_cache(model)
    return made


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
