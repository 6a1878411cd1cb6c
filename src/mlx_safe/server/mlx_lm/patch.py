"""How mlx-lm's own ``main`` comes to run this server: attributes of its modules.

mlx-lm looks these functions up by name each time, so replacing the name is enough.
"""

from __future__ import annotations

import argparse
import functools
import types
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any, NoReturn, Protocol

from ..._command import CommandError
from .. import logs
from . import compat
from .protocols.generation import (
    BatchGenerator,
    GenerationResponse,
)
from .protocols.models import (
    Model,
    ModelProvider,
)
from .protocols.opaque import (
    Array,
    Json,
    Processor,
    Sampler,
)
from .protocols.requests import GenerationArguments
from .protocols.server import Server
from .protocols.text import Tokenizer

__all__ = ["parser_of", "patch", "run_main"]


class Parts(Protocol):
    """The server's `parts.Parts`: what stands in for mlx-lm's functions."""

    def sampler(
        self,
        make: Callable[[GenerationArguments, Tokenizer], Sampler],
        args: GenerationArguments,
        tokenizer: Tokenizer,
    ) -> Sampler: ...
    def processors(
        self,
        make: Callable[[GenerationArguments], list[Processor]],
        args: GenerationArguments,
    ) -> list[Processor]: ...
    def top_logprobs(
        self, logprobs: Array, top_n: int, tokenizer: Tokenizer
    ) -> tuple[Json, ...]: ...
    def stream_alone(
        self,
        made: Iterator[GenerationResponse],
        *,
        prompt: Sequence[int],
        draft_model: Model | None = None,
        **more: object,
    ) -> Iterator[GenerationResponse]: ...
    def batch(self, cls: Any, *args: object, **kwargs: object) -> BatchGenerator: ...


def _replace(server: Server, **functions: object) -> None:
    for name, value in functions.items():
        setattr(server, name, value)


class _Made(BaseException):
    """Leaves mlx-lm's ``main`` with its parser."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def _with_parser(server: Server, cls: type[argparse.ArgumentParser]) -> None:
    others = {**vars(argparse), "ArgumentParser": cls}
    _replace(server, argparse=types.SimpleNamespace(**others))


def parser_of(server: Server) -> argparse.ArgumentParser:
    """The parser that mlx-lm's ``main`` makes, which is left right after.

    Raises:
        CommandError: it makes none that can be seen.
    """

    class Collecting(argparse.ArgumentParser):
        def parse_args(self, *args: object, **kwargs: object) -> NoReturn:
            raise _Made(self)

    def run(*args: object, **kwargs: object) -> None:
        raise CommandError("mlx-safe does not know how this mlx-lm reads its flags")

    before = {name: vars(server)[name] for name in ("argparse", "run")}
    _with_parser(server, Collecting)
    _replace(server, run=run)
    try:
        server.main()
    except _Made as made:
        return made.parser
    finally:
        _replace(server, **before)
    raise CommandError("cannot find the flags of this mlx-lm")


def run_main(
    server: Server,
    run: Callable[[str, int, ModelProvider], None],
    values: argparse.Namespace,
) -> None:
    """Calls mlx-lm's ``main``, which gets ``values`` of its parser and calls ``run``.

    Args:
        server: the module ``mlx_lm.server``; it stays changed.
        run: called with the host, the port and mlx-lm's `ModelProvider`, which has
            loaded nothing yet, on this thread.
        values: of the flags that `parser_of` has.
    """

    class Parsed(argparse.ArgumentParser):
        def parse_args(self, *args: object, **kwargs: object) -> Any:
            return values

    _with_parser(server, Parsed)
    _replace(
        server,
        # Whole requests and answers are in its lines.
        logging=logs.for_mlx_lm(),
        run=lambda host, port, model_provider, **_: run(host, port, model_provider),
    )
    server.main()


def patch(server: Server, parts: Callable[[], Parts]) -> None:
    """Sends mlx-lm's functions through ``parts``, which need not exist yet.

    Main thread, once, before the generation thread starts.

    Args:
        server: the module ``mlx_lm.server``; it stays changed.
        parts: gives the generator's `Parts`; called on its thread.
    """
    compat.keep_processors_in_place()
    make_sampler, make_batch = server._make_sampler, server.BatchGenerator
    make_processors, stream = server._make_logits_processors, server.stream_generate

    def sampler(args: GenerationArguments, tokenizer: Tokenizer) -> Sampler:
        return parts().sampler(make_sampler, args, tokenizer)

    def processors(args: GenerationArguments) -> list[Processor]:
        return parts().processors(make_processors, args)

    def format_top(
        logprobs: Array, top_n: int, tokenizer: Tokenizer
    ) -> tuple[Json, ...]:
        if top_n <= 0:
            return ()
        return parts().top_logprobs(logprobs, top_n, tokenizer)

    def stream_alone(*args: Any, **kwargs: Any) -> Iterator[GenerationResponse]:
        return parts().stream_alone(stream(*args, **kwargs), **kwargs)

    def batch(*args: object, **kwargs: object) -> BatchGenerator:
        return parts().batch(make_batch, *args, **kwargs)

    _replace(
        server,
        # The weights stay in their files until they are wanted (`model_loading`).
        load=functools.partial(server.load, lazy=True),
        _make_sampler=sampler,
        _make_logits_processors=processors,
        _format_top_logprobs=format_top,
        BatchGenerator=batch,
        stream_generate=stream_alone,
        # What each token goes through, and each handler waits at. It is written in C;
        # in `Queue` a token takes two locks and some 200 bytecodes.
        Queue=SimpleQueue,
    )
