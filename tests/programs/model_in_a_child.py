"""A server that has its model in a child, and talks with it by queues.

As mlx-openai-server does (1.8.1): it looks at the child when the next request comes.
"""

import asyncio
import multiprocessing
import os
import queue
import signal
import sys


def computes(asked, answered) -> None:
    import mlx.core as mx

    from mlx_safe import testing  # to fail; the program needs it not

    parent = multiprocessing.parent_process()
    assert parent is not None
    while parent.is_alive():
        try:
            how = asked.get(timeout=1.0)
        except queue.Empty:
            continue
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "terminate":
            testing.throw_on_foreign_thread()
        elif how == "lost":
            testing.record_fault(4)
        elif how == "asked_to_end":
            os.kill(os.getpid(), signal.SIGTERM)
        elif how == "sum":
            answered.put(mx.array([1, 2]).sum().item())


class Model:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.asked, self.answered = context.Queue(), context.Queue()
        self.process = context.Process(
            target=computes, args=(self.asked, self.answered), daemon=True
        )
        self.process.start()


model = None


async def serves(scope, receive, send) -> None:
    global model
    if scope["type"] != "http":
        return
    if model is None or not model.process.is_alive():
        model = Model()
    how = scope["path"].strip("/")
    is_stream = scope["query_string"] == b"stream"
    kind = b"text/event-stream" if is_stream else b"text/plain"
    start = {"status": 200, "headers": [(b"content-type", kind)]}
    if is_stream:
        await send({"type": "http.response.start", **start})
        part = {"body": b"data: one\n\n", "more_body": True}
        await send({"type": "http.response.body", **part})
    if how != "waits":
        model.asked.put(how)
    loop = asyncio.get_running_loop()
    answer = await loop.run_in_executor(None, model.answered.get)
    await send({"type": "http.response.start", **start})
    await send({"type": "http.response.body", "body": str(answer).encode()})


if __name__ == "__main__":
    import uvicorn

    config = uvicorn.Config(
        serves,
        port=int(sys.argv[1]),
        lifespan="off",
        timeout_graceful_shutdown=1,
    )
    uvicorn.Server(config).run()
    if model is not None:
        model.process.kill()
    os._exit(0)
