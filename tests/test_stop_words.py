"""The first stop word in a text that comes in pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_safe.server.stop_words import StopWords

SHORT = st.text("ab", min_size=1, max_size=4)


def reference(text: str, words: list[str]) -> str | None:
    """The text before the word that ends first, the longest of those; None: none."""
    for end in range(1, len(text) + 1):
        ended = [word for word in words if text[:end].endswith(word)]
        if ended:
            return text[: end - max(map(len, ended))]
    return None


@given(st.lists(st.text("ab", max_size=5), max_size=8), st.lists(SHORT, min_size=1))
def test_words_are_found_wherever_the_text_is_cut(
    pieces: list[str], words: list[str]
) -> None:
    stops, safe, text = StopWords(words), "", "".join(pieces)
    come = ""
    for piece in pieces:
        come += piece
        safe += stops.take(piece)
        if not stops.found:
            # No more is held back than may become a word.
            held = come[len(safe) :]
            assert come.startswith(safe)
            assert not held or any(word.startswith(held) for word in words)
    before = reference(text, words)
    assert stops.found == (before is not None)
    assert safe + stops.rest() == (text if before is None else before)


@pytest.mark.parametrize("text", ["a" * 100_000, "ab" * 50_000])
def test_a_long_word_costs_no_more_for_each_letter(text: str) -> None:
    word, steps = text[:20_000] + "c", 0

    class Counted(StopWords):
        def _step(self, letter: str) -> int:
            nonlocal steps
            steps += 1
            return super()._step(letter)

    stops = Counted([word])
    safe = "".join(stops.take(text[i : i + 5]) for i in range(0, len(text), 5))
    assert steps == len(text)
    assert safe + stops.rest() == text and not stops.found
