"""What protection costs a server of others while nothing fails.

``python bench/foreign_cost.py``. The batch step: mlx-lm's `BatchGenerator` with a tiny
model, protected and not in turns, in processor time of all threads. Beside the ratio is
the interval in which 95 % of resampled pairs lie. What a busy machine does not change:
the bytecodes and the calls of C functions of a step, and what is ours of its time.
ASGI: one request, and one event of a stream, of an application that does nothing else,
with and without `protect`.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from spread import interval

ROUNDS = 60
STEPS = 60
ROWS = 4


def batch() -> None:
    from mlx_lm import load
    from mlx_lm.generate import BatchGenerator

    import mlx_safe.mlx_lm
    from support.tiny_model import make

    with tempfile.TemporaryDirectory() as directory:
        model = load(str(make(Path(directory))))[0]

    def begun(protected: bool) -> Any:
        """A generator that has read the prompts of ``ROWS`` answers."""
        if protected:
            mlx_safe.mlx_lm.protect()
        generator = BatchGenerator(model)
        generator.insert([[5, 9, 100, 7 + i] for i in range(ROWS)], [STEPS + 9] * ROWS)
        while not generator.next()[1]:
            pass
        return generator

    def steps(protected: bool) -> float:
        """Seconds of processor time for one step."""
        generator = begun(protected)
        began = time.process_time()
        for _ in range(STEPS):
            generator.next()
        took = time.process_time() - began
        mlx_safe.mlx_lm.unprotect()
        return took / STEPS

    pairs = []
    for i in range(ROUNDS):
        order = (True, False) if i % 2 else (False, True)
        found = {protected: steps(protected) for protected in order}
        pairs.append((found[True], found[False]))
    ratio, low, high = interval([a / b for a, b in pairs[4:]])
    plain = statistics.median(b for _, b in pairs)
    print(
        f"batch step of {ROWS}: {plain * 1e6:.0f} us of processor time, protected x "
        f"{ratio:.4f} ({low:.4f} to {high:.4f})"
    )
    for protected in (False, True):
        codes, calls = counted(begun(protected))
        mlx_safe.mlx_lm.unprotect()
        name = "protected" if protected else "plain"
        print(f"  {name}: {codes:.0f} bytecodes, {calls:.0f} calls of C functions")
    own(plain)


def counted(generator: Any) -> tuple[float, float]:
    """Bytecodes and calls of C functions of one step, in this thread."""
    found: Counter[str] = Counter()

    def trace(frame: Any, event: str, arg: Any) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        found[event] += 1
        return trace

    def profile(frame: Any, event: str, arg: Any) -> None:
        found[event] += event == "c_call"

    sys.settrace(trace)
    sys.setprofile(profile)
    for _ in range(STEPS):
        generator.next()
    sys.setprofile(None)
    sys.settrace(None)
    return found["opcode"] / STEPS, found["c_call"] / STEPS


def own(plain_s: float) -> None:
    """What is ours of a step, without the noise of the rest: mlx-lm's does nothing."""
    from types import SimpleNamespace

    from mlx_safe.mlx_lm import batch as module
    from mlx_safe.mlx_lm.sequences import Kept

    answers = [
        SimpleNamespace(uid=i, token=1, finish_reason=None, prompt_cache=None)
        for i in range(ROWS)
    ]

    class Batch:
        def filter(self, keep: list[int]) -> None:
            pass

    class Nothing:
        _unprocessed_sequences: tuple[Any, ...] = ()
        _generation_batch = Batch()

        def _next(self) -> Any:
            return [], answers

    plan: Any = SimpleNamespace(plain={"_next": Nothing._next}, attempts=2)
    nothing = Nothing()
    replay = module._Replay(plan, nothing)
    for i in range(ROWS):
        entry: tuple[Any, ...] = (i, [[1]], 9, [], [], None, (), None)
        replay.kept[i] = Kept(entry)
    best = min(_timed(replay.step, 20_000) for _ in range(7))
    print(
        f"  ours of it: {best * 1e6:.2f} us, {100 * best / plain_s:.2f} % of the step"
    )


def _timed(call: Any, times: int) -> float:
    began = time.thread_time()
    for _ in range(times):
        call()
    return (time.thread_time() - began) / times


EVENTS = 200


async def app(scope: Any, receive: Any, send: Any) -> None:
    events = EVENTS if scope["path"] == "/stream" else 1
    kind = b"text/event-stream" if events > 1 else b"application/json"
    await send(
        {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-type", kind)],
        }
    )
    for _ in range(events):
        body = {"type": "http.response.body", "body": b"data: x\n\n", "more_body": True}
        await send(body)
    end = b"data: [DONE]\n\n"
    await send({"type": "http.response.body", "body": end})


def asgi() -> None:
    from mlx_safe import asgi as ours

    async def nothing(*_: Any) -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def asked(application: Any, path: str, times: int) -> float:
        began = time.thread_time()
        for _ in range(times):
            scope = {"type": "http", "path": path, "method": "GET", "headers": []}
            await application(scope, nothing, nothing)
        return (time.thread_time() - began) / times

    async def both() -> None:
        protected = ours.protect(app)
        found: dict[tuple[str, bool], list[float]] = {}
        for _ in range(9):
            for path, times in (("/", 500), ("/stream", 20)):
                for on in (False, True):
                    took = await asked(protected if on else app, path, times)
                    found.setdefault((path, on), []).append(took)
        request = min(found["/", True]) - min(found["/", False])
        stream = min(found["/stream", True]) - min(found["/stream", False])
        print(f"asgi.protect: {request * 1e6:.1f} us a request")
        print(f"  {(stream - request) / EVENTS * 1e6:.2f} us an event of a stream")

    asyncio.run(both())


if __name__ == "__main__":
    asgi()
    batch()
