"""The log, and the metrics: what the operator sees of each request is true."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import child, warm
from support.programs import program
from support.reports import sample, write
from support.server import CONTROLLED, PYTHON, Answer, Server, eventually

PATHS: dict[str, dict[str, Any]] = {"batched": {}, "sequential": {"seed": 5}}
SECRET = "xylophone-manatee"  # as in the programs


@pytest.fixture(scope="module")
def shared(tiny_model: Path) -> Iterator[Server]:
    flags = ("--log-format", "json", "--log-level", "DEBUG")
    with Server(tiny_model, *flags, program=CONTROLLED) as server:
        yield server.wait_ready()


@pytest.fixture
def server(shared: Server) -> Server:
    return shared.renew()


def lines(server: Server) -> list[dict[str, Any]]:
    """What it has logged; every line is an object."""
    own = ("planned: ", "holds: ", "hold: ", "clients: ", "forget: ", "steps: ")
    texts = [x for x in server.log.splitlines() if not x.startswith(own)]
    return [json.loads(text) for text in texts]


def requests(server: Server, count: int) -> list[dict[str, Any]]:
    """The lines of so many requests, when they are there."""

    def found() -> list[dict[str, Any]]:
        return [x for x in lines(server) if x["message"] == "request"]

    assert eventually(lambda: len(found()) >= count, 30), server.log
    assert len(found()) == count, server.log
    return found()


def ask(server: Server, path: str, **more: Any) -> Answer:
    return server.chat(SECRET, **PATHS[path], **more)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_one_line(server: Server, path: str, stream: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if stream else {}
    answer = ask(server, path, stream=stream, max_tokens=6, **options)
    usage = answer.events[-1]["usage"] if stream else answer.json["usage"]
    (line,) = requests(server, 1)
    assert line["level"] == "INFO" and line["path"] == "/v1/chat/completions"
    assert (line["outcome"], line["status"], line["end"]) == ("ok", 200, "whole")
    assert line["id"] == (answer.events[0] if stream else answer.json)["id"]
    assert line["prompt_tokens"] == usage["prompt_tokens"]
    assert line["tokens"] == usage["completion_tokens"]
    assert line["cached_tokens"] == usage["prompt_tokens_details"]["cached_tokens"]
    assert 0 < line["first_token_s"] <= line["duration_s"]
    assert line["tokens_per_s"] > 0
    assert "replays" not in line and "code" not in line
    assert [x["message"] for x in lines(server)].count("prompt cache") == 1


@pytest.mark.parametrize("path", PATHS)
def test_a_fault_names_whom_it_touched(server: Server, path: str) -> None:
    server.plan("decode:3:2")
    answer = ask(server, path)
    (line,) = requests(server, 1)
    assert (line["outcome"], line["replays"]) == ("ok", 1)
    (fault,) = [x for x in lines(server) if x["level"] == "WARNING"]
    assert "fault of the GPU" in fault["message"] and fault["code"] == 2
    assert fault["replayed"] == [answer.json["id"]] and "ended" not in fault


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_is_in_the_line(server: Server, path: str, stream: bool) -> None:
    server.plan("decode:3:8:persistent")
    answer = ask(server, path, stream=stream)
    (line,) = requests(server, 1)
    assert (line["outcome"], line["code"]) == ("failed", "metal_out_of_memory")
    assert line["status"] == answer.status
    assert line["end"] == ("error_event" if answer.status == 200 else "whole")
    touched = [x for x in lines(server) if x["level"] == "WARNING"]
    assert touched[-1]["ended"] == [line["id"]]


REFUSED = [
    ({"max_tokens": "six"}, 400, "invalid_request", "max_tokens"),
    ({"model": "nosuch"}, 404, "model_not_found", "model"),
    ({"messages": []}, 400, "invalid_request", "messages"),
]


@pytest.mark.parametrize(("body", "status", "code", "param"), REFUSED)
def test_a_refusal_says_why(
    server: Server, body: Any, status: int, code: str, param: str
) -> None:
    assert server.chat(SECRET, **body).status == status
    (line,) = requests(server, 1)
    assert (line["outcome"], line["status"]) == ("refused", status)
    assert (line["code"], line["param"]) == (code, param)


def test_a_field_is_named_and_a_sentence_is_not(server: Server) -> None:
    """What is no field of the API is told of at DEBUG, and may be anything."""
    sentence = f"dear diary, {SECRET}"
    answer = server.chat("hello", max_token=5, **{sentence: 1})
    assert answer.status == 200
    (line,) = [x for x in lines(server) if "without effect" in x["message"]]
    assert line["message"] == "fields without effect: max_token, 1 more"
    assert SECRET not in server.log


@pytest.mark.parametrize("path", PATHS)
def test_a_client_that_leaves_is_one_line(server: Server, path: str) -> None:
    body = {"messages": [{"role": "user", "content": SECRET}], "stream": True}
    with server.connected({**body, "max_tokens": 10**5, **PATHS[path]}) as s:
        s.recv(200)
    (line,) = requests(server, 1)
    assert (line["outcome"], line["status"], line["end"]) == ("client_left", 200, "cut")
    assert line["tokens"] > 0


def test_who_leaves_the_queue_is_told_at_once(server: Server) -> None:
    """The sequential path takes no other meanwhile: it ended when its turn came."""
    body = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 4}
    server.hold(5)
    with server.connected({**body, "max_tokens": 50, "seed": 1}) as first:
        server.wait_held()
        with server.connected(body):
            assert eventually(lambda: server.get("/health").json["waiting"] == 1)
            health = server.get("/health").json
            assert health["in_flight"] == 2 and health["oldest_waiting_s"] > 0
            assert health["step"]["kind"] == "decode"
            queued = server.metric("mlx_safe_requests_in_state", state="queued")
            assert queued == server.metric("mlx_safe_queue_requests") == 1
            assert server.metric("mlx_safe_queue_oldest_seconds") > 0
            assert server.metric("mlx_safe_step_age_seconds", kind="decode") > 0
        (line,) = requests(server, 1)  # the first is held still
        assert (line["outcome"], line["status"]) == ("client_left", "none")
        assert server.get("/health").json["waiting"] == 0
        server.go()
        assert b"200" in first.recv(100)
    assert [x["outcome"] for x in requests(server, 2)][1] in ("ok", "client_left")
    assert ask(server, "batched").status == 200


@pytest.mark.parametrize("head", ["Content-Length: 99", "Transfer-Encoding: chunked"])
def test_a_client_that_leaves_in_the_midst_of_its_body(
    server: Server, head: str
) -> None:
    """Nothing was wrong with what it asked: no alert on refusals is to know of it."""
    name = "mlx_safe_requests_total"
    before = server.metric(name, outcome="client_left", status="400")
    refused = server.metric(name, outcome="refused")
    with socket.create_connection(("127.0.0.1", server.port), 60) as s:
        start = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
        s.sendall(f"{start}{head}\r\n\r\n5\r\n{{".encode())
    (line,) = requests(server, 1)
    assert line["outcome"] == "client_left" and "code" not in line
    assert server.metric(name, outcome="client_left", status="400") == before + 1
    assert server.metric(name, outcome="refused") == refused


def test_health_and_metrics_are_not_logged(server: Server) -> None:
    for path in ("/health", "/metrics", "/health?x"):
        assert server.get(path).status == 200
    assert server.get("/v1/models").status == 200
    (line,) = requests(server, 1)
    assert line["path"] == "/v1/models" and "tokens" not in line


BODIES = [
    SECRET.encode(),
    json.dumps([SECRET]).encode(),
    json.dumps({"messages": SECRET}).encode(),
    json.dumps({"messages": [{"role": SECRET, "content": SECRET}]}).encode(),
    json.dumps({"prompt": SECRET, "logit_bias": {SECRET: 1}}).encode(),
    json.dumps({"prompt": {SECRET: 1}}).encode(),
]


def test_no_text_is_logged_at_any_level(server: Server) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", f"/{SECRET}?{SECRET}"):
        for body in BODIES:
            assert server.post(body, path).status in (400, 404)
    answers = [ask(server, path, stream=s) for path in PATHS for s in (False, True)]
    server.plan("any:2:0:once:bug")
    failed = ask(server, "sequential", stop=["FAILS"])
    assert failed.status == 500
    requests(server, 3 * len(BODIES) + len(answers) + 1)
    log = server.log.replace(f'"path": "/{SECRET}"', "")
    assert SECRET not in log
    for answer in answers:
        assert answer.text not in log
    assert max(map(len, log.splitlines())) < 20_000


@pytest.mark.parametrize("form", ["text", "json"])
def test_all_lines_have_one_form(tiny_model: Path, form: str) -> None:
    flags = ("--log-format", form, "--supervise")
    with Server(tiny_model, *flags, inject="decode:5:0:once:bug") as server:
        server.wait_ready()
        assert server.chat().status == 500  # with a traceback in the log
        server.stop()
    log = server.log.splitlines()
    if form == "json":
        found = [json.loads(line) for line in log]
        assert {"SUPERVISOR"} == {x["process"] for x in found if "process" in x}
        assert any("Traceback" in x.get("trace", "") for x in found)
        return
    dated = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} - [A-Z]+ - .")
    rest = [line for line in log if not dated.match(line)]
    assert any("request id=chatcmpl-" in line for line in log)
    assert any("INFO - SUPERVISOR - the server listens" in line for line in log)
    # A traceback below its line, and nothing else.
    assert rest[0].startswith("Traceback") and rest[-1].startswith("ValueError")


def test_a_thread_that_ends_is_a_line(tiny_model: Path) -> None:
    with Server(
        tiny_model, "--log-format", "json", program=program("loses_a_thread")
    ) as server:
        server.wait_ready()
        server.wait_for_log("a thread has ended")
        (line,) = [x for x in lines(server) if x["level"] == "ERROR"]
        assert (line["message"], line["thread"]) == ("a thread has ended", "a-thread")
        assert line["trace"].endswith("ValueError") and SECRET not in server.log


def test_so_is_what_python_would_print_itself() -> None:
    """An exception of a destructor, and one that ends the main thread."""
    done = child.run(program("raises_where_python_prints"))
    found = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.returncode == 1 and SECRET not in done.stderr
    assert [(x["level"], x["message"]) for x in found] == [
        ("ERROR", "an exception was ignored"),
        ("CRITICAL", "the main thread has ended"),
    ]
    assert found[0]["where"] == "Fails.__del__"
    assert found[1]["trace"].endswith("LookupError")


@pytest.mark.parametrize("supervised", [(), ("--supervise",)])
@pytest.mark.parametrize("place", ["flag", "variable", "file"])
def test_a_mistake_is_a_line_of_the_log(
    tmp_path: Path, place: str, supervised: tuple[str, ...]
) -> None:
    """Wherever the format comes from, and whichever flag is wrong."""
    file = tmp_path / "flags.toml"
    file.write_text('log-format = "json"\n' if place == "file" else "port = 8081\n")
    words = {"flag": ("--log-format=json",), "file": ("--config", str(file))}
    variables = {"MLX_SAFE_LOG_FORMAT": "json"} if place == "variable" else {}
    for wrong, says in (
        (("--port", "many"), "argument --port: must be from 0 to 65535"),
        (("--no-such-flag",), "--no-such-flag"),
        (("--model", "/no/such/model"), "there is no such directory"),
        (("--host", "192.0.2.1", "--model", "/no/such"), ""),
    ):
        port = ("--port", "0") if "--port" not in wrong else ()
        command = ["serve", *words.get(place, ()), *supervised, *port, *wrong]
        done = warm.run(
            f"import sys; from mlx_safe.cli import main; sys.exit(main({command!r}))",
            timeout=180.0,
            **variables,
        )
        assert done.returncode == 2 and done.stdout == "", done.stderr
        last = json.loads(done.stderr.splitlines()[-1])
        assert last["level"] == "ERROR" and says in last["message"], done.stderr
        assert last["message"].startswith("cannot start: "), done.stderr
        for line in done.stderr.splitlines():
            json.loads(line)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("MLX_SAFE_INJECT", "sometimes", "MLX_SAFE_INJECT: cannot read 'sometimes'"),
        ("MLX_SAFE_INJECT_CEILING", "much", "MLX_SAFE_INJECT_CEILING must be a size"),
        ("MLX_SAFE_INJECT_LOG", "/dev", "MLX_SAFE_INJECT_LOG: cannot be written: "),
    ],
)
@pytest.mark.parametrize("supervised", [(), ("--supervise",)])
def test_a_plan_that_cannot_be_read_is_one_too(
    name: str, text: str, says: str, supervised: tuple[str, ...]
) -> None:
    """It is read when mlx_safe is imported, before the format is known."""
    command = [PYTHON, "-m", "mlx_safe", "serve", "--log-format", "json", *supervised]
    done = subprocess.run(
        command,
        env={**os.environ, "MLX_SAFE_INJECT": "decode:3", name: text},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert json.loads(line)["message"].startswith(f"cannot start: {says}")


def test_so_is_what_an_exception_says_that_nothing_caught(tiny_model: Path) -> None:
    """It reaches std::terminate, and the server answers before it leaves."""
    plan = "decode:3:8:once:terminate"
    with Server(tiny_model, "--log-format", "json", inject=plan) as server:
        server.wait_ready()
        # On another thread: more tokens than it can come after.
        assert server.chat(max_tokens=400).status == 503
        assert server.wait() == 75
    said = [x["message"] for x in lines(server) if x["level"] == "ERROR"]
    # Whichever thread sees it first, that of the callbacks or the one that computes.
    first, second = (x.partition(": ")[0] for x in said)
    assert first == "an exception reached std::terminate", server.log
    assert second == "the process must be replaced", server.log


@pytest.mark.parametrize("supervised", [(), ("--supervise",)])
def test_what_is_said_before_and_after_has_the_format(
    tiny_model: Path, tmp_path: Path, supervised: tuple[str, ...]
) -> None:
    """Of a variable that is read when mlx_safe is installed, and of a plan."""
    write(tmp_path / "reports", sample())
    wrong = {"MLX_SAFE_REPORTS_KEEP": "many"}
    wrong["MLX_SAFE_REPORT_DIR"] = str(tmp_path / "reports")
    flags = ("--log-format", "json", *supervised)
    with Server(tiny_model, *flags, inject="decode:99", env=wrong) as server:
        server.wait_ready()
        server.stop()
    messages = [x["message"] for x in lines(server)]
    assert sum("MLX_SAFE_REPORTS_KEEP must be" in x for x in messages) >= 1
    (unfired,) = [x for x in messages if "has not struck" in x]
    assert "MLX_SAFE_INJECT: decode:99:8:once:raise never fired" in unfired


def test_a_file_that_is_wrong_is_told_in_the_format_of_the_flag(tmp_path: Path) -> None:
    for text in ("port = ", "no-such-flag = 1", 'log-format = "xml"'):
        (tmp_path / "flags.toml").write_text(text)
        command = ["serve", "--log-format", "json"]
        command += ["--config", str(tmp_path / "flags.toml")]
        done = child.run(
            f"import sys; from mlx_safe.cli import main; sys.exit(main({command!r}))"
        )
        (line,) = done.stderr.splitlines()
        assert done.returncode == 2
        assert json.loads(line)["message"].startswith("cannot start: --config ")


def test_lines_of_libraries_have_it_too(tiny_model: Path, tmp_path: Path) -> None:
    """transformers writes to stderr itself, where a text is longer than it likes."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    settings = model / "tokenizer_config.json"
    told = {**json.loads(settings.read_text()), "model_max_length": 20}
    settings.write_text(json.dumps(told))
    with Server(model, "--log-format", "json") as server:
        server.wait_ready()
        server.chat("hello " * 50)
        server.stop()
    found = [json.loads(line) for line in server.log.splitlines()]
    lines = [x for x in found if x["logger"].startswith("transformers")]
    assert any("sequence length" in x["message"] for x in lines)
    assert len({x["message"] for x in lines}) == len(lines)


