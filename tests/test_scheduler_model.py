"""The scheduler alone, driven through any order of what can happen to it.

`Loop` stands for mlx-lm: it asks for requests, begins with them, makes steps and
tokens, loses all that it has in a failure. What happens next is chosen by bytes, which
hypothesis draws, so that it finds orders that nobody thought of and makes them short.
Neither MLX nor mlx-lm is imported: thousands of steps a second.
"""

from __future__ import annotations

import ast
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mlx_safe.server
from mlx_safe._failures import SMALLEST
from mlx_safe.memory.budget import Decision, Situation
from mlx_safe.memory.demand import Demand, Row, step_sizes
from mlx_safe.memory.estimate import CacheCost, LayerCost, Transients
from mlx_safe.server import admission
from mlx_safe.server.admission import Ask, Load, SingleStep
from mlx_safe.server.request import (
    BEFORE_PREFILL,
    ENDED,
    RUNNING,
    SUSPECT_FROM,
    TRANSITIONS,
    Disconnected,
    IllegalTransition,
    Request,
    RequestState,
    Run,
    diagram,
)
from mlx_safe.server.scheduler import BEGUN_WAIT_S, Failure, Scheduler

ROOT = Path(__file__).resolve().parent.parent
ATTEMPTS = 2
WAIT_S = 20.0
STEP = 256
BASELINE = 1000
CEILING = 8000
ROOM = 4000  # tokens of a request that there is always room for
# A byte for each token.
DEMAND = Demand(CacheCost(((LayerCost(per_slot=1), 1),)), Transients())


class Client(Request):
    """A request, and what its client has of it."""

    def __init__(
        self, prompt: int, answer: int, alone: bool, seeded: bool, deaths: int = 0
    ) -> None:
        super().__init__()
        self.prompt, self.answer, self.deaths = prompt, answer, deaths
        self.is_single, self.is_seeded = alone, seeded
        self.got: list[int] = []
        self.ends: list[Any] = []
        self.notes: list[str] = []
        self.is_cancelled = False
        self.is_stopped = False
        self.is_worked_on = False
        # Of this run at mlx-lm: tokens to read, tokens in its caches, the next one.
        self.unread = self.length = self.at = 0

    @property
    def is_suspect(self) -> bool:
        return self.deaths >= SUSPECT_FROM

    def send(self, item: Any) -> None:
        assert not self.is_cancelled
        self.ends.append(item)

    def stop_run(self) -> None:
        self.is_stopped = True

    def note_work(self, does: bool) -> None:
        assert not self.is_ended
        self.is_worked_on = does

    def note_end(self, how: str) -> None:
        self.notes.append(how)


class Machine:
    """The memory: what the caches and the prompt cache hold, and a ceiling."""

    step_size = STEP

    def __init__(self) -> None:
        self.ceiling = CEILING
        self.others = 0  # bytes that nobody here can give back
        self.prompt_cache = 0
        self.asked: tuple[Ask, Decision] | None = None
        # What `steps_with_room` has looked at.
        self.granted: tuple[int, int, int] | None = None
        self.at_mlx_lm: list[Client] = []

    @property
    def caches(self) -> int:
        return sum(client.length for client in self.at_mlx_lm)

    def _situation(self) -> Situation:
        return Situation(
            ceiling=self.ceiling,
            later=CEILING,
            active=BASELINE + self.others + self.prompt_cache + self.caches,
            evictable=self.prompt_cache,
            baseline=BASELINE,
            may_wait=False,
        )

    def _steps(self, rows: int) -> list[int]:
        return step_sizes(STEP, rows)

    def _done(self, found: Decision) -> bool:
        if found.verdict == "admit":
            assert found.evict <= self.prompt_cache
            self.prompt_cache -= found.evict
            self.step_size = found.step
        return found.verdict == "admit"

    def admits(self, ask: Ask, load: Load) -> Decision:
        load = replace(load, held=self.caches)
        found = admission.for_request(
            DEMAND, self._situation(), load, ask, self._steps, ROOM
        )
        self.asked = (ask, found)
        if found.verdict == "admit" and load.rows:
            # All of it, to the end: those that run, and this one, in bytes.
            rows = [*load.rows, Row(ask.prompt, ask.total)]
            total = sum(row.total for row in rows)
            assert BASELINE + self.others + total <= self.ceiling
        if found.verdict == "never":
            assert ask.total > ROOM and not ask.begun
        if found.verdict == "refuse":
            assert not (ask.may_wait and ask.ahead)
        if found.verdict == "wait":
            assert ask.may_wait
        assert ask.step_max is None or found.step <= max(ask.step_max, 64)
        return found

    def steps_with_room(self, load: Load) -> int:
        load = replace(load, held=self.caches)
        found = admission.for_step(DEMAND, self._situation(), load, self._steps)
        if not self._done(found):
            return 0
        self.granted = self._surroundings()
        self.check_step(len(load.rows))
        is_reading = any(row.is_reading for row in load.rows)
        return 1 if is_reading else max(found.times, 1)

    def _surroundings(self) -> tuple[int, int, int]:
        return self.others, self.prompt_cache, self.ceiling

    def check_step(self, rows: int) -> None:
        """A step is made: it has its memory, unless something else took it since."""
        if self.granted != self._surroundings():
            return
        active = BASELINE + self.others + self.caches + self.prompt_cache
        assert active + rows <= max(self.ceiling, CEILING)
        assert rows == 1 or active + rows <= self.ceiling

    def single_step(self, load: Load) -> SingleStep:
        assert len(load.rows) == 1 and load.length > 0
        size = self.step_size
        load = replace(load, held=self.caches)
        found = admission.for_single_step(
            DEMAND, self._situation(), load, size, self._steps
        )
        if not self._done(found):
            return "none"
        assert found.step == size or load.rows[0].is_reading
        return "smaller" if found.step < size else "fits"


