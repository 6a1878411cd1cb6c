"""Stop words, looked for in the text of an answer.

mlx-lm (0.31.3, 0.32.2) looks for the tokens of a stop word. Inside a text it is mostly
written in others: "France" is not the token of " France". Then mlx-lm 0.31.3 overlooks
it, and 0.32.2 cuts it out of the text and generates on.

So mlx-lm is given no stop words. Its generation thread learns from `StopsAtWords` when
an answer has had one, and the answer's handler ends the text there (`answers`). Both
read the same text with a `StopWords` of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from .mlx_lm.protocols import text
from .mlx_lm.protocols.opaque import State
from .mlx_lm.protocols.text import Detokenizer, StopMatcher032

__all__ = ["StopWords", "StopsAtWords"]


class StopWords:
    """The first stop word in a text that comes in pieces. One thread at a time.

    Of words that end at the same letter the longest counts.

    Args:
        words: none of them empty.

    Attributes:
        found: one has come; nothing is taken after it.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._words = sorted(set(words), key=len, reverse=True)
        self._shorter = [_borders(word) for word in self._words]
        self._matched = [0] * len(self._words)
        self._held = ""
        self.found = False

    def take(self, text: str) -> str:
        """What is no part of a stop word, of ``text`` and what was held back."""
        if self.found:
            return ""
        known = self._held + text
        for end in range(len(self._held), len(known)):
            length = self._step(known[end])
            if length:
                self.found, self._held = True, ""
                return known[: end + 1 - length]
        safe = len(known) - max(self._matched)
        self._held = known[safe:]
        return known[:safe]

    def rest(self) -> str:
        """What was held back and is no stop word, as no more text comes."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._words)
        return held

    def _step(self, letter: str) -> int:
        """The length of the word that ``letter`` ends, or 0 (Knuth, Morris, Pratt)."""
        ended = 0
        for i, word in enumerate(self._words):
            matched = self._matched[i]
            while matched and word[matched] != letter:
                matched = self._shorter[i][matched - 1]
            matched += word[matched] == letter
            if matched == len(word):
                ended = max(ended, matched)
                matched = self._shorter[i][matched - 1]
            self._matched[i] = matched
        return ended


def _borders(word: str) -> list[int]:
    """Of each beginning of ``word``, the longest shorter one that it ends with."""
    borders = [0]
    for letter in word[1:]:
        length = borders[-1]
        while length and word[length] != letter:
            length = borders[length - 1]
        borders.append(length + (word[length] == letter))
    return borders


class StopsAtWords:
    """mlx-lm's stops of one request, which end it at stop words, too.

    Asked for the tokens one by one: by ``make_state`` and ``match`` (mlx-lm 0.31) or
    by a ``matcher`` (0.32). The answer ends with the token after the one whose text
    ends a stop word: mlx-lm drops the text of the token that ends an answer, and what
    stands before the word in its last token belongs to the answer. Generation thread.

    Args:
        stops: of mlx-lm (`_make_state_machine`), without stop words.
        words: not empty.
    """

    def __init__(self, stops: text.StopWords, words: Sequence[str]) -> None:
        self._stops = stops
        self._words = StopWords(words)
        self._asked = self._read = self._found_at = 0

    def make_state(self) -> State:
        return self._stops.make_state()

    def match(self, state: State, token: int) -> tuple[State, object, object]:
        state, sequence, name = self._stops.match(state, token)
        return (state, (token,), None) if self._is_over() else (state, sequence, name)

    def matcher(self) -> StopMatcher032:
        return _Matcher(self._stops.matcher(), self._is_over)

    def _is_over(self) -> bool:
        # In a batch mlx-lm asks before it makes the token's text, else after it.
        self._asked += 1
        return 0 < self._found_at < self._asked

    def reading(self, detokenizer: Detokenizer) -> Detokenizer:
        """``detokenizer`` of the answer; its text is looked into as mlx-lm reads it."""
        # Its text is a property, which is no variable to mypy.
        return cast(Detokenizer, _Reading(detokenizer, self))

    def token_added(self) -> None:
        self._read += 1

    def text_read(self, text: str) -> None:
        self._words.take(text)
        if self._words.found and not self._found_at:
            self._found_at = self._read


class _Matcher:
    def __init__(self, matcher: StopMatcher032, is_over: Callable[[], bool]) -> None:
        self._matcher = matcher
        self._is_over = is_over

    def advance(self, token: int) -> object:
        ended = self._matcher.advance(token)
        return self._is_over() or ended


class _Reading:
    """A detokenizer of mlx-lm's; ``last_segment`` is read after each token."""

    def __init__(self, made: Detokenizer, stops: StopsAtWords) -> None:
        self._made = made
        self._stops = stops

    def add_token(self, token: int) -> None:
        self._made.add_token(token)
        self._stops.token_added()

    @property
    def last_segment(self) -> str:
        text = self._made.last_segment
        self._stops.text_read(text)
        return text

    def __getattr__(self, name: str) -> Any:
        return getattr(self._made, name)