def test_the_level_rules_the_requests_too(tiny_model: Path) -> None:
    with Server(tiny_model, "--log-level", "warning", inject="decode:5:2") as server:
        server.wait_ready()
        assert server.chat().status == 200
        server.wait_for_log("fault of the GPU")
        server.stop()
    assert len(server.log.splitlines()) == 1


# -- metrics -----------------------------------------------------------------------


def counts(server: Server) -> dict[tuple[str, str], float]:
    """By outcome and status."""
    pattern = re.compile(
        r'mlx_safe_requests_total{code="\w*",outcome="(\w+)",status="(\w+)"} (.*)'
    )
    found: dict[tuple[str, str], float] = {}
    for line in server.get("/metrics").body.splitlines():
        if match := pattern.fullmatch(line):
            key = (match[1], match[2])
            found[key] = found.get(key, 0) + float(match[3])
    return found


SUMS = (
    *("mlx_safe_prompt_tokens_total", "mlx_safe_prompt_tokens_cached_total"),
    *("mlx_safe_generated_tokens_total", "mlx_safe_request_duration_seconds_count"),
    *("mlx_safe_requests_replayed_total", "mlx_safe_faults_injected_total"),
)


def test_metrics_add_up_to_what_clients_saw(server: Server) -> None:
    before = counts(server)
    sums = {name: server.metric(name) for name in SUMS}
    answers = [
        ask(server, path, max_tokens=5, n=n) for path in PATHS for n in (1, 3)
    ] + [ask(server, path, max_tokens=5, stream=True) for path in PATHS]
    bad = [server.post(b"{", "/v1/completions") for _ in range(13)]
    bad += [server.chat(temperature=-n) for n in range(1, 14)]
    nowhere = [server.get("/nowhere"), server.chat(model="nosuch")]
    server.plan("decode:2:2")
    replayed = ask(server, "batched")
    server.plan("decode:2:8:persistent")
    failed = [ask(server, "batched", stream=stream) for stream in (False, True)]
    server.renew()
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
    for more in PATHS.values():
        with server.connected({**body, "max_tokens": 10**5, **more}) as s:
            s.recv(200)

    whole = [*answers, replayed]
    wanted = {
        ("ok", "200"): len(whole) + 1,  # that of `renew`
        ("refused", "400"): 26,
        ("refused", "404"): len(nowhere),
        ("client_left", "200"): 2,
    }
    for answer in failed:
        key = ("failed", str(answer.status))
        wanted[key] = wanted.get(key, 0) + 1
    assert all(a.status == 400 for a in bad) and all(a.status == 404 for a in nowhere)

    def rises() -> dict[tuple[str, str], float]:
        now = counts(server)
        found = {key: n - before.get(key, 0) for key, n in now.items()}
        return {key: n for key, n in found.items() if n}

    assert eventually(lambda: sum(rises().values()) == sum(wanted.values()), 20)
    assert rises() == wanted
    rise = {name: server.metric(name) - n for name, n in sums.items()}
    usages = [a.json["usage"] for a in whole if not a.events]
    least = sum(u["completion_tokens"] for u in usages)
    assert rise["mlx_safe_generated_tokens_total"] >= least
    assert rise["mlx_safe_prompt_tokens_total"] >= sum(
        u["prompt_tokens"] for u in usages
    )
    assert rise["mlx_safe_requests_replayed_total"] == 1
    assert rise["mlx_safe_faults_injected_total"] >= 1 + 3 * len(failed)
    assert server.metric("mlx_safe_requests_in_flight") == 0
    assert server.metric("mlx_safe_memory_footprint_bytes") > 10**7
    assert server.metric("mlx_safe_memory_ceiling_bytes") > 10**7


