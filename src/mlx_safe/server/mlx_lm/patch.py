"""How mlx-lm's own ``main`` comes to run this server: attributes of its modules.

mlx-lm looks these functions up by name each time, so replacing the name is enough.
"""

from __future__ import annotations

import argparse
import functools
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

from ..._command import Parser
from .. import logs
from . import compat
from .protocols import Array, GenerationArguments, ModelProvider, Server, Tokenizer

__all__ = ["patch", "run_main"]


def _replace(server: Server, **functions: Any) -> None:
    for name, value in functions.items():
        setattr(server, name, value)


def run_main(
    server: Server,
    run: Callable[[str, int, ModelProvider], None],
    arguments: Sequence[str],
) -> None:
    """Calls mlx-lm's ``main``, which parses ``arguments`` and calls ``run``.

    Args:
        server: the module ``mlx_lm.server``; it stays changed.
        run: called with the host, the port and mlx-lm's `ModelProvider`, which has
            loaded nothing yet, on this thread.
        arguments: of mlx-lm's command line, without the program's name.

    Raises:
        CommandError: an argument is wrong.
    """
    _replace(
        server,
        # It makes a parser of argparse, whose mistakes take several lines. Without
        # effect where a later mlx-lm makes its parser in another way.
        argparse=types.SimpleNamespace(**{**vars(argparse), "ArgumentParser": Parser}),
        # Whole requests and answers are in its lines.
        logging=logs.for_mlx_lm(),
        run=lambda host, port, model_provider, **_: run(host, port, model_provider),
    )
    sys.argv = ["mlx-safe serve", *arguments]
    server.main()


def patch(server: Server, generator: Callable[[], Any]) -> None:
    """Sends mlx-lm's functions through ``generator``, which need not exist yet.

    Main thread, once, before the generation thread starts.

    Args:
        server: the module ``mlx_lm.server``; it stays changed.
        generator: gives the `ProtectedResponseGenerator`; called on its thread.
    """
    from ..logprobs import top_logprobs

    compat.keep_processors_in_place()
    make_sampler, make_batch = server._make_sampler, server.BatchGenerator
    make_processors = server._make_logits_processors

    def sampler(args: GenerationArguments, tokenizer: Tokenizer) -> Any:
        return generator().resume_sampler(make_sampler, args, tokenizer)

    def processors(args: GenerationArguments) -> Any:
        return generator().resume_processors(make_processors, args)

    def format_top(logprobs: Array, top_n: int, tokenizer: Tokenizer) -> Any:
        return generator().top_logprobs(top_logprobs, logprobs, top_n, tokenizer)

    def batch(*args: Any, **kwargs: Any) -> Any:
        return generator().make_batch(make_batch, *args, **kwargs)

    _replace(
        server,
        # The weights stay in their files until they are wanted (`model_loading`).
        load=functools.partial(server.load, lazy=True),
        _make_sampler=sampler,
        _make_logits_processors=processors,
        _format_top_logprobs=format_top,
        BatchGenerator=batch,
    )
