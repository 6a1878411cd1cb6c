"""pydantic-ai's model for the OpenAI API, as its agents use it, without an agent."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

from protocol import KEY, MODEL, TOOL, Outcome, Task, piece, serve_async
from pydantic_ai.direct import model_request, model_request_stream
from pydantic_ai.messages import (
    ModelRequest,
    PartDeltaEvent,
    PartStartEvent,
    TextPart,
    TextPartDelta,
)
from pydantic_ai.models import ModelRequestParameters
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.tools import ToolDefinition


@functools.cache
def model(base_url: str, retries: bool) -> OpenAIChatModel:
    provider = OpenAIProvider(base_url=base_url, api_key=KEY)
    if not retries:
        provider.client.max_retries = 0
    return OpenAIChatModel(MODEL, provider=provider)


def text_of(event: Any) -> str:
    if isinstance(event, PartStartEvent) and isinstance(event.part, TextPart):
        return str(event.part.content)
    if isinstance(event, PartDeltaEvent) and isinstance(event.delta, TextPartDelta):
        return str(event.delta.content_delta)
    return ""


async def ask(task: Task, outcome: Outcome) -> None:
    settings: dict[str, Any] = {"max_tokens": task.max_tokens}
    if task.logit_bias:
        settings["logit_bias"] = task.logit_bias
    tools = []
    if task.tool:
        tools = [
            ToolDefinition(
                name=TOOL["name"],
                description=TOOL["description"],
                parameters_json_schema=TOOL["parameters"],
            )
        ]
    arguments: dict[str, Any] = {
        "messages": [ModelRequest.user_text_prompt(task.prompt)],
        "model_settings": settings,
        "model_request_parameters": ModelRequestParameters(function_tools=tools),
    }
    if not task.stream:
        response = await model_request(model(task.base_url, task.retries), **arguments)
        piece(task, outcome, response.text)
    else:
        stream = model_request_stream(model(task.base_url, task.retries), **arguments)
        async with stream as events:
            async for event in events:
                piece(task, outcome, text_of(event))
        response = events.get()
    outcome.finish = response.finish_reason
    outcome.calls = [[c.tool_name, c.args_as_json_str()] for c in response.tool_calls]


asyncio.run(serve_async(ask))
