"""What no request may do: kill, wait, or get anything but its answer or a 400."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from support.bad_requests import CHAT, TEXT, Case, cases
from support.programs import program
from support.server import Answer, Server

PATHS: dict[str, dict[str, Any]] = {"batched": {}, "sequential": {"seed": 1}}
# Of exceptions that nobody expected.
EXCEPTIONS = re.compile(
    r"Error|object has no|Traceback|unhashable|out of range|NoneType|takes \d"
)
REFUSED = [case for case in cases() if case.refused]
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Server]:
    with Server(tiny_model).wait_ready() as server:
        yield server


@pytest.fixture
def undisturbed(server: Server) -> Iterator[None]:
    """What happens in the test costs nobody else anything."""
    ask = {"text": "an innocent", "max_tokens": 300, "stream": True}
    alone = server.chat(**ask).text
    resets = server.metric("mlx_safe_resets_total")
    answers: list[Answer] = []
    stop = threading.Event()

    def keep_asking() -> None:
        while not stop.is_set() or not answers:
            answers.append(server.chat(**ask))

    thread = threading.Thread(target=keep_asking, daemon=True)
    thread.start()
    yield
    stop.set()
    thread.join(60)
    assert not thread.is_alive()
    assert {answer.text for answer in answers} == {alone}
    assert server.metric("mlx_safe_resets_total") == resets
    assert server.process.poll() is None
    assert "Traceback" not in server.log and " ERROR " not in server.log


def assert_refused(answer: Answer, param: str | None) -> None:
    assert answer.broken is None
    assert answer.status == 400
    assert answer.headers["content-type"] == "application/json"
    error = dict(answer.error)
    message = error.pop("message")
    assert error == {
        "type": "invalid_request_error",
        "param": param,
        "code": "invalid_request",
    }
    assert message and "\n" not in message and not EXCEPTIONS.search(message)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_every_field_with_every_bad_value(
    server: Server, undisturbed: None, path: str, stream: bool
) -> None:
    wrong = []
    for case in REFUSED:
        answer = server.post(case.also(**PATHS[path], stream=stream), case.path)
        # What is too deep, too wide or no JSON at all is about no field.
        about_all = case.field in ("(body)", "x") or case.kind == "wide"
        param = None if about_all else case.field
        try:
            assert_refused(answer, param)
        except AssertionError as e:
            wrong.append(f"{case.id}: {answer.status} {answer.body[:200]} ({e})"[:400])
    assert not wrong, "\n".join(wrong)


def odd_cases() -> list[Case]:
    """Few of those of which each is a sampler of its own, compiled for a second."""
    sampled = ("top_k:odd 1000000", "xtc_threshold:odd 0.6", "temperature:odd 1e-300")
    found = [case for case in cases() if not case.refused]
    return [x for x in found if x.kind == "null" or x.id.endswith(sampled)]


@pytest.mark.parametrize("path", PATHS)
def test_null_and_what_samplers_cannot_take(
    server: Server, undisturbed: None, path: str
) -> None:
    def ask(case: Case) -> Answer:
        return server.post(case.also(**PATHS[path]), case.path)

    wrong = []
    found = odd_cases()
    # One by one, each would wait for most of the innocent's answer.
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, found))
    for case, answer in zip(found, answers, strict=True):
        # XTC fails in mlx-lm 0.31.3, whatever is asked of it, and is refused.
        expected = (200, 400) if "odd" in case.kind else (200,)
        if answer.status not in expected:
            wrong.append(f"{case.id}: {answer.status} {answer.body[:300]}")
        elif answer.status == 400:
            assert answer.error["param"] == "xtc_probability"
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", PATHS)
def test_top_k_past_the_vocabulary_keeps_everything(server: Server, path: str) -> None:
    if not PATHS[path]:
        assert server.chat(temperature=1, top_k=10**6).status == 200
        return
    ask = {"temperature": 1.0, "seed": 7, "max_tokens": 20}
    whole = server.chat(**ask).text
    assert server.chat(**ask, top_k=10**6).text == whole
    assert server.chat(**ask, top_k=-1).text == whole


def choices(answer: Answer) -> list[Any]:
    return [part["choices"] for part in answer.events or [answer.json]]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_null_is_absent(server: Server, stream: bool) -> None:
    names = ["model", "max_tokens", "temperature", "top_p", "logprobs", "seed"]
    names += ["presence_penalty", "frequency_penalty", "stop", "tools", "n", "user"]
    names += ["tool_choice", "response_format", "stream_options", "logit_bias"]
    nothing = dict.fromkeys(names)
    body = {"messages": HELLO, "max_completion_tokens": 8, "stream": stream}
    with_nulls, without = server.post({**body, **nothing}), server.post(body)
    assert with_nulls.status == without.status == 200
    assert choices(with_nulls) == choices(without)


def test_what_real_clients_send_is_accepted(server: Server) -> None:
    """Fields that change nothing, and parts of messages as coding agents have them."""
    function = {"name": "f", "arguments": '{"a": 1}'}
    call = {"id": "1", "type": "function", "function": function}
    body = {
        "model": "default_model",
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
            {"role": "user", "content": "hello", "name": "me"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "42", "name": "f"},
            {"role": "assistant", "content": "42", "refusal": None, "reasoning": "x"},
            {"role": "user", "content": [{"type": "text", "text": "more"}]},
        ],
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "f",
                    "description": "",
                    "strict": False,
                    "parameters": {"type": "object", "properties": {}},
                },
            },
            {"type": "function", "function": {"name": "without_parameters"}},
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "store": False,
        "user": "u",
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "n": 1,
        "prompt_cache_key": "k",
        "response_format": {"type": "text"},
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_completion_tokens": 4,
        "something_new": {"x": [1, None]},
    }
    answer = server.post(body)
    assert answer.status == 200 and answer.done and answer.error is None
    body = {"prompt": ["one"], "max_tokens": 2, "echo": False, "best_of": 1}
    assert server.post({**body, "suffix": None}, TEXT).status == 200
    # The mark that Windows' editors put before a text.
    marked = b"\xef\xbb\xbf" + json.dumps({"messages": HELLO, "max_tokens": 1}).encode()
    assert server.post(marked).status == 200


ARGUMENTS = {
    "cut short": '{"path": "/etc/ho',
    "an object": {"path": "/etc/hosts"},
    "nothing": "",
    "null": None,
    "a number": "5",
    "a list": [1, 2],
    "not finite": '{"x": 1e999}',
    "deep": "[" * 200,
    "half a character": '"\\ud83d"',
    "text": "rm -rf build",
}


@pytest.mark.parametrize("path", PATHS)
def test_a_history_that_no_template_can_render_goes_on(
    scripted_model: Path, path: str
) -> None:
    """The client sends it back for ever; mlx-lm parses it, its template walks it."""
    with Server(scripted_model).wait_ready() as server:
        for arguments in ARGUMENTS.values():
            function = {"name": "f", "arguments": arguments}
            answer = server.post(
                {
                    "messages": [
                        *HELLO,
                        {"role": "assistant", "tool_calls": [{"function": function}]},
                        {"role": "tool", "content": "x"},
                        {"role": "assistant", "function_call": function},
                        {"role": "function", "name": "f", "content": "x"},
                    ],
                    "max_tokens": 2,
                    **PATHS[path],
                }
            )
            assert answer.status == 200, (arguments, answer.body)
        assert "Traceback" not in server.log


def test_what_is_left_of_arguments() -> None:
    from mlx_safe.server.messages import readable_arguments

    assert readable_arguments('{"a": [1, "é"]}') == '{"a": [1, "é"]}'
    assert readable_arguments({"a": 1}) == '{"a": 1}'
    assert readable_arguments(" ") == "{}"
    cut = json.loads(readable_arguments('{"path": "/etc/ho'))
    assert cut == {"INVALID_JSON": '{"path": "/etc/ho'}
    assert json.loads(readable_arguments("[1]")) == {"INVALID_JSON": "[1]"}


def test_a_bad_request_does_not_wait_for_the_thread_that_generates(
    server: Server,
) -> None:
    """Beside a step that holds; a bias beyond the vocabulary is known as well."""
    ask = {"messages": HELLO, "max_tokens": 100_000, "stream": True}
    with server.stream(ask) as lines:
        next(line for line in lines if line.startswith(b"data"))
        for bad in ({"temperature": "x"}, {"logit_bias": {"99999": 1}}):
            times = []
            for _ in range(20):
                begun = time.monotonic()
                assert server.chat(**bad).status == 400
                times.append(time.monotonic() - begun)
            # mlx-lm's loop looks at its queue every half second.
            assert min(times) < 0.25


# -- HTTP ----------------------------------------------------------------------------


def talk(server: Server, data: bytes, *more: bytes) -> tuple[int, dict[str, str], Any]:
    """What a plain socket gets for ``data``: status, headers, body if it is JSON."""
    address = ("127.0.0.1", server.port)
    with socket.create_connection(address, 60) as s:
        s.sendall(data)
        for part in more:
            s.sendall(part)
        response = http.client.HTTPResponse(s, method=data.split(b" ")[0].decode())
        response.begin()
        body = response.read()
        headers = {k.lower(): v for k, v in response.getheaders()}
        return response.status, headers, json.loads(body) if body else None


def post(headers: str, body: bytes = b"") -> bytes:
    return f"POST {CHAT} HTTP/1.1\r\n{headers}\r\n\r\n".encode() + body


SMALL = json.dumps({"messages": HELLO, "max_tokens": 1}).encode()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /nothing HTTP/1.1\r\n\r\n", 404),
        (b"GET /v1/models/no/such HTTP/1.1\r\n\r\n", 404),
        (b"POST /nothing HTTP/1.1\r\n\r\n", 404),
        (b"DELETE /nothing HTTP/1.1\r\n\r\n", 404),
        (b"POST /health HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 405),
        (b"GET /v1/completions HTTP/1.1\r\n\r\n", 405),
        (b"PUT /v1/models HTTP/1.1\r\n\r\n", 405),
        (b"BREW /health HTTP/1.1\r\n\r\n", 501),
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/7.0\r\n\r\n", 505),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nA: " + b"a" * 70_000 + b"\r\n\r\n", 431),
        (post("A: b"), 411),
        (post("Content-Length: -1"), 400),
        (post("Content-Length: +5", b"12345"), 400),
        (post("Content-Length: 1_0"), 400),
        (post("Content-Length: 0x10"), 400),
        (post("Content-Length:"), 400),
        (post("Content-Length: 5\r\nContent-Length: 6", b"123456"), 400),
        (post("Content-Length: 99999999999"), 413),
        (post("Content-Length: " + "9" * 60), 413),
        (post("Content-Length: 5\r\nTransfer-Encoding: chunked"), 400),
        (post("Transfer-Encoding: gzip, chunked"), 400),
        (post("Transfer-Encoding: chunked", b"x\r\n"), 400),
        (post("Transfer-Encoding: chunked", b"-1\r\n"), 400),
        (post("Transfer-Encoding: chunked", b"3\r\nabcdef\r\n0\r\n\r\n"), 400),
        (post("Transfer-Encoding: chunked", b"1" * 2000), 400),
        (post("Transfer-Encoding: chunked", b"fffffff\r\n"), 413),
        (post("Content-Encoding: gzip\r\nContent-Length: 5", b"12345"), 415),
        (post("Expect: a-miracle\r\nContent-Length: 5"), 417),
        (post("Expect: 100-continue\r\nContent-Length: 99999999999"), 413),
    ],
)
def test_what_is_no_request(server: Server, request_: bytes, status: int) -> None:
    found, headers, body = talk(server, request_)
    assert found == status
    assert headers["content-type"] == "application/json"
    error = body["error"]
    assert error["type"] == "invalid_request_error" and error["code"]
    assert error["message"].endswith(".") and not EXCEPTIONS.search(error["message"])
    if status == 405:
        assert headers["allow"]


def test_head_is_get_without_a_body(server: Server) -> None:
    for path in ("/health", "/v1/models", "/nothing", f"/v1/models/{server.model}"):
        line = f" {path} HTTP/1.1\r\n\r\n".encode()
        status, headers, body = talk(server, b"GET" + line)
        bare = talk(server, b"HEAD" + line)
        assert bare[0] == status and bare[2] is None and body
        for name in ("content-type", "content-length"):
            assert bare[1][name] == headers[name]
    assert talk(server, b"HEAD /metrics HTTP/1.1\r\n\r\n")[0] == 200


def test_one_model(server: Server) -> None:
    (listed,) = server.get("/v1/models").json["data"]
    for name in (listed["id"], listed["id"].replace("/", "%2F")):
        found = server.get(f"/v1/models/{name}").json
        assert found.pop("created") and found == {"id": listed["id"], "object": "model"}
    refused = server.get("/v1/models/no/such")
    assert (refused.status, refused.error["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("trailers", [b"", b"A: b\r\nC: d\r\n"])
def test_a_body_in_chunks(server: Server, trailers: bytes) -> None:
    pieces = [SMALL[i : i + 7] for i in range(0, len(SMALL), 7)]
    chunks = b"".join(b"%X;a=b\r\n%s\r\n" % (len(p), p) for p in pieces)
    data = post("Transfer-Encoding: Chunked", chunks + b"0\r\n" + trailers + b"\r\n")
    assert talk(server, data)[0] == 200


def test_a_client_that_asks_first(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 60) as s:
        s.sendall(post(f"Expect: 100-continue\r\nContent-Length: {len(SMALL)}"))
        first = s.recv(1000)
        assert first == b"HTTP/1.1 100 Continue\r\n\r\n"
        s.sendall(SMALL)
        assert b" 200 OK" in s.recv(1000)


def test_a_body_that_ends_too_early(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 60) as s:
        s.sendall(post("Content-Length: 1000", b"{"))
        s.shutdown(socket.SHUT_WR)
        response = http.client.HTTPResponse(s)
        response.begin()
        assert response.status == 400 and b"ends too early" in response.read()


def test_the_answer_arrives_though_the_body_is_not_read(tiny_model: Path) -> None:
    """Of a client that sends all before it reads, as Python's own does."""
    flags = ["--max-request-bytes", "1M"]
    with Server(tiny_model, *flags).wait_ready() as server:
        large = json.dumps({"prompt": "x" * 20_000_000}).encode()
        for _ in range(3):
            answer = server.post(large)
            assert (answer.broken, answer.status) == (None, 413)
            assert answer.error["code"] == "request_too_large"
            assert "1000000 bytes" in answer.error["message"]
        assert server.chat().status == 200


