"""A chat that survives a fault of the GPU, next to one that does not.

    python tools/demo.py --model DIR [--keep-logs]

Starts the protected server and holds a chat of three turns with it through the
`openai` client. Then it does so again, and has an out-of-memory fault strike in the
middle of the second answer, which must be the same in the end. Then it does that to
mlx-lm's own server. The fault is planned by `mlx_safe.testing` and raised where MLX
raises one, so that no GPU is needed.

Exit status: 0, or 1 with what was not as it should be.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import openai

SYSTEM = "Be brief."
QUESTIONS = (
    "What is the capital of France?",
    "What is it known for?",
    "What is the capital of Japan?",
)
LAST_ANSWER_HAS = "Tokyo"
# More than these answers have, so that they end by themselves.
MAX_TOKENS = 200
FAULT_MARK = " [the GPU fails here] "
# What the server logs when it has noticed.
FAULT_LOGGED = "fault of the GPU"

# Limits for what goes wrong; on two slow cores a prompt is read at some ten tokens a
# second.
WHOLE_DEMO_S = 900
START_S = 240.0
CHUNK_S = 240.0
GET_S = 60.0
STOP_S = 30.0
# How long a client waits for an answer that does not come.
STOCK_HANGS_S = 60.0
WIDTH = 78

# mlx-lm's own server. All it takes from mlx-safe is the fault.
STOCK_PROGRAM = """\
import os
os.environ["MLX_SAFE_AUTOINSTALL"] = "0"

import mlx_safe  # follows MLX_SAFE_INJECT
import mlx_lm.server as server

