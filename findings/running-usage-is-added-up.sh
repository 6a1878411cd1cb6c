#!/usr/bin/env bash
# Clients add up the usage of all chunks of a stream.
#
# Packages: langchain-openai 1.7.4, pydantic-ai-slim 2.68.0, smolagents 1.26.0 and litellm
# 1.108.7, all with openai 3.57.0 for Python.
# A server may tell with each chunk how many tokens there are so far, as vLLM does with
# "continuous_usage_stats". Here three chunks say 5+1, 5+2 and 5+3.
# Guess before: each number replaces the one before: 5 tokens read, 3 written.
# Seen: langchain-openai, pydantic-ai and smolagents say 15 and 6. The prompt is counted
# once for each chunk. litellm says 5 and 3. pydantic-ai has a setting for such servers,
# openai_continuous_usage_stats, with which it says 5 and 3.
# So a server sends one usage, with the last chunk or behind it; then all say 5 and 3.
set -euo pipefail

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check 'openai==3.57.0' \
  'langchain-openai==1.7.4' 'pydantic-ai-slim[openai]==2.68.0' 'smolagents==1.26.0' \
  'litellm==1.108.7'
"$place/venv/bin/python" - <<'PYTHON'
import asyncio
import http.server
import json
import os
import threading

TEXTS = ["y", "es", ""]


def chunk(i, told):
    choice = {
        "index": 0,
        "delta": {"role": "assistant", "content": TEXTS[i]},
        "finish_reason": "stop" if i == 2 else None,
    }
    usage = {"prompt_tokens": 5, "completion_tokens": i + 1, "total_tokens": 6 + i}
    common = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return {**common, "choices": [choice], **({"usage": usage} if told else {})}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        chunks = [chunk(i, body["model"] == "each" or i == 2) for i in range(3)]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for one in chunks:
            self.wfile.write(f"data: {json.dumps(one)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
URL = f"http://127.0.0.1:{server.server_port}/v1"
os.environ.update(OPENAI_API_KEY="-", OPENAI_BASE_URL=URL)
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm
from langchain_openai import ChatOpenAI
from pydantic_ai.direct import model_request_stream
from pydantic_ai.messages import ModelRequest
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from smolagents import OpenAIModel
from smolagents.models import agglomerate_stream_deltas

litellm.suppress_debug_info = True


def langchain(model):
    whole = None
    for part in ChatOpenAI(model=model, stream_usage=True).stream("hello"):
        whole = part if whole is None else whole + part
    return whole.usage_metadata["input_tokens"], whole.usage_metadata["output_tokens"]


def pydantic_ai(model, **settings):
    async def ask():
        chat = OpenAIChatModel(model, provider=OpenAIProvider(base_url=URL, api_key="-"))
        prompt = [ModelRequest.user_text_prompt("hello")]
        async with model_request_stream(chat, prompt, model_settings=settings) as stream:
            async for _ in stream:
                pass
            return stream.get().usage

    usage = asyncio.run(ask())
    return usage.input_tokens, usage.output_tokens


def smolagents(model):
    messages = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    chat = OpenAIModel(model_id=model, api_base=URL, api_key="-")
    usage = agglomerate_stream_deltas(list(chat.generate_stream(messages))).token_usage
    return usage.input_tokens, usage.output_tokens


def of_litellm(model):
    chunks = litellm.completion(
        model=f"openai/{model}", api_base=URL, api_key="-", stream=True,
        messages=[{"role": "user", "content": "hello"}],
        stream_options={"include_usage": True},
    )
    usage = litellm.stream_chunk_builder(list(chunks)).usage
    return usage.prompt_tokens, usage.completion_tokens


def told_of_it(model):
    return pydantic_ai(model, openai_continuous_usage_stats=True)


SEEN = {
    langchain: (15, 6), pydantic_ai: (15, 6), smolagents: (15, 6),
    told_of_it: (5, 3), of_litellm: (5, 3),
}
for client, seen in SEEN.items():
    found, once = client("each"), client("once")
    print(f"{client.__name__}: usage in each chunk {found}, in the last one {once}")
    assert found == seen
    assert once == (5, 3)
server.shutdown()
PYTHON
echo "as written: usage is added up"
