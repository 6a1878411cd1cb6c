"""A stream that has begun, as the server that goes on with it finds it.

Of each piece of a stream the server writes an entry before it sends the piece. It has
what the answer's handler has heard since the last one (the notes), and the piece. The
entries follow the request in its `RequestFile`. What is in them was sent, or is in a
piece that can still be sent; what is not was seen by nobody, and is made again.

An entry is `ENTRY`, the notes in JSON, and the piece. Notes are:

- ``{"id", "model", "created", "chunked", "before"}``, once, at the beginning;
- ``[choice, prompt, cached]``: how many tokens its prompt has, and of these the cache;
- ``[choice, token, text, finish_reason, state, logprob, top_tokens]``: as mlx-lm's
  ``Response`` had them;
- ``[choice]``: it has ended; ``"introduced"``, ``"done"``, ``"end"``: of the answer.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    *("DONE", "END", "INTRODUCED", "Begun", "Note", "Said"),
    *("entry", "opening", "said"),
]

# Bytes of the notes, and of the piece.
ENTRY = struct.Struct("=II")
INTRODUCED = "introduced"  # its choices were named
DONE = "done"  # with this piece its last event is sent
END = "end"  # and with this one what marks its end

Note = Any
_encode = json.JSONEncoder(separators=(",", ":")).encode


@dataclass
class Said:
    """One of mlx-lm's ``Response`` objects, as a handler looks at it."""

    token: int
    text: str
    finish_reason: str | None
    state: str | None
    logprob: Any
    top_tokens: Any


def opening(
    id: str, model: str | None, created: int, is_chunked: bool, before: int
) -> Note:
    """The first note.

    Args:
        is_chunked: the client finds the end by a last chunk.
        before: bytes that the connection had been given; -1: not known.
    """
    return {
        "id": id,
        "model": model,
        "created": created,
        "chunked": is_chunked,
        "before": before,
    }


def said(choice: int, response: Any, with_logprobs: bool) -> Note:
    """What is noted of one token."""
    note = [choice, response.token, response.text, response.finish_reason]
    note.append(getattr(response, "state", None))
    if with_logprobs:
        return [*note, response.logprob, response.top_tokens]
    return [*note, None, None]


def entry(notes: list[Note], piece: bytes) -> bytes:
    """What is written before ``piece`` is sent."""
    noted = _encode(notes).encode()
    return ENTRY.pack(len(noted), len(piece)) + noted + piece


@dataclass
class _Choice:
    tokens: list[Said] = field(default_factory=list)
    prompt: tuple[int, int] | None = None
    has_ended: bool = False


class Begun:
    """What the entries say; ``data``: of all of them, the last perhaps cut short.

    Attributes:
        id, model, created: of the answer. is_chunked, before: as in `opening`.
        size: bytes of the whole entries. output: what was to be sent by them.
        is_introduced, is_done, is_ended: these notes were there.
    """

    def __init__(self, data: bytes) -> None:
        self._choices: dict[int, _Choice] = {}
        self.is_introduced = self.is_done = self.is_ended = False
        self.size = 0
        pieces = []
        notes: list[Note] = []
        while len(data) - self.size >= ENTRY.size:
            noted, piece = ENTRY.unpack_from(data, self.size)
            begin = self.size + ENTRY.size
            middle, end = begin + noted, begin + noted + piece
            if len(data) < end:
                break
            notes += json.loads(data[begin:middle])
            pieces.append(data[middle:end])
            self.size = end
        if not notes:
            raise ValueError("there is no whole entry")
        self.output = b"".join(pieces)
        first, *notes = notes
        self.id: str = first["id"]
        self.model: str | None = first["model"]
        self.created: int = first["created"]
        self.is_chunked: bool = first["chunked"]
        self.before: int = first["before"]
        for note in notes:
            self._read(note)

    def _read(self, note: Note) -> None:
        if isinstance(note, str):
            self.is_introduced |= note == INTRODUCED
            self.is_done |= note == DONE
            self.is_ended |= note == END
            return
        index, *rest = note
        choice = self._choices.setdefault(index, _Choice())
        if not rest:
            choice.has_ended = True
        elif len(rest) == 2:
            choice.prompt = (rest[0], rest[1])
        else:
            choice.tokens.append(Said(*rest))

    def has_ended(self, choice: int) -> bool:
        """Nothing more is to be generated for it."""
        return choice in self._choices and self._choices[choice].has_ended

    def tokens(self, choice: int) -> list[Said]:
        """What its client has of it."""
        return self._choices[choice].tokens if choice in self._choices else []

    def prompt(self, choice: int) -> tuple[int, int] | None:
        """(tokens of its prompt, those of them that were in the cache)."""
        return self._choices[choice].prompt if choice in self._choices else None
