"""Whether a model's log-probabilities are numbers, and who gets them.

Where a model's values are too large for its type, as those of some are for float16,
all log-probabilities are NaN. mlx-lm (0.31.3, 0.32.2) then takes one token, over and
over (`findings/mlx-lm-half-precision-says-one-token.sh`). Generation thread only.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx

from .in_flight import InFlight
from .logprobs import NOT_READ
from .mlx_lm.protocols.generation import AnswerResponse, GenerationResponse
from .mlx_lm.protocols.opaque import Array
from .replies import NotANumber

__all__ = ["Numbers"]

# A token that is NaN is in the KV cache, and so is every one after it.
EVERY_TOKENS = 64
SAYS = (
    "The model's log-probabilities are not numbers (NaN), so its answer would mean "
    "nothing. Its values may be too large for float16: take it in bfloat16."
)

_begin: Callable[[Array], None] = mx.async_eval


class Numbers:
    """Looks at a request's first token, and at one of `EVERY_TOKENS` after it.

    A look waits for nothing. When mlx-lm passes on a token, its log-probabilities
    are computed and the next step is on its way. So the own one of the token is asked
    for (a view, no kernel), and read with the token after it, when that step has ended.
    Only where there is no token after it the step is waited for.

    Args:
        failed: called with a request and what it failed with; None: nobody looks. So
            it is with more than one rank, each of which would end it by itself.
    """

    def __init__(self, failed: Callable[[InFlight, Exception], None] | None) -> None:
        self._failed = failed

    def token(
        self, request: InFlight, response: AnswerResponse | GenerationResponse
    ) -> None:
        """mlx-lm is about to pass on this token of ``request``, alone or in a batch.

        The log-probabilities stay where its client has asked for them.
        """
        place = len(request.produced) % EVERY_TOKENS
        if place < 2 and self._failed is not None:
            self._look(request, response, place, self._failed)
        if not request.wants_logprobs:
            response.logprobs = NOT_READ

    def _look(
        self,
        request: InFlight,
        response: AnswerResponse | GenerationResponse,
        place: int,
        failed: Callable[[InFlight, Exception], None],
    ) -> None:
        if place == 0:
            request.logprob = response.logprobs[response.token]
            _begin(request.logprob)
            if response.finish_reason is None:
                return
        looked, request.logprob = request.logprob, None
        if looked is not None and math.isnan(looked.item()):
            failed(request, NotANumber(SAYS))
