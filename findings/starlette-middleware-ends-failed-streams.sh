#!/usr/bin/env bash
# starlette 1.10.0, uvicorn 0.54.0: a stream that fails looks whole behind a middleware.
#
# A streaming response whose generator raises after two pieces. Without a middleware
# uvicorn cuts the connection: the chunked body has no last chunk, and Python's
# http.client says IncompleteRead. With any BaseHTTPMiddleware, one that does nothing, the
# body gets its last chunk first and the exception is raised after it. The client has a
# whole answer of 200, with the end missing.
#
# Guess beforehand: the connection is cut in both, as the exception reaches the server in
# both. For a server of language models it is a truncated answer that nobody notices.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check starlette==1.10.0 uvicorn==0.54.0
cat > "$work/seen.py" << 'PY'
import http.client
import socket
import threading
import time

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import StreamingResponse
from starlette.routing import Route


async def answer(request):
    async def parts():
        yield "data: one\n\n"
        yield "data: two\n\n"
        raise RuntimeError("the model failed")

    return StreamingResponse(parts(), media_type="text/event-stream")


async def passes(request, call_next):
    return await call_next(request)


def seen(middleware):
    app = Starlette(routes=[Route("/", answer)], middleware=middleware)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.02)
    connection = http.client.HTTPConnection(*listener.getsockname(), timeout=30)
    connection.request("GET", "/")
    response = connection.getresponse()
    try:
        found = f"{response.status}, whole: {response.read()!r}"
    except http.client.IncompleteRead as e:
        found = f"{response.status}, cut after: {e.partial!r}"
    connection.close()
    server.should_exit = True
    thread.join(30)
    return found


print("without:", seen([]))
print("with:   ", seen([Middleware(BaseHTTPMiddleware, passes)]))
PY
"$work/venv/bin/python" "$work/seen.py" | tee "$work/out"
grep -q '^without: 200, cut after: ' "$work/out"
grep -q '^with:    200, whole: ' "$work/out"
