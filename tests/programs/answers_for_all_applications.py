"""Two applications under protection in one process, and a fault that ends it."""

import asyncio
import os

import mlx_safe
from mlx_safe import asgi, testing
from support import asgi_app
from test_asgi import asked

# Each has its own protection, as where they are mounted in an application without.
first, second = (asgi.protect(asgi_app.make()) for _ in range(2))


async def tells(app: object, name: str) -> None:
    answer = await asked(app, "/waits")
    print(name, answer.status, mlx_safe.draining(), flush=True)


async def all_of_them() -> None:
    await asked(first, "/own")  # is called back before the second
    open_ones = [asyncio.ensure_future(tells(second, "second"))]
    while "waits" not in asgi_app.events:
        await asyncio.sleep(0.01)
    if os.environ["HOW"] == "counted":
        testing.record_fault(4)
    else:
        await asked(first, "/loses")
    await asyncio.gather(*open_ones)
    await asyncio.sleep(60)


asyncio.run(all_of_them())
