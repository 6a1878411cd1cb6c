"""curl, the program: what it prints, and its exit status. It tries nothing again."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from protocol import MODEL, TOOL, Left, Outcome, Task, piece, serve

LIMIT_S = "120"


def ask(task: Task, outcome: Outcome) -> None:
    body: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": task.prompt}],
        "max_tokens": task.max_tokens,
        "stream": task.stream,
    }
    if task.tool:
        body["tools"] = [{"type": "function", "function": TOOL}]
    if task.logit_bias:
        body["logit_bias"] = task.logit_bias
    command = ["curl", "--silent", "--show-error", "--no-buffer", "--noproxy", "*"]
    command += ["--max-time", LIMIT_S, "--header", "Content-Type: application/json"]
    command += ["--write-out", "\n%{http_code}\n", "--data-binary", json.dumps(body)]
    with subprocess.Popen(
        [*command, *[f"{task.base_url}/chat/completions"] * task.times],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as curl:
        assert curl.stderr is not None
        try:
            last = read(curl, task, outcome)
        except Left:
            curl.kill()
            raise
        said = curl.stderr.read().strip()
    outcome.status = int(last) or None if last.isdigit() else None
    if curl.returncode:
        outcome.told, outcome.error = "told", f"exit status {curl.returncode}"
        outcome.message = said


def read(curl: subprocess.Popen[str], task: Task, outcome: Outcome) -> str:
    """What it prints, as it comes; the last line."""
    line = ""
    assert curl.stdout is not None
    for raw in curl.stdout:
        line = raw.strip()
        found = line.removeprefix("data: ")
        if found.startswith("{"):
            event = json.loads(found)
            if "error" in event:
                outcome.told = "told"
                outcome.error = "error event" if found != line else "error body"
                outcome.code = event["error"]["code"]
            for choice in event.get("choices") or []:
                delta = choice.get("delta") or choice.get("message") or {}
                outcome.finish = choice.get("finish_reason") or outcome.finish
                for call in delta.get("tool_calls") or []:
                    function = call["function"]
                    outcome.calls.append([function["name"], function["arguments"]])
                piece(task, outcome, delta.get("content"))
    return line


serve(ask)
