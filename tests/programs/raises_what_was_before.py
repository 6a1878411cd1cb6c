"""A fatal fault of before anything is served, which each request raises again."""

import asyncio

import mlx_safe
from mlx_safe import asgi, testing
from test_asgi import asked

testing.record_fault(4)


async def raises(scope, receive, send) -> None:
    mlx_safe.check(0)


async def once() -> None:
    print((await asked(asgi.protect(raises), "/")).status, flush=True)
    await asyncio.sleep(60)


asyncio.run(once())