class Watched(Scheduler[Client]):
    """Notes which transitions there were."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: Counter[tuple[RequestState, RequestState]] = Counter()

    def _change(self, request: Client, state: RequestState) -> bool:
        old, waited_since = request.state, request.waits_since
        changed = super()._change(request, state)
        if changed:
            self.seen[old, state] += 1
            begins_to_wait = old not in BEFORE_PREFILL and state in BEFORE_PREFILL
            since = self._clock() if begins_to_wait else waited_since
            assert request.waits_since == since
        return changed


class Loop:
    """mlx-lm, its clients and its misfortunes; ``choices`` say what happens."""

    def __init__(self, choices: bytes, attempts: int = ATTEMPTS) -> None:
        self.choices = iter(choices)
        self.is_calm = False
        self.now = 1.0
        self.machine = Machine()
        self.care: int | None = None
        self.attempts = attempts
        self.wait_s = 0.0 if self.choose(4) == 1 else WAIT_S
        self.scheduler = Watched(
            self.machine, attempts, self.wait_s, self._be_careful, lambda: self.now
        )
        self.queue: list[Client] = []  # of the server: nobody has looked at them
        self.offered: Client | None = None
        self.batch: list[Client] = []
        self.single: Client | None = None
        self.arrived: list[Client] = []
        self.line: list[Client] = []  # those that were held, in their order
        self.limit: int | None = None  # how many may run at a time
        self.events: Counter[str] = Counter()
        self.steps = 0
        self.states: set[object] = set()

    def _be_careful(self, level: int | None) -> None:
        self.care = level

    def choose(self, n: int) -> int:
        """A number below ``n``; 0 when nothing is chosen any more."""
        return 0 if self.is_calm else next(self.choices, 0) % n

    @property
    def alive(self) -> list[Client]:
        return [c for c in self.arrived if not c.is_ended]

    # -- from outside ------------------------------------------------------------

    def outside(self) -> None:
        """What can happen at any moment, on another thread."""
        what = self.choose(16)
        if what == 1:
            self.leave()
        elif what == 2:
            self.now += (1.0, 7.0, WAIT_S, BEGUN_WAIT_S)[self.choose(4)]
        elif what in (3, 6):
            self.machine.ceiling = CEILING - 2000 * self.choose(4)
            self.machine.others = 1500 * self.choose(6)
        elif what == 4:
            self.come()
        elif what == 5:
            self.end_some()

    def end_some(self) -> None:
        """One request fails by itself, or the server is told to stop."""
        if self.choose(4) == 1:
            self.scheduler.fail_everyone(RuntimeError("the server stops"))
            assert not self.alive
        elif self.alive:
            client = self.alive[self.choose(len(self.alive))]
            assert self.scheduler.fail(client, RuntimeError("its own"))
            assert not self.scheduler.fail(client, RuntimeError("once more"))

    def come(self) -> None:
        prompt = (20, 300, 1500, 3000, 9000)[self.choose(5)]
        answer = (60, 1, 3, 150)[self.choose(4)]
        kind = self.choose(4)
        deaths = (0, SUSPECT_FROM, SUSPECT_FROM - 1)[self.choose(3)]
        self.enter(Client(prompt, answer, kind == 1, kind == 2, deaths))

    def enter(self, client: Client) -> None:
        self.arrived.append(client)
        self.scheduler.arrive(client)
        assert client.came_at == client.waits_since == self.now
        self.queue.append(client)

    def leave(self) -> None:
        if self.alive:
            client = self.alive[self.choose(len(self.alive))]
            if self.choose(2):
                client.is_cancelled = not client.ends
                self.scheduler.cancel(client)
            else:
                self.scheduler.disconnect(client)
            assert client.is_stopped

    # -- mlx-lm's loop -------------------------------------------------------------

    def turn(self) -> None:
        self.steps += 1
        self.outside()
        if self.offered is not None and not self._must_drain(self.offered):
            self.begin(self.offered)
        elif self.offered is None and (self._is_idle() or self.choose(3)):
            self.offered = self.take()
            self.check()
        elif self.choose(12) == 1:
            self.fail(tuple(Failure)[self.choose(len(Failure))])
        elif self.single is not None:
            self.step_alone(self.single)
        elif self.batch:
            self.step()
        self.check()

    def _is_idle(self) -> bool:
        return not self.batch and self.single is None

    def _must_drain(self, client: Client) -> bool:
        return self.single is not None or (client.is_single and bool(self.batch))

    def take(self) -> Client | None:
        # mlx-lm's sequential path asks for no other meanwhile.
        if self.single is not None:
            return None
        held = self.scheduler.held()
        replays = self.scheduler.requests(RequestState.REPLAY)
        running = [c for c in self.machine.at_mlx_lm if not c.is_ended]
        careful = [c for c in held if c.times_replayed]
        client = self.scheduler.next()
        assert self.scheduler.current is None
        if not replays and not running and not careful:
            self.limit = None
        assert self.scheduler.takes_new() == (self.limit is None)
        is_full = self.limit is not None and len(running) >= self.limit
        if self.limit is not None:
            held = [] if is_full else careful  # nobody else runs beside them
        if replays:
            assert client is (None if is_full else replays[0])
        elif client is not None:
            assert client in held
            late = [c for c in held if c.claim and c.claim.deadline <= self.now]
            assert client is (late or held)[0]
        else:
            for waiting in held:
                assert waiting.claim and self.now < waiting.claim.deadline
            has_all = not running and self.machine.ceiling == CEILING
            assert not (held and has_all and not self.machine.others), "could run"
            while self.queue and client is None and self.limit is None:
                first = self.queue.pop(0)
                was_ended = first.is_ended
                taken = self.scheduler.take(first)
                assert taken is not (was_ended or first.is_suspect)
                if first.is_suspect and not was_ended:
                    assert first.state is RequestState.REPLAY
                    self.limit = 1
                client = first if taken else None
        assert client is None or client.prompt_read == (0, 0)
        return client

    def begin(self, client: Client) -> None:
        self.offered = None
        if self.choose(16) == 1:
            self.scheduler.not_begun(client)
            assert client.run.failed
            self.fail(tuple(Failure)[self.choose(len(Failure))])
            return
        if client.is_ended:
            return
        self.scheduler.works_on(client)  # it is read as tokens
        assert client.is_worked_on
        client.at = len(client.produced)
        prompt, total = client.prompt + client.at, client.prompt + client.answer
        if client.is_seeded:
            self.scheduler.repeat(client)
            client.at, prompt = 0, client.prompt
        if client.is_single:
            self.scheduler.serve_alone(client)
            assert client.run.alone and self.scheduler.current is client
        reusable = self.machine.prompt_cache // 2 if self.choose(2) else 0
        found = self._ask(client, prompt, total, reusable)
        if found.verdict == "admit":
            assert self.scheduler.current is client
            assert client.run.takes_over == found.take_over
            assert client.run.owned == (reusable if found.take_over else 0)
            self._start(client, prompt)
        elif found.verdict == "wait":
            assert client.state is RequestState.HELD
        else:
            assert client.state is RequestState.WAITING
            self.events["too_long" if found.verdict == "never" else "refused"] += 1
            self.scheduler.fail(client, MemoryError(found.verdict))

    def _ask(self, client: Client, prompt: int, total: int, reusable: int) -> Decision:
        """What the scheduler answers, and what it must have asked for that."""
        line, claim = client.line, client.claim
        held = self.scheduler.held()
        running = [c for c in self.machine.at_mlx_lm if not c.is_ended]
        found = self.scheduler.ask(client, prompt, total, reusable)
        assert client.claim is not None and self.machine.asked is not None
        patience = max(self.wait_s, BEGUN_WAIT_S if client.has_context else 0)
        deadline = self.now + patience if line is None else claim and claim.deadline
        assert client.claim.deadline == deadline
        ask, wanted = self.machine.asked
        assert ask == Ask(
            prompt=prompt,
            total=total,
            reusable=reusable,
            ahead=len(running) + len(held) + (line is not None),
            begun=client.has_context,
            may_wait=self.now < client.claim.deadline,
            step_max=client.step_max,
        )
        # Those that wait for memory come before one that is new, and those that a
        # failure interrupted before all.
        before = [c for c in held if c.times_replayed or not client.times_replayed]
        is_new = line is None and wanted.verdict == "admit" and ask.may_wait
        is_behind = is_new and before
        assert found.verdict == ("wait" if is_behind else wanted.verdict)
        if found.verdict == "refuse":
            assert line is None or not ask.may_wait
        self.events["held"] += found.verdict == "wait" and line is None
        return found

    def _start(self, client: Client, prompt: int) -> None:
        client.unread, client.length = prompt, 0
        client.is_stopped = False
        is_first = not client.has_context
        assert self.scheduler.begin(client) == is_first and client.has_context
        if client.is_single:
            self.single = client
        else:
            self.batch.append(client)
            uid = object()
            assert self.scheduler.inserted(uid) is client and client.run.uid is uid
        self.machine.at_mlx_lm.append(client)

    def _drop(self, client: Client) -> None:
        client.length = 0
        self.machine.at_mlx_lm.remove(client)
        if client is self.single:
            self.single = None
        else:
            self.batch.remove(client)

    def step(self) -> None:
        for client in [c for c in self.batch if c.is_ended]:
            assert client.is_stopped
            self._drop(client)
        if not self.batch:
            return
        leaving = [] if self.scheduler.goes_on() else self.scheduler.step()
        for client in leaving:
            self._note_leaving(client)
            assert client.state in (RequestState.HELD, RequestState.FAILED)
            assert client.is_stopped
            # All others came before it.
            assert client is max(self.batch, key=self.arrived.index)
            assert len(self.batch) > 1 or client.is_ended
            self._drop(client)
        if leaving:
            return
        self.machine.check_step(len(self.batch))
        self._check_work(*self.batch)
        for client in list(self.batch):
            if client in self.batch:  # or a failure has come in between
                self._go_on(client)

    def _check_work(self, *clients: Client) -> None:
        """A step is made: nobody else is worked on, whatever has been before."""
        found = [client for client in self.alive if client.is_worked_on]
        assert set(found) == {client for client in clients if not client.is_ended}

    def _note_leaving(self, client: Client) -> None:
        if client.state is RequestState.HELD:
            assert client.claim and client.claim.deadline == self.now + BEGUN_WAIT_S
            self.events["preempted"] += 1
            self.events["held"] += 1
        else:
            self.events["refused"] += 1

    def step_alone(self, client: Client) -> None:
        if client.is_ended:
            self._drop(client)
            return
        self._check_work(client)
        self._go_on(client)
        if client is not self.single or client.is_ended or not client.length:
            return
        found = self.scheduler.single_step(
            client, client.length, reads=client.unread > 0
        )
        if found == "smaller":
            assert client.state is RequestState.HELD
            assert client.step_max == self.machine.step_size
            self.events["held"] += 1
        if found == "none":
            assert client.is_ended
            self.events["refused"] += 1
        if found != "fits":
            self._drop(client)

    def _go_on(self, client: Client) -> None:
        if client.unread:
            read = min(client.unread, self.machine.step_size)
            client.unread -= read
            client.length += read
            told = (client.length, client.length + client.unread)
            self.scheduler.progress(client, *told)
            assert client.prompt_read == told
            return
        if self.choose(40) == 1:
            self.scheduler.complete(client)  # without a last token
            self._drop(client)
            return
        token, client.at = client.at, client.at + 1
        client.length += 1
        is_last = client.at >= client.answer
        if self.scheduler.token(client, token, is_last):
            client.got.append(token)
        if is_last:
            assert client.is_ended or client.got == list(range(client.answer))
            self.outside()
            if self.choose(16) == 1:
                self.end_some()
            if self.choose(12) == 1:
                self.fail(tuple(Failure)[self.choose(len(Failure))])
                return
            self.scheduler.complete(client)
            self.machine.prompt_cache += client.prompt // 2
            self._drop(client)

    def fail(self, what: Failure) -> None:
        """A step fails: mlx-lm loses all that it has."""
        before = {c: (c.state, c.attempts, c.line, c.claim) for c in self.alive}
        for client in list(self.machine.at_mlx_lm):
            self._drop(client)
        self.offered = None
        ending = self.scheduler.failure(what)
        self._check_failure(what, ending, before)
        self._note_care(what)
        self.outside()
        for client in ending:
            self.scheduler.fail(client, RuntimeError(what.name))

    def _check_failure(
        self, what: Failure, ending: list[Client], before: dict[Client, Any]
    ) -> None:
        """What has become of those that were in flight, by the words of the manual."""
        asked = [c for c in before if before[c][0] is RequestState.WAITING]
        ran = [c for c in before if before[c][0] in RUNNING]
        ran += [c for c in asked if c.run.failed]
        lost = [c for c in ran if before[c][0] is not RequestState.FINISHED]
        lost += [c for c in asked if before[c][2] is None and c not in ran]
        struck = lost if not ran else [c for c in lost if c in ran]
        if what is Failure.UNKNOWN and len(struck) > 1:
            struck = []
        elif what not in (Failure.FINAL, Failure.UNKNOWN):
            struck = [c for c in struck if before[c][1] >= self.attempts]
        assert {*ending} == {*(struck if self.attempts else lost)}
        kept = []
        for client, (state, attempts, line, claim) in before.items():
            waits = state is RequestState.WAITING and not client.run.failed
            if state is RequestState.FINISHED:
                assert client.ends == [None]
            elif state is RequestState.QUEUED:
                assert client.state is RequestState.QUEUED and client not in ending
            elif state is RequestState.HELD or (waits and line is not None):
                # It keeps its place and its patience.
                assert client.state is RequestState.HELD and client not in ending
                assert (client.line, client.claim) == (line, claim)
            elif client not in ending:
                assert client.state is RequestState.REPLAY
                if state is not RequestState.REPLAY:
                    kept.append(client)
            if state is RequestState.REPLAY or (waits and ran):
                # It had no part in it.
                assert client.attempts == attempts
                assert client not in ending or self.attempts == 0
        assert all(c.state is before[c][0] for c in ending)
        for client in ran if self.attempts else ():
            attempts = before[client][1]
            if client.is_ended or what in (Failure.FINAL, Failure.UNKNOWN):
                assert client.attempts == attempts
            else:
                assert (client in ending) == (attempts == self.attempts)
                assert client.attempts == attempts + (client not in ending)
        if what is Failure.FINAL and self.attempts:
            assert all(c in ending for c in ran if not c.is_ended)
        if what is Failure.UNKNOWN and self.attempts:
            assert len(ending) <= 1
        assert self.attempts or not kept

    def _note_care(self, what: Failure) -> None:
        """How many may run at a time from now on, and in which steps."""
        again = self.scheduler.requests(RequestState.REPLAY)
        level = max((c.attempts for c in again), default=0)
        if self.attempts == 0:
            assert all(c.is_suspect for c in again)
            return
        is_last = level >= max(2, self.attempts)
        if what is Failure.UNKNOWN or (again and level >= min(2, self.attempts)):
            self.limit = 1
        elif again and what not in (Failure.PASSING, Failure.UNKNOWN):
            half = max(1, len(again) // 2)
            self.limit = min(half, self.limit or half)
        if again and what is Failure.TOO_MUCH:
            # The first time the lowered ceiling says what fits.
            assert self.care == (SMALLEST if is_last else level - 1)
        elif again and what is Failure.TOO_LONG:
            assert self.care == (SMALLEST if is_last else level)

    # -- what always holds ---------------------------------------------------------

    def _state(self) -> object:
        """What decides about what comes next, without lengths and times."""
        requests = tuple(
            (
                *(c.state, c.is_single, c.is_suspect),
                *(c.has_context, c.attempts, c.line is not None),
            )
            for c in self.alive
        )
        return requests, self.limit, self.care, self.scheduler.is_unchanged

    def check(self) -> None:
        self.states.add(self._state())
        for client in self.arrived:
            assert len(client.ends) + client.is_cancelled == client.is_ended
            assert len(client.notes) == client.is_ended
            assert client.got == list(range(len(client.got))), "lost or sent twice"
            assert client.got == client.produced
            assert client.attempts <= min(self.attempts, client.times_replayed)
            if client.is_ended:
                assert client.ended_at is not None
                assert client.is_stopped == (client.state is not RequestState.COMPLETED)
                assert (client.ended_with is None) == (
                    client.state is RequestState.COMPLETED or client.is_cancelled
                )
            assert (client.first_token_at is not None) >= bool(client.produced)
        self.check_line()
        self.check_suspects()
        here = self.machine.at_mlx_lm
        for client in self.alive:
            assert (client.state in RUNNING) == (client in here)
            if client in here:
                assert client.line is None
            assert (client.state is RequestState.WAITING) == (client is self.offered)
            if client.state is RequestState.HELD:
                assert client.line is not None and client.claim is not None
            if client.state is RequestState.REPLAY:
                assert client.claim is None
        assert self.scheduler.requests() == self.alive
        assert len(self.scheduler) == len(self.alive)
        assert self.scheduler.events == self.events
        assert self.scheduler.tokens == sum(len(c.got) for c in self.arrived)
        self.check_claims()

    def check_suspects(self) -> None:
        """Nothing is at mlx-lm beside one that may be what ends the servers."""
        here = [*self.machine.at_mlx_lm, *filter(None, [self.offered])]
        alive = [client for client in here if not client.is_ended]
        assert len(alive) < 2 or not any(client.is_suspect for client in alive)

    def check_line(self) -> None:
        """Those that a failure interrupted, then those that were held first."""
        self.line = [c for c in self.line if c.line is not None and not c.is_ended]
        self.line += [
            c for c in self.alive if c.line is not None and c not in self.line
        ]
        held = [c for c in self.line if c.state is RequestState.HELD]
        begun = [c for c in held if c.times_replayed]
        assert self.scheduler.held() == begun + [c for c in held if c not in begun]

    def check_claims(self) -> None:
        """Who runs has a claim, and nobody else's counts."""
        load = self.scheduler.load()
        runs = [c for c in self.arrived if c in self.machine.at_mlx_lm]
        runs = [c for c in runs if not c.is_ended]
        assert list(load.rows) == [
            Row(c.prompt + (0 if c.is_seeded else len(c.produced) - c.run.made),
                c.prompt + c.answer, c.run.made == 0)
            for c in runs
        ]  # fmt: skip
        assert load.length == sum(c.run.length for c in runs)
        assert load.owned == {c.run.uid: c.run.owned for c in runs}
        lengths = {c.run.uid: c.claim.prompt for c in runs if c.claim}
        assert self.scheduler.prompt_lengths() == lengths

    def end(self) -> None:
        """Nothing happens any more but what was begun, and everyone is answered."""
        self.is_calm = True
        self.machine.ceiling, self.machine.others = CEILING, 0
        left = len(self.alive) + len(self.queue)
        for _ in range(200 + 1000 * left):
            if not self.alive and not self.queue and self._is_idle():
                break
            self.now += 0.5
            self.turn()
            if self.batch and self.offered is None:
                self.step()
        assert not self.alive and not self.queue, "somebody starves"
        assert self.take() is None
        assert len(self.scheduler) == 0
        assert self.scheduler.load() == Load()
        assert self.scheduler.takes_new() and self.care is None
        assert self.scheduler.current is None
        self.check()


