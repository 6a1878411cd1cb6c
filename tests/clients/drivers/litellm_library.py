"""litellm, the library, asynchronous, with its defaults."""

from __future__ import annotations

import asyncio
import os
from typing import Any

# Its list of prices comes from the network otherwise.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm
from protocol import KEY, MODEL, TOOL, Outcome, Task, piece, serve_async


async def ask(task: Task, outcome: Outcome) -> None:
    more: dict[str, Any] = {} if task.retries else {"max_retries": 0}
    if task.tool:
        more["tools"] = [{"type": "function", "function": TOOL}]
    if task.logit_bias:
        more["logit_bias"] = task.logit_bias
    answer = await litellm.acompletion(
        model=f"openai/{MODEL}",
        api_base=task.base_url,
        api_key=KEY,
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
    try:
        async for chunk in answer:
            for choice in chunk.choices:
                outcome.finish = choice.finish_reason or outcome.finish
                for call in choice.delta.tool_calls or []:
                    add_call(outcome, call)
                piece(task, outcome, choice.delta.content)
    finally:
        await answer.aclose()


def add_call(outcome: Outcome, call: Any) -> None:
    """Its deltas may be pieces of the same call."""
    if call.function.name:
        outcome.calls.append([call.function.name, ""])
    outcome.calls[-1][1] += call.function.arguments or ""


asyncio.run(serve_async(ask))
