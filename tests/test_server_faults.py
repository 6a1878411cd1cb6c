"""The real mlx_lm.server in a child process, with faults injected.

Every combination of path, phase, streaming and number of clients; after each
the answer, the end of the stream, /health and the next request are checked. The
stock server's fate under the same fault stands beside it.
"""

from __future__ import annotations

import contextlib
import json
import select
import signal
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from mlx_safe._mlx_versions import parse_version
from mlx_safe.server.backoff import Backoff
from support.programs import program
from support.server import (
    CONTROLLED,
    REFUSING,
    REQUEST_TIMEOUT_S,
    Answer,
    Server,
    eventually,
)

# What clients get when a request is not run again; test_server_replay.py has
# the rest.
NO_REPLAY = ("--replay-attempts", "0")
SEQUENTIAL = {"seed": 1}  # mlx-lm serves a request with a seed by itself
TOKENS = 24


# (text of the request, batched or sequential) -> what a server without any
# fault answers. The paths may differ in the end of a cut character (0.31.3).
Texts = dict[tuple[str, str], str]
PATHS: dict[str, dict[str, int]] = {"batched": {}, "sequential": SEQUENTIAL}


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path) -> Texts:
    with Server(tiny_model).wait_ready() as server:
        texts = {
            (text, path): server.chat(text, max_tokens=TOKENS, **more).text
            for text in (f"hello from client {i}" for i in range(3))
            for path, more in PATHS.items()
        }
    assert len(set(texts.values())) >= 3
    assert all(texts.values())
    return texts


@pytest.fixture(scope="module")
def one_without_replay(tiny_model: Path) -> Iterator[Server]:
    with Server(tiny_model, *NO_REPLAY, program=CONTROLLED).wait_ready() as server:
        yield server


@pytest.fixture
def without_replay(one_without_replay: Server) -> Server:
    """A server that tests share, as good as new."""
    return one_without_replay.renew()


def assert_told(answer: Answer, code: str, status: int = 503) -> None:
    """The answer is the contract's, as a stream or not."""
    assert answer.broken is None
    error = answer.error
    assert error["code"] == code
    assert error["param"] is None
    assert "Traceback" not in answer.body
    if answer.events:
        assert answer.status == 200
        assert answer.done
        event = answer.events[-1]
        assert event["object"] == "error"
        assert {"id", "model", "created"} <= set(event)
    else:
        assert answer.status == status
    if status == 503:
        assert error["retry_after"] == 5
        if not answer.events:
            assert answer.headers["retry-after"] == "5"


def assert_serves(server: Server, undisturbed: Texts) -> None:
    """Healthy, and the next requests are answered as if nothing had been."""
    assert server.is_well()
    for (text, path), expected in undisturbed.items():
        assert server.chat(text, max_tokens=TOKENS, **PATHS[path]).text == expected
    assert server.process.poll() is None


def struck(server: Server, plan: str, clients: int, **more: Any) -> list[Answer]:
    """The answers of so many clients, whose generation ``plan`` strikes."""
    with server.chatting(clients, max_tokens=100_000, **more) as answers:
        # The sequential path takes them one by one.
        server.wait_for_requests(1 if "seed" in more else clients)
        server.wait_for_clients(clients)
        # The server may be gone before it could say that it has the plan.
        server.hold(1)
        server.wait_held()
        server.plan(plan)
        server.go()
    return answers


@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("phase", ["prefill:1", "decode:9"])
@pytest.mark.parametrize("path", ["batched", "sequential"])
def test_fault(
    without_replay: Server,
    undisturbed: Texts,
    path: str,
    phase: str,
    stream: bool,
    clients: int,
) -> None:
    server = without_replay
    server.plan(f"{phase}:8")
    more = {"max_tokens": TOKENS, "stream": stream, **PATHS[path]}
    answers = server.chats(clients, **more)
    assert len(answers) == clients
    failed = [a for a in answers if a.error]
    assert failed
    for answer in failed:
        assert_told(answer, "metal_out_of_memory")
    for answer in answers:
        if answer not in failed:
            assert answer.text in undisturbed.values()
    if path == "sequential":
        assert len(failed) == 1
    assert_serves(server, undisturbed)
    assert "Traceback" not in server.log
    server.wait_for_log("fault of the GPU")
    assert server.log.count("fault of the GPU") == 1


