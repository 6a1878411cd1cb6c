"""``/status`` and ``/status.json``: what the operator sees is what is so."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from mlx_safe.cli import main
from mlx_safe.server import status_page
from support.server import BATCH_RUNS_S, CONTROLLED, NEVER, Server, eventually, kept_in

PAGE_MAX = 60_000
SECRET = "a text that must not be told"


@pytest.fixture(scope="module")
def shared(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    disk = tmp_path_factory.mktemp("kv")
    with Server(
        tiny_model,
        *(*kept_in(disk), "--max-active-memory-bytes", "1G"),
        *("--prompt-cache-size", "2"),
        program=CONTROLLED,
    ).wait_ready() as server:
        yield server


@pytest.fixture
def server(shared: Server) -> Server:
    return shared.renew()


def status(server: Server, history: str = "none") -> Any:
    answer = server.get(f"/status.json?history={history}")
    assert answer.status == 200, answer.body
    return answer.json


def test_a_server_at_rest(server: Server, tiny_model: Path) -> None:
    server.chat()
    assert eventually(lambda: status(server)["prompt_cache"]["bytes"] > 0)
    found = status(server, "short")
    assert found["version"] == 1
    assert found["server"]["state"] == "ok"
    assert found["server"]["reason"] is None
    assert found["server"]["model"] == str(tiny_model)
    assert found["server"]["pid"] == server.process.pid
    assert found["requests"]["in_flight"] == found["requests"]["waiting"] == 0
    memory = found["memory"]
    assert memory["ceiling"] == 10**9
    parts = memory["parts"]
    assert parts["model"] > 100_000
    assert parts["prompt_cache"] == found["prompt_cache"]["bytes"] > 0
    held = parts["model"] + parts["prompt_cache"] + parts["caches"]
    assert held == pytest.approx(memory["active"], rel=0.05)
    assert parts["other"] > 0
    assert found["disk"]["off"] is None
    assert found["history"]["fields"][0] == "time"
    assert abs(found["history"]["samples"][-1][0] - time.time()) < 60


@contextlib.contextmanager
def held(server: Server) -> Iterator[None]:
    """It has come to the step where it waits; it goes on whatever happens."""
    try:
        server.wait_held(BATCH_RUNS_S)
        yield
    finally:
        server.go()


@pytest.mark.parametrize("more", [{}, {"seed": 1}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_in_flight(server: Server, more: Any, stream: bool) -> None:
    before = status(server)["requests"]["tokens"]
    server.hold(20)
    chatting = server.chatting(1, max_tokens=40, stream=stream, **more)
    with chatting as answers, held(server):
        found = status(server)["requests"]
    (one,) = found["list"]
    assert one["state"] == "decode" and not one["waits"]
    assert one["path"] == "/v1/chat/completions"
    assert one["id"].startswith("chatcmpl-")
    assert one["max_tokens"] == 40
    assert 10 <= one["produced"] <= 20
    assert one["prompt_tokens"] > 10
    assert one["alone"] is bool(more)
    assert found["tokens"] - before == one["produced"]
    assert answers[0].status == 200
    assert status(server)["requests"]["in_flight"] == 0
    assert status(server)["requests"]["tokens"] - before == 40


def test_a_prompt_that_is_read(server: Server) -> None:
    server.hold(3)
    with server.chatting(1, max_tokens=2, text="x" * 8000), held(server):
        found = status(server)["requests"]["list"]
    assert found[0]["state"] == "prefill"
    assert 2000 <= found[0]["read_tokens"] < found[0]["to_read"]
    assert found[0]["produced"] == 0


def test_who_waits(server: Server) -> None:
    server.hold(4)
    first = server.chatting(1, max_tokens=8, seed=1)
    # What is listed last ends first: the clients are waited for when it goes on.
    with first, server.chatting(2, max_tokens=2, seed=2), held(server):
        server.wait_for_clients(3)
        found = status(server)["requests"]
    assert found["in_flight"] == 3
    assert found["waiting"] == 2
    assert {r["state"] for r in found["list"]} == {"decode", "queued"}


def test_faults_and_replays_are_marks(server: Server) -> None:
    before = status(server)["counts"]
    server.plan("decode:5:8")
    assert server.chat(max_tokens=10).status == 200
    found = status(server)["counts"]
    assert found["failures"] - before["failures"] == 1
    assert found["replays"] - before["replays"] == 1

    def kinds() -> set[str]:
        return {mark["kind"] for mark in status(server)["marks"]}

    assert eventually(lambda: {"start", "fault", "replays"} <= kinds())
    marks = status(server)["marks"]
    fault = [mark for mark in marks if mark["kind"] == "fault"][-1]
    assert fault["text"] == "metal out of memory"
    assert abs(fault["time"] - time.time()) < 120


def test_evictions_are_marks(server: Server) -> None:
    for i in range(4):
        server.chat(f"{i} is another text")
    assert status(server)["counts"]["evictions"] > 0
    assert eventually(
        lambda: "evictions" in {m["kind"] for m in status(server)["marks"]}
    )


def test_no_text_is_in_it(server: Server) -> None:
    server.hold(10)
    chatting = server.chatting(1, text=SECRET, max_tokens=30, stream=True)
    with chatting as answers, held(server):
        body = server.get("/status.json").body
    assert answers[0].text
    assert SECRET not in body
    assert answers[0].text[:8] not in body
    assert SECRET not in server.get("/status.json").body


def test_a_crash_report_is_shown(server: Server) -> None:
    server.plan("decode:2:8")
    server.chat()
    own = f"on port {server.port} with {server.model}"  # others' may be beside it

    def reports() -> list[Any]:
        return [r for r in status(server)["reports"] if r["server"] == own]

    assert eventually(lambda: bool(reports()))
    report = reports()[0]
    assert report["headline"] and abs(report["time"] - time.time()) < 600


def test_the_histories(server: Server) -> None:
    for name, every_s in (("short", 2.0), ("long", 120.0)):
        found = status(server, name)["history"]
        assert found["every_s"] == every_s
        assert all(len(s) == len(found["fields"]) for s in found["samples"])
    assert "history" not in status(server, "none")
    refused = server.get("/status.json?history=always")
    assert refused.status == 400 and refused.error["param"] == "history"


def test_the_page(server: Server) -> None:
    answer = server.get("/status")
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert len(answer.body.encode()) < PAGE_MAX
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ")
    for element in ("script", "style"):
        inner = re.findall(rf"<{element}>(.*?)</{element}>", answer.body, re.DOTALL)
        assert len(inner) == 1
        digest = base64.b64encode(hashlib.sha256(inner[0].encode()).digest()).decode()
        assert f"{element}-src 'sha256-{digest}'" in policy
    # It asks nobody else, and no part of it could.
    assert not re.findall(r"(?:https?:)?//[a-z0-9]", answer.body.replace(SVG, ""))
    assert " onclick=" not in answer.body and " style=" not in answer.body


SVG = "http://www.w3.org/2000/svg"


def test_pages_from_elsewhere_cannot_read_it(server: Server) -> None:
    for path in ("/status", "/status.json"):
        headers = server.get(path, headers={"Origin": "http://evil.example"}).headers
        assert "access-control-allow-origin" not in headers
        assert headers["cache-control"] == "no-store"
        named = server.get(path, headers={"Host": "evil.example"})
        assert named.status == 404
        assert server.get(path, method="HEAD").body == ""
        assert server.get(path, method="POST").status == 405
    server.wait_for_log("path=/status.json outcome=refused", 2)
    assert "path=/status outcome=ok" not in server.log  # only what is refused is told
    assert "path=/status.json outcome=ok" not in server.log


def test_a_key_is_asked_for(tiny_model: Path) -> None:
    with Server(tiny_model, "--api-key", "k").wait_ready() as server:
        for path in ("/status", "/status.json"):
            refused = server.get(path)
            assert refused.status == 401
            assert refused.headers["www-authenticate"] == 'Basic realm="mlx-safe"'
            basic = base64.b64encode(b"anyone:k").decode()
            for given in (f"Basic {basic}", "Bearer k"):
                answer = server.get(path, headers={"Authorization": given})
                assert answer.status == 200


def test_it_can_be_turned_off(tiny_model: Path) -> None:
    with Server(tiny_model, "--status-page", "off").wait_ready() as server:
        assert server.get("/status").status == 404
        assert server.get("/status.json").status == 404
        assert server.get("/health").json["status"] == "ok"
        done = top(server)
        assert done.returncode == 1 and "it shows no status" in done.stderr


# -- in a terminal -------------------------------------------------------------------


def top(
    server: Server, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "mlx_safe", "top", "--once"),
            *("--url", f"http://127.0.0.1:{server.port}", *arguments),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "120", **environment},
        check=False,
    )


def test_top_shows_the_same(server: Server) -> None:
    server.plan("decode:5:8")
    server.chat(max_tokens=10)
    assert eventually(lambda: bool(status(server)["reports"]))
    server.plan(f"any:{NEVER}")
    server.hold(20)
    with server.chatting(1, max_tokens=40), held(server):
        found, done = status(server), top(server)
    assert done.returncode == 0, done.stderr
    (one,) = found["requests"]["list"]
    for text in (
        found["server"]["model"][:40],
        "ceiling ",
        "1 in flight, 0 of them waiting",
        one["id"][:22],
        f"{one['produced']}/40",
        "failed: metal out of memory",
        f"report {found['reports'][0]['id']}: ",
    ):
        assert text in done.stdout, done.stdout
    assert "\x1b" not in done.stdout  # no colours where no terminal is


IN_80_COLUMNS = """\
recovering: the state is being reset after a failure  up 2 h, pid 12345
[████████████████████████████████████············] ceiling 110.0 GB
model 20.0 GB  prompt cache 20.0 GB  caches of requests 20.0 GB
MLX's pool 20.0 GB  other programs 20.0 GB
ended: 100000 ok, 1000 client_left, 1000 failed; 1000000000 tokens
1000 failures, 1000 replays, 1000 put back, 1000 refused for memory
prompt cache: 10.0 GB of 100.0 GB, 100 entries, 1000 hits, 1000 misses,
1000 evicted
2 in flight, 0 of them waiting
request              state             prompt           read         made   time
chatcmpl-00000001-…  prefill           131072  100000/131072  16383/16384  100 s
chatcmpl-00000002-…  decode (again 2)       9                 16383/16384  100 s
"""


def longest_status() -> dict[str, Any]:
    """With figures that are as long as they get."""
    named = dict.fromkeys(("replays", "to_read", "waits"), 0)
    long = {"prompt_tokens": 131072, "read_tokens": 100000, "to_read": 131072}
    made = {"produced": 16383, "max_tokens": 16384, "seconds": 100.0}
    ids = [f"chatcmpl-{i:08x}-b23a-4a7e-9d9f-{i:012x}" for i in (1, 2)]
    counts = ("failures", "replays", "preempted", "refused")
    return {
        "time": 9000.0,
        "server": {
            "state": "recovering",
            "reason": "the state is being reset after a failure",
            "model": f"/models/{'x' * 99}/snapshots/0123456789",
            "started": 0.0,
            "pid": 12345,
        },
        "memory": {
            "ceiling": 110 * 10**9,
            "parts": dict.fromkeys(
                ("model", "prompt_cache", "caches", "pool", "other"), 20 * 10**9
            ),
            "lowered": None,
        },
        "requests": {
            "in_flight": 2, "waiting": 0, "tokens": 10**9,
            "outcomes": {"ok": 100000, "client_left": 1000, "failed": 1000},
            "list": [
                {"id": ids[0], "state": "prefill", **named, **long, **made},
                {"id": ids[1], "state": "decode", **named, **made, "replays": 2,
                 "prompt_tokens": 9, "read_tokens": 0},
            ],
        },
        "counts": dict.fromkeys((*counts, "hits", "misses", "evictions"), 1000),
        "prompt_cache": {"bytes": 10**10, "limit": 10**11, "entries": 100},
        "disk": None,
        "marks": [],
        "reports": [],
    }  # fmt: skip


def test_top_fits_80_columns() -> None:
    """No word or figure is broken or cut."""
    from rich.console import Console

    from mlx_safe.top import render

    found = longest_status()
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render(found))
    path, *lines = (line.rstrip() for line in console.export_text().splitlines())
    assert len(path) == 78 and path.endswith("xx/snapshots/0123456789")
    assert lines == IN_80_COLUMNS.splitlines()
    # Characters that take two columns.
    found["server"]["model"] = "模" * 78
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render(found))
    path, *lines = (line.rstrip() for line in console.export_text().splitlines())
    assert path == "…" + "模" * 38
    assert lines == IN_80_COLUMNS.splitlines()


@pytest.mark.parametrize(
    ("width", "columns"),
    [
        (20, ""),
        (40, "request state"),
        (60, "request state made time"),
        (80, "request state prompt read made time"),
        (120, "request state prompt read made time"),
    ],
)
def test_top_in_a_narrow_terminal(width: int, columns: str) -> None:
    """Which request it is, and what it does, are the last to go."""
    from rich.cells import cell_len
    from rich.console import Console

    from mlx_safe.top import render

    found = longest_status()
    found["memory"]["parts"].update(  # each is rounded up
        model=56 * 10**9, prompt_cache=16 * 10**9, caches=16 * 10**9, pool=22 * 10**9
    )
    found["memory"]["lowered"] = "lowered by a fault"
    found["marks"] = [{"kind": "fault", "count": 9, "text": "x y " * 30, "time": 0}]
    found["reports"] = [{"time": 0, "id": "r" * 99, "headline": "x y " * 30}]
    shown = io.StringIO()
    Console(width=width, file=shown).print(render(found))
    lines = shown.getvalue().splitlines()
    assert [line for line in lines if cell_len(line) > width] == []
    # Of the bar, which would be broken.
    assert sum("[" in line for line in lines) == sum("]" in line for line in lines) == 1
    if columns:
        head, *rows = lines[-3:]
        assert head.split() == columns.split()
        assert all(row.startswith("chatcmpl-0000000") for row in rows)
        assert rows[0][16] == "1" and rows[1][16] == "2"
        assert " prefill " in rows[0] and " decode (again 2)" in rows[1]


@contextlib.contextmanager
def top_on_a_terminal(
    **environment: str,
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """`top` of a server with `longest_status`, and the terminal that it writes to."""
    ours, theirs = os.openpty()
    found = {**longest_status(), "version": 1}
    with answering(json.dumps(found)) as url, os.fdopen(ours, "rb", 0):
        command = [sys.executable, "-m", "mlx_safe", "top", url]
        process = subprocess.Popen(
            command, stdout=theirs, env={**os.environ, "COLUMNS": "80", **environment}
        )
        os.close(theirs)
        try:
            yield process, ours
        finally:
            process.kill()
            process.wait(60)


def shown_until(terminal: int, text: bytes | None) -> bytes:
    """What is written until ``text`` is; None: until the end."""
    shown = b""
    while text is None or text not in shown:
        assert select.select([terminal], [], [], 60)[0], shown
        try:
            piece = os.read(terminal, 1 << 16)
        except OSError:  # Linux's terminal, whose writers have gone
            piece = b""
        if not piece:
            assert text is None, shown
            break
        shown += piece
    return shown


def test_top_on_a_dumb_terminal_prints_it_once() -> None:
    """It showed nothing, for ever."""
    with top_on_a_terminal(TERM="dumb") as (process, terminal):
        shown = shown_until(terminal, None)
        assert process.wait(60) == 0
        assert b"2 in flight" in shown and b"\x1b" not in shown


def test_top_that_is_ended_gives_the_terminal_back() -> None:
    with top_on_a_terminal(TERM="xterm") as (process, terminal):
        shown_until(terminal, b"2 in flight")
        process.send_signal(signal.SIGTERM)
        shown = shown_until(terminal, None)
        assert process.wait(60) == 143
        assert b"\x1b[?25h" in shown and b"\x1b[?1049l" in shown


def test_top_has_a_bar_where_there_is_ascii_only() -> None:
    """It was a row of question marks."""
    from rich.console import Console

    from mlx_safe.top import render

    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
    Console(width=80, file=file).print(render(longest_status()))
    file.seek(0)
    assert f"[{'#' * 36}{'.' * 12}] ceiling" in file.read()


def test_top_shows_nothing_that_a_terminal_obeys(
    capsys: pytest.CaptureFixture[str],
) -> None:
    evil = "a\x1b[2J\x1b]0;b\x07\u202e\nc"
    found = {**longest_status(), "version": 1}
    found["server"].update(model=evil, reason=evil)
    found["requests"]["list"][0]["id"] = evil
    found["marks"] = [{"kind": evil, "count": 1, "text": evil, "time": 0}]
    found["reports"] = [{"time": 0, "id": evil, "headline": evil}]
    with answering(json.dumps(found)) as url:
        assert main(["top", "--once", url]) == 0
    shown = capsys.readouterr().out
    assert "a [2J ]0;b" in shown
    assert all(c.isprintable() for c in shown.replace("\n", ""))
    with answering("[" * 100_000) as url:
        assert main(["top", "--once", url]) == 1
    assert "it is no mlx-safe serve" in capsys.readouterr().err


@contextlib.contextmanager
def answering(body: str) -> Iterator[str]:
    """The URL of a server that answers everything with ``body``."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def test_top_says_why_there_is_nothing(tiny_model: Path) -> None:
    with Server(tiny_model, "--api-key", "k").wait_ready() as server:
        done = top(server, MLX_SAFE_API_KEY="")
        assert (done.returncode, done.stdout) == (1, "")
        assert "it needs a key: --api-key-file" in done.stderr
        assert "does not take this key" in top(server, MLX_SAFE_API_KEY="x").stderr
        assert top(server, MLX_SAFE_API_KEY="k").returncode == 0
        command = [sys.executable, "-m", "mlx_safe", "top", "--once"]
        for words in ([*command, str(server.port)], [*command[:-1], str(server.port)]):
            # Without --once, too: a pipe would never see anything. It takes any text,
            # and need not have the characters of the bar.
            by_port = subprocess.run(
                words,
                env={
                    **os.environ,
                    "MLX_SAFE_API_KEY": "k",
                    "PYTHONIOENCODING": "ascii",
                },
                stdout=subprocess.PIPE,
                timeout=60,
                check=False,
            )
            assert by_port.returncode == 0 and b"ceiling" in by_port.stdout
    done = top(server)
    assert done.returncode == 1
    assert done.stderr.startswith(
        f"mlx-safe: http://127.0.0.1:{server.port}: no answer"
    )
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--port", "0"), "--port: must be from 1 to 65535, not '0'"),
        (("--port", "x"), "--port: must be from 1 to 65535, not 'x'"),
        (("--port", "8080", "--url", "http://h"), "name the server once"),
        (("h", "--port", "8080"), "name the server once"),
        (("http://",), "http://: must be a port, HOST:PORT, or a URL"),
        (("--url", "http://h:99999"), "http://h:99999: must be a port, HOST:PORT"),
        (("99999",), "99999: must be a port"),
        (("ftp://h",), "ftp://h: must be a port"),
        (("two words",), "two words: must be a port"),
        (("--every", "0"), "--every: must be from 0.1 to 3600 seconds"),
    ],
)
def test_a_mistake_in_the_flags_of_top(arguments: tuple[str, ...], says: str) -> None:
    from mlx_safe._command import CommandError
    from mlx_safe.top import top

    with pytest.raises(CommandError, match=re.escape(says)):
        top(arguments)


