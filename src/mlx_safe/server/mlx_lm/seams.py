"""Looks whether mlx-lm has what `protocols` lists, before anything is patched.

The order of calls is a fact about mlx-lm as well: what this server does at one call
holds for the next ones. It stands here, and a test compares it with both versions.
"""

from __future__ import annotations

import importlib
import inspect
import types
import typing
from collections.abc import Iterator
from typing import Any

from ..._command import in_one_line
from . import protocols
from .protocols.generation import (
    AnswerBatch,
    AnswerResponse,
    BatchGenerator,
    CacheOrder,
    CacheTrie,
    GenerationResponse,
    LRUPromptCache,
    PromptBatch,
    PromptResponse,
)
from .protocols.models import (
    ArraysCache,
    BatchKVCache,
    BatchRotatingKVCache,
    CacheList,
    Caches,
    ChunkedKVCache,
    CliArgs,
    KVCache,
    ModelProvider,
    QuantizedKVCache,
    RotatingKVCache,
    Utils,
)
from .protocols.requests import (
    CompletionRequest,
    GenerationArguments,
    GenerationContext,
    GenerationContext032,
    LogitsProcessorArguments,
    ModelDescription,
    Response,
    Response031,
    SamplingArguments,
)
from .protocols.server import APIHandler, ResponseGenerator, Server
from .protocols.text import (
    Detokenizer,
    StopWords031,
    StopWords032,
    TextStateMachine,
    Tokenizer031,
    Tokenizer032,
    TokenizerWrapper,
)

__all__ = ["BATCHED_CALLS", "SEQUENTIAL_CALLS", "missing_of_provider", "missing_seams"]

SERVER = "mlx_lm.server"
GENERATE = "mlx_lm.generate"
CACHE = "mlx_lm.models.cache"
TOKENIZER = "mlx_lm.tokenizer_utils"

# One request that joins a batch, on the generation thread: from `_next_request` on
# the request is the one that `_tokenize` was called with, until its detokenizer has
# been made. So `replay` and `own_failures` know whose sampler is being made.
BATCHED_CALLS = (
    *("_next_request", "_is_batchable", "_tokenize", "_make_state_machine"),
    *("fetch_nearest_cache", "GenerationContext"),
    *("_make_sampler", "_make_logits_processors", "insert_segments", "detokenizer"),
)
# One request of the sequential path, up to its first token.
SEQUENTIAL_CALLS = (
    *("_next_request", "_is_batchable", "load", "_serve_single", "_tokenize"),
    *("_make_state_machine", "GenerationContext"),
    *("_make_sampler", "_make_logits_processors", "fetch_nearest_cache", "detokenizer"),
)

Place = tuple[str, str, type]  # module, class in it or "", type of `protocols`

# Every version has these.
PLACES: tuple[Place, ...] = (
    (SERVER, "", Server),
    *(
        (SERVER, cls.__name__, cls)
        for cls in (
            *(ResponseGenerator, APIHandler, ModelProvider, BatchGenerator),
            *(LRUPromptCache, CompletionRequest, ModelDescription),
            *(SamplingArguments, LogitsProcessorArguments),
            *(GenerationArguments, GenerationContext, Response),
        )
    ),
    (SERVER, "LRUPromptCache.CacheOrder", CacheOrder),
    *((CACHE, cls.__name__, cls) for cls in (KVCache, BatchKVCache)),
    *((CACHE, cls.__name__, cls) for cls in (QuantizedKVCache, ArraysCache)),
    *((CACHE, c.__name__, c) for c in (RotatingKVCache, BatchRotatingKVCache)),
    *((CACHE, cls.__name__, cls) for cls in (ChunkedKVCache, CacheList)),
    (GENERATE, "PromptProcessingBatch", PromptBatch),
    (GENERATE, "GenerationBatch", AnswerBatch),
    (GENERATE, "PromptProcessingBatch.Response", PromptResponse),
    (GENERATE, "GenerationBatch.Response", AnswerResponse),
    (GENERATE, "GenerationResponse", GenerationResponse),
    (TOKENIZER, "TokenizerWrapper", TokenizerWrapper),
    (TOKENIZER, "StreamingDetokenizer", Detokenizer),
    (CACHE, "", Caches),
    ("mlx_lm.utils", "", Utils),
)
# Of each, one version's way is enough.
ALTERNATIVES: tuple[tuple[str, tuple[Place, ...], tuple[Place, ...]], ...] = (
    (
        "it does not separate text, reasoning and tool calls",
        ((SERVER, "Response", Response031),),
        (
            (SERVER, "GenerationContext", GenerationContext032),
            (GENERATE, "TextStateMachine", TextStateMachine),
        ),
    ),
    (
        "its tokenizer does not show how tokens are spelled",
        ((TOKENIZER, "TokenizerWrapper", Tokenizer031),),
        ((TOKENIZER, "TokenizerWrapper", Tokenizer032),),
    ),
    (
        "its stop words cannot be matched token by token",
        ((GENERATE, "SequenceStateMachine", StopWords031),),
        ((GENERATE, "StopSequences", StopWords032),),
    ),
)
# What is looked into once the object that has it is there.
PARTS = (PromptBatch, AnswerBatch, CacheTrie, CacheOrder, CliArgs)