@pytest.mark.parametrize(
    ("plan", "code", "status"),
    [
        ("any:1:8", "metal_out_of_memory", 503),
        ("any:1:0:once:bug", "internal_generation_error", 500),
    ],
)
def test_all_of_a_batch_are_told(
    without_replay: Server, undisturbed: Texts, plan: str, code: str, status: int
) -> None:
    for answer in struck(without_replay, plan, 3):
        assert_told(answer, code, status)
    assert_serves(without_replay, undisturbed)


@pytest.mark.parametrize("path", ["batched", "sequential"])
def test_stock_server_without_us(tiny_model: Path, path: str) -> None:
    """The other side of the proof: the same fault, without mlx-safe."""
    ask = {"max_tokens": TOKENS, "stream": True, **PATHS[path]}
    server = Server(tiny_model, inject="decode:9:8", stock=True).wait_ready()
    # Where the first client waits for ever, its answer ends with the server.
    with server.chatting(1, **ask) as answers, server:
        server.wait_for_log("Insufficient Memory")
        if path == "batched":
            assert server.chat(timeout=4).status != 200
        else:
            assert server.chat().status == 200
    (answer,) = answers
    assert answer.error is None
    assert not answer.done


def test_a_fault_that_mlx_swallowed(without_replay: Server, undisturbed: Texts) -> None:
    server = without_replay
    faults = server.metric("mlx_safe_faults_total")
    server.plan("decode:9:8:once:record,decode:20:2:once:record")
    assert_told(server.chat(max_tokens=TOKENS), "metal_out_of_memory")
    more = {"max_tokens": TOKENS, "stream": True, **SEQUENTIAL}
    assert_told(server.chat(**more), "metal_timeout")
    assert_serves(server, undisturbed)
    assert server.metric("mlx_safe_faults_total") == faults + 2


def test_each_code_has_its_answer(without_replay: Server, undisturbed: Texts) -> None:
    expected = [
        (0x2, 503, "metal_timeout"),
        (0x3, 503, "metal_hang"),
        (0x5, 503, "metal_innocent_victim"),
        (0x6, 503, "metal_background_not_permitted"),
        (0x7, 503, "metal_error"),
        (0x8, 503, "metal_out_of_memory"),
        (0x9, 500, "internal_generation_error"),
        (0xA, 500, "internal_generation_error"),
        (0xB, 500, "internal_generation_error"),
        (0xE, 503, "metal_interactivity"),
        (0x10, 500, "internal_generation_error"),
        (0x11, 500, "internal_generation_error"),
    ]
    kind = {503: "resource_exhausted_error", 500: "internal_server_error"}
    for number, status, code in expected:
        without_replay.plan(f"decode:1:{number}")
        answer = without_replay.chat()
        assert_told(answer, code, status)
        assert answer.error["type"] == kind[status]
        assert without_replay.chat().status == 200
    assert_serves(without_replay, undisturbed)


def test_a_lasting_fault_kills_nothing(tiny_model: Path) -> None:
    with Server(
        tiny_model, *NO_REPLAY, inject="decode:1:8:persistent", program=REFUSING
    ).wait_ready() as server:
        codes = []
        for stream in (False, True) * 4:
            for more in PATHS.values():
                answer = server.chat(stream=stream, **more)
                codes.append(answer.error["code"])
                assert_told(answer, codes[-1])
        # After so many in a row it no longer tries, and says so.
        assert codes == ["metal_out_of_memory"] * 12 + ["unavailable"] * 4
        health = server.get("/health")
        assert health.status == 503
        assert "12 times in a row" in health.json["reason"]
        server.process.send_signal(signal.SIGUSR1)  # the hour passes
        assert eventually(lambda: server.get("/health").status == 200)
        assert_told(server.chat(), "metal_out_of_memory")
        assert server.log.count("faults in a row: new requests are refused") == 1
        assert server.process.poll() is None


def test_a_card_that_always_fails_does_not_fill_the_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mlx_safe.server.backoff.time.sleep", lambda _: None)
    found = Backoff()
    told = [n for n in range(1, 200) if found.fault(tokens=0) and found.is_told]
    assert told == [12, 24, 48, 96, 192]


def bad_stop(server: Server, timeout: float) -> Answer:
    return server.chat(stop=[1], timeout=timeout)


