"""One request in flight, as mlx-lm has it.

A client that leaves just as mlx-lm begins with its request: nothing is generated. Its
handler's thread, or the one that notices clients that leave, ends the request while
the generation thread begins with it. Here one thread does what both would, in each
order that matters.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import pytest

from mlx_safe.memory.budget import Decision
from mlx_safe.server.admission import Ask, Load, SingleStep
from mlx_safe.server.in_flight import InFlight
from mlx_safe.server.prefill import PrefillStep
from mlx_safe.server.request import Claim, Disconnected, Request, RequestState
from mlx_safe.server.scheduler import Scheduler
from mlx_safe.server.sequential import Sequential
from mlx_safe.server.step import Step


class Room:
    """Memory for everything."""

    step_size = 256

    def __init__(self) -> None:
        self.seen: list[bool] = []  # whether the step alone was one of a prompt

    def admits(self, ask: Ask, load: Load) -> Decision:
        return Decision(False, 0, False, self.step_size, "admit")

    def steps_with_room(self, load: Load) -> int:
        return 16

    def single_step(self, load: Load) -> SingleStep:
        self.seen += [row.is_reading for row in load.rows]
        return "fits"


class Context:
    """mlx-lm's `GenerationContext`, as far as it is used."""

    prompt_cache_count = 0

    def __init__(self) -> None:
        self.prompt = [1, 2, 3]
        self.is_stopped = False

    def stop(self) -> None:
        self.is_stopped = True


@dataclass
class Arguments:
    """mlx-lm's `GenerationArguments`, likewise."""

    max_tokens: int = 8
    logprobs: bool = False
    top_logprobs: int = 0


class Leaving(InFlight):
    """Does ``meanwhile`` once, when its run is stopped for the first time."""

    meanwhile: Callable[[], None] | None = None

    def stop_run(self) -> None:
        super().stop_run()
        then, self.meanwhile = self.meanwhile, None
        if then is not None:
            then()


@pytest.fixture
def queue() -> SimpleQueue[Any]:
    return SimpleQueue()


CALLED = {"name": "look", "arguments": '{"at": [1, 2]}'}
CALL = {"id": "call-1", "type": "function", "function": CALLED}
MESSAGES = [
    {"role": "user", "content": "Look."},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
]


def _read(messages: list[Any]) -> None:
    """As mlx-lm 0.31.3 does before it uses the chat template; in place."""
    for message in messages:
        message["content"] = message["content"] or ""
        for call in message.get("tool_calls", ()):
            called = call["function"]
            called["arguments"] = json.loads(called["arguments"])


@pytest.fixture
def request_(queue: SimpleQueue[Any]) -> Leaving:
    """One that mlx-lm has, and has not begun with: its prompt is being tokenized."""
    scheduler: Scheduler[InFlight] = Scheduler(Room(), attempts_max=2, wait_s=20)
    asked = SimpleNamespace(messages=copy.deepcopy(MESSAGES))
    taken = cast(Any, (queue, asked, Arguments()))
    made = Leaving(scheduler, taken, lambda *_: None, lambda *_: None)
    made.tokenizer = cast(Any, object())
    scheduler.arrive(made)
    assert made.taken()
    assert scheduler.ask(made, 3, 11).verdict == "admit"
    return made


def _left(queue: SimpleQueue[Any]) -> bool:
    found = []
    while not queue.empty():
        found.append(queue.get())
    return any(isinstance(item, Disconnected) for item in found)


WAYS = [InFlight.disconnect, lambda made: made.fail(Disconnected("left"))]


@pytest.mark.parametrize("leave", WAYS, ids=["disconnect", "fail"])
def test_it_has_left_before_mlx_lm_begins(
    request_: Leaving, queue: SimpleQueue[Any], leave: Callable[[InFlight], object]
) -> None:
    leave(request_)
    context = Context()
    request_.put(context)
    assert context.is_stopped
    assert request_.is_ended and _left(queue)


@pytest.mark.parametrize("leave", WAYS, ids=["disconnect", "fail"])
def test_mlx_lm_begins_while_it_leaves(
    request_: Leaving, queue: SimpleQueue[Any], leave: Callable[[InFlight], object]
) -> None:
    """After the look for a run to stop."""
    context = Context()
    request_.meanwhile = lambda: request_.put(context)
    leave(request_)
    assert context.is_stopped
    assert request_.is_ended and _left(queue)


def test_its_handler_stops_it_while_another_run_begins(
    request_: Leaving, queue: SimpleQueue[Any]
) -> None:
    """The context that a handler has is of the first run; a failure began another."""
    first, second = Context(), Context()
    request_.put(first)
    request_.meanwhile = lambda: request_.put(second)
    first.stop()
    assert first.is_stopped and second.is_stopped
    assert request_.state is RequestState.DISCONNECTED


def test_each_run_reads_the_messages_that_the_client_has_sent(
    request_: Leaving,
) -> None:
    for _ in range(3):
        _, work, _ = request_.work()
        assert work.messages == MESSAGES
        _read(work.messages)


def test_its_first_token_alone_is_followed_by_no_step_of_its_prompt() -> None:
    """On a card a failure in one teaches how much memory a step of a prompt takes.

    Its state is "prefill" until the token is passed on, after the look at the memory.
    """
    room = Room()
    scheduler: Scheduler[InFlight] = Scheduler(room, attempts_max=2, wait_s=20)
    headroom = SimpleNamespace(observing_step=lambda *_: nullcontext())
    prefill = PrefillStep(cast(Any, SimpleNamespace(prefill_step_size=256)))
    alone = Sequential(scheduler, cast(Any, headroom), None, prefill, Step())
    taken = cast(Any, (SimpleQueue(), SimpleNamespace(messages=[]), Arguments()))
    made = InFlight(scheduler, taken, alone.before_put, lambda *_: None)
    made.tokenizer = cast(Any, object())
    scheduler.arrive(made)
    assert made.taken()
    assert scheduler.ask(made, 600, 608).verdict == "admit"
    scheduler.serve_alone(made)
    made.put(Context())
    for item, tokens in (((256, 600), 256), ((512, 600), 88), ((600, 600), 88)):
        made.put(item)
        # Of its next step, that is, while there is one.
        assert prefill.lacked_memory() == tokens
    assert made.state is RequestState.PREFILL
    made.put(SimpleNamespace(token=7, finish_reason=None))
    assert room.seen == [True, True, False, False]


def test_its_caches_have_as_many_tokens_as_the_next_step_is_asked_for(
    tiny_model: Path,
) -> None:
    """mlx-lm's sequential path begins a step before it passes on the token before it.

    Were one less asked for, that of the first token of a new block would not be.
    """
    from mlx_lm import load
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import make_prompt_cache

    model = load(str(tiny_model))[0]
    cache = make_prompt_cache(model)
    prompt = mx.array([5, 9, 100])
    request = Request()
    request.claim = Claim(len(prompt), 9, 0.0)
    for _ in zip(
        generate_step(prompt, model, prompt_cache=cache), range(4), strict=False
    ):
        assert request.next_length == cache[0].offset
        request.run.made += 1
