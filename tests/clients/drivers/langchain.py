"""langchain-openai, asynchronous, with its defaults."""

from __future__ import annotations

import asyncio
import functools
import json
from typing import Any

from langchain_openai import ChatOpenAI
from protocol import KEY, MODEL, TOOL, Outcome, Task, piece, serve_async


@functools.cache
def client(
    base_url: str, max_tokens: int, logit_bias: str, retries: bool
) -> ChatOpenAI:
    more: dict[str, Any] = {} if retries else {"max_retries": 0}
    if logit_bias != "{}":
        more["logit_bias"] = json.loads(logit_bias)
    return ChatOpenAI(
        model=MODEL, base_url=base_url, api_key=KEY, max_tokens=max_tokens, **more
    )


async def ask(task: Task, outcome: Outcome) -> None:
    model: Any = client(
        task.base_url, task.max_tokens, json.dumps(task.logit_bias), task.retries
    )
    if task.tool:
        model = model.bind_tools([{"type": "function", "function": TOOL}])
    if not task.stream:
        answer = await model.ainvoke(task.prompt)
        outcome.finish = answer.response_metadata.get("finish_reason")
        piece(task, outcome, answer.content)
        return
    whole: Any = None
    parts = model.astream(task.prompt)
    try:
        async for part in parts:
            whole = part if whole is None else whole + part
            piece(task, outcome, part.content)
    finally:
        await parts.aclose()
    outcome.finish = whole.response_metadata.get("finish_reason")
    calls = [[c["name"], json.dumps(c["args"])] for c in whole.tool_calls]
    outcome.calls = calls


asyncio.run(serve_async(ask))
