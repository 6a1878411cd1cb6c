#!/usr/bin/env bash
# uvicorn 0.54.0, websockets 17.4: each websocket that is refused with an HTTP answer is an
# error in the log.
#
# The application refuses a websocket with websocket.http.response.start and .body, as
# ASGI's extension has it (Starlette's send_denial_response, and any HTTPException before
# accept). The client gets the 503 with its body. Then uvicorn logs "ASGI callable
# returned without completing handshake.", though it has nothing more to send.
#
# Guess beforehand: one line of access log with the status, and no error.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check uvicorn==0.54.0 websockets==17.4
cat > "$work/seen.py" << 'PY'
import logging
import socket
import sys
import threading
import time

import uvicorn
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

errors = []


class Keeps(logging.Handler):
    def emit(self, record):
        errors.append(record.getMessage())


async def app(scope, receive, send):
    await receive()
    start = {"status": 503, "headers": [(b"retry-after", b"5")]}
    await send({"type": "websocket.http.response.start", **start})
    await send({"type": "websocket.http.response.body", "body": b"later"})


logging.getLogger("uvicorn.error").addHandler(Keeps(logging.ERROR))
listener = socket.create_server(("127.0.0.1", 0))
server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None))
thread = threading.Thread(target=server.run, args=([listener],))
thread.start()
try:
    try:
        with connect(f"ws://127.0.0.1:{listener.getsockname()[1]}/", open_timeout=30):
            answer = "accepted"
    except InvalidStatus as e:
        answer = f"{e.response.status_code} {e.response.body.decode()}"
    time.sleep(0.5)
finally:
    server.should_exit = True
    thread.join(30)
print("the client:", answer)
print("the log:", errors)
sys.exit(
    (answer, errors)
    != ("503 later", ["ASGI callable returned without completing handshake."])
)
PY
"$work/venv/bin/python" "$work/seen.py"
