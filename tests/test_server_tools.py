"""What a model writes as a tool call, well and badly, and what its client gets.

Each model says one text (`support.spoken_models`). All of it must arrive: as calls
in the form of the OpenAI API, or as text.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx_lm.tool_parsers
import pytest

from mlx_safe.server import tool_calls
from support.models import make_model
from support.server import Server
from support.spoken_models import MARKERS, SPOKEN, Spoken

SEED: dict[str, Any] = {"seed": 1}  # the sequential path
PATHS: dict[str, dict[str, Any]] = {"batched": {}, "sequential": SEED}
PROPERTIES = {
    "nullable": {"type": ["string", "null"]},
    "number": {"type": "number"},
    "integer": {"type": "integer"},
    "object": {"type": "object"},
}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {"type": "object", "properties": PROPERTIES},
        },
    }
    for name in ("add", "run")
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("spoken_models.py", tmp_path_factory.mktemp("spoken"))


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[Server]:
    with Server(models / "plain") as server:
        server.wait_ready()
        yield server


def strictly(text: str) -> Any:
    """``text`` as JSON, of which Python's NaN and Infinity are no part."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


class Said:
    """What a client has of the first choice of an answer, streamed or not."""

    def __init__(self, answer: Any) -> None:
        assert answer.status == 200, answer.body
        assert answer.error is None, answer.body
        self.content = self.reasoning = ""
        self.calls: list[Any] = []
        self.finish = None
        for event in answer.events or [answer.json]:
            for choice in event["choices"]:
                message = choice.get("delta") or choice.get("message") or {}
                self.content += message.get("content") or ""
                self.reasoning += message.get("reasoning") or ""
                for call in message.get("tool_calls", ()):
                    if answer.events:
                        assert call["index"] == len(self.calls)
                    self.calls.append(call)
                self.finish = choice["finish_reason"] or self.finish

    @property
    def functions(self) -> list[tuple[str, Any]]:
        """(name, arguments) of each call, which must be what the API promises."""
        found = []
        for call in self.calls:
            assert call["type"] == "function"
            assert isinstance(call["function"]["name"], str)
            arguments = strictly(call["function"]["arguments"])
            assert isinstance(arguments, dict)
            found.append((call["function"]["name"], arguments))
        assert len({call["id"] for call in self.calls}) == len(self.calls)
        return found


def ask(server: Server, name: str, **more: Any) -> Said:
    body = {"model": str(server.model.parent / name), "tools": TOOLS, **more}
    return Said(server.chat("a", max_tokens=10, **body))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", SPOKEN)
def test_all_that_is_said_arrives(server: Server, name: str, path: str) -> None:
    spoken = SPOKEN[name]
    whole = ask(server, name, **PATHS[path])
    streamed = ask(server, name, stream=True, **PATHS[path])
    for said in (whole, streamed):
        _check(said, spoken)
    assert streamed.content == whole.content
    assert streamed.functions == whole.functions


def _check(said: Said, spoken: Spoken) -> None:
    text = "".join(spoken.pieces)
    if not spoken.ends:
        text += spoken.pieces[-1] * (10 - len(spoken.pieces))
    if spoken.thinks:
        inside, _, after = text.removeprefix("<think>").partition("</think>")
        if "<think>" in text:
            assert (said.reasoning, said.content) == (inside, after)
        else:
            assert (said.reasoning, said.content) == ("", text)
        return
    if said.functions:
        start, end = MARKERS[spoken.parser or ""]
        before, _, rest = text.partition(start)
        assert said.content == before + (rest.partition(end)[2] if end else "")
    else:
        assert said.content == text
    if spoken.readable is not None:
        assert bool(said.calls) == spoken.readable, said.content
    ends = "tool_calls" if said.calls else "stop"
    assert said.finish == (ends if spoken.ends else "length")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("name", "functions"),
    [
        ("good", [("add", {"a": 1})]),
        ("no-arguments", [("add", {})]),
        ("parameters", [("add", {"a": 1})]),
        ("text-arguments", [("add", {"a": 1})]),
        ("two-in-a-list", [("a", {}), ("b", {})]),
        ("qwen-good", [("run", {"cmd": "ls -la"})]),
        ("qwen-two", [("a", {"x": "1"}), ("b", {"y": "2"})]),
        ("mistral-good", [("run", {"cmd": "ls"})]),
        ("kimi-good", [("run", {"n": 1})]),
    ],
)
def test_what_is_called(
    server: Server, name: str, functions: list[Any], path: str
) -> None:
    assert ask(server, name, **PATHS[path]).functions == functions


