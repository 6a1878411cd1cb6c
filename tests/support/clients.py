"""What people talk to a server with: the openai client, curl, and a plain socket.

All three are asked the same and give the same: the `Said` of one answer.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from support.server import Answer, Server

LIMIT_S = 120
# A program that is missing is left out, and named; or, if one of these is set, its
# tests fail.
REQUIRED = any(os.environ.get(x) for x in ("MLX_SAFE_REQUIRE_CLIENTS", "CI"))


@dataclass
class Said:
    """One answer as its client saw it, without ids and times.

    Attributes:
        deltas: of a stream, the pieces in the order they came.
        calls: (name, arguments as text) of each tool call.
        usage: (prompt tokens, completion tokens).
        error: the code of the error that the answer is or ends with.
    """

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    finish: str | None = None
    usage: tuple[int, int] | None = None
    logprobs: list[Any] = field(default_factory=list)
    error: str | None = None
    deltas: list[tuple[str, str]] = field(default_factory=list, compare=False)

    def add(self, message: dict[str, Any]) -> None:
        """Adds a message, or a delta of one."""
        for name in ("content", "reasoning"):
            text = message.get(name)
            if text:
                setattr(self, name, getattr(self, name) + text)
                self.deltas.append((name, text))
        for call in message.get("tool_calls") or []:
            function = call["function"]
            self.calls.append((function["name"], function["arguments"]))
            self.deltas.append(("call", function["arguments"]))

    def message(self) -> dict[str, Any]:
        """It, as a part of the conversation that goes on."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.calls:
            message["tool_calls"] = [
                {
                    "type": "function",
                    "id": f"{i}",
                    "function": {"name": n, "arguments": a},
                }
                for i, (n, a) in enumerate(self.calls)
            ]
        return message


def said(parts: list[dict[str, Any]]) -> Said:
    """Of the events of a stream, or of the one body of an answer."""
    result = Said()
    for part in parts:
        if "error" in part:
            result.error = part["error"]["code"]
        for choice in part.get("choices") or []:
            result.add(choice.get("delta") or choice.get("message") or {})
            result.finish = choice.get("finish_reason") or result.finish
            result.logprobs += (choice.get("logprobs") or {}).get("content") or []
        if part.get("usage"):
            usage = part["usage"]
            result.usage = (usage["prompt_tokens"], usage["completion_tokens"])
    return result


def ask_plain(server: Server, body: dict[str, Any]) -> Said:
    """With Python's own HTTP client."""
    return _of_answer(server.post(body, timeout=LIMIT_S))


def _of_answer(answer: Answer) -> Said:
    if answer.broken:
        return Said(error=f"broken: {answer.broken}")
    if answer.events and not answer.done:
        return Said(error="the stream has no end")
    return said(answer.events or [answer.json])


def ask_curl(server: Server, body: dict[str, Any]) -> Said:
    """With the program curl."""
    curl = shutil.which("curl")
    assert curl, "curl is not installed: apt-get install curl"
    url = f"http://127.0.0.1:{server.port}/v1/chat/completions"
    done = subprocess.run(
        [
            *(curl, "--silent", "--show-error", "--no-buffer", "--data-binary", "@-"),
            *("--header", "Content-Type: application/json", "--noproxy", "*"),
            *("--max-time", str(LIMIT_S), url),
        ],
        input=json.dumps(body),
        capture_output=True,
        text=True,
        timeout=LIMIT_S + 5,
        check=False,
    )
    broken = done.stderr.strip() if done.returncode else None
    return _of_answer(Answer(None, body=done.stdout, broken=broken).with_events())


@functools.cache
def _openai(port: int) -> Any:
    import openai

    return openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1",
        api_key="-",
        max_retries=0,
        timeout=LIMIT_S,
    )


def ask_openai(server: Server, body: dict[str, Any]) -> Said:
    """With the openai package, which retries nothing here."""
    import openai

    parts: list[dict[str, Any]] = []
    try:
        answer = _openai(server.port).chat.completions.create(
            model="default_model", **body
        )
        for part in answer if body.get("stream") else [answer]:
            parts.append(part.model_dump(exclude_none=True))
    except openai.APIError as e:
        parts.append({"error": {"code": e.code or f"{type(e).__name__}: {e}"}})
    return said(parts)


HAS_CURL = REQUIRED or shutil.which("curl") is not None
CLIENTS: list[Callable[[Server, dict[str, Any]], Said]] = [
    ask_openai,
    *([ask_curl] if HAS_CURL else []),
    ask_plain,
]
