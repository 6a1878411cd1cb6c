"""JSON as a request may have it: bounded in depth and number of values, finite.

Python's own parser takes more than JSON (``NaN``), passes lone surrogates on, which
no tokenizer takes, and makes a hundred times its size of a body such as ``[[],[],…``.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from .replies import BadRequest

__all__ = ["check_value", "dumps", "loads", "name_of", "parse", "wrong"]

# Of arrays and objects in each other. A chat template goes through the schemas of
# tools by functions of its own, which take several of Python's frames a level.
DEPTH_MAX = 64
# Values in one body, keys not counted. Each takes up to 250 bytes when parsed.
VALUES_MAX = 100_000
# Larger ones are read as floats, as most parsers of JSON do; of more digits Python's
# own int() takes too long, and beyond a float's range there is no number.
INT_MAX = 2**64
DIGITS_MAX = 20

_SURROGATE = re.compile("[\ud800-\udfff]")

# (the place of its container, its key or index); None: the whole.
Place = Any


def loads(raw: bytes | bytearray) -> Any:
    """The value that ``raw`` is, UTF-8 with or without a byte order mark.

    Raises:
        BadRequest: it is none, or more than is taken; its ``param`` is the place.
    """
    _check_count(raw)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadRequest("The body is not UTF-8.") from None
    value = parse(text)
    check_value(value)
    return value


def parse(text: str) -> Any:
    """As `loads`, but of a text whose values have not been looked at."""
    try:
        return json.loads(text, parse_int=_int, parse_constant=float)
    except json.JSONDecodeError as e:
        raise BadRequest(
            f"The body is not valid JSON (line {e.lineno}, column {e.colno})."
        ) from None
    except RecursionError:
        raise _too_deep() from None


def dumps(value: object) -> str:
    """``value``, which `loads` has made, as text for another parser."""
    return json.dumps(value, ensure_ascii=False)


def _int(digits: str) -> int | float:
    if len(digits) <= DIGITS_MAX + 1 and abs(found := int(digits)) < INT_MAX:
        return found
    return float(digits)  # infinity, whose place `check_value` knows


def _too_deep(param: str | None = None) -> BadRequest:
    return BadRequest(
        f"The request is nested too deeply: at most {DEPTH_MAX} levels are read.", param
    )


def _too_many() -> BadRequest:
    return BadRequest(
        f"The request has too many values: at most {VALUES_MAX} are read in one body."
    )


def _check_count(raw: bytes | bytearray) -> None:
    """Refuses a body of too many values, before anything is made of them.

    Counted are the signs between values, outside of strings. All of it are single
    passes in C: a prompt may have millions of the same signs.
    """
    if sum(map(raw.count, (b",", b"[", b"{"))) < VALUES_MAX:
        return
    # A backslash stands in strings only, so what is escaped is found from the left.
    plain = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    if plain.count(b'"') > 4 * VALUES_MAX:  # keys are strings, too
        raise _too_many()
    between = b"".join(plain.split(b'"')[::2])
    if sum(map(between.count, (b",", b"[", b"{"))) >= VALUES_MAX:
        raise _too_many()


def check_value(value: object) -> None:
    """Looks at every value in ``value`` for what nothing behind the door takes.

    Raises:
        BadRequest: a number that is not finite or too large, half of a surrogate
            pair, or too many levels; its ``param`` is the place.
    """
    # (value, level, place: (place of its container, key or index)).
    pending: list[tuple[Any, int, Place]] = [(value, 0, None)]
    while pending:
        found, level, place = pending.pop()
        if isinstance(found, str):
            _check_text(found, place)
        elif isinstance(found, bool) or found is None:
            continue
        elif isinstance(found, int | float):
            # The floats that Python makes of 1e999.
            if not math.isfinite(found):
                raise _refusal(place, "must be a number in the range of a double")
        elif level >= DEPTH_MAX:
            raise _too_deep(name_of(_path(place)[:1]))
        elif isinstance(found, dict):
            for key, inner in found.items():
                _check_text(key, place)
                pending.append((inner, level + 1, (place, key)))
        else:
            for i, inner in enumerate(found):
                pending.append((inner, level + 1, (place, i)))


def _check_text(text: str, place: Place) -> None:
    if not text.isascii() and _SURROGATE.search(text):
        raise _refusal(place, "has half of a surrogate pair, which is no character")


def _refusal(place: Place, what: str) -> BadRequest:
    return wrong(name_of(_path(place)), what)


def wrong(place: str | None, what: str) -> BadRequest:
    """The refusal whose sentence is ``place``, a name of `name_of`, and ``what``.

    Its ``param`` is the API's own field, the first part of the place.
    """
    field = re.split(r"[.\[]", place)[0] if place else None
    return BadRequest(f"{place or 'The request'} {what}.", field)


def _path(place: Place) -> list[str | int]:
    path = []
    while place is not None:
        place, key = place
        path.append(key)
    return path[::-1]


def name_of(path: list[str | int] | tuple[str | int, ...]) -> str | None:
    """The name of a place, such as ``messages[0].content``; None: the body itself."""
    name = ""
    for part in path:
        if isinstance(part, int):
            name += f"[{part}]"
        else:
            # A client's own key is shown, but not at any length or with anything.
            shown = part if part.isidentifier() else ascii(part)[1:-1]
            name += f".{shown[:64]}" if name else shown[:64]
    return name or None
