"""What the handlers of connections ask of the generator, as a type."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Thread
from typing import Protocol

from .disconnects import Disconnects
from .health import Health
from .live import Live
from .metrics import Metrics
from .mlx_lm.protocols.models import ModelProvider
from .mlx_lm.protocols.opaque import Progress
from .mlx_lm.protocols.requests import (
    CompletionRequest,
    GenerationArguments,
    GenerationContext,
    Response,
)
from .model_names import ModelNames
from .status import Status

__all__ = ["Service"]


class Service(Protocol):
    """`generator.ProtectedResponseGenerator`, as any thread may use it."""

    health: Health
    live: Live
    status: Status
    metrics: Metrics
    names: ModelNames
    disconnects: Disconnects
    model_provider: ModelProvider
    _generation_thread: Thread

    def answer(
        self,
        request: CompletionRequest,
        args: GenerationArguments,
        progress: Progress,
    ) -> tuple[GenerationContext, Iterator[Response]]:
        """Begins with ``request``: a context, and an iterator of its responses."""
