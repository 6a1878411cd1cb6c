#!/usr/bin/env bash
# openai 3.57.0 for Python (httpx2 2.16.2 under it).
#
# An event stream in HTTP/1.1, chunked, is read to its end, `data: [DONE]`, and so is the
# next one of the same client.
# Guess before looking: both take the same connection, in the synchronous client as in the
# asynchronous one.
# Seen: the asynchronous client reads the body to its end and asks again on the same
# connection. The synchronous one stops at [DONE], even when the last chunk came in the
# same packet. So httpx2 closes the connection: each stream costs a connection.
# Answers without a stream take one connection in both.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  openai==3.57.0 httpx2==2.16.2
cat > "$folder/look.py" <<'END'
import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai

connections = 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self):
        global connections
        connections += 1
        super().setup()

    def log_message(self, *args):
        pass

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind = "delta" if asked.get("stream") else "message"
        choice = {"index": 0, kind: {"role": "assistant", "content": "a"}}
        answer = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
        text = json.dumps({**answer, "choices": [{**choice, "finish_reason": "stop"}]})
        self.send_response(200)
        if not asked.get("stream"):
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())
            return
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        body = f"data: {text}\n\ndata: [DONE]\n\n".encode()
        # The last chunk with the others, in one write.
        self.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
settings = {
    "base_url": f"http://127.0.0.1:{server.server_port}/v1",
    "api_key": "-",
    "max_retries": 0,
}
request = {"model": "m", "messages": [{"role": "user", "content": "a"}]}


def synchronous(stream):
    with openai.OpenAI(**settings) as client:
        for _ in range(3):
            answer = client.chat.completions.create(**request, stream=stream)
            assert not stream or [x.choices[0].delta.content for x in answer] == ["a"]


async def asynchronous(stream):
    async with openai.AsyncOpenAI(**settings) as client:
        for _ in range(3):
            answer = await client.chat.completions.create(**request, stream=stream)
            if stream:
                assert [x.choices[0].delta.content async for x in answer] == ["a"]


seen = {}
for name, ask in {
    "synchronous, streams": lambda: synchronous(True),
    "synchronous, no streams": lambda: synchronous(False),
    "asynchronous, streams": lambda: asyncio.run(asynchronous(True)),
    "asynchronous, no streams": lambda: asyncio.run(asynchronous(False)),
}.items():
    connections = 0
    ask()
    seen[name] = connections
    print(f"{name}: 3 requests, {connections} connections")
assert list(seen.values()) == [3, 1, 1, 1], seen
END
"$folder/venv/bin/python" "$folder/look.py"
