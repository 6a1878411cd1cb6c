"""What is told of a failure, each thing once: in the log, in a report, in a metric."""

from __future__ import annotations

import logging
from typing import Any, cast
from unittest.mock import Mock

import pytest

from mlx_safe import _reports
from mlx_safe.server.in_flight import InFlight
from mlx_safe.server.recovery import Recovery
from mlx_safe.server.replies import Unavailable
from mlx_safe.server.request import Request, RequestState
from mlx_safe.server.scheduler import Memory, Scheduler
from support.other_thread import Other


class Asked(Request):
    """As much of an `InFlight` as a recovery needs."""

    def __init__(self, name: str, scheduler: Scheduler[InFlight]) -> None:
        super().__init__()
        self.id = name
        self.scheduler = scheduler
        self.context = self.prompt_key = None
        self.answers: list[Any] = []

    def fail(self, exc: Exception) -> bool:
        return self.scheduler.fail(cast(Any, self), exc)

    def send(self, item: Any) -> None:
        self.answers.append(item)

    def stop_run(self) -> None:
        pass


class Some:
    """A server's recovery, its scheduler, and two requests that run."""

    def __init__(self) -> None:
        self.scheduler: Scheduler[InFlight] = Scheduler(
            cast(Memory, None), attempts_max=2, wait_s=20
        )
        self.health, self.metrics = Mock(), Mock()
        self.recovery = Recovery(
            self.scheduler,
            self.health,
            Mock(),
            Mock(disk=None),
            self.metrics,
            one_rank=True,
        )
        self.requests = [Asked(name, self.scheduler) for name in ("first", "second")]
        for request in self.requests:
            self.scheduler.arrive(cast(Any, request))
            self.run(request)

    def run(self, request: Asked) -> None:
        for state in (RequestState.WAITING, RequestState.PREFILL):
            assert self.scheduler._change(cast(Any, request), state)


def lines(caplog: pytest.LogCaptureFixture, text: str) -> list[dict[str, Any]]:
    """The fields of each line that begins so."""
    found = [r for r in caplog.records if r.getMessage().startswith(text)]
    return [vars(record)["mlx_safe_fields"] for record in found]


def test_what_several_threads_notice_is_told_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nobody is answered before it is: a client's retry meets the next server."""
    some, other = Some(), Other()
    why = Unavailable("The server restarts.", restarts=True)
    reports: list[str] = []

    def write(kind: str, text: str, code: object) -> None:
        reports.append(text)
        other()
        assert [request.answers for request in some.requests] == [[], []]

    monkeypatch.setattr(_reports, "write", write)
    other.what = lambda: some.recovery.give_up(why)
    some.recovery._leaving = cast(Any, other.lock)
    some.recovery.give_up(why)
    other.end()
    assert reports == ["The server restarts."]
    told = lines(caplog, "the process must be replaced")
    assert told == [{"ended": ["first", "second"]}]
    assert all(len(request.answers) == 1 for request in some.requests)


def test_who_still_waits_after_a_failure_has_no_part_in_the_next(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.ERROR)
    some = Some()
    first, second = some.requests
    some.recovery.begin()
    some.recovery.recover(KeyError("a bug"))
    again = some.scheduler.requests(RequestState.REPLAY)
    assert again == cast(Any, some.requests)
    # Of an unknown cause: they run again one by one, and the first one fails again.
    assert some.scheduler.next() is cast(Any, first)
    assert some.scheduler._change(cast(Any, first), RequestState.PREFILL)
    some.recovery.recover(KeyError("a bug"))
    assert first.state is RequestState.FAILED
    assert second.state is RequestState.REPLAY and second.times_replayed == 1
    assert lines(caplog, "a generation step failed") == [
        {"replayed": ["first", "second"]},
        {"ended": ["first"]},
    ]
    counted = [call.args[0] for call in some.metrics.replays.inc.call_args_list]
    assert counted == [2, 0]