@pytest.mark.parametrize(
    ("server", "url"),
    [
        ("8081", "http://127.0.0.1:8081"),
        ("box:8081", "http://box:8081"),
        ("box", "http://box"),
        ("[::1]:8081", "http://[::1]:8081"),
        ("https://box:8443/", "https://box:8443"),
        ("http://127.0.0.1:8080/status", "http://127.0.0.1:8080"),
        ("http://127.0.0.1:8080/status.json", "http://127.0.0.1:8080"),
    ],
)
def test_how_a_server_may_be_named(server: str, url: str) -> None:
    from mlx_safe import top

    assert top._url(server) == url


@pytest.mark.parametrize("text", ["two words\n", "\u00e9\n", "\n"])
def test_what_top_sends_is_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """Or it would say of a key that no header can carry: it is no mlx-safe serve."""
    from mlx_safe._command import CommandError
    from mlx_safe.top import top

    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(CommandError, match=f"^--api-key-file {file}: .*key"):
        top(["--once", "--api-key-file", str(file)])
    if text.strip():
        monkeypatch.setenv("MLX_SAFE_API_KEY", text)
        with pytest.raises(CommandError, match=r"^MLX_SAFE_API_KEY: a key must be"):
            top(["--once"])


def test_the_pictures_in_the_docs_are_of_this_page() -> None:
    """Made again by tests/clients/test_status_page.py: MLX_SAFE_SCREENSHOTS."""
    images = Path(__file__).parent.parent / "docs" / "images"
    digest = hashlib.sha256(status_page.body()).hexdigest()
    assert (images / "status-page.sha256").read_text() == f"{digest}\n"
