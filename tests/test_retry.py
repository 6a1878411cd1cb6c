"""`retry`, `next_fault`, `require`, and the protocol of the drain."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import mlx.core as mx
import pytest

import mlx_safe
from mlx_safe import errors, testing
from support import child

OUT_OF_MEMORY = testing.metal_message(8)


class Flaky:
    """Fails ``times`` times with ``exc``, then returns 7; counts its calls."""

    def __init__(self, times: int, exc: Exception) -> None:
        self.times = times
        self.exc = exc
        self.calls = 0

    def __call__(self) -> int:
        self.calls += 1
        if self.calls <= self.times:
            raise self.exc
        return 7


@pytest.mark.parametrize(
    "exc", [RuntimeError(OUT_OF_MEMORY), MemoryError(), RuntimeError("[malloc] no")]
)
def test_what_may_pass_is_tried_again(exc: Exception) -> None:
    flaky = Flaky(2, exc)
    assert mlx_safe.retry(flaky) == 7
    assert flaky.calls == 3


def test_the_last_attempt_raises_the_typed_error() -> None:
    flaky = Flaky(9, RuntimeError(OUT_OF_MEMORY))
    with pytest.raises(errors.MetalOutOfMemoryError):
        mlx_safe.retry(flaky, 2)
    assert flaky.calls == 2


@pytest.mark.parametrize(
    "exc", [ValueError("mine"), RuntimeError(testing.metal_message(9))]
)
def test_what_will_not_pass_is_not_tried_again(exc: Exception) -> None:
    flaky = Flaky(1, exc)
    with pytest.raises(type(exc)):
        mlx_safe.retry(flaky)
    assert flaky.calls == 1


def test_a_fault_that_mlx_swallowed_is_tried_again() -> None:
    calls: list[int] = []

    def step() -> int:
        calls.append(1)
        if len(calls) == 1:
            testing.record_fault(8)
        return 7

    assert mlx_safe.retry(step) == 7
    assert len(calls) == 2


def test_before_is_told_and_the_caller_chooses() -> None:
    told: list[tuple[type, int]] = []
    flaky = Flaky(2, RuntimeError(OUT_OF_MEMORY))
    mlx_safe.retry(flaky, before=lambda exc, n: told.append((type(exc), n)))
    assert told == [
        (errors.MetalOutOfMemoryError, 1),
        (errors.MetalOutOfMemoryError, 2),
    ]
    with pytest.raises(errors.MetalOutOfMemoryError):
        mlx_safe.retry(Flaky(1, RuntimeError(OUT_OF_MEMORY)), on=lambda exc: False)


def test_what_a_failed_call_held_is_free_before_the_next() -> None:
    held: list[int] = []

    def step() -> int:
        array = mx.ones((1 << 20,))
        mx.eval(array)
        held.append(mx.get_active_memory())
        if len(held) < 3:
            raise RuntimeError(OUT_OF_MEMORY)
        return array.size

    gc.disable()
    try:
        assert mlx_safe.retry(step) == 1 << 20
    finally:
        gc.enable()
    assert max(held) == min(held)


def test_attempts_must_be_a_number_of_calls() -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        mlx_safe.retry(lambda: 7, 0)


def test_next_fault_waits_and_misses_none() -> None:
    async def watch() -> tuple[Any, Any]:
        waiting = asyncio.create_task(mlx_safe.next_fault())
        await asyncio.sleep(0.05)
        assert not waiting.done()
        testing.record_fault(2)
        testing.record_fault(8)
        first = await asyncio.wait_for(waiting, 20)
        # The second came before anybody asked for it.
        return first, await asyncio.wait_for(mlx_safe.next_fault(first.number), 20)

    first, second = asyncio.run(watch())
    assert (first.code, second.code) == (2, 8)


def test_require_says_what_is_missing() -> None:
    mlx_safe.uninstall()
    try:
        with pytest.raises(RuntimeError, match=r"call mlx_safe\.install"):
            mlx_safe.require()
    finally:
        mlx_safe.install()
    assert mlx_safe.require().installed


def leave(setup: str) -> Any:
    """A child in which an exception reaches std::terminate under "drain"."""
    return child.run(
        f"""
        import time, threading, mlx_safe
        from mlx_safe import testing
        mlx_safe.install(on_terminate="drain", drain_seconds=3000)
        began = time.monotonic()
        {setup}
        testing.throw_on_foreign_thread()
        time.sleep(3000)
        """,
        timeout=120.0,
    )


def test_a_drain_with_nobody_to_answer_holds_no_client() -> None:
    done = leave("mlx_safe.on_fault(print)")
    assert done.returncode == 75
    assert "nobody answered the clients" in done.stderr


def test_a_drain_ends_when_the_callbacks_have_returned() -> None:
    done = leave(
        "mlx_safe.on_fault(lambda f: print('answered', mlx_safe.draining(), "
        "flush=True), drains=True)"
    )
    assert (done.returncode, done.stdout) == (75, "answered True\n"), done.stderr
    assert "an exception reached std::terminate: " in done.stderr
    assert "answering the clients, then leaving with status 75" in done.stderr


def test_drained_ends_it_earlier() -> None:
    done = leave(
        "mlx_safe.on_fault(lambda f: (mlx_safe.drained(), time.sleep(3000)), "
        "drains=True)"
    )
    assert done.returncode == 75


def test_who_has_cancelled_is_not_waited_for() -> None:
    done = leave("mlx_safe.on_fault(lambda f: time.sleep(3000), drains=True).cancel()")
    assert done.returncode == 75


def test_drained_does_nothing_in_a_sound_process() -> None:
    mlx_safe.drained()
    assert not mlx_safe.draining()


@pytest.mark.parametrize(
    ("exc", "status", "code", "after"),
    [
        (RuntimeError(OUT_OF_MEMORY), 503, "metal_out_of_memory", "5"),
        (RuntimeError(testing.metal_message(2)), 503, "metal_timeout", "5"),
        (
            RuntimeError(testing.metal_message(9)),
            500,
            "internal_generation_error",
            None,
        ),
        (MemoryError(), 503, "insufficient_memory", "5"),
    ],
)
def test_reply_for(exc: Exception, status: int, code: str, after: str | None) -> None:
    reply = errors.reply_for(exc)
    assert reply is not None
    assert (reply.status, reply.code) == (status, code)
    assert reply.headers().get("Retry-After") == after
    assert reply.openai()["error"]["message"] == reply.message
    kind = "overloaded_error" if status == 503 else "api_error"
    assert reply.anthropic() == {
        "type": "error",
        "error": {"type": kind, "message": reply.message},
    }
    assert "kIOGPU" not in reply.message or code != "metal_out_of_memory"


def test_reply_for_knows_no_other_exception() -> None:
    assert errors.reply_for(ValueError("mine")) is None


def a_generator() -> Any:
    yield 7


async def a_coroutine() -> int:
    return 7


@pytest.mark.parametrize("function", [a_generator, a_coroutine])
def test_what_has_not_run_yet_is_not_taken_for_done(function: Any) -> None:
    """A fault of it would be raised outside, and nothing tried again."""
    with pytest.raises(TypeError, match="nothing of it has run"):
        mlx_safe.retry(function)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"function": 7}, "needs a function that takes nothing, not int"),
        ({"attempts": "3"}, "attempts must be a whole number of calls, not str"),
        ({"attempts": True}, "attempts must be a whole number of calls, not bool"),
        ({"attempts": 2.5}, "attempts must be a whole number of calls, not float"),
        ({"on": errors.OutOfMemoryError}, "on must be a function that says whether"),
        ({"on": (ValueError,)}, "on must be a function that says whether"),
        ({"on": None}, "on must be a function that says whether"),
        ({"before": 3}, "before must be a function or None, not 3"),
    ],
)
def test_an_argument_that_is_wrong_is_told_before_anything_runs(
    wrong: dict[str, Any], said: str
) -> None:
    flaky = Flaky(1, RuntimeError(OUT_OF_MEMORY))
    with pytest.raises(TypeError, match=said):
        mlx_safe.retry(**{"function": flaky, **wrong})
    assert flaky.calls == 0


def test_next_fault_of_several_tasks_is_told_to_each_that_waits() -> None:
    async def watch() -> Any:
        waiting = [asyncio.create_task(mlx_safe.next_fault()) for _ in range(3)]
        await asyncio.sleep(0.05)
        waiting[0].cancel()
        await asyncio.gather(waiting[0], return_exceptions=True)
        testing.record_fault(2)
        with pytest.raises(TypeError, match="since must be an epoch or None, not str"):
            await mlx_safe.next_fault("1")  # type: ignore[arg-type]
        return await asyncio.wait_for(asyncio.gather(*waiting[1:]), 20)

    first, second = asyncio.run(watch())
    assert first.number == second.number
