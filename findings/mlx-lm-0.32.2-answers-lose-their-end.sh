#!/usr/bin/env bash
# mlx-lm 0.32.2, mlx_lm.server: an answer that ends with what may be the beginning of a
# marker loses it. With a model that calls tools between <tool_call> and </tool_call> the
# answer "a <" arrives as "a ", streamed or not, and finish_reason is "stop".
#
# Why: `TextStateMachine` holds back text that may be a part of a marker, and the server
# calls its `discard` when the finish reason is "stop". That is meant for a stop word,
# the beginning of which is held back, but the model's own end has the same reason. When
# max_tokens ends the answer it calls `flush`, and the text arrives.
#
# Guessed before looking: the end-of-sequence token ends the answer, and what was held
# back is no marker then, so it is sent.
#
# Seen: stop: 'a ', length: 'a <'
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
mlx='mlx[cpu]==0.32.4'
[[ $(uname) == Darwin ]] && mlx='mlx==0.32.4'
"$place/venv/bin/pip" install --quiet --disable-pip-version-check "$mlx" 'mlx-lm==0.32.2'
"$place/venv/bin/python" - <<'PYTHON'
import http.server
import json
import os
import threading
import urllib.request
from types import SimpleNamespace

from mlx_lm.generate import make_text_state_machine
from mlx_lm.server import APIHandler, GenerationContext, Response

# What the server asks of a tokenizer to find calls of tools.
tokenizer = SimpleNamespace(
    has_thinking=False,
    has_tool_calling=True,
    tool_call_start="<tool_call>",
    tool_call_end="</tool_call>",
    response_transitions={},
    structural_markers=(),
)


class Model:
    """Says "a <" and ends; stands in for the thread that generates."""

    cli_args = SimpleNamespace(
        **{"allowed_origins": "*", "max_tokens": 9, "num_draft_tokens": 3},
        **{"temp": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0},
    )
    finish = "stop"

    def generate(self, request, args, progress_callback=None):
        context = GenerationContext(
            **{"has_tool_calling": True, "has_thinking": False, "tool_parser": None},
            **{"text_sm": make_text_state_machine(tokenizer), "prompt": [1]},
            initial_state="normal",
        )
        said = [("a ", None), ("<", None), ("", "stop")]
        if self.finish == "length":
            said = [("a ", None), ("<", "length")]
        return context, (Response(text, 1, 0.0, end, ()) for text, end in said)


model = Model()
server = http.server.ThreadingHTTPServer(
    ("127.0.0.1", 0), lambda *args: APIHandler(model, *args, system_fingerprint="x")
)
threading.Thread(target=server.serve_forever, daemon=True).start()
found = {}
for model.finish in ("stop", "length"):
    body = json.dumps({"messages": [{"role": "user", "content": "hello"}]}).encode()
    url = f"http://127.0.0.1:{server.server_port}/v1/chat/completions"
    with urllib.request.urlopen(url, body) as answer:
        message = json.load(answer)["choices"][0]["message"]
    found[model.finish] = message["content"]
print(", ".join(f"{k}: {v!r}" for k, v in found.items()), flush=True)
os._exit(0 if found == {"stop": "a ", "length": "a <"} else 1)
PYTHON
