"""The model that is loaded, and what loading one means to the rest of the server."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import testing
from .headroom import Headroom
from .mlx_lm import kv_window
from .mlx_lm.kv_tier import KVTier
from .mlx_lm.model_loading import replace_model
from .mlx_lm.protocols.models import (
    CliArgs,
    Model,
    ModelProvider,
)
from .mlx_lm.protocols.opaque import ModelKey
from .mlx_lm.protocols.requests import (
    CompletionRequest,
    GenerationArguments,
    ModelDescription,
)
from .mlx_lm.protocols.text import (
    Detokenizer,
    Tokenizer,
)
from .mlx_lm.speculative import report_calls
from .model_demand import NoRoom
from .model_limits import ModelLimits
from .model_names import DEFAULT, ModelNames
from .overflow import Overflow
from .recovery import one_line
from .replay import Resumed
from .replies import EXPECTED, ModelNotFound, is_of_all

__all__ = ["ServedModel", "where"]

log = logging.getLogger("mlx_safe.server")

# Not the reason, which names files and hosts; it is in the log.
CANNOT_BE_LOADED = "The model that the request names cannot be loaded."


class ServedModel:
    """Wraps mlx-lm's `ModelProvider`; loads on the generation thread.

    ``loaded`` may be read by any.

    Args:
        is_first: whether it is the model that the server was started with.
        on_load, on_loaded: called before another is loaded, and afterwards.
        on_call: called when a model with a draft, or the draft, is called.
        detokenizer: returns the detokenizer that is used in the place of mlx-lm's.

    Attributes:
        loaded: (mlx-lm's key, what the model can be asked for).
    """

    def __init__(
        self,
        provider: ModelProvider,
        names: ModelNames,
        headroom: Headroom,
        overflow: Overflow,
        resumed: Resumed,
        *,
        is_first: Callable[[], bool],
        on_load: Callable[[], None],
        on_loaded: Callable[[], None],
        on_call: Callable[[int], None],
        detokenizer: Callable[[Detokenizer], Detokenizer],
        max_kv_size: int | None,
        disk: KVTier | None = None,
    ) -> None:
        self.loaded: tuple[ModelKey, ModelLimits] = (None, ModelLimits())
        self._provider = provider
        self._names = names
        self._headroom = headroom
        self._overflow = overflow
        self._resumed = resumed
        self._is_first = is_first
        self._on_load, self._on_loaded = on_load, on_loaded
        self._on_call = on_call
        self._detokenizer = detokenizer
        self._max_kv_size = max_kv_size
        self._disk = disk
        self._load = provider.load
        provider._load = self._load_anew  # type: ignore[method-assign,assignment]
        provider.load = self._load_or_say_why  # type: ignore[method-assign,assignment]

    @property
    def key(self) -> ModelKey:
        """mlx-lm's, of what it has loaded."""
        return self._provider.model_key

    @property
    def limits(self) -> ModelLimits:
        """What it can be asked for."""
        return self.loaded[1]

    @property
    def has_draft(self) -> bool:
        """It has a draft model."""
        return self._provider.draft_model is not None

    def is_named(self, description: ModelDescription) -> bool:
        """Whether it is what a request names (mlx-lm's ``ModelDescription``)."""
        named = (description.model, description.adapter, description.draft)
        return bool(named == self.key)

    def check(self, request: CompletionRequest, args: GenerationArguments) -> None:
        """What needs no turn in the queue; names become those that mlx-lm loads.

        Any thread.

        Raises:
            ModelNotFound: it names one that is not known.
            BadRequest, ContextTooLong: the loaded model cannot do it.
        """
        named = self._names.find(args.model.model, args.model.adapter, args.model.draft)
        args.model = type(args.model)(**named._asdict())
        key, limits = self.loaded
        if key == named:  # else it will be checked when its model is loaded
            limits.check(args)
            limits.check_length(request, self._overflow.refuses_over(limits.context))
        elif named.draft is not None and key is not None and key[:2] == named[:2]:
            limits.check_draft()  # the model that is loaded, with another draft model

    def _load_anew(self, *named: str | None) -> None:
        ceiling = self._headroom.limits.static
        self._on_load()
        facts = replace_model(self._provider, named, lambda: ceiling().size)
        model, draft = self._provider.model, self._provider.draft_model
        assert model is not None
        if draft is not None:
            report_calls(model, self._on_call)
            report_calls(draft, self._on_call)
        limits = ModelLimits.of(model, self._provider.tokenizer, facts)
        self._overflow.compare(limits.context)
        self.loaded = (self.key, limits)
        self._resumed.width = facts.width
        self._on_loaded()

    def _load_or_say_why(self, *named: str | None) -> tuple[Model, Tokenizer]:
        # What a model is measured with is no step of a request.
        with testing.uncounted():
            model, tokenizer = self._load_and_measure(*named)
        if testing.attaches_all():
            self._count_steps(model)
        self._resumed.watch(tokenizer, self._detokenizer)
        return model, tokenizer

    def _load_and_measure(self, *named: Any) -> tuple[Model, Tokenizer]:
        # mlx-lm 0.31.3 forgets the adapters of its command line.
        named = self._names.default if named[0] == DEFAULT else named
        try:
            model, tokenizer = self._load(*named)
        except Exception as e:
            if is_of_all(e):
                raise  # it may pass
            if not self._is_first():
                log.info("a model cannot be loaded: %s", one_line(e))
            if isinstance(e, EXPECTED):
                raise
            raise ModelNotFound(CANNOT_BE_LOADED, "model") from e
        if self._max_kv_size and not self.has_draft:
            kv_window.limit(model, self._max_kv_size)
        self._measure()
        if self._disk is not None:
            self._disk.model_loaded(self._provider)
        return model, tokenizer

    def _count_steps(self, model: Model) -> None:
        """Steps of the target alone are planned for, whether it has a draft or not."""
        width = self._provider.cli_args.num_draft_tokens + 1 if self.has_draft else 1
        testing.attach(model, decode_width=width)
        if self.has_draft:
            testing.detach(self._provider.draft_model)

    def _measure(self) -> None:
        try:
            self._headroom.model_loaded(self._provider)
        except NoRoom as e:
            if self._is_first():
                raise
            log.warning("a model cannot be served: %s", e)
            raise ModelNotFound(CANNOT_BE_LOADED, "model") from e


def where(cli_args: CliArgs) -> str:
    """Names the flags' models: what cannot be loaded says little without."""
    given = [
        (f"--{flag.replace('_', '-')}", name)
        for flag in ("model", "draft_model", "adapter_path")
        if (name := getattr(cli_args, flag))
    ]
    absent = [
        f"there is no directory {name} here ({flag}), "
        for flag, name in given
        if not Path(name).exists()
    ]
    if absent:
        return "".join([*absent, "and on the hub: "])
    return ", ".join(f"{flag} {name}" for flag, name in given) + ": "
