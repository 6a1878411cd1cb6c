"""More than one rank: two servers in a ring on loopback, as mlx.launch starts them.

What is asserted: nobody hangs. The client in flight gets its 503, and every rank
ends by itself, with the launcher and without it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from http.client import IncompleteRead
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

from mlx_safe.server import lifeline
from support import model_types
from support.models import make_fp8
from support.programs import program
from support.server import NEVER, Answer, Server, eventually, free_port

# Ranks that get no error from a lost peer (MLX up to 0.32.0) end after this time. Not
# before: while one is loading its model, the other waits for it.
STALL_TIMEOUT = ("--stall-timeout", "8")
END_TIMEOUT_S = 180.0

ONE_STREAM = program("one_stream")
SLOW_RANK = program("slow_to_read")
LATE_RANK = program("loads_later") + ONE_STREAM


@contextmanager
def two_ranks(
    model: Path, directory: Path, *arguments: str, inject: tuple[str, str], **more: Any
) -> Iterator[list[Server]]:
    """Both ranks, ready; ``inject`` has the fault plan of each."""
    with two_ranks_begun(model, directory, *arguments, inject=inject, **more) as ranks:
        ranks[0].wait_ready()
        yield ranks


@contextmanager
def two_ranks_begun(
    model: Path, directory: Path, *arguments: str, inject: tuple[str, str], **more: Any
) -> Iterator[list[Server]]:
    """Both ranks, which may still load their model."""
    port = free_port(2)
    hosts = directory / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port + rank}"] for rank in (0, 1)]))
    if not more.get("stock"):
        more.setdefault("program", ONE_STREAM)
    with ExitStack() as stack:
        ranks = []
        for rank in (0, 1):
            env = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
            server = Server(model, *arguments, inject=inject[rank], env=env, **more)
            ranks.append(stack.enter_context(server))
        yield ranks


def ends(ranks: list[Server]) -> list[int]:
    """The exit statuses of ranks that end by themselves."""
    return [rank.wait(END_TIMEOUT_S) for rank in ranks]


def leave(server: Server, **ask: Any) -> None:
    """A client that goes while its long request is worked on."""
    assert server.chat(max_tokens=100_000, timeout=0.5, **ask).broken


def assert_503(answer: Answer, code: str) -> None:
    assert answer.broken is None
    assert answer.error["code"] == code
    assert answer.error["retry_after"] == 5
    if answer.events:
        assert answer.done
    else:
        assert answer.status == 503


def test_requests_and_leavers_and_the_end(tiny_model: Path, tmp_path: Path) -> None:
    with two_ranks(tiny_model, tmp_path, inject=("", "")) as ranks:
        first, second = ranks
        text = first.chat().text
        assert text
        assert first.chat(stream=True).text == text
        sequential = first.chat(seed=1).text
        leave(first)
        assert first.chat().text == text
        leave(first, seed=1)
        assert first.chat(seed=1).text == sequential
        deep: Any = "deep"
        for _ in range(600):
            deep = [deep]
        assert first.chat(chat_template_kwargs={"deep": deep}).status == 400
        assert first.chat().text == text
        # Both, as mlx.launch ends a rank on another host.
        first.process.send_signal(signal.SIGHUP)
        first.process.send_signal(signal.SIGTERM)
        assert ends(ranks) == [0, 0]
        for rank in ranks:
            assert "Traceback" not in rank.log
        assert "listening" not in second.log


@pytest.mark.parametrize("path", [{}, {"seed": 1}], ids=["batched", "sequential"])
def test_who_leaves_the_queue_leaves_the_ranks_together(
    tiny_model: Path, tmp_path: Path, path: dict[str, Any]
) -> None:
    """Only the first knows that its client has left; the others have the request.

    When it alone dropped it, what came after had another text.
    """
    with two_ranks(tiny_model, tmp_path, inject=("", "")) as ranks:
        first = ranks[0]
        text = first.chat(**path).text
        # One that runs alone: all others wait in the queue.
        with stream_of(first, seed=2):
            for _ in range(3):
                leave(first, **path)
            in_flight = "mlx_safe_requests_in_flight"
            assert eventually(lambda: first.metric(in_flight) == 1)
        assert eventually(lambda: first.get("/health").json["in_flight"] == 0)
        assert first.chat(**path).text == text
        first.process.send_signal(signal.SIGTERM)
        assert ends(ranks) == [0, 0]


# Each step of the first rank, who waits for the other, takes 2 ms for each token.
PACED = ("--step-seconds", "1", "--prefill-step-size", "1024")


@pytest.mark.parametrize("path", [{}, {"seed": 1}], ids=["batched", "sequential"])
def test_all_ranks_take_steps_of_the_seconds_that_were_asked_for(
    tiny_model: Path, tmp_path: Path, path: dict[str, Any]
) -> None:
    """One of them is slow to read, and that is not the one that decides."""
    plans = (f"any:{NEVER}", f"any:{NEVER}")
    with two_ranks(
        tiny_model, tmp_path, *PACED, inject=plans, program=SLOW_RANK
    ) as ranks:
        first = ranks[0]
        text = " ".join(f"w{i % 97}" for i in range(100))
        assert first.chat(text, max_tokens=1, **path).status == 200  # tells the speed
        began = [len(rank.log) for rank in ranks]
        long = " ".join(f"v{i % 97}" for i in range(400))
        answer = first.chat(long, max_tokens=2, **path)
        assert answer.status == 200
        took = [
            [int(n) for n in re.findall(r"step of (\d+)", rank.log[since:])]
            for rank, since in zip(ranks, began, strict=True)
        ]
        assert took[0] == took[1]
        assert len(took[0]) > 2 and max(took[0]) <= 600, took
        read = answer.json["usage"]["prompt_tokens"]
        assert sum(took[0]) in range(read - 8, read + 9)
        first.process.send_signal(signal.SIGTERM)
        assert ends(ranks) == [0, 0]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_fault_ends_all_ranks(tiny_model: Path, tmp_path: Path, failing: int) -> None:
    inject = ("decode:3:8", "") if failing == 0 else ("", "decode:3:8")
    with two_ranks(tiny_model, tmp_path, *STALL_TIMEOUT, inject=inject) as ranks:
        # A stream where it matters that the answer has begun.
        answer = ranks[0].chat(stream=failing == 1)
        assert_503(answer, "metal_out_of_memory" if failing == 0 else "unavailable")
        assert ends(ranks) == [75, 75]
        for rank in ranks:
            assert "Traceback" not in rank.log


DRAWS_BADLY = program("draws_badly") + ONE_STREAM


@pytest.mark.parametrize("path", [{}, {"seed": 1}], ids=["batched", "sequential"])
def test_so_does_a_failure_of_one_request(
    tiny_model: Path, tmp_path: Path, path: dict[str, Any]
) -> None:
    """What is mended on one rank alone would differ from then on: what they draw."""
    plans = ("", "")
    with two_ranks(
        tiny_model, tmp_path, *STALL_TIMEOUT, inject=plans, program=DRAWS_BADLY
    ) as ranks:
        assert_503(ranks[0].chat(temperature=1, **path), "unavailable")
        assert ends(ranks) == [75, 75]


def test_the_stock_server_leaves_a_rank_behind(
    tiny_model: Path, tmp_path: Path
) -> None:
    inject = ("", "decode:3:8")
    with two_ranks(tiny_model, tmp_path, inject=inject, stock=True) as ranks:
        answer = ranks[0].chat(timeout=3)
        assert answer.broken or answer.status != 503
        assert ranks[0].process.poll() is None
        following = ranks[0].chat(timeout=2)
        assert following.broken or following.status != 200


def test_a_rank_is_killed_while_nothing_is_to_do(
    tiny_model: Path, tmp_path: Path
) -> None:
    with two_ranks(tiny_model, tmp_path, *STALL_TIMEOUT, inject=("", "")) as ranks:
        ranks[1].process.kill()
        assert ends(ranks) == [75, -signal.SIGKILL]


LAUNCHED = program("ends_with_its_launcher") + ONE_STREAM
LAUNCHER = """
import sys
from mlx._distributed_utils.launch import main
sys.argv[1:1] = ["-n", "2", "--starting-port", "{port}", "--", "{program}"]
main()
"""


def test_mlx_launch_ends_the_other_ranks(tiny_model: Path, tmp_path: Path) -> None:
    """At once: --stall-timeout is the default of ten minutes here."""
    rank = tmp_path / "rank.py"
    rank.write_text(f"#!{sys.executable}\n{LAUNCHED}")
    rank.chmod(0o755)  # MLX 0.31 gives it to Python, 0.32 executes it
    launcher = LAUNCHER.format(program=rank, port=free_port(2))
    with Server(tiny_model, program=launcher) as server:
        server.wait_ready()
        assert_503(server.chat(), "unavailable")
        # So a program that starts it again must not ask for the status.
        assert server.wait(END_TIMEOUT_S) == 0
        assert "rank 1 exited with code 75" in server.log


@contextmanager
def stream_of(server: Server, **more: Any) -> Iterator[Any]:
    """The lines of a stream that has begun and does not end by itself."""
    ask = {"messages": [{"role": "user", "content": "hello"}], "stream": True, **more}
    with closing(server.connect()) as connection:
        body = json.dumps({**ask, "max_tokens": 100_000})
        connection.request("POST", "/v1/chat/completions", body)
        response = connection.getresponse()
        while not response.readline().startswith(b"data: {"):
            pass
        yield response


def delta_in(line: bytes) -> str:
    """What a line of a stream says."""
    if not line.startswith(b"data: {"):
        return ""
    event = json.loads(line.removeprefix(b"data: "))
    return str(event["choices"][0]["delta"]["content"])


def error_in(response: Any) -> Any:
    """Of the event that ends a stream; None when it is cut."""
    with suppress(OSError, IncompleteRead):
        for line in response:
            if b'"error"' in line:
                assert b"[DONE]" in response.read()
                return json.loads(line.removeprefix(b"data: "))["error"]
    return None


def test_a_rank_that_is_killed_ends_the_others_at_once(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Whatever the backend makes of it: MLX 0.31.2 has nothing, nor has NCCL."""
    with two_ranks(tiny_model, tmp_path, inject=("", "")) as ranks:
        with stream_of(ranks[0]) as lines:
            ranks[1].process.kill()
            assert error_in(lines)["code"] == "unavailable"
        # --stall-timeout is the default of ten minutes here.
        assert ranks[0].wait() == 75