def test_refusals_of_a_server_that_stops_are_counted(tiny_model: Path) -> None:
    with Server(tiny_model, program=CONTROLLED) as server:
        server.wait_ready()
        server.hold(3)
        with server.chatting(1, max_tokens=50) as answers:
            server.wait_held()
            server.process.send_signal(signal.SIGTERM)
            server.wait_for_log("stopping")
            time.sleep(0.2)
        server.go()
        assert server.wait() == 0
    assert answers[0].status == 503
    assert "outcome=failed code=unavailable status=503" in server.log


# -- a Mac whose hooks are not in --------------------------------------------------

UNHOOKED = program("unhooked")


def test_a_server_without_hooks_says_so(tiny_model: Path) -> None:
    with Server(tiny_model, program=UNHOOKED) as server:
        server.wait_ready()
        (line,) = [x for x in server.log.splitlines() if "not hooked, and" in x]
        assert " - WARNING - " in line and line.endswith("no such class")


def test_a_server_that_needs_hooks_does_not_start(tiny_model: Path) -> None:
    with Server(tiny_model, "--require-hooks", program=UNHOOKED) as server:
        assert server.wait() == 2
        assert server.log.splitlines()[-1] == (
            "mlx-safe: --require-hooks: faults of the GPU are not caught here: "
            "no such class"
        )
        assert "listening" not in server.log
