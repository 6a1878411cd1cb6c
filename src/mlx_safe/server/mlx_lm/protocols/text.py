# mypy: disable-error-code="empty-body"
"""Tokens and text: tokenizers, stop words, and what a model writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from .opaque import State

__all__ = [
    "Detokenizer",
    "StopMatcher032",
    "StopWords",
    "StopWords031",
    "StopWords032",
    "TextStateMachine",
    "Tokenizer",
    "Tokenizer031",
    "Tokenizer032",
    "TokenizerWrapper",
]


class Detokenizer(Protocol):
    """``StreamingDetokenizer``: text of the tokens of one answer."""

    last_segment: str

    def add_token(self, token: int) -> None: ...
    def finalize(self) -> None: ...


class TokenizerWrapper(Protocol):
    """mlx-lm's wrapper, and what it passes on to transformers' tokenizer."""

    tool_call_start: str | None
    tool_call_end: str | None
    detokenizer: Detokenizer  # a new one for each answer

    def rfind_think_start(
        self, tokens: Sequence[int], start: int | None, end: int | None
    ) -> int:
        """Replaced by `compat` for short prompts (0.31.3)."""


class Tokenizer031(TokenizerWrapper, Protocol):
    """With the class of its detokenizers (mlx-lm 0.31)."""

    _detokenizer_class: type[Detokenizer]


class Tokenizer032(TokenizerWrapper, Protocol):
    """With the detokenizer that is copied for each answer (mlx-lm 0.32)."""

    _detokenizer: Detokenizer


class Tokenizer(TokenizerWrapper, Protocol):
    """What the wrapper passes on to transformers, whose names these are."""

    eos_token_ids: set[int]
    added_tokens_decoder: dict[int, object]
    model_max_length: int | None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, tokens: list[int]) -> str: ...
    def convert_ids_to_tokens(self, token: int) -> str | None: ...
    def get_vocab(self) -> dict[str, int]: ...


class StopMatcher032(Protocol):
    """How far in a stop word an answer is."""

    def advance(self, token: int) -> object: ...


class StopWords031(Protocol):
    """What `_make_state_machine` makes of stop words (mlx-lm 0.31)."""

    def make_state(self) -> State: ...
    def match(self, state: State, x: int) -> tuple[State, object, object]: ...


class StopWords032(Protocol):
    """The same of mlx-lm 0.32."""

    def matcher(self) -> StopMatcher032: ...


class StopWords(StopWords031, StopWords032, Protocol):
    """Either: mlx-lm asks its own kind for what that has."""


class TextStateMachine(Protocol):
    """``mlx_lm.generate.TextStateMachine`` (0.32): text, reasoning, tool calls."""

    def make_state(self, initial: str) -> State: ...
    @staticmethod
    def split(state: State, text: str) -> tuple[State, list[tuple[str, str]]]: ...
    @staticmethod
    def flush(state: State) -> tuple[State, str, str]: ...
    @staticmethod
    def discard(state: State) -> tuple[State, str]: ...