def run(choices: bytes, attempts: int = ATTEMPTS) -> Loop:
    loop = Loop(choices, attempts)
    try:
        while True:
            first = next(loop.choices, None)
            if first is None:
                break
            if first % 8 == 1:
                loop.come()
            loop.turn()
        loop.end()
    except AssertionError as e:
        states = [(c.state.value, c.prompt, c.answer, c.ends) for c in loop.arrived]
        raise AssertionError(f"{e}; {states}") from e
    return loop


@settings(max_examples=300)
@given(st.binary(min_size=20, max_size=400), st.integers(0, 3))
def test_any_order_of_events(choices: bytes, attempts: int) -> None:
    run(choices, attempts)


def test_every_transition_is_reached() -> None:
    """So the table has none that never happens, and the model tries them all."""
    seen: Counter[tuple[RequestState, RequestState]] = Counter()
    steps, begin, states = 0, time.process_time(), set()
    draw = random.Random(1)
    for i in range(240):
        # A 0 is the quiet choice: in every second run more of them.
        choices = draw.randbytes(400)
        quiet = bytes(b if draw.random() < 0.4 else 0 for b in choices)
        loop = run(quiet if i % 2 else choices, i % (ATTEMPTS + 1))
        seen += loop.scheduler.seen
        steps += loop.steps
        states |= loop.states
    seconds = time.process_time() - begin
    print(f"{steps} steps, {steps / seconds:.0f} in a second of the CPU")
    print(f"{len(states)} states")
    for (old, new), times in sorted(seen.items(), key=lambda item: item[1]):
        print(f"{times:7} {old.value} -> {new.value}")
    assert seen.keys() == TRANSITIONS.keys()