@pytest.mark.parametrize("killed", [0, 1])
def test_supervisors_bring_all_ranks_back_together(
    tiny_model: Path, tmp_path: Path, killed: int
) -> None:
    with two_ranks(
        tiny_model, tmp_path, "--supervise", inject=("", ""), program=None
    ) as ranks:
        first = ranks[0]
        text = first.chat().text
        long = first.chat("hello", max_tokens=600).text
        before = [rank.children()[0] for rank in ranks]
        with stream_of(first) as lines:
            os.kill(before[killed], signal.SIGKILL)
            first.wait_for_log("the server has ended")
            first.wait_for_log("a stream goes on")
            said = "".join(delta_in(lines.readline()) for _ in range(300))
            assert said in long
            assert len(said) > 50
        assert first.chat().text == text
        assert all(
            rank.children()[0] != pid for rank, pid in zip(ranks, before, strict=True)
        )
        first.process.send_signal(signal.SIGTERM)
        assert ends(ranks) == [0, 0]


def test_with_nccl_the_ranks_meet_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """mlx-lm names the CPU for one sum, and nothing for those of a step."""
    import mlx.core as mx

    from mlx_safe.server.mlx_lm import compat

    streams: list[Any] = []

    def all_sum(x: Any, *, group: Any = None, stream: Any = None) -> Any:
        streams.append(stream)
        return x

    monkeypatch.setattr(mx.distributed, "all_sum", all_sum)
    compat.meet_on_the_gpu()
    given = mx.new_stream(mx.cpu)
    for stream in (None, mx.cpu, mx.Device(mx.cpu, 0), given, mx.gpu):
        assert mx.distributed.all_sum(mx.array(1), stream=stream).item() == 1
    assert streams == [None, None, None, given, mx.gpu]


