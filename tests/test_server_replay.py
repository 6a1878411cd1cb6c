"""No request is lost: replay after a fault, with the real server in a child.

The texts must be those of a server without any fault, byte for byte. Each
failure names the step that was failed.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_safe._failures import SMALLEST, Failure, what_it_means
from mlx_safe.errors import (
    MetalAccessError,
    MetalError,
    MetalInteractivityError,
    MetalOutOfMemoryError,
    MetalTimeoutError,
)
from mlx_safe.memory.budget import Decision
from mlx_safe.server import logs
from mlx_safe.server.admission import Ask, Load, SingleStep
from mlx_safe.server.live import Live
from mlx_safe.server.prefill import PrefillStep
from mlx_safe.server.request import Request, RequestState
from mlx_safe.server.scheduler import Scheduler
from mlx_safe.server.step import Step
from mlx_safe.testing import metal_message
from support.programs import program
from support.server import (
    BATCH_RUNS_S,
    CONTROLLED,
    REFUSING,
    REQUEST_TIMEOUT_S,
    Answer,
    Server,
    eventually,
)

TOKENS = 10
CLIENTS = 3
PATHS: dict[str, dict[str, Any]] = {"batched": {}, "sequential": {"seed": 1}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


LOADS_BADLY = program("loads_badly")


@pytest.fixture
def server(tiny_model: Path) -> Iterator[Server]:
    """The protected server; `Server.plan` fails steps of it."""
    with Server(tiny_model, program=CONTROLLED) as server:
        yield server.wait_ready()


def conversation(server: Server, client: int, **more: Any) -> list[Answer]:
    """Three turns with a tool call in between; stops at the first error."""
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": f"Client {client} asks."},
    ]
    answers = []
    for turn in range(3):
        answer = server.post(
            {"messages": messages, "tools": [TOOL], "max_tokens": TOKENS, **more}
        )
        answers.append(answer)
        if answer.broken or answer.error:
            break
        messages.append({"role": "assistant", "content": answer.text})
        if turn == 0:
            messages.append({"role": "tool", "content": f"found {client}"})
        else:
            messages.append({"role": "user", "content": f"And {turn}?"})
    return answers


def conversations(server: Server, **more: Any) -> list[list[Answer]]:
    """`CLIENTS` of them at once."""
    results: list[list[Answer]] = [[] for _ in range(CLIENTS)]

    def one(client: int) -> None:
        results[client] = conversation(server, client, **more)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(CLIENTS)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(3 * REQUEST_TIMEOUT_S)
    assert not any(t.is_alive() for t in threads), server.log
    return results


def texts(results: list[list[Answer]]) -> list[list[str]]:
    assert not any(a.broken or a.error for answers in results for a in answers)
    return [[a.text for a in answers] for answers in results]


def test_swallowed_faults_are_replayed_too(server: Server) -> None:
    undisturbed = texts(conversations(server))
    for n in (1, 4, 9, 17):
        server.plan(f"any:{n}:8:once:record")
        assert texts(conversations(server)) == undisturbed, f"at step {n}"
    assert "mlx_safe_faults_total 4.0" in server.get("/metrics").body


@pytest.mark.parametrize("path", PATHS)
def test_a_history_with_a_call_is_read_again(server: Server, path: str) -> None:
    """mlx-lm (0.31.3) changes the messages in a way that it cannot twice."""
    function = {"name": "look", "arguments": '{"at": 1}'}
    calls = [{"id": "call-1", "type": "function", "function": function}]
    ask = {
        "messages": [
            {"role": "user", "content": "Look at it."},
            {"role": "assistant", "tool_calls": calls},
            {"role": "tool", "content": "found", "tool_call_id": "call-1"},
        ],
        "tools": [TOOL],
        "max_tokens": TOKENS,
        **PATHS[path],
    }
    calm = server.post(ask)
    server.plan("decode:3:8")
    faulty = server.post(ask)
    assert faulty.text == calm.text
    used = [answer.json["usage"]["prompt_tokens"] for answer in (calm, faulty)]
    assert used[0] == used[1]
    assert server.metric("mlx_safe_replays_total") == 1


def test_usage_and_logprobs_do_not_show_it(server: Server) -> None:
    ask = {"max_tokens": TOKENS, "logprobs": True, "top_logprobs": 2, "seed": 1}
    calm = server.chat(**ask).json
    # The prompt cache of the first makes no difference to the second.
    server.plan("decode:5:8")
    faulty = server.chat(**ask).json
    assert server.metric("mlx_safe_replays_total") == 1
    for field in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert faulty["usage"][field] == calm["usage"][field]
    pairs = zip(
        calm["choices"][0]["logprobs"]["content"],
        faulty["choices"][0]["logprobs"]["content"],
        strict=True,
    )
    for a, b in pairs:
        assert a["id"] == b["id"]
        assert a["logprob"] == pytest.approx(b["logprob"], abs=1e-3)


@pytest.mark.parametrize("path", ["batched", "sequential"])
def test_a_stop_word_that_was_half_seen(server: Server, path: str) -> None:
    more = {**PATHS[path], "max_tokens": 40}
    text = server.chat("stop words", **more).text
    # Two neighbours that are whole characters, so one token each here.
    stop = next(
        text[i : i + 2]
        for i in range(4, len(text) - 1)
        if "\ufffd" not in text[i : i + 2] and text[i : i + 2] not in text[: i + 1]
    )
    undisturbed = server.chat("stop words", stop=stop, **more)
    assert len(undisturbed.text) < len(text)
    assert undisturbed.json["choices"][0]["finish_reason"] == "stop"
    for n in range(1, undisturbed.json["usage"]["completion_tokens"] + 1):
        server.plan(f"decode:{n}:8")
        faulty = server.chat("stop words", stop=stop, **more)
        assert faulty.text == undisturbed.text, f"decode step {n}"
        assert faulty.json["choices"][0]["finish_reason"] == "stop", f"step {n}"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_attempts_used_up(server: Server, stream: bool) -> None:
    server.plan("decode:3:8,decode:4:8,decode:5:8")
    answer = server.chat(max_tokens=TOKENS, stream=stream)
    assert answer.error["code"] == "metal_out_of_memory"
    if not stream:
        assert answer.status == 503
    assert server.metric("mlx_safe_replays_total") == 2
    assert server.chat().status == 200


def test_one_bad_request_ends_alone(server: Server) -> None:
    """The others of its batch go on, with the text that they would have had."""
    undisturbed = server.chats(2, max_tokens=400)
    server.hold(100)
    bad: list[Answer] = []
    thread = threading.Thread(
        target=lambda: bad.append(server.chat("bad", stop=["FAILS"])), daemon=True
    )
    with server.chatting(2, max_tokens=400) as answers:
        server.wait_held(BATCH_RUNS_S)
        thread.start()
        server.wait_for_clients(3)
        server.go()
    thread.join(REQUEST_TIMEOUT_S)
    assert bad[0].status == 500
    assert bad[0].error["code"] == "internal_generation_error"
    assert texts([answers]) == texts([undisturbed])


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (metal_message(2), "metal_timeout"),
        ("[malloc] Unable to allocate 8 bytes.", "insufficient_memory"),
    ],
)
def test_a_fault_while_another_model_is_loaded(
    tiny_model: Path, draft_model: Path, message: str, code: str
) -> None:
    env = {"MLX_SAFE_TEST_FAILS": "\n".join([message] * 5)}
    with Server(tiny_model, program=LOADS_BADLY, env=env).wait_ready() as server:
        told = server.chat(model=str(draft_model))
        assert told.status == 503
        assert told.error["code"] == code
        # Of the five, three have struck.
        assert server.chat(model=str(draft_model)).status == 200
        assert server.metric("mlx_safe_replays_total") == 4
        assert server.chat().status == 200


def test_it_refuses_for_a_while_and_recovers_by_itself(tiny_model: Path) -> None:
    plan = ",".join(f"decode:{i}:8" for i in range(1, 13))
    with Server(tiny_model, inject=plan, program=REFUSING).wait_ready() as server:
        # Three faults for each of four requests, with nothing in between.
        for _ in range(4):
            assert server.chat().error["code"] == "metal_out_of_memory"
        refused = server.chat()
        assert refused.status == 503
        assert refused.error["code"] == "unavailable"
        assert server.get("/health").status == 503
        server.process.send_signal(signal.SIGUSR1)
        assert eventually(lambda: server.get("/health").status == 200)
        assert server.chat().status == 200


def test_a_client_that_leaves_is_not_run_again(server: Server) -> None:
    server.hold(30)
    messages = [{"role": "user", "content": "x"}]
    with server.connected({"messages": messages, "max_tokens": 9999, "stream": True}):
        server.wait_held()
    server.wait_for_log("outcome=client_left")
    server.plan("any:1:8")
    server.go()
    assert server.chat().status == 200
    assert server.metric("mlx_safe_generation_failures_total") == 1
    assert server.metric("mlx_safe_replays_total") == 0
    assert server.metric("mlx_safe_requests_in_flight") == 0


@pytest.mark.real_model
def test_the_real_model_goes_on_where_it_was(real_model: Path) -> None:
    with Server(real_model, program=CONTROLLED) as server:
        server.wait_ready()
        # Seconds of work on a machine to itself, a minute and more on a busy one.
        calm: dict[str, Any] = {"max_tokens": 12, "stream": True, "timeout": 300.0}
        question = "Name three colours."
        for path, cuts in (("batched", (2, 9)), ("sequential", (6,))):
            ask = {**calm, **PATHS[path]}
            undisturbed = server.chat(question, **ask).text
            assert undisturbed
            for n in cuts:
                server.plan(f"decode:{n}:8")
                found = server.chat(question, **ask).text
                assert found == undisturbed, f"{path}, step {n}"
        assert server.metric("mlx_safe_replays_total") == 3


@pytest.mark.parametrize("path", PATHS)
def test_out_of_memory_makes_smaller_steps_until_it_is_over(
    tiny_model: Path, path: str
) -> None:
    """Counts the steps of the model; each reads one piece of the prompt."""
    sizes = ("--prefill-step-size", "256", "--prompt-cache-size", "0")
    with Server(tiny_model, *sizes, program=CONTROLLED).wait_ready() as server:

        def steps() -> int:
            before = server.ask("steps")
            assert server.chat("x" * 2000, **PATHS[path]).status == 200
            return server.ask("steps") - before

        undisturbed = steps()
        server.plan("decode:3:2")
        as_before = steps()
        server.plan("decode:3:8")
        budget = steps()
        server.plan("decode:3:8,decode:4:8")
        smaller = steps()
        assert server.metric("mlx_safe_replays_total") == 4
        # Those for the prompt, and for the tokens up to the fault, once more.
        assert undisturbed + 2000 // 256 <= as_before <= undisturbed + 2000 // 256 + 4
        # There is memory enough for the full step, and the first time it is tried.
        assert abs(budget - as_before) <= 1
        twice = undisturbed + 2 * (as_before - undisturbed)
        # The last time in the smallest steps, to the end of the prompt.
        assert smaller - twice >= 2000 // 64 - 2000 // 256 - 2
        assert steps() == undisturbed


class Unlimited:
    """Memory for everything."""

    step_size = 2048

    def admits(self, ask: Ask, load: Load) -> Decision:
        return Decision(False, 0, False, self.step_size, "admit")

    def steps_with_room(self, load: Load) -> int:
        return 1

    def single_step(self, load: Load) -> SingleStep:
        return "fits"


class Quiet(Request):
    """A request whose answer nobody reads."""

    def send(self, item: Any) -> None:
        pass

    def stop_run(self) -> None:
        pass


def scheduler(settings: SimpleNamespace, attempts: int = 2) -> Scheduler[Quiet]:
    prefill = PrefillStep(settings)
    return Scheduler(Unlimited(), attempts, 60.0, prefill.be_careful)


def begin(scheduler: Scheduler[Quiet], request: Quiet) -> Quiet:
    assert scheduler.ask(request, 10, 20).verdict == "admit"
    return request


def begun(count: int, scheduler: Scheduler[Quiet]) -> list[Quiet]:
    requests = [Quiet() for _ in range(count)]
    for request in requests:
        scheduler.arrive(request)
        assert scheduler.take(request)
        begin(scheduler, request)
    return requests


def given_out(scheduler: Scheduler[Quiet]) -> list[Quiet]:
    """All that may run now, which mlx-lm begins with."""
    return [begin(scheduler, request) for request in iter(scheduler.next, None)]


def test_who_is_interrupted_waits_since_then() -> None:
    """A long answer was as old as a queue that nobody serves."""
    now = [0.0]
    runs: Scheduler[Quiet] = Scheduler(Unlimited(), 2, 60.0, clock=lambda: now[0])
    live = Live(runs, Step(), dict, lambda: now[0])
    (request,) = begun(1, runs)
    now[0] = 300.0
    assert live.queue() == (0, 0.0)
    runs.failure(Failure.PASSING)
    now[0] = 302.0
    assert live.queue() == (1, 2.0) and live.age(request) == 302.0
    assert given_out(runs) == [request]
    late = Quiet()
    runs.arrive(late)
    now[0] = 303.0
    assert live.queue() == (1, 1.0)


@pytest.mark.parametrize(
    ("failure", "steps"),
    # Out of memory: at first the budget finds the largest step. The last time whatever
    # fits at all must fit.
    [
        (Failure.TOO_MUCH, (2048, 64)),
        (Failure.TOO_LONG, (512, 64)),
        (Failure.PASSING, (2048, 2048)),
    ],
)
def test_out_of_memory_lets_fewer_run_until_it_is_over(
    failure: Failure, steps: tuple[int, int]
) -> None:
    settings = SimpleNamespace(prefill_step_size=2048)
    runs = scheduler(settings)
    requests = begun(4, runs)

    assert runs.failure(failure) == []
    if failure is Failure.PASSING:
        assert given_out(runs) == requests
        assert settings.prefill_step_size == 2048
        return
    assert given_out(runs) == requests[:2]
    assert settings.prefill_step_size == steps[0]
    assert runs.failure(failure) == []
    for request in requests:
        assert given_out(runs) == [request]
        assert settings.prefill_step_size == steps[1]
        assert not runs.takes_new()
        runs.complete(request)
    assert given_out(runs) == []
    # Everything is as before.
    assert runs.takes_new()
    assert settings.prefill_step_size == 2048


def test_a_step_that_goes_well_lets_the_next_be_larger() -> None:
    settings = SimpleNamespace(prefill_step_size=2048)
    prefill = PrefillStep(settings)
    prefill.be_careful(2)
    sizes = [prefill.size]
    while sizes[-1] < 2048:
        prefill.went_well()
        sizes.append(prefill.size)
    assert sizes == [128, 256, 512, 1024, 2048]
    prefill.be_careful(SMALLEST)  # the last time it is not tried out
    for lacked, most in ((0, 64), (511, 64), (2048, 512), (3 * 2048, 1024)):
        prefill.reads(lacked)
        assert prefill.lacked_memory() == lacked
        for _ in range(9):
            prefill.went_well()
        assert prefill.size == most
    prefill.be_careful(None)
    prefill.limit("memory", 256)  # the budget has its own say
    prefill.went_well()
    assert prefill.size == 256


def test_those_that_wait_for_their_turn_lose_no_attempt() -> None:
    """One request fails again and again; it alone is told so."""
    runs = scheduler(SimpleNamespace(prefill_step_size=2048))
    requests = begun(3, runs)
    assert runs.failure(Failure.TOO_MUCH) == []
    for left in (1, 0):
        assert given_out(runs) == requests[:1]
        assert runs.failure(Failure.TOO_MUCH) == [requests[0]][left:]


@pytest.mark.parametrize("attempts", [1, 2, 3])
def test_one_that_fails_every_time_takes_nobody_with_it(attempts: int) -> None:
    """Whatever the fault: in the end each is alone."""
    runs = scheduler(SimpleNamespace(prefill_step_size=2048), attempts)
    requests = begun(3, runs)
    bad = requests[1]
    running, ended = list(requests), []
    while running:
        if bad in running:
            for request in runs.failure(Failure.PASSING):
                runs.fail(request, RuntimeError())
                ended.append(request)
        else:
            runs.complete(running[0])
        running = given_out(runs)
    assert ended == [bad]
    assert runs.takes_new()


def test_a_fault_that_must_not_be_tried_again_ends_only_those_it_struck() -> None:
    runs = scheduler(SimpleNamespace(prefill_step_size=2048))
    requests = begun(3, runs)
    runs.failure(Failure.TOO_MUCH)
    assert given_out(runs) == requests[:1]
    assert runs.failure(Failure.FINAL) == requests[:1]
    assert runs.requests(RequestState.REPLAY) == requests[1:]


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (MetalTimeoutError("Caused GPU Timeout Error", code=2), Failure.PASSING),
        (MetalOutOfMemoryError("Insufficient Memory", code=8), Failure.TOO_MUCH),
        # What held up the display: only smaller pieces of work pass.
        (
            MetalInteractivityError("Impacting Interactivity", code=0xE),
            Failure.TOO_LONG,
        ),
        (MetalAccessError("Caused GPU Address Fault Error", code=0xB), Failure.FINAL),
        (RuntimeError("[malloc] Unable to allocate 1 bytes."), Failure.TOO_MUCH),
        (ValueError("of the model"), Failure.UNKNOWN),
    ],
)
def test_what_a_failure_means(error: Exception, failure: Failure) -> None:
    fault = error if isinstance(error, MetalError) else None
    assert what_it_means(fault, error) is failure


def test_one_that_mlx_lm_has_not_begun_with_loses_no_attempt(server: Server) -> None:
    """It cannot join the batch, and waits at mlx-lm until that has ended."""
    expected = server.chat("waits", seed=1, max_tokens=TOKENS).text
    server.hold(30)
    late: list[Answer] = []
    thread = threading.Thread(
        target=lambda: late.append(server.chat("waits", seed=1, max_tokens=TOKENS)),
        daemon=True,
    )
    with server.chatting(1, max_tokens=100_000) as answers:
        server.wait_held(BATCH_RUNS_S)
        thread.start()
        server.wait_for_clients(2)
        server.hold(30)
        server.go()
        server.wait_held()
        server.wait_for_requests(2)
        server.plan("decode:1:2,decode:2:2,decode:3:2")
        server.go()
    thread.join(REQUEST_TIMEOUT_S)
    assert answers[0].error["code"] == "metal_timeout"
    assert late[0].text == expected


def test_one_alone_for_which_memory_runs_out_is_a_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Full(Unlimited):
        def single_step(self, load: Load) -> SingleStep:
            return "none"

    made: Scheduler[Quiet] = Scheduler(Full(), 2, 60.0)
    (request,) = begun(1, made)
    request.produced = [5, 6]
    assert made.single_step(request, 12, reads=False) == "none"
    (line,) = caplog.records
    said = logs._Text().format(line)
    assert line.levelname == "WARNING"
    assert f"gets a 503 id={request.id} tokens=2" in said
