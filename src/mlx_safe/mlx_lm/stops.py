"""Stop words in the middle of an answer. Generation thread.

Asked for the tokens of an answer one by one: by ``make_state`` and ``match`` (mlx-lm
0.31, state machines) or by a ``matcher`` (0.32, stop sequences). The class has both.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

__all__ = ["stops_after"]


class _StopsAfter:
    """Stop words as they stand after some tokens of the answer."""

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


def stops_after(stops: Any, tokens: Sequence[int]) -> Any:
    """mlx-lm's ``stops`` as they stand after ``tokens`` of the answer."""
    return _StopsAfter(stops, list(tokens)) if tokens else stops