def cached_prompt(server: Server, timeout: float) -> Answer:
    """Asks for an earlier prompt with its whole answer, token by token the same."""
    path = "/v1/completions"
    for i in range(100):
        prompt = f"abc {i}"
        first = server.post({"prompt": prompt, "max_tokens": 3}, path)
        text = first.json["choices"][0]["text"]
        if len(text) == 3 and text.isascii():
            break
    return server.post({"prompt": prompt + text, "max_tokens": 3}, path, timeout)


def xtc(server: Server, timeout: float) -> Answer:
    more = {"xtc_probability": 1.0, "xtc_threshold": 0.01, "temperature": 1.0}
    return server.chat(timeout=timeout, **more)


# Requests, the status of our answer, and whether the stock server dies of them.
OLD = parse_version(version("mlx-lm")) < (0, 32)
KILLERS = {
    "bad-stop": (bad_stop, 400, True),
    "cached-prompt": (cached_prompt, 200, True),
    "xtc": (xtc, 400 if OLD else 200, OLD),
}


class TestOtherFailures:
    """Failures that have nothing to do with the GPU."""

    @pytest.mark.parametrize("more", [{}, SEQUENTIAL], ids=["batched", "sequential"])
    @pytest.mark.parametrize(
        ("step", "stream"),
        [("prefill:1", False), ("decode:9", False), ("decode:9", True)],
    )
    def test_a_bug(
        self,
        without_replay: Server,
        undisturbed: Texts,
        more: dict[str, int],
        step: str,
        stream: bool,
    ) -> None:
        without_replay.plan(f"{step}:0:once:bug")
        answer = without_replay.chat(max_tokens=TOKENS, stream=stream, **more)
        assert_told(answer, "internal_generation_error", 500)
        assert answer.error["type"] == "internal_server_error"
        assert "injected" not in answer.body
        assert_serves(without_replay, undisturbed)

    @pytest.mark.parametrize("name", KILLERS)
    def test_what_kills_the_stock_server_without_any_fault(
        self, tiny_model: Path, undisturbed: Texts, name: str
    ) -> None:
        ask, status, _ = KILLERS[name]
        with Server(tiny_model).wait_ready() as server:
            answer = ask(server, REQUEST_TIMEOUT_S)
            assert answer.status == status
            if status != 200:
                assert answer.error["code"] == "invalid_request"
                assert answer.error["param"] in ("stop", "xtc_probability")
            assert_serves(server, undisturbed)

    @pytest.mark.parametrize("name", [name for name in KILLERS if KILLERS[name][2]])
    def test_it_kills_the_stock_server(self, tiny_model: Path, name: str) -> None:
        with Server(tiny_model, stock=True).wait_ready() as server:
            assert KILLERS[name][0](server, 4).status != 200
            server.wait_for_log("Traceback")
            assert server.chat(timeout=4).status != 200

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            (b"{", None),
            (b"\xff\xfe", None),
            (b"[]", None),
            ({}, "messages"),
            ({"messages": [], "max_tokens": 1}, "messages"),
            ({"messages": [{"role": "user", "content": "x"}], "top_p": 7}, "top_p"),
            (
                {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
                "messages",
            ),
            ({"messages": 7}, "messages"),
            (
                {
                    "messages": [{"role": "user", "content": "x"}],
                    "stream": True,
                    "stream_options": 5,
                },
                "stream_options",
            ),
            # llama.cpp's word for any seed; MLX takes 64 bits without a sign.
            ({"messages": [{"role": "user", "content": "x"}], "seed": -1}, "seed"),
            ({"messages": [{"role": "user", "content": "x"}], "seed": 1 << 64}, "seed"),
        ],
    )
    def test_bad_requests(
        self, shared_server: Server, body: object, param: str | None
    ) -> None:
        answer = shared_server.post(body)
        assert answer.broken is None
        assert answer.status == 400
        error = answer.error
        assert error.pop("message")
        assert error == {
            "type": "invalid_request_error",
            "param": param,
            "code": "invalid_request",
        }
        assert shared_server.chat().status == 200
        assert "Traceback" not in shared_server.log

    def test_stream_options_need_not_say_all(self, shared_server: Server) -> None:
        """mlx-lm's own server fails there, when the whole answer is out."""
        answer = shared_server.chat(stream=True, stream_options={})
        assert answer.status == 200 and answer.error is None
        assert answer.done and answer.text

    def test_an_unknown_model_is_a_404(self, shared_server: Server) -> None:
        answer = shared_server.chat(model="/no/such/model")
        assert answer.status == 404
        assert answer.error["code"] == "model_not_found"
        assert shared_server.chat().status == 200

    def test_unknown_paths(self, shared_server: Server) -> None:
        assert shared_server.get("/nothing").status == 404
        assert shared_server.post({}, path="/nothing").status == 404
        assert shared_server.get("/v1/models").status == 200


