"""The fault log, the guard and the callbacks, as a user sees them."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import pickle
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator

import mlx.core as mx
import pytest

import mlx_safe
from mlx_safe import testing
from support import child
from support.programs import program
from support.server import eventually


def test_a_fault_is_counted_and_described() -> None:
    before = mlx_safe.epoch()
    testing.record_fault(0xE)
    assert mlx_safe.epoch() == before + 1
    (fault,) = mlx_safe.faults(since=before)
    assert fault.number == before + 1
    assert fault.code == 0xE
    assert fault.name == "kIOGPUCommandBufferCallbackErrorImpactingInteractivity"
    assert fault.retryable
    assert not fault.fatal
    assert fault.source == "injected"
    assert abs(fault.time - time.time()) < 60
    assert pickle.loads(pickle.dumps(fault)).message == fault.message
    with pytest.raises(AttributeError, match="immutable"):
        fault.code = 1


def test_check_raises_the_worst_and_tells_all() -> None:
    since = mlx_safe.epoch()
    mlx_safe.check(since)
    for code in (8, 4, 2):
        testing.record_fault(code)
    with pytest.raises(mlx_safe.errors.MetalDeviceLostError) as caught:
        mlx_safe.check(since)
    assert [f.code for f in caught.value.faults] == [8, 4, 2]
    assert caught.value.fatal
    mlx_safe.check(mlx_safe.epoch())


def test_messages_that_are_too_long_are_cut_between_characters() -> None:
    since = mlx_safe.epoch()
    testing.record_fault(8, "ü" * 1000)
    (fault,) = mlx_safe.faults(since)
    assert set(fault.message) == {"ü"}
    assert len(fault.message) == 179


def test_overflow_keeps_the_newest_and_counts_all() -> None:
    since = mlx_safe.epoch()
    for i in range(300):
        testing.record_fault(8, f"fault {i}")
    found = mlx_safe.faults(since)
    assert len(found) == 256
    assert found[-1].message == "fault 299"
    assert mlx_safe.epoch() == since + 300
    with pytest.raises(mlx_safe.errors.MetalOutOfMemoryError):
        mlx_safe.check(since)


def test_many_writers_lose_nothing() -> None:
    since = mlx_safe.epoch()
    threads = [
        threading.Thread(target=lambda: [testing.record_fault(8) for _ in range(25)])
        for _ in range(8)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    found = mlx_safe.faults(since)
    assert [f.number for f in found] == list(range(since + 1, since + 201))
    assert mlx_safe.status().dropped == 0


class TestGuard:
    def test_nothing_happens_without_a_fault(self) -> None:
        with mlx_safe.guard():
            pass

    def test_a_swallowed_fault_is_raised(self) -> None:
        with pytest.raises(mlx_safe.errors.MetalTimeoutError), mlx_safe.guard():
            testing.record_fault(2)

    def test_mlxs_own_error_becomes_the_typed_one(self) -> None:
        raised = RuntimeError(testing.metal_message(8))
        with (
            pytest.raises(mlx_safe.errors.MetalOutOfMemoryError) as caught,
            mlx_safe.guard(),
        ):
            testing.record_fault(8)
            raise raised
        assert caught.value.__cause__ is raised
        assert [f.code for f in caught.value.faults] == [8]

    def test_a_fatal_fault_is_not_hidden_by_a_milder_error(self) -> None:
        with pytest.raises(mlx_safe.errors.MetalDeviceLostError), mlx_safe.guard():
            testing.record_fault(4)
            raise RuntimeError(testing.metal_message(8))

    @pytest.mark.parametrize("raises", [False, True])
    def test_what_it_has_told_is_not_raised_again(
        self, raises: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """MLX 0.32 stores an error for each stream, and a later wait raises it."""
        stored = [RuntimeError(testing.metal_message(8)) for _ in range(3)]

        def synchronize() -> None:
            if stored:
                raise stored.pop()

        monkeypatch.setattr(mx, "synchronize", synchronize)
        with pytest.raises(mlx_safe.errors.MetalOutOfMemoryError), mlx_safe.guard():
            testing.record_fault(8)
            if raises:
                raise RuntimeError(testing.metal_message(8))
        assert bool(stored) == (mlx_safe.status().mode == "intercept")

    def test_an_error_of_something_else_is_not_swallowed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stored = [RuntimeError("of something else")]

        def synchronize() -> None:
            if stored:
                raise stored.pop()

        monkeypatch.setattr(mx, "synchronize", synchronize)
        with (
            pytest.raises(mlx_safe.errors.MetalOutOfMemoryError) as caught,
            mlx_safe.guard(),
        ):
            testing.record_fault(8)
            raise RuntimeError(testing.metal_message(8))
        notes = getattr(caught.value, "__notes__", [])
        observes = mlx_safe.status().mode == "observe"
        assert any("of something else" in note for note in notes) == observes

    def test_other_exceptions_pass(self) -> None:
        with pytest.raises(ZeroDivisionError), mlx_safe.guard():
            testing.record_fault(8)
            raise ZeroDivisionError

    def test_an_earlier_fault_does_not_count(self) -> None:
        testing.record_fault(8)
        with mlx_safe.guard():
            pass

    def test_one_object_cannot_be_entered_twice_at_once(self) -> None:
        guard = mlx_safe.guard()
        with guard, pytest.raises(RuntimeError, match="entered already"), guard:
            pass
        with guard:
            pass

    def test_as_a_decorator(self) -> None:
        @mlx_safe.guard()
        def step(code: int) -> int:
            """Doc."""
            if code:
                testing.record_fault(code)
            return 7

        assert step(0) == 7
        assert step.__doc__ == "Doc."
        with pytest.raises(mlx_safe.errors.MetalHangError):
            step(3)

    def test_generators(self) -> None:
        @mlx_safe.guard()
        def tokens() -> Iterator[int]:
            yield 1
            testing.record_fault(8)
            yield 2

        seen: list[int] = []
        with pytest.raises(mlx_safe.errors.MetalOutOfMemoryError):
            seen += iter(tokens())
        assert list(seen) in ([], [1, 2])

    def test_a_generator_that_is_left_early(self) -> None:
        @mlx_safe.guard()
        def tokens() -> Generator[int, None, None]:
            while True:
                yield 1

        left = tokens()
        next(left)
        testing.record_fault(8)
        with pytest.raises(mlx_safe.errors.MetalOutOfMemoryError):
            left.close()
        left = tokens()
        next(left)
        left.close()

    def test_async_code(self) -> None:
        @mlx_safe.guard()
        async def step(code: int) -> int:
            await asyncio.sleep(0)
            if code:
                testing.record_fault(code)
            return 7

        @mlx_safe.guard()
        async def stream() -> AsyncIterator[int]:
            yield 1
            testing.record_fault(8)

        async def main() -> None:
            assert await step(0) == 7
            with pytest.raises(mlx_safe.errors.MetalOutOfMemoryError):
                await step(8)
            with pytest.raises(mlx_safe.errors.MetalOutOfMemoryError):
                async with mlx_safe.guard():
                    testing.record_fault(8)
            with pytest.raises(mlx_safe.errors.MetalOutOfMemoryError):
                async for _ in stream():
                    pass

        asyncio.run(main())

    @pytest.mark.parametrize("code", [0, 8])
    def test_asynchronous_generators_are_passed_on_whole(self, code: int) -> None:
        """What is sent and thrown into them, and their end when they are left."""
        seen: list[object] = []

        @mlx_safe.guard()
        async def echo() -> AsyncGenerator[object, object]:
            got: object = "first"
            try:
                while got != "stop":
                    try:
                        got = yield got
                    except KeyError as e:
                        got = repr(e)
            finally:
                await asyncio.sleep(0)
                seen.append("ended")
                if code:
                    testing.record_fault(code)

        async def main() -> None:
            assert inspect.isasyncgenfunction(echo)
            talk = echo()
            assert await talk.__anext__() == "first"
            assert await talk.asend("second") == "second"
            assert await talk.athrow(KeyError("third")) == "KeyError('third')"
            raised = mlx_safe.errors.MetalOutOfMemoryError
            with pytest.raises(raised) if code else contextlib.nullcontext():
                await talk.aclose()
            assert seen == ["ended"]
            talk = echo()
            await talk.__anext__()
            with pytest.raises(raised if code else StopAsyncIteration):
                await talk.asend("stop")

        asyncio.run(main())


class TestCallbacks:
    def test_not_told_of_faults_before(self) -> None:
        """Although another callback is still at them."""
        go_on = threading.Event()
        seen: list[int] = []
        with mlx_safe.on_fault(lambda _: go_on.wait(120)):
            testing.record_fault(2)
            testing.record_fault(3)
            with mlx_safe.on_fault(lambda fault: seen.append(fault.code)):
                testing.record_fault(8)
                go_on.set()
                assert eventually(lambda: len(seen) > 0)
        assert seen == [8]

    def test_told_in_order_on_a_thread_of_ours(self) -> None:
        seen: list[tuple[int, str]] = []

        def note(fault: mlx_safe.Fault) -> None:
            seen.append((fault.code, threading.current_thread().name))

        with mlx_safe.on_fault(note):
            for code in (8, 2, 5):
                testing.record_fault(code)
            assert eventually(lambda: len(seen) == 3)
        assert seen == [(code, "mlx-safe-faults") for code in (8, 2, 5)]

    def test_cancelled_ones_hear_no_more(self) -> None:
        seen: list[mlx_safe.Fault] = []
        late: list[mlx_safe.Fault] = []
        subscription = mlx_safe.on_fault(seen.append)
        subscription.cancel()
        subscription.cancel()
        with mlx_safe.on_fault(late.append):
            testing.record_fault(8)
            assert eventually(lambda: len(late) > 0)
        assert seen == []

    def test_a_bad_callback_harms_no_other(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        seen: list[mlx_safe.Fault] = []
        with mlx_safe.on_fault(lambda fault: 1 / 0), mlx_safe.on_fault(seen.append):
            testing.record_fault(8)
            assert eventually(lambda: len(seen) > 0)
        assert "a fault callback failed" in caplog.text

    def test_the_interpreter_may_end_while_a_callback_runs(self) -> None:
        """Python up to 3.13 aborted: it unwound through our native code."""
        done = child.run(program("callback_at_the_end"))
        assert done.returncode == 0, done.stderr

    def test_needs_a_callable(self) -> None:
        with pytest.raises(TypeError, match="callable"):
            mlx_safe.on_fault(3)  # type: ignore[arg-type]

    def test_a_forked_child_has_its_own(self) -> None:
        done = child.run(program("faults_after_a_fork"))
        assert done.returncode == 0, done.stderr


# -- whose a fault is ----------------------------------------------------------------


def test_a_fault_names_the_guards_that_it_may_belong_to() -> None:
    with mlx_safe.guard(name="before"):
        pass
    with (
        pytest.raises(mlx_safe.MetalError) as caught,
        mlx_safe.guard(name="outer"),
        mlx_safe.guard(),
        mlx_safe.guard(name="inner"),
    ):
        testing.record_fault(2)
    with mlx_safe.guard(name="after"):
        pass
    assert caught.value.tasks == ("outer", "inner")
    (fault,) = caught.value.faults
    assert fault.tasks == ("outer", "inner")
    assert mlx_safe.faults(fault.number - 1)[0].tasks == ("outer", "inner")
    assert pickle.loads(pickle.dumps(caught.value)).tasks == ("outer", "inner")


def test_guards_side_by_side_are_all_named() -> None:
    inside = threading.Barrier(2)
    caught: dict[str, tuple[str, ...]] = {}

    def work(name: str) -> None:
        try:
            with mlx_safe.guard(name=name):
                inside.wait(60)
                if name == "one":
                    testing.record_fault(2)
                inside.wait(60)
        except mlx_safe.MetalError as e:
            caught[name] = e.tasks

    threads = [threading.Thread(target=work, args=(n,)) for n in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {name: set(tasks) for name, tasks in caught.items()} == {
        "one": {"one", "two"},
        "two": {"one", "two"},
    }


def test_what_mlx_raises_in_a_task_is_of_that_task() -> None:
    """Nothing was counted: there are no hooks here. The exception says whose it is."""

    async def work(name: str, fails: bool) -> tuple[str, ...]:
        try:
            async with mlx_safe.guard(name=name):
                await asyncio.sleep(0.05)
                if fails:
                    raise RuntimeError(testing.metal_message(8))
        except mlx_safe.MetalError as e:
            return e.tasks
        return ()

    async def both() -> tuple[tuple[str, ...], tuple[str, ...]]:
        return await asyncio.gather(work("one", True), work("two", False))

    assert list(asyncio.run(both())) == [("one",), ()]


def test_a_callback_is_told_whose_it_may_be() -> None:
    told: list[tuple[str, ...]] = []
    with mlx_safe.on_fault(lambda fault: told.append(fault.tasks)):

        @mlx_safe.guard(name="a step")
        def step() -> None:
            testing.record_fault(2)

        with pytest.raises(mlx_safe.MetalError):
            step()
        assert eventually(lambda: bool(told))
    assert told == [("a step",)]


def test_without_a_name_there_is_no_task() -> None:
    with pytest.raises(mlx_safe.MetalError) as caught, mlx_safe.guard():
        testing.record_fault(2)
    assert caught.value.tasks == ()
    with pytest.raises(TypeError, match="name must be a text, not int"):
        mlx_safe.guard(name=7)  # type: ignore[arg-type]
