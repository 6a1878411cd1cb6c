"""How an answer is put together: choices, log-probabilities, roles, and failures."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest

from mlx_safe.server import logprobs
from mlx_safe.server.answers import Answer
from mlx_safe.server.asked import Asked
from mlx_safe.server.handover import Handover, Held
from support.programs import program
from support.server import CONTROLLED, NEVER, Server, eventually

PATHS: dict[str, dict[str, Any]] = {"batched": {}, "sequential": {"seed": 1}}
TOKENS = 12
IN_FLIGHT = "mlx_safe_requests_in_flight"

# The protected server, which cannot put an answer to "fail" together.
FAILING = program("cannot_frame_an_answer")


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Server]:
    with Server(tiny_model, program=CONTROLLED) as server:
        server.wait_ready()
        yield server


@pytest.fixture(scope="module")
def hasty(tiny_model: Path) -> Iterator[Server]:
    """A server that runs nothing again."""
    with Server(tiny_model, "--replay-attempts", "0", program=CONTROLLED) as server:
        server.wait_ready()
        yield server


@pytest.fixture(scope="module")
def failing(tiny_model: Path) -> Iterator[Server]:
    with Server(tiny_model, program=FAILING) as server:
        server.wait_ready()
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{server.port}/v1",
        api_key="-",
        max_retries=0,
        timeout=60,
    ) as client:
        yield client


def choices(answer: Any) -> list[dict[str, Any]]:
    """The choices of an answer by index, streamed or not: what each adds up to."""
    assert answer.status == 200, answer.body
    assert answer.error is None, answer.body
    found: dict[int, dict[str, Any]] = {}
    for event in answer.events or [answer.json]:
        for choice in event["choices"]:
            one = found.setdefault(
                choice["index"],
                {"text": "", "roles": 0, "logprobs": [], "finish": None},
            )
            message = choice.get("delta") or choice.get("message") or choice
            one["text"] += message.get("content") or message.get("text") or ""
            one["roles"] += "role" in message
            one["logprobs"] += (choice["logprobs"] or {}).get("content", [])
            assert one["finish"] is None
            one["finish"] = choice["finish_reason"]
    return [found[i] for i in range(len(found))]


def usage(answer: Any) -> dict[str, Any]:
    found: dict[str, Any] = (answer.events or [answer.json])[-1]["usage"]
    return found


def ask(server: Server, stream: bool, **more: Any) -> Any:
    if stream:
        more = {"stream": True, "stream_options": {"include_usage": True}, **more}
    return server.chat(**{"max_tokens": TOKENS, **more})


# -- what client libraries make of it ------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("n", [1, 3])
def test_the_role_is_said_once(server: Server, path: str, n: int) -> None:
    for stream in (False, True):
        answer = ask(server, stream, n=n, **PATHS[path])
        assert [choice["roles"] for choice in choices(answer)] == [1] * n


@pytest.mark.parametrize("n", [1, 4])
def test_the_openai_stream_helper(client: openai.OpenAI, n: int) -> None:
    with client.chat.completions.stream(
        model="default_model",
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=TOKENS,
        n=n,
        logprobs=True,
        top_logprobs=2,
        stream_options={"include_usage": True},
    ) as stream:
        stream.until_done()
        found = stream.current_completion_snapshot
    assert [choice.message.role for choice in found.choices] == ["assistant"] * n
    assert found.usage and found.usage.completion_tokens == n * TOKENS
    assert [choice.index for choice in found.choices] == list(range(n))
    for choice in found.choices:
        assert choice.logprobs and choice.logprobs.content
        assert len(choice.logprobs.content) == TOKENS


def test_every_event_of_a_stream_is_a_chunk(server: Server) -> None:
    answer = ask(server, True)
    assert {event["object"] for event in answer.events} == {"chat.completion.chunk"}
    assert usage(answer)["completion_tokens"] == TOKENS
    body = {"prompt": "hello", "stream": True, "max_tokens": 3}
    body["stream_options"] = {"include_usage": True}
    answer = server.post(body, "/v1/completions")
    assert {event["object"] for event in answer.events} == {"text_completion"}


# -- log-probabilities ------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("top", [0, 1, 5, 20])
def test_each_token_once_with_what_might_have_come(
    server: Server, path: str, top: int
) -> None:
    # Hot enough that tokens come which are not the most likely ones.
    more = {"temperature": 2.0, "seed": 7} if path == "sequential" else {}
    for stream in (False, True):
        answer = ask(server, stream, logprobs=True, top_logprobs=top, **more)
        (choice,) = choices(answer)
        entries = choice["logprobs"]
        assert len(entries) == usage(answer)["completion_tokens"] == TOKENS
        said = b"".join(bytes(entry["bytes"]) for entry in entries)
        assert said.decode(errors="replace").startswith(choice["text"].rstrip("\ufffd"))
        for entry in entries:
            _check_entry(entry, top)
        if more and top == 5:
            assert any(e["id"] != e["top_logprobs"][0]["id"] for e in entries)


def _check_entry(entry: dict[str, Any], top: int) -> None:
    found = [t["logprob"] for t in entry["top_logprobs"]]
    assert len(found) == top
    assert found == sorted(found, reverse=True)
    assert len({t["id"] for t in entry["top_logprobs"]}) == top
    assert all(entry["logprob"] <= found[0] for _ in found[:1])
    for other in entry["top_logprobs"]:
        assert (other["id"] == entry["id"]) <= (other["logprob"] == entry["logprob"])
    assert isinstance(entry["token"], str)


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_has_them_as_they_come(server: Server, path: str) -> None:
    answer = ask(server, True, logprobs=True, **PATHS[path])
    counts = [
        len(choice["logprobs"]["content"])
        for event in answer.events
        for choice in event["choices"]
    ]
    assert sum(counts) == TOKENS
    assert sum(count > 0 for count in counts) > 1, counts
    assert choices(answer) == choices(ask(server, False, logprobs=True, **PATHS[path]))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
def test_the_older_form(
    server: Server, client: openai.OpenAI, path: str, stream: bool
) -> None:
    body = {"prompt": "hello", "max_tokens": TOKENS, "logprobs": 3, **PATHS[path]}
    answer = server.post({**body, "stream": stream}, "/v1/completions")
    assert answer.status == 200, answer.body
    parts = [e["choices"][0]["logprobs"] for e in answer.events or [answer.json]]
    whole = {
        name: list(itertools.chain(*(part[name] for part in parts)))
        for name in parts[0]
    }
    assert {len(values) for values in whole.values()} == {TOKENS}
    for i, token in enumerate(whole["tokens"]):
        assert whole["top_logprobs"][i][token] == whole["token_logprobs"][i]
        assert 3 <= len(whole["top_logprobs"][i]) <= 4
    assert whole["text_offset"] == sorted(whole["text_offset"])
    assert whole["text_offset"][0] == 0
    # What is half a character at the end is no text for mlx-lm 0.31.
    assert whole["text_offset"][-1] <= len(answer.text) + 1
    if not stream:
        found = client.completions.create(
            model="default_model", prompt="hello", max_tokens=TOKENS, logprobs=0
        )
        assert found.choices[0].logprobs and found.choices[0].logprobs.tokens


class _Spelled:
    """A tokenizer of three tokens, which mlx-lm decodes in the way it is told."""

    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012

    def __init__(self, decoder: str, *tokens: str) -> None:
        self._detokenizer = type(decoder, (), {})()
        self._tokens = tokens

    def convert_ids_to_tokens(self, token: int) -> str | None:
        return self._tokens[token] if token < len(self._tokens) else None

    def decode(self, tokens: list[int]) -> str:
        return "".join(self._tokens[token] for token in tokens)


def _spelled(decoder: str, *tokens: str) -> Any:
    return _Spelled(decoder, *tokens)


@pytest.mark.parametrize(
    ("decoder", "token", "expected"),
    [
        ("BPEStreamingDetokenizer", "Ġtwo", b" two"),
        ("BPEStreamingDetokenizer", "âĤ", b"\xe2\x82"),
        ("SPMStreamingDetokenizer", "\u2581two", b" two"),
        ("SPMStreamingDetokenizer", "<0xE2>", b"\xe2"),
        ("SPMStreamingDetokenizer", "é", "é".encode()),
        ("NaiveStreamingDetokenizer", "Ġtwo", "Ġtwo".encode()),
    ],
)
def test_the_bytes_of_a_token(decoder: str, token: str, expected: bytes) -> None:
    names = logprobs.Names(_spelled(decoder, token))
    assert names.bytes(0) == expected
    assert names.bytes(7) == b""  # a place that no token has


def test_what_cannot_come_has_a_number_that_json_has() -> None:
    import mlx.core as mx

    values = mx.array([float("-inf"), -2.0, -1.0, float("-inf"), -1.0])
    top = logprobs.top_logprobs(values, 20, None)
    assert [t["id"] for t in top] == [2, 4, 1, 0, 3]
    assert logprobs.top_logprobs(values, 0, None) == ()
    names = logprobs.Names(_spelled("SPMStreamingDetokenizer", *"abcde"))
    entry = logprobs.Entry(0, float("-inf"), top)
    (found,) = logprobs.of_chat([entry], names)["content"]
    assert json.loads(json.dumps(found, allow_nan=False))["logprob"] == -9999.0
    assert [t["token"] for t in found["top_logprobs"]] == ["c", "e", "b", "a", "d"]


# -- more than one choice ---------------------------------------------------------


def test_each_choice_is_what_its_seed_gives(server: Server) -> None:
    more = {"temperature": 1.0, "logprobs": True}
    alone = [choices(ask(server, False, seed=5 + i, **more))[0] for i in range(3)]
    assert len({choice["text"] for choice in alone}) > 1
    for stream in (False, True):
        answer = ask(server, stream, seed=5, n=3, **more)
        assert choices(answer) == alone
        assert usage(answer)["completion_tokens"] == 3 * TOKENS
        prompt = usage(ask(server, False, seed=5))["prompt_tokens"]
        assert usage(answer)["prompt_tokens"] == prompt


@pytest.mark.parametrize("path", PATHS)
def test_what_is_drawn_is_drawn_anew(server: Server, path: str) -> None:
    """On MLX 0.31.2 all was drawn alike: by token, by choice, and by seed."""
    found = choices(ask(server, False, n=4, temperature=2.0, **PATHS[path]))
    assert len({choice["text"] for choice in found}) > 1
    again = choices(ask(server, False, n=4, temperature=2.0, **PATHS[path]))
    assert (again == found) == (path == "sequential")


@pytest.mark.parametrize("stream", [False, True])
def test_choices_run_side_by_side(server: Server, stream: bool) -> None:
    answer = ask(server, stream, n=8)
    found = choices(answer)
    assert len(found) == 8
    assert {choice["text"] for choice in found} == {ask(server, False).text}
    assert {choice["finish"] for choice in found} == {"length"}
    if stream:
        order = [c["index"] for event in answer.events for c in event["choices"]]
        assert order != sorted(order), "one came after the other"
        assert len({event["id"] for event in answer.events}) == 1


def test_choices_of_a_completion(server: Server, client: openai.OpenAI) -> None:
    found = client.completions.create(
        model="default_model", prompt="hello", max_tokens=4, n=2, seed=3, logprobs=1
    )
    assert [choice.index for choice in found.choices] == [0, 1]
    assert found.usage and found.usage.completion_tokens == 8


@pytest.mark.parametrize("n", [0, 9, -1, 1.5, "2", True, [2]])
def test_a_number_of_choices_that_is_none(server: Server, n: Any) -> None:
    answer = server.chat(n=n)
    assert answer.status == 400
    assert "n must be" in answer.error["message"]


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_a_seed_that_is_none(server: Server, seed: int) -> None:
    assert server.chat(seed=seed, n=2).status == 400
    assert len(choices(server.chat(seed=(1 << 64) - 1, n=2))) == 2


def test_no_number_of_choices_is_one(server: Server) -> None:
    assert len(choices(server.chat(n=None))) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_choices_count_as_one_answer(server: Server, stream: bool) -> None:
    before = server.metric("mlx_safe_requests_total")
    ask(server, stream, n=4)
    assert eventually(lambda: server.metric("mlx_safe_requests_total") > before)
    assert server.metric("mlx_safe_requests_total") == before + 1


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_all_choices(
    server: Server, path: str, stream: bool
) -> None:
    requests = "mlx_safe_requests_total"
    before = server.metric(requests, outcome="client_left")
    disconnects = server.disconnects
    body = {
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 100_000,
        "n": 3,
        "stream": stream,
        **PATHS[path],
    }
    with server.connected(body):
        server.wait_for_requests(3 if path == "batched" else 1)
        time.sleep(0.3)
    server.wait_for_log("outcome=client_left", disconnects + 1)
    assert eventually(lambda: server.metric(IN_FLIGHT) == 0, 30), server.log
    assert ask(server, stream).status == 200
    assert server.disconnects == disconnects + 1
    assert server.metric(requests, outcome="client_left") == before + 1


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_choice_that_fails_ends_the_answer(
    hasty: Server, path: str, stream: bool
) -> None:
    # The request of another test is counted when its client has the answer.
    assert eventually(lambda: hasty.metric(IN_FLIGHT) == 0, 30), hasty.log
    before = hasty.metric("mlx_safe_requests_total")
    hasty.plan("decode:5")
    answer = ask(hasty, stream, n=3, **PATHS[path])
    if stream and answer.status == 200:
        assert answer.done
    else:
        assert answer.status == 503
    assert answer.error["code"].startswith("metal_")
    assert eventually(lambda: hasty.metric(IN_FLIGHT) == 0, 30), hasty.log
    # Counted when its last byte is sent, which is after it has left the flight.
    counted = "mlx_safe_requests_total"
    assert eventually(lambda: hasty.metric(counted) == before + 1), hasty.log
    hasty.plan(f"decode:{NEVER}")
    assert len(choices(ask(hasty, stream, n=3, **PATHS[path]))) == 3


@pytest.mark.parametrize("path", PATHS)
def test_a_fault_is_not_seen_in_choices(server: Server, path: str) -> None:
    more = {"n": 3, "logprobs": True, **PATHS[path]}
    calm = choices(ask(server, True, **more))
    replays = server.metric("mlx_safe_replays_total")
    server.plan("decode:5")
    found = choices(ask(server, True, **more))
    server.plan(f"decode:{NEVER}")
    assert server.metric("mlx_safe_replays_total") > replays
    assert [c["text"] for c in found] == [c["text"] for c in calm]
    assert [len(c["logprobs"]) for c in found] == [TOKENS] * 3


# -- what goes wrong here ---------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_is_told_logged_and_counted(
    failing: Server, path: str, stream: bool
) -> None:
    code = "internal_generation_error"
    failures = f'mlx_safe_generation_failures_total{{code="{code}"}}'
    requests = "mlx_safe_requests_total"
    before = failing.metric(failures), failing.metric(requests, code=code)
    told = failing.log.count("could not be put together")
    with failing.chatting(2, max_tokens=60, stream=True, **PATHS[path]) as others:
        answer = ask(failing, stream, stop="fail", **PATHS[path])
    assert answer.error["code"] == code
    assert answer.done if answer.events else answer.status == 500
    assert [a.status for a in others] == [200, 200]
    assert all(a.done and a.error is None for a in others)
    failing.wait_for_log("could not be put together", told + 1)
    failing.wait_for_log("LookupError", told + 1)
    assert ", in send" in failing.log  # the traceback
    assert "secret" not in failing.log
    after = failing.metric(failures), failing.metric(requests, code=code)
    assert after == (before[0] + 1, before[1] + 1)


# -- calls in a row, with no model --------------------------------------------------


class _Written:
    """A handler that keeps what is written."""

    def __init__(self, stream: bool, said: list[tuple[str | None, str]]) -> None:
        self.stream = stream
        self.n = 1
        self.body: dict[str, Any] = {}
        self.stream_options = None
        self.connection = None
        self.held = Held(Handover(None), 0, None)
        self.heard = lambda: None
        self.request_id, self.path = "chatcmpl-1", "/v1/chat/completions"
        self.frames: list[Any] = []
        self.wfile = SimpleNamespace(write=self._write, flush=lambda: None)
        watch = contextlib.nullcontext(SimpleNamespace(request=None))
        self.current_exchange = SimpleNamespace
        self.response_generator = SimpleNamespace(
            answer=lambda *_: self._answer(said),
            disconnects=SimpleNamespace(watching=lambda *_: watch),
        )

    def _answer(self, said: list[tuple[str | None, str]]) -> tuple[Any, Any]:
        import mlx_lm.tool_parsers.json_tools as parser

        tokenizer = SimpleNamespace(tool_call_start="<t>", tool_call_end="</t>")
        context = SimpleNamespace(
            prompt=[1],
            prompt_cache_count=0,
            tokenizer=tokenizer,
            tool_parser=parser.parse_tool_call,
            stop=lambda: None,
        )
        responses = [
            SimpleNamespace(state=state, text=text, token=i, finish_reason=None)
            for i, (state, text) in enumerate(said)
        ]
        return context, iter(responses)

    def _write(self, data: bytes) -> None:
        if data.startswith(b"data: {"):
            self.frames.append(json.loads(data[len("data: ") :]))

    def _set_stream_headers(self, status: int) -> None:
        assert status == 200

    def end_headers(self) -> None:
        pass

    def generate_response(self, *_: Any) -> dict[str, Any]:
        return {}

    def send_json(self, status: int, body: Any) -> None:
        assert status == 200
        self.frames.append(body)


GOOD = '{"id": "x", "name": "a", "arguments": {}}'


def _put_together(stream: bool, *said: tuple[str | None, str]) -> tuple[Any, ...]:
    """(content, names of the calls, their ids, why it ended)."""
    handler: Any = _Written(stream, list(said))
    request = SimpleNamespace(request_type="chat", tools=None)
    wanted = SimpleNamespace(logprobs=False, top_logprobs=-1, seed=None, stop_words=[])
    Answer(handler, Asked(request, wanted, None)).send()
    found = [frame["choices"][0] for frame in handler.frames]
    messages = [choice.get("delta") or choice.get("message") or {} for choice in found]
    calls = [call for m in messages for call in m.get("tool_calls", ())]
    if stream:
        assert [call["index"] for call in calls] == list(range(len(calls)))
    text = "".join(m.get("content") or "" for m in messages)
    names = [call["function"]["name"] for call in calls]
    return text, names, [c["id"] for c in calls], found[-1]["finish_reason"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_good_call_and_a_bad_one(stream: bool) -> None:
    good, bad = ("tool", GOOD), ("tool", '{"name": ')
    between = ("normal", " and ")
    assert _put_together(stream, ("normal", "One"), good, between, bad, between) == (
        'One and <t>{"name": </t> and ',
        *(["a"], ["x"], "tool_calls"),
    )
    assert _put_together(stream, bad, ("normal", ""), good, ("normal", "!")) == (
        '<t>{"name": </t>!',
        *(["a"], ["x"], "tool_calls"),
    )
    assert _put_together(stream, bad, ("normal", ""), bad, (None, "")) == (
        '<t>{"name": </t><t>{"name": ',
        *([], [], "stop"),
    )


@pytest.mark.parametrize("stream", [False, True])
def test_two_calls_have_two_ids(stream: bool) -> None:
    call = ("tool", GOOD)
    text, names, ids, finish = _put_together(
        stream, call, ("normal", ""), call, ("normal", "")
    )
    assert (text, names, finish) == ("", ["a", "a"], "tool_calls")
    assert ids[0] == "x" != ids[1]


@pytest.mark.parametrize("path", PATHS)
def test_log_probabilities_that_nobody_asked_for_are_waited_for_by_nobody(
    tiny_model: Path, path: str
) -> None:
    """To read one waits for the step after it: nothing would run beside the model."""
    with Server(tiny_model, program=program("tells_of_waits")).wait_ready() as server:

        def waits(**more: Any) -> int:
            before = server.log.count("waits\n")
            assert ask(server, True, **more, **PATHS[path]).status == 200
            return server.log.count("waits\n") - before

        waits()
        # The sequential path reads each token so as well.
        limit = 2 * TOKENS if path == "sequential" else TOKENS
        assert waits() < limit
        assert waits(logprobs=True) >= limit