@settings(max_examples=150)
@given(
    st.binary(min_size=5, max_size=60),
    st.integers(2, 6),
    st.integers(1, 3),
    st.sampled_from([Failure.PASSING, Failure.TOO_MUCH, Failure.UNKNOWN]),
)
def test_who_fails_every_time_ends_alone(
    choices: bytes, others: int, attempts: int, what: Failure
) -> None:
    loop = Loop(b"", attempts)
    loop.is_calm = True
    clients = [Client(20 + i, 3, False, False) for i in range(others)]
    bad = clients[choices[0] % others]
    for client in clients:
        loop.enter(client)
    for choice in choices + bytes(400):
        if bad in loop.batch:
            loop.fail(what)
        loop.turn()
        if loop.batch and bad not in loop.batch and choice % 3 == 0:
            loop.step()
    loop.end()
    assert [client for client in clients if client.ends != [None]] == [bad]
    assert bad.attempts == (0 if what is Failure.UNKNOWN else attempts)


def loop_with(clients: list[Client], attempts: int = ATTEMPTS) -> Loop:
    """A calm one, in which they run, as far as they have room."""
    loop = Loop(b"", attempts)
    loop.is_calm = True
    for client in clients:
        loop.enter(client)
    while loop.queue:
        taken = loop.take()
        assert taken is not None
        loop.begin(taken)
    return loop