SLOW = program("impatient_with_bodies")


def test_slow_bodies(tiny_model: Path) -> None:
    """With a second of patience instead of 30, and room for one body of 1 MiB."""
    with Server(tiny_model, program=SLOW).wait_ready() as server:
        for data in (
            post("Content-Length: 1000", b"{"),
            post("Transfer-Encoding: chunked", b"5\r\n{"),
        ):
            with socket.create_connection(("127.0.0.1", server.port), 60) as s:
                s.sendall(data)
                # A byte now and then is no answer to a limit on each read.
                for _ in range(8):
                    time.sleep(0.2)
                    s.sendall(b" ")
                response = http.client.HTTPResponse(s)
                response.begin()
                assert response.status == 408, response.read()
                assert json.loads(response.read())["error"]["code"] == "request_timeout"
        # One that holds the room; the next waits, and is told to come again.
        with socket.create_connection(("127.0.0.1", server.port), 60) as s:
            s.sendall(post(f"Content-Length: {2**20}", b"{"))
            time.sleep(0.2)
            status, headers, body = talk(server, post("Content-Length: 1000000"))
            assert status == 503 and headers["retry-after"] == "5"
            assert body["error"]["code"] == "insufficient_memory"
            # Small ones need none.
            assert server.chat().status == 200
        assert "Traceback" not in server.log