def test_strangers_hold_no_rank_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that is silent, one that says nonsense, one that has left again."""
    monkeypatch.setattr(lifeline, "GREETING_S", 60.0)
    met, said = threading.Event(), [0, 0, 0]
    strangers = []

    def first(numbers: list[int]) -> list[int]:
        said[:] = numbers
        address = ("127.0.0.1", numbers[0])
        for _ in range(3):
            strangers.append(socket.create_connection(address, 60.0))
        strangers[1].sendall(bytes(lifeline.GREETING.size))
        strangers[2].close()
        met.set()
        return numbers

    def other(rank: int) -> None:
        assert met.wait(60.0)
        found.append(lifeline.Lifeline(rank, 3, "127.0.0.1", lambda _: list(said)))

    found: list[lifeline.Lifeline] = []
    threads = [threading.Thread(target=other, args=(rank,)) for rank in (2, 1)]
    for thread in threads:
        thread.start()
    begin = time.monotonic()
    with caplog.at_level("WARNING", "mlx_safe.server"):
        home = lifeline.Lifeline(0, 3, "127.0.0.1", first)
    assert time.monotonic() - begin < 20.0  # less than the silent one's patience
    for thread in threads:
        thread.join(60.0)
    assert sorted(home._peers) == [1, 2]
    assert len(caplog.messages) == 3  # one line for each
    # Those that stay are told to go.
    assert strangers[0].recv(1) == b""
    lost: Queue[int] = Queue()
    home.watch(lost.put)
    for connection in found[0]._peers.values():
        connection.close()
    assert lost.get(timeout=60.0) in (1, 2)
    for connection in (*home._peers.values(), *found[1]._peers.values(), *strangers):
        connection.close()


def test_a_rank_that_never_comes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifeline, "CONNECT_S", 0.3)
    with pytest.raises(TimeoutError, match=r"\[1\]"):
        lifeline.Lifeline(0, 2, "127.0.0.1", lambda numbers: numbers)


def make_pipelined(directory: Path, base: Path) -> Path:
    """Of a type that can be shared in both ways, in the files that it takes."""
    import mlx.core as mx

    model_types.write(directory, "ministral3", base)
    weights = directory / "model.safetensors"
    names = dict(mx.load(str(weights)))  # type: ignore[arg-type]
    index = {"weight_map": dict.fromkeys(names, weights.name)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


@pytest.mark.parametrize("arguments", [(), ("--pipeline",)], ids=["tensor", "pipeline"])
def test_ranks_share_a_model_both_ways(
    tiny_model: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    """What two of them say together is what one says alone."""
    model = make_pipelined(tmp_path / "model", tiny_model)
    with Server(model).wait_ready() as alone:
        text = alone.chat(max_tokens=8).text
    with two_ranks(model, tmp_path, *arguments, inject=("", "")) as ranks:
        for options in ({}, {"stream": True}, {"seed": 1}):
            assert ranks[0].chat(max_tokens=8, **options).text == text


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (5, 5)])
def test_ranks_refuse_a_model_whose_heads_they_cannot_share(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    heads: int,
    kv_heads: int,
) -> None:
    """The one failed at each request; the other answered them all with noise."""
    config = {**model_types.OVERRIDES["ministral3"], "num_attention_heads": heads}
    config["num_key_value_heads"] = kv_heads
    monkeypatch.setitem(model_types.OVERRIDES, "ministral3", config)
    model = model_types.write(tmp_path / "model", "ministral3", tiny_model)
    for log in logs_of_refusal(model, tmp_path):
        assert "2 ranks cannot share it evenly" in log
        assert f"heads is {min(heads, kv_heads)}: start" in log


def test_so_they_do_with_weights_that_mlx_lm_does_not_decode(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "fp8")
    make_fp8(model)
    for log in logs_of_refusal(model, tmp_path):
        assert ".weight is uint8, as MLX reads FP8" in log


def logs_of_refusal(model: Path, directory: Path) -> list[str]:
    """Of ranks that refuse ``model``; the second is later than the first."""
    plans = ("", "")
    with two_ranks_begun(model, directory, inject=plans, program=LATE_RANK) as ranks:
        assert ends(ranks) == [2, 2]
        logs = [rank.log for rank in ranks]
    for log in logs:
        assert "Traceback" not in log and "ready:" not in log
    return logs