@pytest.fixture(scope="module")
def shared_server(tiny_model: Path) -> Iterator[Server]:
    with Server(tiny_model).wait_ready() as server:
        yield server


class TestStopping:
    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
    @pytest.mark.parametrize("path", PATHS)
    def test_sigterm_answers_and_ends(
        self, tiny_model: Path, path: str, stream: bool
    ) -> None:
        server = Server(tiny_model).wait_ready()
        ask = {"max_tokens": 100_000, "stream": stream, **PATHS[path]}
        with server.chatting(1, **ask) as answers:
            server.wait_for_requests(1)
            assert server.stop() == 0
        assert_told(answers[0], "unavailable")
        assert "ERROR" not in server.log
        assert "Traceback" not in server.log


class TestHostileRequests:
    def test_a_bias_beyond_the_vocabulary(self, shared_server: Server) -> None:
        answer = shared_server.chat(logit_bias={"99999999": 5})
        assert answer.status == 400
        assert "there is no token" in answer.error["message"]
        assert shared_server.chat().status == 200

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("prompt", ["", ["one", "two"], [1, 2], None])
    def test_a_prompt_that_is_none(
        self, shared_server: Server, prompt: object, path: str
    ) -> None:
        """It is told so, and nobody else's state is reset for it."""
        resets = shared_server.metric("mlx_safe_resets_total")
        body = {"prompt": prompt, "max_tokens": 4, **PATHS[path]}
        answer = shared_server.post(body, "/v1/completions")
        assert answer.status == 400
        assert answer.error["code"] == "invalid_request"
        assert shared_server.metric("mlx_safe_resets_total") == resets

    @pytest.mark.parametrize("path", PATHS)
    def test_no_tokens_wanted(self, shared_server: Server, path: str) -> None:
        resets = shared_server.metric("mlx_safe_resets_total")
        answer = shared_server.chat(max_tokens=0, **PATHS[path])
        assert answer.status in (200, 400)  # mlx-lm 0.32 refuses it
        assert shared_server.metric("mlx_safe_resets_total") == resets

    def test_deep_nesting(self, shared_server: Server) -> None:
        deep = "[" * 700 + "]" * 700
        body = f'{{"messages": [{{"role": "user", "content": "x", "y": {deep}}}]}}'
        answer = shared_server.post(body.encode())
        assert answer.broken is None
        assert shared_server.chat().status == 200

    def test_models_without_a_hub_cache(self, tiny_model: Path, tmp_path: Path) -> None:
        with Server(tiny_model, env={"HF_HOME": str(tmp_path)}).wait_ready() as server:
            listed = server.get("/v1/models").json["data"]
            assert [m["id"] for m in listed] == [str(tiny_model)]
            assert "Traceback" not in server.log

    def test_the_first_model_is_gone(self, tiny_model: Path, tmp_path: Path) -> None:
        """mlx-lm would load it again after each failure."""
        import shutil

        first = shutil.copytree(tiny_model, tmp_path / "first")
        # The second chat's: each has eight.
        with Server(first, inject="decode:12:0:once:bug").wait_ready() as server:
            other = {"model": str(tiny_model)}
            assert server.chat(**other).status == 200
            shutil.rmtree(first)
            assert server.chat(**other).status == 500
            assert server.chat(**other).status == 200


# The protected server, which gives its clients as long as a slow machine may take. It
# prints a line each time that it looks whether they are served.
PATIENT = program("waits_for_its_clients")


