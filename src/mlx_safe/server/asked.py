"""What a handler of mlx-lm's wants to have generated."""

from __future__ import annotations

from .mlx_lm.protocols.opaque import Progress
from .mlx_lm.protocols.requests import CompletionRequest, GenerationArguments

__all__ = ["Asked", "wants_logprobs"]


def wants_logprobs(args: GenerationArguments) -> bool:
    """Whether the client asked for log-probabilities, in one of the two ways."""
    return bool(args.logprobs) or args.top_logprobs > 0


class Asked(BaseException):
    """What mlx-lm's handler wants to have generated; raised past its own way of
    answering, ``except Exception`` included.

    Attributes:
        request, arguments, progress: what it calls `ResponseGenerator.generate` with.
    """

    def __init__(
        self,
        request: CompletionRequest,
        arguments: GenerationArguments,
        progress: Progress | None,
    ) -> None:
        super().__init__("to be answered by `answers.Answer`")
        self.request = request
        self.arguments = arguments
        self.progress = progress
