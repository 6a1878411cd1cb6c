"""Requests that are wrong in one thing, for every field of both endpoints.

None of them may be sent to a server without the protected one's door: some of the
values would reach MLX there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
DEFAULTS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2},
    TEXT: {"prompt": "hello", "max_tokens": 2},
}
# Instead of a number of tokens that is left out: 512 take a while.
SHORT = {"max_completion_tokens": 2}
# As text, since Python's JSON has no word for them.
NAN, INFINITY, TOO_LARGE, DIGITS = "NaN", "-Infinity", "1e999", "9" * 5000
SURROGATE = '"\\ud800"'


@dataclass(frozen=True)
class Case:
    """A body with one field that is wrong, or odd.

    Attributes:
        kind: of what is wrong, such as ``"a string"``.
        refused: whether it must be a 400; else it may be a 200 as well.
    """

    path: str
    field: str
    kind: str
    body: bytes
    refused: bool

    @property
    def id(self) -> str:
        return f"{self.path}:{self.field}:{self.kind}"

    def also(self, **more: Any) -> bytes:
        """The body with fields added, as far as it has an end."""
        ends = self.body.startswith(b'{"') and self.body.endswith(b"}")
        if not more or not ends or self.field in more:
            return self.body
        return b"{" + json.dumps(more)[1:-1].encode() + b", " + self.body[1:]


# Without these a sampler does not look at what is odd.
SAMPLED = {"temperature": 0.8}

# What a field is: what it can be asked for is right, of any other type it is wrong.
NUMBERS = {
    "temperature": (-1, 1e300),
    "top_p": (-0.1, 1.1),
    "min_p": (-0.1, 1.1),
    "xtc_probability": (-0.1, 1.1),
    "xtc_threshold": (-0.1, 1.1),
    "repetition_penalty": (-1, 1e300, 1e-300),
    "presence_penalty": (-1e300, 1e300),
    "frequency_penalty": (-1e300, 1e300),
}
INTEGERS = {
    "max_tokens": (0, -1, 2**63),
    "max_completion_tokens": (0, -1, 2**63),
    "top_k": (-2, 2**63),
    "n": (0, -1, 9, 2**63),
    "seed": (-1, 2**64),
    "top_logprobs": (-1, 21, 2**63),
    "num_draft_tokens": (-1, 2**63),
    "repetition_context_size": (-1, 2**63),
    "presence_context_size": (-1, 2**63),
    "frequency_context_size": (-1, 2**63),
}
STRINGS = ("model", "adapters", "draft_model")
BOOLEANS = ("stream",)
# Values that a sampler of mlx-lm cannot take, or was not made for: brought to the
# nearest, or refused.
ODD: dict[str, tuple[Any, ...]] = {
    "temperature": (0, 1e-300, 100),
    "top_p": (0, 1e-12),
    "min_p": (1, 1e-300),
    "top_k": (-1, 0, 262, 263, 10**6, 2**62),
    "xtc_probability": (0, 1, 0.5),
    "xtc_threshold": (0, 0.6, 1),
    "repetition_penalty": (0, 0.01, 100),
    "repetition_context_size": (0, 2**62),
    "presence_context_size": (0, 2**62),
    "frequency_context_size": (0, 2**62),
    "num_draft_tokens": (0, 2**62),
    "max_tokens": (1,),
    "seed": (0, 2**64 - 1),
}
ODD_WITH: dict[str, dict[str, Any]] = {
    "xtc_probability": {"xtc_threshold": 0.2},
    "xtc_threshold": {"xtc_probability": 0.5},
    "repetition_context_size": {"repetition_penalty": 1.1},
    "presence_context_size": {"presence_penalty": 1},
    "frequency_context_size": {"frequency_penalty": 1},
}
OTHERS: dict[str, tuple[Any, ...]] = {
    "stop": (1, {}, "", [""], ["a"] * 17, [1], [[]], [None]),
    "stream_options": (1, "x", [], {"include_usage": 1}),
    "logit_bias": (
        *(1, "x", [], {"a": 1}, {"1": 101}, {"1": "x"}, {"-1": 1}, {" 1": 1}),
        *({"1_0": 1}, {"9" * 30: 1}, {"999999": 1}, {"1": None}, {"1": []}),
    ),
    "logprobs": ("x", [], {}, -1),
    "response_format": (1, {}, {"type": "json_object"}, {"type": "json_schema"}),
    "user": (1, []),
    "metadata": (1, "x"),
    "store": (1, "x"),
    "service_tier": (1, []),
}
NO_CONTENT: tuple[Any, ...] = (1, True, {}, [1], [{}], [[]])
NO_CALLS: tuple[Any, ...] = (1, "x", {"a": 1}, [1], [{}], [{"function": 1}])
OF_CHAT: dict[str, tuple[Any, ...]] = {
    "messages": (
        *(1, "x", {}, [], [1], ["x"], [[]], [{}], [None]),
        *([{"role": 1, "content": "x"}], [{"role": "alien", "content": "x"}]),
        *([{"role": "user"}], [{"role": "user", "content": None}]),
        *([{"role": "user", "content": x}] for x in NO_CONTENT),
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [{"type": "text", "text": 1}]}],
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": "file:x"}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": 1}]}],
        [{"role": "user", "content": "x", "name": 1}],
        *([{"role": "assistant", "tool_calls": x}] for x in NO_CALLS),
        [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}],
        [{"role": "assistant", "tool_calls": [{"type": "custom"}]}],
        [{"role": "tool", "content": 1, "tool_call_id": "1"}],
        [{"role": "tool", "content": "x", "tool_call_id": 1}],
    ),
    "tools": (
        *(1, "x", {"a": 1}, [1], [{}], [{"type": "function"}]),
        [{"type": "web_search"}],
        [{"type": "function", "function": {}}],
        [{"type": "function", "function": {"name": 1}}],
        [{"type": "function", "function": {"name": "f", "parameters": []}}],
        [
            {
                "type": "function",
                "function": {"name": "f", "parameters": {"properties": 1}},
            }
        ],
    ),
    "tool_choice": (1, "required", "x", {"type": "function"}),
    "chat_template_kwargs": (
        *(1, "x", [], {"tokenize": False}, {"tools": 1}, {"messages": []}),
        *({"chat_template": "x"}, {"return_tensors": "np"}),
        *({"documents": 1}, {"documents": ["x"]}),
    ),
    "role_mapping": (1, "x", [], {"user": 1}),
    "reasoning_effort": (1, "", []),
    "functions": ([{"name": "f"}], 1),
    "modalities": (["text", "audio"], 1),
    "audio": ({"voice": "x"},),
}
OF_TEXT: dict[str, tuple[Any, ...]] = {
    "prompt": (1, {}, [], ["a", "b"], [1, 2], [[1]], True),
    "echo": (True, 1),
    "best_of": (2, "x"),
    "suffix": ("x", 1),
}


def _with(path: str, field: str, value: str, more: Any = ()) -> bytes:
    """A body in which ``field`` is ``value``, which is JSON or meant to be."""
    rest = {k: v for k, v in {**DEFAULTS[path], **dict(more)}.items() if k != field}
    return (json.dumps(rest)[:-1] + f', "{field}": {value}}}').encode()


def _wrong(path: str) -> Iterator[tuple[str, str, str]]:
    """(field, kind, value as text) of what must be refused."""
    value: Any
    for field, bounds in NUMBERS.items():
        for value in (*bounds, "x", True, [], {}):
            yield field, f"{value!r}", json.dumps(value)
    for field, limits in INTEGERS.items():
        for other in (*limits, "1", True, 1.5, [], {}):
            yield field, f"{other!r}", json.dumps(other)
    for field in (*NUMBERS, *INTEGERS):
        for literal in (NAN, INFINITY, TOO_LARGE, DIGITS):
            yield field, literal[:9], literal
    for field in STRINGS:
        for value in (1, True, [], {}, "", "a\0b", "x" * 5000):
            yield field, f"{value!r}"[:9], json.dumps(value)
        yield field, "a surrogate", SURROGATE
    for field in BOOLEANS:
        for value in (1, "x", [], {}):
            yield field, f"{value!r}", json.dumps(value)
    for field, values in {**OTHERS, **(OF_CHAT if path == CHAT else OF_TEXT)}.items():
        for i, value in enumerate(values):
            yield field, f"{i}: {value!r}"[:40], json.dumps(value)
    yield "stop", "a surrogate", f"[{SURROGATE}]"
    yield "logit_bias", NAN, f'{{"1": {NAN}}}'
    yield "logit_bias", TOO_LARGE, f'{{"1": {TOO_LARGE}}}'
    if path == CHAT:
        message = f'[{{"role": "user", "content": {SURROGATE}}}]'
        yield "messages", "a surrogate", message
        tool = f'[{{"type": "function", "function": {{"name": {SURROGATE}}}}}]'
        yield "tools", "a surrogate", tool
        yield "chat_template_kwargs", "deep", '{"a": ' + "[" * 200 + "]" * 200 + "}"
        yield "tools", "deep", "[" * 200 + "]" * 200
        yield "messages", "wide", "[" + "[]," * 250_000 + "[]]"
    else:
        yield "prompt", "a surrogate", SURROGATE
    yield "x", "deep", "[" * 100_000 + "]" * 100_000


def cases() -> list[Case]:
    """All of them, for both endpoints."""
    found = []
    for path in DEFAULTS:
        for field, kind, value in _wrong(path):
            found.append(Case(path, field, kind, _with(path, field, value), True))
        for field, values in ODD.items():
            for odd in values:
                more = {**SAMPLED, **ODD_WITH.get(field, {})}
                body = _with(path, field, json.dumps(odd), more)
                found.append(Case(path, field, f"odd {odd!r}", body, False))
        required = "messages" if path == CHAT else "prompt"
        for field in _fields(path):
            raw = _with(path, field, "null", SHORT)
            found.append(Case(path, field, "null", raw, field == required))
        for name, body in NO_REQUESTS.items():
            found.append(Case(path, "(body)", name, body, True))
    return found


def _fields(path: str) -> list[str]:
    fields = dict.fromkeys([*NUMBERS, *INTEGERS, *STRINGS, *BOOLEANS, *OTHERS])
    return [*fields, *(OF_CHAT if path == CHAT else OF_TEXT)]


NO_REQUESTS = {
    "empty": b"",
    "cut": b'{"messages": [',
    "an array": b"[]",
    "a string": b'"x"',
    "null": b"null",
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "deep": b"[" * 100_000,
    "a comment": b"{} // x",
}