def test_one_that_waits_for_its_turn_keeps_its_place() -> None:
    """Its memory was found, and a batch that it cannot join has to end first."""
    alone = Client(300, 200, True, False)
    loop = loop_with([Client(300, 200, False, False)])
    loop.machine.others = CEILING
    loop.enter(alone)
    loop.offered = loop.take()
    assert loop.offered is alone
    loop.begin(alone)
    place = alone.line
    loop.machine.others = 0
    loop.offered = loop.take()
    assert loop.offered is alone and alone.state is RequestState.WAITING
    loop.fail(Failure.PASSING)
    assert (alone.state, alone.line) == (RequestState.HELD, place)
    loop.end()


@pytest.mark.parametrize(
    ("what", "most"), [(Failure.TOO_MUCH, 2), (Failure.UNKNOWN, 1)]
)
def test_fewer_run_at_a_time_after_a_failure(what: Failure, most: int) -> None:
    loop = loop_with([Client(20 + i, 60, False, False) for i in range(5)], 3)
    assert len(loop.batch) == 5
    loop.fail(what)
    while (client := loop.take()) is not None:
        loop.begin(client)
    assert len(loop.batch) == most
    loop.end()


@pytest.mark.parametrize(
    ("what", "most"), [(Failure.TOO_MUCH, 2), (Failure.UNKNOWN, 1)]
)
def test_care_is_taken_until_those_have_ended_that_wait_for_memory(
    what: Failure, most: int
) -> None:
    """Where memory lacks others wait for it already, and all of them soon will."""
    loop = loop_with([Client(20, 60, False, False) for _ in range(5)], 3)
    begun = list(loop.batch)
    loop.machine.others = CEILING
    loop.enter(late := Client(20, 60, False, False))
    assert loop.take() is late
    loop.begin(late)
    loop.fail(what)
    while (client := loop.take()) is not None:
        loop.begin(client)
    assert loop.scheduler.held() == [*begun, late]
    loop.machine.others = 0
    while not all(client.is_ended for client in begun):
        while (client := loop.take()) is not None:
            loop.begin(client)
        assert 0 < len(loop.batch) <= most and late not in loop.batch
        assert loop.care is not None or what is Failure.UNKNOWN
        loop.step()
    loop.end()
    assert late.ends == [None]


