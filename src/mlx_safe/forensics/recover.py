"""The members that can still be read of a JSON text that is cut or damaged.

A report is written front to back by a dying process, so a cut one is the rule
and not the exception. The json module does the parsing; here the text is only
cut at the last place up to which it is valid, and what is open there is closed.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

__all__ = ["loads"]

# What the writer makes is 5 deep. Far below Python's recursion limit, so that
# nobody who walks through the value has to fear it.
DEPTH_MAX = 32
_INTEGER_DIGITS_MAX = 20

# Brackets and commas outside of strings. The strings, of which the last may be
# open, are matched to be skipped.
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*("|\\?\Z)|[\[\]{},]', re.DOTALL)
_CLOSER = {"[": "]", "{": "}"}
# A string that is cut may end inside of \u12.
_ESCAPE_LENGTH_MAX = 6


def _integer(digits: str) -> int | None:
    return int(digits) if len(digits) <= _INTEGER_DIGITS_MAX else None


def _float(digits: str) -> float | None:
    value = float(digits)
    return value if math.isfinite(value) else None


_decoder = json.JSONDecoder(
    strict=False,  # a raw newline in a string loses nothing
    parse_int=_integer,
    parse_float=_float,
    parse_constant=lambda name: None,
)


def loads(text: str) -> tuple[Any, list[str]]:
    """The value of ``text``, or of its longest valid part from the front.

    Numbers that JSON cannot hold again (NaN, infinities, integers of more than
    20 digits) become None. Nesting is at most `DEPTH_MAX` deep.

    Returns:
        (value, one line for each thing that is wrong); the value is None when
        nothing can be read. Never raises.
    """
    start = len(text) - len(text.lstrip())
    limit, open_string = _scan(text)
    problems = []
    if limit < len(text):
        problems.append(f"nested deeper than {DEPTH_MAX} at character {limit}")
    try:
        value, end = _decoder.raw_decode(text[:limit], start)
    except json.JSONDecodeError as e:
        was_cut = e.pos >= min(open_string, len(text.rstrip()))
        if not problems and was_cut:
            problems.append(f"cut after {len(text)} characters: the rest is missing")
        elif not problems:
            problems.append(f"damaged at character {e.pos}: {e.msg}; the rest is lost")
        value = _with_open_string(text, open_string) if was_cut else None
        if value is None:
            end, closers = _last_boundary(text[: min(limit, e.pos)])
            value = _try(text[:end] + closers)
        return value, problems
    if text[end:].strip():
        problems.append(f"more text after the end, at character {end}")
    return value, problems


def _scan(text: str) -> tuple[int, int]:
    """(where the nesting gets too deep, where a string begins that has no end).

    The length of the text if nowhere.
    """
    depth = 0
    for token in _TOKEN.finditer(text):
        if token[0] in _CLOSER:
            depth += 1
            if depth > DEPTH_MAX:
                return token.start(), len(text)
        elif token[0] in "]}":
            depth -= 1
        elif token[0] != "," and token[1] != '"':
            return len(text), token.start()
    return len(text), len(text)


def _with_open_string(text: str, start: int) -> Any:
    """The value with the string that begins at ``start`` ended by us.

    None where that string is a key, whose value was not written.
    """
    _, closers = _last_boundary(text[:start])
    for cut in range(_ESCAPE_LENGTH_MAX + 1):
        if len(text) - cut > start:
            value = _try(text[: len(text) - cut] + '"' + closers)
            if value is not None:
                return value
    return None


def _try(text: str) -> Any:
    try:
        return _decoder.decode(text)
    except json.JSONDecodeError:
        return None


def _last_boundary(text: str) -> tuple[int, str]:
    """(end of the last whole member, what closes all that is open there).

    ``text`` is the beginning of a valid JSON text.
    """
    closers: list[str] = []
    end = 0
    for token in _TOKEN.finditer(text):
        if token[0] in _CLOSER:
            closers.append(_CLOSER[token[0]])
            end = token.end()
        elif token[0] in "]}":
            if closers:
                closers.pop()
            end = token.end()
        elif token[0] == ",":
            end = token.start()
    return end, "".join(reversed(closers))