assert not mlx_safe.status().installed
server.main()
"""


class DemoFailed(Exception):
    """The demo cannot go on; one line says why."""


@dataclass
class Answer:
    """What a client got for one request."""

    text: str = ""
    finish: str | None = None
    # How it ended, when it did not end well.
    failure: str = ""
    code: str | None = None
    longest_pause: float = 0.0
    # Seconds until the first piece of text, and tokens of the prompt and the answer.
    first_s: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    # How many pieces had come when the fault struck.
    struck_after: int = 0


@dataclass
class Protected:
    """What was seen of the protected server."""

    answers: list[Answer] = field(default_factory=list)
    struck: Answer = field(default_factory=Answer)
    health: str = ""
    alive: bool = False
    resets: float = 0.0
    log: str = ""

    @property
    def replayed(self) -> bool:
        """Whether the fault was no more than a pause to the client."""
        return not self.struck.failure


@dataclass
class Stock:
    """What was seen of mlx-lm's own server."""

    first: Answer = field(default_factory=Answer)
    struck: Answer = field(default_factory=Answer)
    health: str = ""
    process: str = ""
    logged: str = ""
    next: Answer = field(default_factory=Answer)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--keep-logs", action="store_true", help="keep the logs of both servers"
    )
    arguments = parser.parse_args(argv)
    logs = Path(tempfile.mkdtemp(prefix="mlx-safe-demo-"))
    signal.signal(signal.SIGALRM, _give_up)
    signal.alarm(WHOLE_DEMO_S)
    try:
        return run(arguments.model.resolve(), logs)
    except DemoFailed as e:
        print(f"\ndemo: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        signal.alarm(0)
        if arguments.keep_logs:
            print(f"the logs of both servers are in {logs}")
        else:
            shutil.rmtree(logs, ignore_errors=True)


def _give_up(number: int, frame: object) -> NoReturn:
    raise DemoFailed(f"not done after {WHOLE_DEMO_S} s")


def run(model: Path, logs: Path) -> int:
    """Shows both servers and judges the protected one."""
    heading("1. The chat as it is when nothing fails")
    undisturbed = show_protected(model, logs / "undisturbed.log", "")
    plan = plan_for(undisturbed.answers)
    heading(f"2. mlx-safe serve, with a fault planned (MLX_SAFE_INJECT={plan})")
    protected = show_protected(model, logs / "mlx-safe.log", plan)
    heading("3. mlx_lm.server as it is, with the same fault")
    stock = show_stock(model, logs / "mlx-lm.log", plan)
    heading("What happened")
    print(summary(undisturbed, protected, stock))
    problems = find_problems(protected, stock)
    for problem in problems:
        print(f"NOT AS IT SHOULD BE: {problem}")
    return 1 if problems else 0


def plan_for(answers: Sequence[Answer]) -> str:
    """Out of memory half-way through the second answer; a step makes a token."""
    if any(answer.failure or answer.tokens < 2 for answer in answers):
        raise DemoFailed("the chat failed before any fault was planned")
    return f"decode:{answers[0].tokens + answers[1].tokens // 2}:8"


def heading(text: str) -> None:
    """Prints ``text`` so that it stands out."""
    print(f"\n{text}\n{'=' * len(text)}", flush=True)


# -- servers -------------------------------------------------------------------------


class Server:
    """A server in a child process, with its log in a file."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self._log = log

    def log(self) -> str:
        """All that it has written so far."""
        return self._log.read_text(errors="replace")

    def get(self, path: str, timeout: float = GET_S) -> tuple[int, str]:
        """Status and body of a GET request.

        Raises:
            OSError, http.client.HTTPException: no answer.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def health(self) -> str:
        """What /health says, in a few words."""
        try:
            status, body = self.get("/health")
        except (OSError, http.client.HTTPException) as e:
            return f"no answer ({type(e).__name__})"
        return f"{status} {body.strip()}"

    def wait_until_ready(self) -> None:
        """Returns when /health is 200.

        Raises:
            DemoFailed: the process ended, or took too long.
        """
        deadline = time.monotonic() + START_S
        while not self.health().startswith("200"):
            status = self.process.poll()
            if status is not None or time.monotonic() > deadline:
                ended = "is not ready" if status is None else f"ended ({status})"
                lines = self.log().strip().splitlines() or ["nothing was logged"]
                raise DemoFailed(f"the server {ended}: {lines[-1]}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Ends the process, by its id."""
        self.process.terminate()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(STOP_S)


@contextmanager
def running(
    program: Sequence[str], model: Path, log: Path, plan: str = ""
) -> Iterator[Server]:
    """Runs ``python PROGRAM`` as a server of ``model``, ready, and ends it.

    Args:
        plan: of the fault, as MLX_SAFE_INJECT takes it.
    """
    print("(starting the server and loading the model)", flush=True)
    port = free_port()
    options = ["--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
    environment = dict(os.environ) | {
        "MLX_SAFE_INJECT": plan,
        # The user's own reports are not told of here, nor are these among them.
        "MLX_SAFE_REPORT_DIR": str(log.parent / "reports"),
        "PYTHONUNBUFFERED": "1",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *program, *options],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    server = Server(process, port, log)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def free_port() -> int:
    """A port that nobody has, from below those of outgoing connections."""
    for port in random.sample(range(10_000, 30_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port between 10000 and 30000")


# -- the protected server ------------------------------------------------------------


def show_protected(model: Path, log: Path, plan: str) -> Protected:
    """Holds the chat of three turns with the protected server."""
    seen = Protected()
    with running(["-m", "mlx_safe", "serve"], model, log, plan) as server:
        with openai.OpenAI(
            base_url=f"http://127.0.0.1:{server.port}/v1",
            api_key="none",
            max_retries=0,
            timeout=CHUNK_S,
            # A proxy of the environment has no business on this machine.
            http_client=openai.DefaultHttpxClient(trust_env=False),
        ) as client:
            hold_chat(client, seen, server)
        seen.alive = server.process.poll() is None
        seen.health = server.health()
        seen.resets = metric(server, "mlx_safe_resets_total")
        seen.log = server.log()
    return seen


def hold_chat(client: openai.OpenAI, seen: Protected, server: Server) -> None:
    """Asks the questions; one that fails in the second turn is asked again."""
    messages = [{"role": "system", "content": SYSTEM}]
    for number, question in enumerate(QUESTIONS, 1):
        messages.append({"role": "user", "content": question})
        print(f"\nyou:   {question}")
        answer = ask(client, messages, server)
        if number == 2:
            seen.struck = answer
            if answer.failure:
                print("(the client asks once more)")
                answer = ask(client, messages, server)
            elif answer.struck_after:
                print(f"(no error; longest pause {answer.longest_pause:.1f} s)")
        seen.answers.append(answer)
        messages.append({"role": "assistant", "content": answer.text})


def ask(
    client: openai.OpenAI, messages: list[dict[str, str]], server: Server
) -> Answer:
    """Streams one answer to the terminal, and tells how it went."""
    answer = Answer()
    print("model: ", end="", flush=True)
    began = last = time.monotonic()
    struck = server.log().count(FAULT_LOGGED)
    pieces = 0
    request: Any = {"model": "default_model", "messages": messages}
    try:
        for chunk in client.chat.completions.create(
            **request,
            max_tokens=MAX_TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        ):
            now = time.monotonic()
            if answer.text:
                answer.longest_pause = max(answer.longest_pause, now - last)
            elif chunk.choices and chunk.choices[0].delta.content:
                answer.first_s = now - began
            last = now
            # It is logged before anything that comes after it is sent.
            if answer.text and server.log().count(FAULT_LOGGED) > struck:
                struck, answer.struck_after = 1 << 30, pieces
                print(FAULT_MARK, end="", flush=True)
            if chunk.usage is not None:
                answer.prompt_tokens = chunk.usage.prompt_tokens
                answer.tokens = chunk.usage.completion_tokens
            pieces += 1
            for choice in chunk.choices:
                answer.text += choice.delta.content or ""
                answer.finish = choice.finish_reason or answer.finish
                print(choice.delta.content or "", end="", flush=True)
    except openai.APIError as e:
        answer.failure = f"openai.{type(e).__name__}: {e.message}"
        answer.code = e.code
    print()
    if answer.failure:
        print(f"\n{wrapped('!', f'{answer.failure} (code: {answer.code})')}")
    return answer


def metric(server: Server, name: str) -> float:
    """The value of one metric; 0 when it is not there."""
    try:
        _, body = server.get("/metrics")
    except (OSError, http.client.HTTPException):
        return 0.0
    for line in body.splitlines():
        if line.startswith(f"{name} "):
            return float(line.split()[1])
    return 0.0


# -- the stock server ----------------------------------------------------------------


def show_stock(model: Path, log: Path, plan: str) -> Stock:
    """Holds the first two turns with mlx-lm's own server, and asks once more."""
    seen = Stock()
    with running(["-c", STOCK_PROGRAM], model, log, plan) as server:
        messages = [{"role": "system", "content": SYSTEM}]
        seen.first = ask_stock(server, messages, QUESTIONS[0], CHUNK_S)
        messages.append({"role": "assistant", "content": seen.first.text})
        seen.struck = ask_stock(server, messages, QUESTIONS[1])
        seen.health = server.health()
        print(f"\nGET /health: {seen.health}")
        messages = [{"role": "system", "content": SYSTEM}]
        seen.next = ask_stock(server, messages, QUESTIONS[2])
        status = server.process.poll()
        seen.process = "still there" if status is None else f"ended ({status})"
        tracebacks = server.log().count("Traceback (most recent call last)")
        seen.logged = f"{tracebacks} traceback{'' if tracebacks == 1 else 's'}"
    return seen


def ask_stock(
    server: Server,
    messages: list[dict[str, str]],
    question: str,
    timeout: float = STOCK_HANGS_S,
) -> Answer:
    """Asks with no client library in between, to see each line of the stream."""
    messages.append({"role": "user", "content": question})
    print(f"\nyou:   {question}\nmodel: ", end="", flush=True)
    answer = Answer()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=timeout)
    request = {"messages": messages, "max_tokens": MAX_TOKENS, "temperature": 0}
    started = time.monotonic()
    try:
        connection.request(
            "POST",
            "/v1/chat/completions",
            json.dumps(request | {"model": "default_model", "stream": True}),
        )
        read_stream(connection.getresponse(), answer)
    except TimeoutError:
        answer.failure = f"hung: nothing came for {timeout:.0f} s"
    except (OSError, http.client.HTTPException) as e:
        answer.failure = f"the connection broke off ({type(e).__name__})"
    finally:
        connection.close()
    answer.longest_pause = time.monotonic() - started
    print(f"\n\n{wrapped('!', answer.failure)}" if answer.failure else "")
    return answer


def read_stream(response: http.client.HTTPResponse, answer: Answer) -> None:
    """Reads a stream to its end into ``answer``, echoing the text."""
    if response.status != 200:
        body = " ".join(response.read().decode(errors="replace").split())
        answer.failure = f"HTTP {response.status} {body[:120]}"
        return
    for line in response:
        data = line.decode().strip().removeprefix("data: ")
        if data == "[DONE]":
            return
        if not data.startswith("{"):
            continue
        event = json.loads(data)
        if "error" in event:
            answer.failure = f"an error event: {event['error']}"
        for choice in event.get("choices", []):
            text = choice["delta"].get("content") or ""
            answer.text += text
            answer.finish = choice.get("finish_reason") or answer.finish
            print(text, end="", flush=True)
    answer.failure = "the stream broke off, with no error event and no [DONE]"


# -- judgement -----------------------------------------------------------------------


def find_problems(protected: Protected, stock: Stock) -> list[str]:
    """Whatever was not as it should be, a line each."""
    struck, last = protected.struck, protected.answers[-1]
    warned = warnings_in(protected.log)
    expected = {
        "the fault should have broken off the second answer with the code "
        f"metal_out_of_memory, not {struck.code}": (
            protected.replayed or struck.code == "metal_out_of_memory"
        ),
        "the fault should have struck in the middle of the second answer": (
            protected.replayed or bool(struck.text)
        ),
        "not every turn got a whole answer in the end": all(
            answer.text and answer.finish == "stop" and not answer.failure
            for answer in protected.answers
        ),
        f"the third answer does not name {LAST_ANSWER_HAS}": (
            LAST_ANSWER_HAS in last.text
        ),
        "the protected server's process has ended": protected.alive,
        f"/health says {protected.health}": protected.health.startswith("200"),
        f"/metrics counts {protected.resets:.0f} resets, not 1": protected.resets == 1,
        f"{len(warned)} warnings or errors were logged, not the fault's alone": (
            len(warned) == 1 and "Insufficient Memory" in warned[0]
        ),
        "the fault's place in the second answer was not seen": (
            not protected.replayed or protected.struck.struck_after > 0
        ),
        "a traceback was logged": "Traceback" not in protected.log,
        f"mlx_lm.server failed before the fault: {stock.first.failure}": (
            not stock.first.failure
        ),
        "mlx_lm.server did not fail; it may handle faults by now": (
            bool(stock.struck.failure)
        ),
    }
    return [problem for problem, fine in expected.items() if not fine]


def warnings_in(log: str) -> list[str]:
    """The lines of a server's log that are warnings or worse."""
    levels = (" - WARNING - ", " - ERROR - ", " - CRITICAL - ")
    return [line for line in log.splitlines() if any(level in line for level in levels)]


def second_turn(protected: Protected) -> str:
    """What the fault was to the client of the protected server."""
    struck = protected.struck
    if struck.failure:
        return (
            f"after {len(struck.text.split())} words an error that says so "
            f"({struck.code}); asked again, it got "
            f"{'the whole answer' if protected.answers[1].finish else 'no answer'}"
        )
    if protected.resets:
        return (
            "no error: the request was replayed, the same answer went on after a "
            f"pause of {struck.longest_pause:.1f} s"
        )
    return "answered; no fault has struck"


def comparison(undisturbed: Protected, protected: Protected) -> str:
    """The second answer, held against the one that no fault struck."""
    wanted, got = undisturbed.answers[1].text, protected.answers[1].text
    if wanted == got:
        return f"the same as without the fault, all {len(got.split())} words"
    pairs = zip(wanted.split(), got.split(), strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return (
        f"the same as without the fault for {same} words, then other ones: what is "
        "read again in one go is rounded in another way"
    )


def why_so_long(protected: Protected) -> str:
    """What the pause is made of."""
    struck, first = protected.struck, protected.answers[0]
    again = struck.prompt_tokens + struck.struck_after
    return (
        f"{struck.longest_pause:.1f} s: what the failed step was to write is garbage. "
        f"So the prompt and what the client had, about {again} tokens, are read again, "
        "but for what the prompt cache had of them. As a measure: the first prompt "
        f"({first.prompt_tokens} tokens) took {first.first_s:.1f} s on this machine, "
        "with what MLX sets up once"
    )


def summary(undisturbed: Protected, protected: Protected, stock: Stock) -> str:
    """Both servers side by side, in plain text."""
    logged = warnings_in(protected.log) or ["nothing"]
    rows = (
        ("mlx-safe serve", ""),
        ("  2nd turn", second_turn(protected)),
        ("  its text", comparison(undisturbed, protected)),
        ("  the pause", why_so_long(protected)),
        ("  3rd turn", f"answered: {protected.answers[-1].text.strip()}"),
        ("  /health", protected.health),
        (
            "  resets",
            f"{protected.resets:.0f} in /metrics; the process "
            f"{'is the same one' if protected.alive else 'has ended'}",
        ),
        ("  logged", " ".join(logged)),
        ("", ""),
        ("mlx_lm.server", ""),
        ("  2nd turn", stock.struck.failure or "answered"),
        ("  /health", stock.health),
        ("  next request", stock.next.failure or "answered"),
        ("  process", stock.process),
        ("  logged", stock.logged),
        ("", ""),
        ("About this run", about()),
    )
    return "\n".join(wrapped(f"{name:<16}", text) for name, text in rows)


def about() -> str:
    """What the run shows, and what it does not."""
    mlx = version("mlx")
    where = "this Mac" if sys.platform == "darwin" else "Linux with MLX's CPU backend"
    text = (
        f"mlx {mlx}, mlx-lm {version('mlx-lm')}, on {where}. The fault is injected, "
        "not a real GPU's: both servers get the error that MLX raises for a command "
        "buffer that ran out of memory, at the same step."
    )
    if tuple(map(int, mlx.split(".")[:2])) < (0, 32):
        text += (
            f" On a Mac mlx {mlx} would not even raise it: it throws on a thread of "
            "Metal's, and the whole process of a stock server aborts."
        )
    return text


def wrapped(label: str, text: str) -> str:
    """``text`` after ``label``, in lines that fit a terminal."""
    label = f"{label} "
    return (
        textwrap.fill(
            text, WIDTH, initial_indent=label, subsequent_indent=" " * len(label)
        )
        or label.rstrip()
    )


if __name__ == "__main__":
    sys.exit(main())