def test_a_suspect_waits_for_the_batch_and_the_others_for_it() -> None:
    batch = [Client(20, 3, False, False) for _ in range(2)]
    suspects = [Client(20, 3, False, False, SUSPECT_FROM) for _ in range(2)]
    loop = loop_with(batch)
    for client in (*suspects, late := Client(20, 3, False, False)):
        loop.enter(client)
    together: list[list[Client]] = []
    while loop.alive:
        while (taken := loop.take()) is not None:
            loop.begin(taken)
        if loop.batch and loop.batch not in together[-1:]:
            together.append(list(loop.batch))
        loop.step()
    assert together == [batch, *([one] for one in suspects), [late]]
    loop.end()


def test_a_suspect_is_alone_though_a_failure_lets_several_run() -> None:
    loop = loop_with([Client(20, 3, False, False) for _ in range(6)])
    loop.enter(suspect := Client(20, 3, False, False, SUSPECT_FROM))
    assert loop.take() is None
    loop.fail(Failure.TOO_MUCH)
    while loop.alive:
        while (taken := loop.take()) is not None:
            loop.begin(taken)
        loop.check()
        loop.step()
    assert suspect.ends == [None]
    loop.end()


def test_ranks_that_take_the_same_steps_put_nobody_off() -> None:
    loop = Loop(b"")
    loop.scheduler._one_rank = False
    loop.enter(client := Client(20, 3, False, False, SUSPECT_FROM))
    assert loop.scheduler.take(client)
    assert client.state is RequestState.WAITING and loop.scheduler.takes_new()