def test_one_line_says_which_parser_and_why_and_not_what(server: Server) -> None:
    before = server.log.count("cannot read it")
    ask(server, "escape")
    server.wait_for_log("cannot read it", before + 1)
    lines = [line for line in server.log.splitlines() if "cannot read it" in line]
    assert len(lines) == before + 1
    assert "WARNING" in lines[-1]
    assert "json_tools" in lines[-1]
    assert "JSONDecodeError" in lines[-1]
    assert not re.search(r"\badd\b", lines[-1])  # in no id by chance


def test_nothing_is_a_failure_of_the_server(server: Server) -> None:
    """Last in the file: after all that the models of this file have said."""
    assert server.metric("mlx_safe_generation_failures_total") == 0
    assert "Traceback" not in server.log


def every_parser() -> list[Any]:
    return [
        importlib.import_module(f"mlx_lm.tool_parsers.{module.name}").parse_tool_call
        for module in pkgutil.iter_modules(mlx_lm.tool_parsers.__path__)
    ]


# What clients send as tools, good and bad: parsers look into them.
OFFERED: list[Any] = [
    None,
    TOOLS,
    [],
    [{}],
    [{"function": {"name": "run"}}],
    ["run"],
    5,
]


@pytest.mark.parametrize("parser", every_parser(), ids=tool_calls.parser_name)
@pytest.mark.parametrize("tools", OFFERED, ids=str)
def test_a_parser_reads_a_call_or_none(parser: Any, tools: Any) -> None:
    texts = {"".join(spoken.pieces) for spoken in SPOKEN.values()}
    texts |= {piece for spoken in SPOKEN.values() for piece in spoken.pieces}
    texts |= {text[:length] for text in texts for length in range(0, 60, 7)}
    for text in texts:
        try:
            calls = tool_calls.read(text, parser, tools)
        except tool_calls.Unreadable as e:
            assert str(e)
            continue
        assert calls
        for call in calls:
            assert call.name == call.name.strip() != ""
            assert isinstance(strictly(call.arguments), dict)


GOOD_AND_BAD = {
    "function_gemma": ("call:a{n:1}", "call:b{n}"),
    "gemma4": ("call:a{n:1}", "call:b{n:"),
    "kimi_k2": tuple(
        f"<|tool_call_begin|>functions.{name}<|tool_call_argument_begin|>{arguments}"
        "<|tool_call_end|>"
        for name, arguments in (("a:0", '{"n": 1}'), ("b:1", "{n}"))
    ),
    "minimax_m2": (
        '<invoke name="a"><parameter name="n">1</parameter></invoke>',
        '<invoke name="b"><parameter name="n">1',
    ),
    "qwen3_coder": (
        "<function=a>\n<parameter=n>\n1\n</parameter>\n</function>",
        "\n<function=b>\n<parameter=integer>\nx\n</parameter>\n</function>",
    ),
}


@pytest.mark.parametrize("name", GOOD_AND_BAD)
def test_calls_between_one_pair_of_markers_are_read_one_by_one(name: str) -> None:
    parser = importlib.import_module(f"mlx_lm.tool_parsers.{name}").parse_tool_call
    good, bad = GOOD_AND_BAD[name]
    tools = [{"function": {**TOOLS[0]["function"], "name": n}} for n in ("a", "b")]
    assert tool_calls.apart(good + bad, parser) == [good, bad]
    assert [call.name for call in tool_calls.read(good, parser, tools)] == ["a"]
    with pytest.raises(tool_calls.Unreadable):
        tool_calls.read(bad, parser, tools)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
def test_nobody_is_called_with_tool_choice_none(
    server: Server, path: str, stream: bool
) -> None:
    more = {"stream": stream, **PATHS[path]}
    said = ask(server, "good", tool_choice="none", **more)
    assert said.content == "".join(SPOKEN["good"].pieces)
    assert (said.calls, said.finish) == ([], "stop")
    assert ask(server, "good", tool_choice="auto", **more).calls


@pytest.mark.parametrize("path", PATHS)
def test_with_tool_choice_none_the_model_is_shown_no_tools(
    scripted_model: Path, path: str
) -> None:
    with Server(scripted_model) as server:
        server.wait_ready()

        def tokens(**more: Any) -> int:
            found: int = server.chat(**more, **PATHS[path]).json["usage"][
                "prompt_tokens"
            ]
            return found

        assert tokens(tools=TOOLS, tool_choice="none") == tokens()
        assert tokens(tools=TOOLS) > tokens()
