"""openai-python, synchronous, as its README uses it."""

from __future__ import annotations

import functools
from typing import Any

import openai
from protocol import KEY, MODEL, TOOL, Outcome, Task, piece, serve


@functools.cache
def client(base_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=base_url, api_key=KEY)


def ask(task: Task, outcome: Outcome) -> None:
    more: dict[str, Any] = {}
    if task.tool:
        more["tools"] = [{"type": "function", "function": TOOL}]
    if task.logit_bias:
        more["logit_bias"] = task.logit_bias
    asking = client(task.base_url)
    if not task.retries:
        asking = asking.with_options(max_retries=0)
    answer: Any = asking.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": task.prompt}],
        max_tokens=task.max_tokens,
        stream=task.stream,
        **more,
    )
    if not task.stream:
        choice = answer.choices[0]
        piece(task, outcome, choice.message.content)
        outcome.finish = choice.finish_reason
        return
    with answer as stream:
        for chunk in stream:
            for choice in chunk.choices:
                outcome.finish = choice.finish_reason or outcome.finish
                for call in choice.delta.tool_calls or []:
                    function = call.function
                    outcome.calls.append([function.name, function.arguments])
                piece(task, outcome, choice.delta.content)


serve(ask)
