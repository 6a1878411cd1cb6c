#!/usr/bin/env bash
# openai (Python) 3.57.0, `client.chat.completions.stream(n=2, …)`: the helper puts the
# choices of a stream in the order in which their first deltas come, but looks them up
# by `index`. And the log-probabilities of the first chunk of every choice that is not
# in the very first chunk are added twice.
#
# One would guess: a choice is found by its `index`, whatever comes first, and
# each log-probability is there once, as with the raw chunks.
#
# Seen, with a server that sends two tokens of each choice and then one more ("ab", "e"
# of choice 0, "cd", "f" of choice 1), choice 0 first:
#   0 abe  ['a', 'b', 'e']
#   1 cdf  ['c', 'd', 'c', 'd', 'f']
# and with choice 1 first: the helper raises IndexError.
#
# OpenAI's own API first sends one delta without text for each choice, in order, so
# neither shows there. A server that streams choices has to do the same.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check 'openai==3.57.0'
"$place/venv/bin/python" - <<'PYTHON'
import http.server
import json
import sys
import threading

import openai


def chunk(index, tokens="", finish=None):
    delta = {"role": "assistant"} if len(tokens) == 2 else {}
    entries = [
        {"token": t, "logprob": -0.5, "bytes": [ord(t)], "top_logprobs": []}
        for t in tokens
    ]
    choice = {
        "index": index,
        "delta": {**delta, "content": tokens} if tokens else {},
        "logprobs": {"content": entries} if tokens else None,
        "finish_reason": finish,
    }
    common = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return {**common, "choices": [choice]}


PARTS = {0: ("ab", "e"), 1: ("cd", "f")}


def serve(order):
    chunks = [chunk(i, PARTS[i][0]) for i in order]
    chunks += [chunk(i, PARTS[i][1]) for i in order]
    chunks += [chunk(i, finish="stop") for i in order]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
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
    return server


def ask(order):
    server = serve(order)
    client = openai.OpenAI(
        base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="-"
    )
    messages = [{"role": "user", "content": "hello"}]
    try:
        with client.chat.completions.stream(
            model="m", messages=messages, n=2, logprobs=True
        ) as stream:
            stream.until_done()
            choices = stream.current_completion_snapshot.choices
        found = [
            (c.index, c.message.content, [e.token for e in c.logprobs.content])
            for c in choices
        ]
    except Exception as e:
        found = [type(e).__name__]
    server.shutdown()
    print(order, found, flush=True)
    return found


in_order, other = ask([0, 1]), ask([1, 0])
twice = in_order == [(0, "abe", ["a", "b", "e"]), (1, "cdf", list("cdcdf"))]
sys.exit(0 if twice and other == ["IndexError"] else 1)
PYTHON