def test_a_model_without_a_chat_template(tiny_model: Path, tmp_path: Path) -> None:
    """mlx-lm would show it the array of parts, and ``None`` for what is null."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    for template in (model / "chat_template.jinja", model / "tokenizer_config.json"):
        if template.suffix == ".json":
            config = json.loads(template.read_text())
            config.pop("chat_template", None)
            template.write_text(json.dumps(config))
        else:
            template.unlink(missing_ok=True)
    with Server(model).wait_ready() as server:
        parts = [{"type": "text", "text": x} for x in ("hel", "lo")]
        said = {"role": "assistant", "content": None}
        body = {"messages": [*HELLO, said, *HELLO], "max_tokens": 8}
        with_parts = [{"role": "user", "content": parts}, said, *HELLO]
        expected = server.post(body)
        assert expected.status == 200
        found = server.post({**body, "messages": with_parts})
        assert choices(found) == choices(expected)
        empty = {"role": "assistant", "content": ""}
        found = server.post({**body, "messages": [*HELLO, empty, *HELLO]})
        assert choices(found) == choices(expected)


# Fails by the words of its author, by a type, and by what tools have.
STRICT_TEMPLATE = """
{%- if style is defined and style != "plain" -%}
  {{- raise_exception("style must be plain") -}}
{%- endif -%}
{%- if depth is defined -%}{{- "x" * depth -}}{%- endif -%}
{%- if low is defined and low > high -%}{{- raise_exception("low over high") -}}
{%- endif -%}
{%- for tool in tools or [] -%}{{- 1 + tool.function.name -}}{%- endfor -%}
{%- for m in messages -%}
  {%- if m.content == "never" -%}{{- raise_exception("never say never") -}}{%- endif -%}
  {{- m.role + ": " + m.content -}}
{%- endfor -%}
"""


@pytest.mark.parametrize("way", [{}, {"seed": 1}, {"stream": True}], ids=str)
def test_what_a_template_cannot_use_is_named(
    strict_server: Server, way: dict[str, Any]
) -> None:
    kwargs = "chat_template_kwargs"
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    wrong: list[tuple[dict[str, Any], str, str]] = [
        ({kwargs: {"style": "odd"}}, f"{kwargs}.style", "style must be plain"),
        ({kwargs: {"a": 1, "style": "odd"}}, f"{kwargs}.style", "style must be plain"),
        ({kwargs: {"depth": "deep"}}, f"{kwargs}.depth", "cannot use"),
        ({kwargs: {"low": 2, "high": 1, "style": 0}}, kwargs, "refuses"),
        ({"tools": [tool]}, "tools", "cannot use tools"),
        ({"text": "never", kwargs: {"a": 1}}, "messages", "never say never"),
        ({"text": "never"}, "messages", "refuses the messages: never say never"),
    ]
    for body, param, message in wrong:
        answer = strict_server.chat(**{**body, **way})
        assert (answer.status, answer.error["param"]) == (400, param), body
        assert message in answer.error["message"]
    assert (
        strict_server.chat(**way, chat_template_kwargs={"style": "plain"}).status == 200
    )


def test_so_is_it_when_the_history_has_a_call_of_a_tool(strict_server: Server) -> None:
    """mlx-lm 0.31.3 cannot read such a one twice."""
    function = {"name": "f", "arguments": '{"a": 1}'}
    call = {"id": "1", "type": "function", "function": function}
    answer = strict_server.chat(
        messages=[
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "1"},
        ],
        chat_template_kwargs={"style": "odd"},
    )
    assert (answer.status, answer.error["param"]) == (400, "chat_template_kwargs.style")


@pytest.fixture(scope="module")
def strict_server(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    model = tmp_path_factory.mktemp("strict") / "model"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["chat_template"] = STRICT_TEMPLATE
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    (model / "chat_template.jinja").unlink(missing_ok=True)
    with Server(model).wait_ready() as server:
        yield server


def test_penalties_stay_with_their_request(tiny_model: Path) -> None:
    """mlx-lm 0.31.3 gives them to nobody, or to the next, when one has ended."""
    punished = {"text": "x", "repetition_penalty": 2.0, "max_tokens": 20}
    plain = {"text": "y", "max_tokens": 20}
    with Server(tiny_model).wait_ready() as server:
        alone = [server.chat(**ask).text for ask in (punished, plain)]
        assert server.chat(**{**punished, "repetition_penalty": 0}).text != alone[0]
        ask = {"messages": HELLO, "max_tokens": 100_000, "stream": True}
        with server.stream(ask) as lines:
            next(line for line in lines if line.startswith(b"data"))
            assert server.chat(max_tokens=2).status == 200
            together = [server.chat(**ask).text for ask in (punished, plain)]
        assert together == alone