def missing_seams(server: object) -> list[str]:
    """What mlx-lm does not have as expected, one line for each; empty when all fits.

    Makes a generator, a batch and a prompt cache, all empty, to look at them. Call it
    before ``server`` is patched.

    Args:
        server: the module ``mlx_lm.server``.
    """
    missing = [line for place in PLACES for line in _missing_at(server, place)]
    for lacking, *ways in ALTERNATIVES:
        if all(
            [line for at in way for line in _missing_at(server, at)] for way in ways
        ):
            missing.append(lacking)
    return missing or _missing_of_made(server)


def missing_of_provider(provider: object) -> list[str]:
    """The same of mlx-lm's `ModelProvider`, which only its ``main`` can make."""
    return list(_missing_attributes("ModelProvider", provider, ModelProvider))


def _is_missing(server: object, place: Place) -> bool:
    return any(_missing_at(server, place))


def _missing_at(server: object, place: Place) -> Iterator[str]:
    module, path, wanted = place
    found = server if module == SERVER else _imported(module)
    for part in path.split(".") if path else ():
        found = getattr(found, part, None)
    label = f"{module}.{path}" if path else module
    for name, method in methods(wanted).items():
        yield from _missing_method(f"{label}.{name}", found, name, method)
    for name in attributes(wanted):
        if not _has(found, name):
            yield f"{label}.{name} is gone"


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def methods(wanted: type) -> dict[str, object]:
    """The methods that ``wanted``, of `protocols`, lists; by name."""
    return {
        name: getattr(cls, name)
        for cls in _of_protocols(wanted)
        for name in vars(cls)
        if inspect.isfunction(call := getattr(cls, name))
        and _is_listed(call.__module__)
    }


def attributes(wanted: type) -> dict[str, object]:
    """The attributes that ``wanted``, of `protocols`, lists, and their types."""
    names = {name for cls in _of_protocols(wanted) for name in _annotated(cls)}
    hints = typing.get_type_hints(wanted)
    return {name: hints[name] for name in sorted(names)}


def _of_protocols(wanted: type) -> list[type]:
    return [cls for cls in wanted.__mro__ if _is_listed(cls.__module__)]


def _is_listed(module: str) -> bool:
    return module.startswith(f"{protocols.__name__}.")


def _annotated(cls: type) -> list[str]:
    return list(vars(cls).get("__annotations__", {}))


def _missing_method(
    label: str, holder: object, name: str, wanted: object
) -> Iterator[str]:
    found = getattr(holder, name, None)
    if found is None:
        yield f"{label} is gone"
        return
    expected = _parameters(wanted)
    has = _parameters(found)[: len(expected)]
    if has != expected:
        yield f"{label} takes ({', '.join(has)}), not ({', '.join(expected)})"


def _parameters(call: Any) -> tuple[str, ...]:
    """The names of those that are not collected by a star, without "self"."""
    stars = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = inspect.signature(call).parameters.values()
    names = [q.name for q in found if q.kind not in stars]
    return tuple(names[1:] if names[:1] == ["self"] else names)


def _has(holder: object, name: str) -> bool:
    """Whether ``holder``, a module or a class, has ``name``, or its methods set it."""
    if hasattr(holder, name):
        return True
    if not inspect.isclass(holder):
        return False
    # Of an object's attributes a class knows the names that its methods use; the
    # `__init__` of a dataclass sets them all.
    calls = [value for value in vars(holder).values() if inspect.isfunction(value)]
    return any(name in call.__code__.co_names for call in calls)


def _missing_of_made(server: Any) -> list[str]:
    class Idle(server.ResponseGenerator):  # type: ignore[misc]
        def _generate(self) -> None:
            """Nothing, so that its thread ends."""

    try:
        made = (
            (Idle(types.SimpleNamespace(cli_args=None), None), ResponseGenerator),
            (server.BatchGenerator(None), BatchGenerator),
            (server.LRUPromptCache(), LRUPromptCache),
        )
        return [
            line
            for found, cls in made
            for line in _missing_attributes(cls.__name__, found, cls)
        ]
    except Exception as e:
        return [f"an object cannot be made: {in_one_line(e)}"]


def _missing_attributes(label: str, found: object, wanted: type) -> Iterator[str]:
    """Of an object, and of those parts of it that this server looks into."""
    for name, hint in attributes(wanted).items():
        try:
            value = getattr(found, name)
        except AttributeError:
            yield f"{label}.{name} is gone"
            continue
        if hint in PARTS and value is not None:
            yield from _missing_attributes(f"{label}.{name}", value, hint)
    if wanted in PARTS:
        for name in methods(wanted):
            if not hasattr(found, name):
                yield f"{label}.{name} is gone"
