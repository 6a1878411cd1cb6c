"""What other threads do to the scheduler in the midst of a change: no client notices.

The generation thread ends a request while its client leaves or the server stops. Here
one thread stops at the worst place of its own accord, until the other one is done, or
stands before the scheduler's lock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from mlx_safe.server.request import Request, RequestState
from mlx_safe.server.scheduler import Memory, Scheduler
from support.other_thread import Other


class Asked(Request):
    """A request; ``other`` comes in between a look at its state and what follows."""

    def __init__(self, other: Other) -> None:
        super().__init__()
        self.other = other
        self.answers: list[Any] = []
        self.notes: list[str] = []

    @property
    def state(self) -> RequestState:
        found = super().state
        self.other()
        return found

    def send(self, item: Any) -> None:
        self.answers.append(item)

    def stop_run(self) -> None:
        pass

    def note_end(self, how: str) -> None:
        self.notes.append(how)


class Listed(dict[Asked, None]):
    """What is in flight; ``other`` comes in while it is gone through.

    Python copies a dict's keys in one piece where it has a global lock, and promises
    nothing of the kind.
    """

    def __init__(self, other: Other) -> None:
        super().__init__()
        self.other = other

    def __iter__(self) -> Iterator[Asked]:
        for request in super().__iter__():
            yield request
            self.other()


@pytest.fixture
def other() -> Other:
    return Other()


@pytest.fixture
def scheduler(other: Other) -> Scheduler[Asked]:
    made: Scheduler[Asked] = Scheduler(cast(Memory, None), attempts_max=2, wait_s=20)
    made._lock = cast(Any, other.lock)
    made._in_flight = Listed(other)
    return made


def in_flight(scheduler: Scheduler[Asked], other: Other) -> Asked:
    """One whose answer has been made, but for its end."""
    request = Asked(other)
    scheduler.arrive(request)
    for state in (
        RequestState.WAITING,
        RequestState.PREFILL,
        RequestState.DECODE,
        RequestState.FINISHED,
    ):
        assert scheduler._change(request, state)
    return request


def _fail(scheduler: Scheduler[Asked], request: Asked) -> object:
    return scheduler.fail(request, RuntimeError("the server stops"))


WAYS: dict[str, Callable[[Scheduler[Asked], Asked], object]] = {
    "complete": Scheduler.complete,
    "disconnect": Scheduler.disconnect,
    "fail": _fail,
}


@pytest.mark.parametrize("first", WAYS)
@pytest.mark.parametrize("second", WAYS)
def test_who_is_ended_by_two_threads_at_once_is_answered_once(
    scheduler: Scheduler[Asked], other: Other, first: str, second: str
) -> None:
    request = in_flight(scheduler, other)
    other.what = lambda: WAYS[second](scheduler, request)
    WAYS[first](scheduler, request)
    other.end()
    assert len(request.answers) == len(request.notes) == 1
    assert len(scheduler) == 0


@pytest.mark.parametrize("second", ["arrive", "disconnect"])
def test_requests_come_and_go_while_they_are_listed(
    scheduler: Scheduler[Asked], other: Other, second: str
) -> None:
    here = [in_flight(scheduler, other) for _ in range(3)]
    late = Asked(other)
    other.what = {
        "arrive": lambda: scheduler.arrive(late),
        "disconnect": lambda: scheduler.disconnect(here[1]),
    }[second]
    assert scheduler.requests() == here
    other.end()
    left = [*here, late] if second == "arrive" else [here[0], here[2]]
    assert scheduler.requests() == left


def test_each_client_is_given_an_exception_of_its_own(
    scheduler: Scheduler[Asked], other: Other
) -> None:
    """Its thread raises it: in one that all share the frames of all would pile up."""
    here = [in_flight(scheduler, other) for _ in range(2)]
    scheduler.fail_everyone(RuntimeError("the server stops"))
    (first,), (second,) = (request.answers for request in here)
    with pytest.raises(RuntimeError, match="the server stops"):
        raise first
    assert first.__traceback__ is not None and second.__traceback__ is None
    with pytest.raises(RuntimeError, match="the server stops"):
        raise second