class TestFatalFaults:
    def test_who_was_accepted_is_answered_and_nobody_else_is_accepted(
        self, tiny_model: Path
    ) -> None:
        ask = ("POST", "/v1/chat/completions")
        body = json.dumps({"messages": [{"role": "user", "content": "x"}]})
        with (
            Server(tiny_model, inject="decode:1:4", program=PATIENT) as server,
            contextlib.closing(server.wait_ready().connect()) as slow,
        ):
            # It is accepted by now: the next one is.
            assert server.get("/health").status == 200
            assert_told(server.chat(), "metal_device_lost")
            with contextlib.closing(server.connect()) as late:
                late.request(*ask, body)
                waits = server.log.count("it waits")
                server.wait_for_log("it waits", waits + 30)
                # With a supervisor the next server has it.
                assert select.select([late.sock], [], [], 0)[0] == []
            slow.request(*ask, body)
            answer = slow.getresponse()
            assert answer.status == 503
            assert answer.headers["Retry-After"] == "5"
            assert server.wait() == 75

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("clients", [1, 3])
    def test_code_4_answers_everyone_and_leaves(
        self, tiny_model: Path, path: str, clients: int
    ) -> None:
        with Server(tiny_model, program=CONTROLLED).wait_ready() as server:
            for answer in struck(server, "any:1:4", clients, **PATHS[path]):
                assert_told(answer, "metal_device_lost")
            assert server.wait() == 75

    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
    def test_terminate_answers_everyone_and_leaves(
        self, tiny_model: Path, private_reports: Path, stream: bool
    ) -> None:
        with Server(tiny_model, program=CONTROLLED).wait_ready() as server:
            plan = "any:1:8:once:terminate"
            for answer in struck(server, plan, 3, stream=stream):
                assert_told(answer, answer.error["code"])
            assert server.wait() == 75
        (report,) = private_reports.glob("*.json")
        told = json.loads(report.read_text())
        assert told["why"] == "terminate"
        # None of them was answered before the report was written.
        assert len(told["requests"]) == 3


def test_a_client_that_leaves_is_one_quiet_line(
    tiny_model: Path, undisturbed: Texts
) -> None:
    with Server(tiny_model).wait_ready() as server:
        messages = [{"role": "user", "content": "x"}]
        body = {"messages": messages, "max_tokens": 100_000, "stream": True}
        with server.connected(body) as s:
            assert s.recv(100)
        server.wait_for_log("outcome=client_left")
        assert_serves(server, undisturbed)
        assert server.log.count("outcome=client_left") == 1
        assert "Traceback" not in server.log
        assert "mlx_safe_requests_in_flight 0.0\n" in server.get("/metrics").body


def test_metrics_speak_prometheus(tiny_model: Path) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    with Server(tiny_model, *NO_REPLAY, inject="decode:1:8").wait_ready() as server:
        server.chat()
        server.chat()
        # An answer is counted when it has been sent.
        assert eventually(lambda: server.metric("mlx_safe_requests_total") == 2)
        answer = server.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    families = list(text_string_to_metric_families(answer.body))
    values = {
        (s.name, *s.labels.values()): s.value for f in families for s in f.samples
    }
    assert values["mlx_safe_requests_total", "", "ok", "200"] == 1
    assert (
        values["mlx_safe_requests_total", "metal_out_of_memory", "failed", "503"] == 1
    )
    assert values["mlx_safe_generation_failures_total", "metal_out_of_memory"] == 1
    assert values["mlx_safe_resets_total",] == 1
    assert values["mlx_safe_ready",] == 1
    types = {f.name: f.type for f in families}
    assert types["mlx_safe_ready"] == "gauge"
    assert types["mlx_safe_prompt_cache_bytes"] == "gauge"
    for name in ("faults", "faults_dropped", "memory_refused", "resets"):
        assert types[f"mlx_safe_{name}"] == "counter"
    for how in ("written", "failed", "suppressed"):
        assert types[f"mlx_safe_reports_{how}"] == "counter"


@pytest.mark.real_model
def test_the_real_model_through_the_openai_client(real_model: Path) -> None:
    import openai

    question = [{"role": "user", "content": "What is the capital of France?"}]
    with Server(real_model, *NO_REPLAY, inject="decode:4:8").wait_ready() as server:
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{server.port}/v1", api_key="-", max_retries=0
        )
        ask: Any = {"model": "default_model", "messages": question, "max_tokens": 8}
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(**ask)
        assert caught.value.status_code == 503
        assert caught.value.code == "metal_out_of_memory"
        assert caught.value.response.headers["retry-after"] == "5"
        answer = client.chat.completions.create(**ask)
        assert "Paris" in answer.choices[0].message.content