def test_a_steady_batch_asks_for_memory_once_for_many_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = loop_with([Client(20, 60, False, False) for _ in range(2)])
    scheduler = loop.scheduler
    monkeypatch.setattr(loop.machine, "steps_with_room", lambda load: 4)

    def steady_steps() -> int:
        count = 0
        while scheduler.goes_on():
            count += 1
        return count

    for _ in range(2):
        assert not scheduler.is_unchanged and steady_steps() == 0
        # The first step after a change grants none; the others do, four in all.
        assert scheduler.step() == []
        assert scheduler.is_unchanged and steady_steps() == 0
        for _ in range(2):
            assert scheduler.step() == []
            assert steady_steps() == 3
        assert scheduler.step() == []
        scheduler.disconnect(loop.batch[-1])
        loop.batch.pop()
    for _ in range(2):  # nobody runs: nothing is granted
        assert scheduler.step() == [] and steady_steps() == 0


def test_a_client_that_left_during_a_step_gets_no_token_of_it() -> None:
    loop = loop_with([Client(20, 60, False, False)])
    (client,) = loop.batch
    loop.scheduler.disconnect(client)
    assert not loop.scheduler.token(client, 0, False)
    assert client.produced == [] and loop.scheduler.tokens == 0


def test_one_that_is_to_read_slowly_goes_on_at_its_turn() -> None:
    loop = loop_with([Client(300, 2, True, False)])
    client = loop.single
    assert client is not None
    loop.scheduler.read_slowly(client)
    loop._drop(client)
    assert client.state is RequestState.HELD and client.line == 1
    assert client.step_max == loop.machine.step_size
    assert loop.events == loop.scheduler.events == {}
    loop.check()
    loop.end()


def test_one_that_has_waited_long_enough_goes_before_those_that_may_wait_on() -> None:
    loop = loop_with([Client(300, 200, False, False) for _ in range(2)])
    loop.machine.others = CEILING
    loop.step()
    (first,) = loop.scheduler.held()
    late = Client(300, 200, False, False)
    loop.enter(late)
    assert loop.take() is late
    loop.begin(late)
    assert loop.scheduler.held() == [first, late] and loop.take() is None
    loop.now += WAIT_S
    loop.offered = loop.take()
    assert loop.offered is late
    loop.end()


