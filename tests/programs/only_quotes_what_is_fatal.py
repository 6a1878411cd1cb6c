"""A client's words, in answers and errors, name a fault that would end the process."""

import asyncio
import os

from mlx_safe import _core, asgi, testing
from test_asgi import asked

LOST = testing.metal_message(4)
RAISED = {
    "/raises": KeyError(f"no template for: {LOST}"),
    "/raises_as_mlx": RuntimeError(f"no template for: {LOST}"),
    # Word for word: whether it was counted tells.
    "/raises_it": RuntimeError(LOST),
}

if os.environ.get("HOOKS"):
    _status = _core.metal_status()
    _core.metal_status = lambda: {**_status, "active": True}


async def quotes(scope, receive, send) -> None:
    if scope["path"] in RAISED:
        raise RAISED[scope["path"]]
    is_stream = scope["path"] == "/stream"
    kind = b"text/event-stream" if is_stream else b"text/plain"
    start = {"status": 200 if is_stream else 500, "headers": [(b"content-type", kind)]}
    body = f'data: {{"error": "{LOST}"}}\n\n'.encode()
    await send({"type": "http.response.start", **start})
    await send({"type": "http.response.body", "body": body})


async def all_of_them() -> None:
    app = asgi.protect(quotes, health="/health")
    paths = ["/raises", "/raises_as_mlx", "/plain", "/stream"]
    for path in [*paths, "/raises_it"] if os.environ.get("HOOKS") else paths:
        answer = await asked(app, path)
        print(answer.status, b"metal_device_lost" in answer.body)
    await asyncio.sleep(1.0)
    print((await asked(app, "/health")).status)


asyncio.run(all_of_them())
