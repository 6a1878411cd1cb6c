"""An application that is served no more, and then a fault."""

import asyncio
import time

import mlx_safe
from mlx_safe import asgi, testing
from support import asgi_app
from test_asgi import asked

app = asgi.protect(asgi_app.make())
asyncio.run(asked(app, "/own"))
told: list[mlx_safe.Fault] = []
mlx_safe.on_fault(told.append)
testing.record_fault(4)
for _ in range(1000):
    if told:
        break
    time.sleep(0.01)
time.sleep(0.5)
print("lives", len(told))