def test_a_stream_of_an_earlier_process_is_waited_for_as_one_that_has_begun() -> None:
    """--memory-wait 0 is for those whose clients can still be told to come again."""
    loop = Loop(bytes([1]))
    loop.is_calm = True
    assert loop.wait_s == 0
    first, new, begun = (Client(300, 200, False, False) for _ in range(3))
    begun.inherited = 1
    loop.enter(first)
    assert loop.take() is first
    loop.begin(first)
    loop.machine.others = CEILING
    for client in (new, begun):
        loop.scheduler.arrive(client)
        assert loop.scheduler.take(client)
    assert loop.scheduler.ask(new, 300, 500).verdict == "refuse"
    assert loop.scheduler.ask(begun, 300, 500).verdict == "wait"
    assert begun.state is RequestState.HELD


def test_nothing_is_inserted_for_nobody() -> None:
    assert Loop(b"").scheduler.inserted(object()) is None


def test_who_may_not_wait_does_not_stand_in_line() -> None:
    """--memory-wait 0: one that fits is let in, though another waits to go on."""
    loop = Loop(bytes([1]))
    loop.is_calm = True
    assert loop.wait_s == 0
    for _ in range(3):
        loop.enter(Client(300, 200, False, False))
    for _ in range(2):
        client = loop.take()
        assert client is not None
        loop.begin(client)
    loop.machine.others = CEILING
    loop.step()
    (held,) = loop.scheduler.held()
    late = loop.take()
    assert late is loop.arrived[2]
    loop.machine.others = 0
    loop.begin(late)
    assert late in loop.batch and held.state is RequestState.HELD


@pytest.mark.parametrize(
    "pair", [(a, b) for a in RequestState for b in RequestState], ids=str
)
def test_the_table_is_kept(pair: tuple[RequestState, RequestState]) -> None:
    scheduler = Loop(b"").scheduler
    client = Client(1, 1, False, False)
    client._state, state = pair
    if client.is_ended:
        assert not scheduler._change(client, state)
    elif pair in TRANSITIONS:
        assert scheduler._change(client, state) and client.state is state
        return
    else:
        with pytest.raises(IllegalTransition):
            scheduler._change(client, state)
    assert client.state is pair[0]


def test_the_client_that_left_is_answered_so() -> None:
    loop = Loop(b"")
    loop.come()
    loop.offered = loop.take()
    (client,) = loop.arrived
    loop.scheduler.disconnect(client)
    assert isinstance(client.ends[0], Disconnected)
    assert client.state in ENDED


# -- the state has one owner ---------------------------------------------------------

# What `Request` and `Run` have; their constructors give the first values.
FIELDS = {*vars(Request()), *vars(Run())}


CHANGES = {"append", "extend", "insert", "clear", "pop", "remove", "update", "add"}
CHANGES |= {"sort", "reverse"}


def writes(tree: ast.AST) -> list[tuple[str, int]]:
    """(attribute, line) of what is assigned to, or changed in place."""
    found: list[tuple[str, int]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            is_of_module = (
                isinstance(node.value, ast.Name) and node.value.id == "server"
            )
            if not is_of_module:  # mlx-lm's, which is patched
                found.append((node.attr, node.lineno))
        elif isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
            if isinstance(node.value, ast.Attribute):
                found.append((node.value.attr, node.lineno))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of = node.func.value
            if node.func.attr in CHANGES and isinstance(of, ast.Attribute):
                found.append((of.attr, node.lineno))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            name = node.args[1]
            if isinstance(name, ast.Constant):
                found.append((str(name.value), node.lineno))
    return found


@pytest.mark.parametrize(
    "statement",
    [
        "request.produced = []",
        "request.produced += [1]",
        "request.produced[0] = 5",
        "del request.produced[:]",
        "request.produced.insert(0, 1)",
        "setattr(request, 'produced', [])",
    ],
)
def test_each_way_of_writing_is_seen(statement: str) -> None:
    assert ("produced", 1) in writes(ast.parse(statement))


def test_only_the_scheduler_writes_a_state() -> None:
    assert {"_state", "produced", "attempts", "claim", "run", "uid"} <= FIELDS
    outside = []
    for path in Path(mlx_safe.server.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text())
        if path.name == "scheduler.py":
            assert any(name == "_state" for name, _ in writes(tree))
            continue
        for node in list(ast.walk(tree)):
            if path.name == "request.py" and isinstance(node, ast.FunctionDef):
                node.body = [] if node.name == "__init__" else node.body
        outside += [
            f"{path.name}:{line} {name}"
            for name, line in writes(tree)
            if name in FIELDS
        ]
    assert outside == []


def test_it_needs_no_mlx() -> None:
    code = "import sys, mlx_safe.server.scheduler; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"mlx", "mlx.core", "mlx_lm"} & {*done.stdout.split()}


def test_the_document_has_the_table() -> None:
    """``python -m mlx_safe.server.request`` prints what stands between the markers."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    _, block = text.split("<!-- lifecycle -->")
    block, _ = block.split("<!-- /lifecycle -->")
    assert block.strip() == f"```mermaid\n{diagram()}\n```"
