#!/usr/bin/env bash
# litellm 1.108.7 and pydantic-ai-slim 2.68.0, both over openai 3.57.0 for Python.
#
# An event stream of HTTP/1.0, whose answers end with their connection (RFC 9112, 6.3),
# ends after a few deltas: no `finish_reason`, no `data: [DONE]`.
# Guess before looking: the text so far, with a finish reason of None, as openai itself
# gives it.
# Seen: both say that the model finished: "stop". So a program that checks the finish
# reason, as it should, takes the fragment for a whole answer.
# A server has to make the cut visible below that: a chunked stream that ends without its
# last chunk is an error in both.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  openai==3.57.0 litellm==1.108.7 'pydantic-ai-slim[openai]==2.68.0'
cat > "$folder/look.py" <<'END'
import asyncio
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm
import openai
from pydantic_ai.direct import model_request_stream
from pydantic_ai.messages import ModelRequest
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

PIECES = ["The ", "old ", "man "]


class Handler(BaseHTTPRequestHandler):
    chunked = False

    def log_message(self, *args):
        pass

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.protocol_version = "HTTP/1.1" if self.chunked else "HTTP/1.0"
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        if self.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for text in PIECES:
            delta = {"index": 0, "delta": {"content": text}, "finish_reason": None}
            event = {"id": "1", "object": "chat.completion.chunk", "created": 1}
            line = json.dumps({**event, "model": "m", "choices": [delta]})
            data = f"data: {line}\n\n".encode()
            if self.chunked:
                data = b"%x\r\n%b\r\n" % (len(data), data)
            self.wfile.write(data)
        self.close_connection = True


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}/v1"
messages = [{"role": "user", "content": "a"}]


async def with_openai():
    client = openai.AsyncOpenAI(base_url=url, api_key="-", max_retries=0)
    stream = await client.chat.completions.create(
        model="m", messages=messages, stream=True
    )
    choices = [x.choices[0] async for x in stream]
    return "".join(c.delta.content for c in choices), choices[-1].finish_reason


async def with_litellm():
    stream = await litellm.acompletion(
        model="openai/m", api_base=url, api_key="-", messages=messages, stream=True
    )
    choices = [x.choices[0] async for x in stream]
    return "".join(c.delta.content or "" for c in choices), choices[-1].finish_reason


async def with_pydantic_ai():
    model = OpenAIChatModel("m", provider=OpenAIProvider(base_url=url, api_key="-"))
    asked = [ModelRequest.user_text_prompt("a")]
    async with model_request_stream(model, asked) as events:
        async for _ in events:
            pass
    response = events.get()
    return response.text, response.finish_reason


async def look(ask):
    try:
        return await ask()
    except Exception as e:
        return type(e).__name__


async def main():
    seen = {}
    for Handler.chunked in (False, True):
        for ask in (with_openai, with_litellm, with_pydantic_ai):
            key = (ask.__name__, "chunked" if Handler.chunked else "HTTP/1.0")
            seen[key] = await look(ask)
            print(*key, seen[key])
    text = "".join(PIECES)
    assert seen["with_openai", "HTTP/1.0"] == (text, None)
    assert seen["with_litellm", "HTTP/1.0"] == (text, "stop")
    assert seen["with_pydantic_ai", "HTTP/1.0"] == (text, "stop")
    assert all(isinstance(v, str) for k, v in seen.items() if k[1] == "chunked")


asyncio.run(main())
END
"$folder/venv/bin/python" "$folder/look.py"
