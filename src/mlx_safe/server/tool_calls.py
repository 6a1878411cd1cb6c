"""From what a model wrote as a tool call to the call that a client gets.

mlx-lm has a parser for each family of models (``mlx_lm.tool_parsers``). They raise
whatever their code comes to, and some return what is no call: no name, arguments
that are a number, or that JSON has no words for. Pure functions, any thread.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["Call", "Unreadable", "apart", "new_id", "parser_name", "read"]

Parser = Callable[[str, Any], object]

# Mistral's chat templates refuse a history with other ids (0.3 and later).
ID_LENGTH = 9
_ID_LETTERS = string.ascii_letters + string.digits
# What belongs to the form of a call and not to its name.
_NO_NAME = re.compile(r'[\s<>{}"]')

# How a call ends and the next one begins, between one pair of markers. These parsers
# leave out what they cannot read, or read the first and give it what the others have.
_BETWEEN = {
    "function_gemma": ("}", "call:"),
    "gemma4": ("}", "call:"),
    "kimi_k2": ("<|tool_call_end|>", "<|tool_call_begin|>"),
    "kimi_k3": ("<|close|>call<|sep|>", "<|open|>call"),
    "minimax_m2": ("</invoke>", "<invoke"),
    "muse_spark": ("</atem:invoke>", "<atem:invoke"),
    "qwen3_coder": ("</function>", "<function="),
}


class Unreadable(Exception):
    """A text is no call; the message is the reason, with nothing of the text."""


class Call(NamedTuple):
    """A call as the OpenAI API has it: ``arguments`` is a JSON object, as text.

    ``id`` is the model's own; None: it gave none.
    """

    name: str
    arguments: str
    id: str | None = None


def new_id() -> str:
    """An id for a call, never the same twice."""
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(ID_LENGTH))


def parser_name(parser: Parser) -> str:
    """What mlx-lm calls ``parser``, such as "json_tools"."""
    return parser.__module__.rpartition(".")[2]


def apart(text: str, parser: Parser) -> list[str]:
    """``text``, which stood between a model's markers, cut into single calls."""
    between = _BETWEEN.get(parser_name(parser))
    if between is None:
        return [text]
    end, begin = map(re.escape, between)
    return re.split(rf"(?<={end})(?=\s*{begin})", text)


def read(text: str, parser: Parser, tools: object) -> list[Call]:
    """The calls in ``text``, a part of `apart`; one or more.

    Args:
        parser: of mlx-lm, for this model.
        tools: of the request, as its client sent them; None without.

    Raises:
        Unreadable: it is no call, or one of several is none.
    """
    try:
        parsed = parser(text, tools)
    except MemoryError:
        raise
    except Exception as e:  # whatever it is: a model can write anything
        raise Unreadable(type(e).__name__) from None
    found = parsed if isinstance(parsed, list) else [parsed]
    if not found:
        raise Unreadable("it has no call")
    return [_call(one, tools) for one in found]


def _call(parsed: object, tools: object) -> Call:
    if not isinstance(parsed, dict):
        raise Unreadable("it is no object")
    name = parsed.get("name")
    name = name.strip() if isinstance(name, str) else ""
    if not name or _NO_NAME.search(name):
        raise Unreadable("it has no name")
    # The key that Llama's models were trained on.
    arguments = parsed.get("arguments", parsed.get("parameters"))
    if _is_given_up(name, arguments, tools):
        raise Unreadable("the parser found no call")
    given = parsed.get("id")
    return Call(name, _as_text(arguments), given if isinstance(given, str) else None)


def _as_text(arguments: object) -> str:
    try:
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if arguments is None:  # also a call without any
            arguments = {}
        if isinstance(arguments, dict):
            # Infinity and NaN are Python's, and no JSON.
            text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
            text.encode()  # half of a pair of surrogates is no text either
            return text
    except MemoryError:
        raise
    except Exception as e:
        raise Unreadable(f"its arguments are no JSON: {type(e).__name__}") from None
    raise Unreadable("its arguments are no object")


def _is_given_up(name: str, arguments: object, tools: object) -> bool:
    """Whether this is how mlx-lm's ``glm47`` (0.31, 0.32) says that it read nothing.

    It raises never, but makes any text the one argument "raw" of a tool that is
    called "unknown", or by the first word of the text.
    """
    if not isinstance(arguments, dict) or set(arguments) != {"raw"}:
        return False
    return name not in _names(tools)


def _names(tools: object) -> set[str]:
    functions = [
        tool.get("function")
        for tool in (tools if isinstance(tools, list) else [])
        if isinstance(tool, dict)
    ]
    names = [f.get("name") for f in functions if isinstance(f, dict)]
    return {name for name in names if isinstance(name, str)}
