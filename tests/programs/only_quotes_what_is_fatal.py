"""A client's words, in answers and errors, name a fault that would end the process."""

import asyncio

from mlx_safe import asgi, testing
from test_asgi import asked

LOST = testing.metal_message(4)
RAISED = {
    "/raises": KeyError(f"no template for: {LOST}"),
    "/raises_as_mlx": RuntimeError(f"no template for: {LOST}"),
    "/raises_it": RuntimeError(LOST),
}


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
    for path in [*RAISED, "/plain", "/stream"]:
        answer = await asked(app, path)
        print(answer.status, b"metal_device_lost" in answer.body)
    await asyncio.sleep(1.0)
    print((await asked(app, "/health")).status)


asyncio.run(all_of_them())
