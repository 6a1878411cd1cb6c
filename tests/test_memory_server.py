"""Memory that does not have to fail: the real server below a real ceiling.

The counters are MLX's own, on the CPU backend; the ceiling is
``--max-active-memory-bytes``.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx_lm.server
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache

from mlx_safe.cli import main
from mlx_safe.doctor import examine
from mlx_safe.memory.estimate import CacheCost, Transients, calibrate
from mlx_safe.server import model_demand
from support import child
from support.card import is_card
from support.programs import program
from support.server import CONTROLLED, Answer, Server, eventually

CEILING = 6_000_000
# Ten conversations of tens of thousands of tokens on a machine of 48 GB, scaled
# to a model of 363 kB with 512 bytes for each token.
CLIENTS, TURNS, GROWTH, TOKENS = 10, 6, 20, 8
# Prompts that come in their midst, as shares of the room, and what they are told. What
# is closer to 1 has a test of its own, without others.
STRANGERS = ((0.5, 200), (0.7, 200), (1.5, 400), (3.0, 400))

# An answer that takes minutes, and room for one such request and not for two.
ENDLESS = 100_000
ROOM_FOR_ONE = ("--max-active-kv-bytes", "75M")

BALLOON = program("balloon")

DEAR = program("dear_steps")

# Of `tiny_model`, in kB. A card's allocator rounds small arrays up.
MODEL_KB = 378 if is_card() else 363

RUNNING = ("prefill", "decode", "finished")


def gauges(server: Server) -> dict[str, float]:
    """The samples of /metrics about memory, without their prefix and unit."""
    found = {"running": 0.0}
    for line in server.get("/metrics").body.splitlines():
        name, _, value = line.rpartition(" ")
        if name.startswith("mlx_safe_memory_") and "{" not in name:
            short = name.removeprefix("mlx_safe_memory_").removesuffix("_bytes")
            found[short] = float(value)
        elif name == "mlx_safe_requests_held":
            found["held"] = float(value)
        elif name.startswith("mlx_safe_requests_in_state"):
            state = name.partition('"')[2].partition('"')[0]
            found["running"] += float(value) * (state in RUNNING)
    return found


def room_told(server: Server) -> str:
    """What the log said at the start, such as ``"2500 tokens"``."""
    told = re.compile(r"room for (.*); the ceiling is ")
    assert eventually(lambda: bool(told.search(server.log)))
    return str(told.findall(server.log)[0])


@contextlib.contextmanager
def sampling(server: Server) -> Iterator[list[float]]:
    """What is active, again and again while the block runs."""
    samples: list[float] = []
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.02):
            samples.append(gauges(server)["active"])

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join(120)


def converse(server: Server, client: int, answers: list[Answer]) -> None:
    """One conversation, each turn of which sends all that was said before."""
    messages = [{"role": "system", "content": "You are terse."}]
    # Every third client takes the sequential path, every other one streams.
    more: dict[str, Any] = {"seed": client} if client % 3 == 2 else {}
    more["stream"] = client % 2 == 0
    for turn in range(TURNS):
        text = f"client {client} turn {turn} " + "word " * GROWTH
        messages.append({"role": "user", "content": text})
        answer = server.post(
            {"messages": messages, "max_tokens": TOKENS, **more}, timeout=400
        )
        answers.append(answer)
        if answer.status != 200 or answer.error:
            return
        messages.append({"role": "assistant", "content": answer.text})


def growing_conversations(server: Server) -> list[Answer]:
    answers: list[Answer] = []
    threads = [
        threading.Thread(target=converse, args=(server, i, answers), daemon=True)
        for i in range(CLIENTS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(400)
    return answers


@contextlib.contextmanager
def strangers(server: Server, room: int) -> Iterator[list[tuple[int, int | None]]]:
    """Cold prompts of all lengths, on both paths, while the block runs.

    Has what each was to be told, and was.
    """
    found: list[tuple[int, int | None]] = []

    def ask(share: float, wanted: int, more: dict[str, Any]) -> None:
        prompt = f"{more}".ljust(int(share * room) - TOKENS, "x")
        body = {"prompt": prompt, "max_tokens": TOKENS, **more}
        answer = server.post(body, "/v1/completions", timeout=400)
        found.append((wanted, answer.status))

    threads = [
        threading.Thread(target=ask, args=(*stranger, more), daemon=True)
        for stranger, more in zip(STRANGERS, 2 * [{}, {"seed": 1}], strict=True)
    ]
    for thread in threads:
        thread.start()
    yield found
    for thread in threads:
        thread.join(400)


def assert_below(active: list[float]) -> None:
    """No more than the ceiling, bytes.

    On a card MLX holds back only above it, and keeps the temporaries of ten graphs
    (`Limits.holds_mlx_back`): of so small a model more than all the rest.
    """
    assert max(active) <= CEILING or is_card()


def test_ten_growing_conversations(tiny_model: Path) -> None:
    """Without a ceiling they take over three times as much, and all end well."""
    with Server(tiny_model) as free:
        free.wait_ready()
        assert all(a.status == 200 for a in growing_conversations(free))
        needed = gauges(free)["peak"]
    # Ten times, as a rule: it depends on how many of them meet in a batch.
    assert needed > 3 * CEILING
    arguments = ["--max-active-memory-bytes", str(CEILING), "--memory-wait", "600"]
    with Server(tiny_model, *arguments) as server:
        server.wait_ready()
        room = int(room_told(server).split()[0])
        with sampling(server) as samples, strangers(server, room) as told:
            answers = growing_conversations(server)
        found = gauges(server)
    failures = [(a.status, a.body, a.broken) for a in answers if a.status != 200]
    assert not failures
    assert not any(a.error or a.broken for a in answers)
    assert len(answers) == CLIENTS * TURNS
    assert samples
    # Not only at the samples: MLX's own counter of the peak.
    assert_below([*samples, found["peak"]])
    assert len(told) == len(STRANGERS)
    assert all(wanted == status for wanted, status in told), told
    assert found["refused_total"] == 0
    assert found["too_long_total"] == sum(wanted == 400 for wanted, _ in told)
    assert "Traceback" not in server.log


@pytest.fixture(scope="module")
def small(tiny_model: Path) -> Iterator[Server]:
    """A server with little room and little patience."""
    arguments = ["--max-active-memory-bytes", str(CEILING), "--memory-wait", "0.2"]
    # Or entries of the prompt cache go for larger steps, as far as these are thought
    # to fit, and how many are left depends on that.
    arguments += ["--prefill-step-size", "64"]
    with Server(tiny_model, *arguments) as server:
        yield server.wait_ready()


@pytest.mark.parametrize("more", [{}, {"seed": 1}], ids=["batched", "sequential"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_what_can_never_fit_is_told_so(
    small: Server, more: dict[str, Any], stream: bool
) -> None:
    # A cold prompt: nothing is in the caches that could be projected from.
    answer = small.chat("x" * 30_000, stream=stream, **more)
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"
    assert answer.error["code"] == "context_length_exceeded"
    assert f"room for {room_told(small)}." in answer.error["message"]
    assert "retry-after" not in answer.headers
    # So is a prompt that fits with more to generate than does.
    assert small.chat(max_tokens=30_000, **more).status == 400
    assert small.chat(**more).status == 200


@pytest.mark.parametrize("more", [{}, {"seed": 1}], ids=["batched", "sequential"])
def test_what_was_told_to_fit_is_not_ended_by_an_estimate(
    tiny_model: Path, more: dict[str, Any]
) -> None:
    """Alone, up to the last token that the log had room for, whatever was learned."""
    arguments = ["--max-active-memory-bytes", str(CEILING)]
    with Server(tiny_model, *arguments, program=DEAR) as server:
        server.wait_ready()
        room = int(room_told(server).split()[0].replace("k", "000"))
        for i, share in enumerate((0.8, 0.9, 1.0)):
            tokens = int(share * room) - 8
            # Nothing of the one before is in the prompt cache.
            body = {"prompt": "abc"[i] * tokens, "max_tokens": 8, **more}
            answer = server.post(body, "/v1/completions", timeout=300)
            assert answer.status == 200, (share, answer.body)
            assert answer.json["usage"]["prompt_tokens"] == tokens
        assert gauges(server)["refused_total"] == 0
        if is_card():  # where nothing is learned from what steps have taken
            return
        # The estimate was against it: one token more, and it is believed.
        body = {"prompt": "d" * (room + 1), "max_tokens": 8, **more}
        refused = server.post(body, "/v1/completions", timeout=300)
        assert refused.error["code"] == "context_length_exceeded"
        assert f"room for {room} tokens." in refused.error["message"]


def test_what_has_ended_is_not_counted_for_the_next(
    tiny_model: Path, draft_model: Path
) -> None:
    """With a draft model there is no look at the memory while a prompt is read."""
    arguments = ["--max-active-memory-bytes", str(CEILING)]
    arguments += ["--draft-model", str(draft_model)]
    with Server(tiny_model, *arguments) as server:
        server.wait_ready()
        tokens = int(room_told(server).split()[0]) * 9 // 10
        for letter in "abcd":
            body = {"prompt": letter * tokens, "max_tokens": 1}
            answer = server.post(body, "/v1/completions", timeout=300)
            assert answer.status == 200, answer.body
        assert_below([gauges(server)["peak"]])


def test_the_prompt_cache_makes_room(small: Server) -> None:
    """Nothing is refused that old entries of the prompt cache could give."""
    for i in range(6):
        assert small.chat(f"{i} " + "entry " * 150).status == 200
    before = small.metric("mlx_safe_prompt_cache_bytes")
    assert before > 10**6
    evictions = small.metric("mlx_safe_prompt_cache_evictions_total")
    refused = gauges(small)["refused_total"]
    assert small.chat("large " * 350).status == 200
    name = "mlx_safe_prompt_cache_evictions_total"
    assert eventually(lambda: small.metric(name) > evictions)
    assert gauges(small)["refused_total"] == refused
    assert_below([gauges(small)["peak"]])


@contextlib.contextmanager
def asking(server: Server, **ask: Any) -> Iterator[socket.socket]:
    """A client that has sent a chat, and leaves when the block ends."""
    messages = [{"role": "user", "content": "x"}]
    body = json.dumps({"messages": messages, **ask}).encode()
    head = f"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: {len(body)}"
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as s:
        s.sendall(head.encode() + b"\r\n\r\n" + body)
        yield s


@contextlib.contextmanager
def endless_request(server: Server, tokens: int = ENDLESS) -> Iterator[None]:
    """It runs when the block begins, and does not end before the block."""
    with asking(server, max_tokens=tokens, stream=True) as s:
        assert s.recv(1)
        yield


def test_what_does_not_fit_in_time_is_told_to_come_again(tiny_model: Path) -> None:
    with Server(tiny_model, *ROOM_FOR_ONE, "--memory-wait", "0") as server:
        server.wait_ready()
        with endless_request(server):
            answer = server.chat()
            # Padded to the long one's length, it would take as much as that.
            assert answer.status == 503
            assert answer.error["code"] == "insufficient_memory"
            assert answer.error["type"] == "resource_exhausted_error"
            assert int(answer.headers["retry-after"]) > 0
        assert eventually(lambda: gauges(server)["running"] == 0)
        assert server.chat().status == 200


def test_what_does_not_fit_yet_waits(tiny_model: Path) -> None:
    answers: list[Answer] = []
    with Server(tiny_model, *ROOM_FOR_ONE, "--memory-wait", "300") as server:
        server.wait_ready()
        waiting = threading.Thread(
            target=lambda: answers.extend(server.chats(3)), daemon=True
        )
        with endless_request(server):
            waiting.start()
            assert eventually(lambda: gauges(server)["held"] == 3)
            assert not answers
        waiting.join(300)
        assert [a.status for a in answers] == [200] * 3
        assert gauges(server)["held_total"] >= 3
        assert gauges(server)["held"] == 0


def test_who_leaves_while_waiting_for_memory_is_noticed(tiny_model: Path) -> None:
    with Server(tiny_model, *ROOM_FOR_ONE, "--memory-wait", "300") as server:
        server.wait_ready()
        with endless_request(server):
            with asking(server):
                assert eventually(lambda: gauges(server)["held"] == 1)
            assert eventually(lambda: "outcome=client_left" in server.log)
            assert eventually(lambda: gauges(server)["held"] == 0)
            # And not only when its turn came.
            assert gauges(server)["running"] == 1
        assert eventually(lambda: server.metric("mlx_safe_requests_in_flight") == 0)
        assert server.chat().status == 200
        assert "Traceback" not in server.log


def test_memory_that_others_take_costs_a_pause_and_no_request(
    tiny_model: Path,
) -> None:
    """The request that came last is put back and goes on later, however long it is."""
    arguments = ["--max-active-memory-bytes", str(CEILING), "--prompt-cache-size", "0"]
    arguments += ["--memory-wait", "0"]  # for those that have not begun
    with Server(tiny_model, *arguments, program=BALLOON) as server:
        server.wait_ready()
        answers = server.chats(2, max_tokens=1500)
        assert gauges(server)["preempted_total"] == 1
        for answer in answers:
            assert answer.json["usage"]["completion_tokens"] == 1500
        assert len(answers) == 2
        assert "Traceback" not in server.log


def test_a_fault_lowers_the_ceiling(tiny_model: Path) -> None:
    """For what runs together: one is served alone, the next is told why it is not."""
    arguments = ["--max-active-memory-bytes", "160M", "--memory-wait", "0"]
    with Server(tiny_model, *arguments, program=CONTROLLED) as server:
        server.wait_ready()
        before = gauges(server)
        assert before["ceiling"] == before["ceiling_static"] == 160e6
        assert server.is_well()
        server.plan("prefill:1:8")
        assert server.chat("some prompt of some length").status == 200
        after = gauges(server)
        assert after["ceiling"] < after["ceiling_static"] == 160e6
        assert re.search(
            r"out of memory with up to .* active: the ceiling is .* now "
            r"\(it stays there for 5 min, and rises to .* in the ",
            server.log,
        )
        # More than the ceiling is now, with another beside it. A card's is lowered
        # by a fifth, as it was known what was there.
        tokens = 131_072  # the model's context
        assert after["ceiling"] < 2 * 512 * tokens < 160e6
        with endless_request(server, tokens):
            refused = server.chat()
            assert refused.error["code"] == "insufficient_memory"
            told = refused.error["message"]
            assert "the GPU ran out of memory" in told
            assert "instead of 160.0 MB" in told and "min" in told
            assert server.is_well()


@pytest.mark.parametrize("more", [{}, {"seed": 1}], ids=["batched", "sequential"])
def test_what_a_fault_has_taught_refuses_nothing_that_is_alone(
    tiny_model: Path, more: dict[str, Any]
) -> None:
    """It is tried, though it needs more than was learned, run again or new."""
    arguments = ["--max-active-memory-bytes", "2M", "--prompt-cache-size", "0"]
    with Server(tiny_model, *arguments, program=CONTROLLED) as server:
        server.wait_ready()
        ask = {"max_tokens": 400, **more}
        undisturbed = server.chat(**ask).text
        server.plan("decode:300:8,decode:301:8")
        answer = server.chat(**ask)
        assert answer.status == 200 and answer.text == undisturbed
        assert gauges(server)["ceiling"] < (1_500_000 if is_card() else 1_000_000)
        assert server.metric("mlx_safe_replays_total") == 2
        # Nor is one that comes later and is alone: to refuse it would help nobody.
        assert server.chat(**ask).text == undisturbed
        assert gauges(server)["refused_total"] == 0


def test_the_start_says_what_fits(small: Server) -> None:
    assert eventually(lambda: "ready: " in small.log)
    line = next(x for x in small.log.splitlines() if "ceiling" in x)
    assert re.search(rf"model {MODEL_KB}\.\d kB, ceiling 6.0 MB, prompt cache at", line)
    assert "room for" in line and "; the ceiling is --max-active-memory-bytes" in line
    found = gauges(small)
    assert found["model"] // 1000 == MODEL_KB
    assert found["prompt_cache_limit"] < CEILING / 2


def test_another_model_takes_the_place_of_the_first(
    tiny_model: Path, draft_model: Path, wide_model: Path
) -> None:
    """Only one is in memory at a time; one that has no room is not served."""
    with Server(tiny_model, "--max-active-memory-bytes", "1200K") as server:
        server.wait_ready()
        first, model = server.chat().text, gauges(server)["model"]
        for _ in range(2):
            second = server.chat(model=str(draft_model))
            assert second.status == 200 and second.text != first
            assert gauges(server)["model"] < 1.1 * model
            assert server.chat().text == first
            assert gauges(server)["model"] < 1.1 * model
        for _ in range(2):
            refused = server.chat(model=str(wide_model))
            assert refused.status == 404
            assert refused.error["code"] == "model_not_found"
        said = "a model cannot be loaded: its weights are"
        assert eventually(lambda: said in server.log)
        assert server.chat().text == first
        assert "Traceback" not in server.log


@pytest.mark.parametrize(
    "arguments",
    [
        ["--max-active-memory-bytes", "20X"],
        ["--max-active-kv-bytes", "0"],
        ["--prompt-cache-bytes", "much"],
        ["--prefill-step-size", "0"],
        ["--memory-wait", "-1"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_bad_value_is_one_clear_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--model", "m", *arguments]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert arguments[0] in last and "must be" in last and arguments[1] in last


@pytest.mark.parametrize(
    ("flag", "size", "why"),
    [
        ("--max-active-memory-bytes", 300_000, "the model and one step"),
        ("--max-active-kv-bytes", 1000, "the cache of the shortest prompt needs"),
    ],
)
def test_a_limit_that_leaves_no_room_is_told_at_the_start(
    tiny_model: Path, flag: str, size: int, why: str
) -> None:
    with Server(tiny_model, flag, str(size)) as server:
        assert server.wait(120) == 2
        assert f"{flag} {size}: {why}" in server.log
        assert "Traceback" not in server.log


NO_KV_BITS = pytest.mark.skipif(
    not hasattr(mlx_lm.server, "DEFAULT_QUANTIZED_KV_START"),
    reason="this mlx-lm's server has no --kv-bits",
)


@NO_KV_BITS
def test_a_cache_that_cannot_be_quantized_is_told_of() -> None:
    """One with a window, as gemma3 has; mlx-lm raises at --quantized-kv-start."""
    model = SimpleNamespace(
        make_cache=lambda: [KVCache(), RotatingKVCache(max_size=64)]
    )
    flags = SimpleNamespace(kv_bits=4, kv_group_size=64, quantized_kv_start=5000)
    provider = SimpleNamespace(model=model, draft_model=None, cli_args=flags)
    with pytest.raises(model_demand.NoRoom, match=r"--kv-bits 4 .*Rotating"):
        model_demand._measure(provider, Transients(), False)


@NO_KV_BITS
def test_a_quantization_that_does_not_suit_the_model_is_told_at_the_start(
    tiny_model: Path,
) -> None:
    """Not with a 500 to the first prompt that is long enough to be quantized."""
    with Server(tiny_model, "--kv-bits", "4") as server:
        assert server.wait(120) == 2
        assert "--kv-bits 4 --kv-group-size 64: [quantize]" in server.log
        assert "Traceback" not in server.log


def test_a_ceiling_beyond_the_machine_is_warned_of(tiny_model: Path) -> None:
    with Server(tiny_model, "--max-active-memory-bytes", "30T") as server:
        server.wait_ready()
        warned = (
            "--max-active-memory-bytes 30000000000000 is more than this machine has"
        )
        assert eventually(lambda: warned in server.log)
        assert "with no margin; without the flag it is" in server.log
        assert gauges(server)["ceiling"] < 30e12


def test_the_doctor(tiny_model: Path) -> None:
    code = f"""
    from mlx_safe.cli import main
    main(["doctor", "--json", "--model", {str(tiny_model)!r}])
    """
    done = child.run(code, timeout=180)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["machine"]["memory"] > 0
    assert found["protection"]["mode"] in ("intercept", "observe")
    assert found["ceiling"]["bytes"] == found["ceiling"]["limits"][0]["bytes"]
    assert all(limit["source"] for limit in found["ceiling"]["limits"])
    assert found["model"]["bytes"] // 1000 == MODEL_KB
    # 2 layers, keys and values, 2 heads of 16 numbers of 4 bytes.
    assert found["model"]["bytes_per_token"] == 2 * 2 * 2 * 16 * 4
    flags = found["model"]["flags"]
    assert "--prompt-cache-bytes" in flags
    # What the model was made for is less than what there is room for here.
    assert found["model"]["context_tokens"] == 131_072
    prompt = int(flags[flags.index("--max-prompt-tokens") + 1])
    assert 0 < prompt <= min(131_072, found["model"]["two_tokens"]) - 512


def test_the_log_and_the_doctor_tell_the_same_room(tiny_model: Path) -> None:
    """One that costs nothing to answer by memory: --max-active-kv-bytes decides."""
    limits = ["--max-active-kv-bytes", "1500K"]
    with Server(tiny_model, *limits) as server:
        server.wait_ready()
        told = room_told(server)
        refused = server.chat("x" * 3000)
        assert refused.status == 400
        assert f"room for {told}." in refused.error["message"]
    # 1.5 MB in places of 512 bytes each, less what is allocated ahead.
    assert told == f"{1_500_000 // 512 - 510} tokens"
    code = f"""
    from mlx_safe.cli import main
    main(["doctor", "--json", "--model", {str(tiny_model)!r}, *{limits}])
    """
    done = child.run(code)
    assert done.returncode == 0, done.stderr
    assert f"{json.loads(done.stdout)['model']['room_tokens']} tokens" == told


def test_the_doctor_counts_a_draft_model(tiny_model: Path, draft_model: Path) -> None:
    done = child.run(program("doctor_with_a_draft"), tiny_model, draft_model)
    assert done.stdout.split("\n")[:2] == ["True", "True"], done.stderr
    assert str(["--draft-model", str(draft_model)]) in done.stdout


def test_the_doctor_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    limits = ("of the card",) if is_card() else ("of RAM", "wired limit")
    for word in ("machine", "mlx", "ceiling", *limits):
        assert word in shown
    assert main(["doctor", "--model", "/no/such/model"]) == 2
    assert "there is no such directory" in capsys.readouterr().err


def test_the_doctor_takes_what_the_server_would(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command line, then the environment, then the file."""
    file = tmp_path / "c.toml"
    file.write_text(
        f'model = "{tiny_model}"\nkv-dir = "{tmp_path / "kv"}"\n'
        'kv-disk-bytes = "3G"\nkv-free-bytes = 0\nmax-active-memory-bytes = "2G"\n'
    )
    monkeypatch.setenv("MLX_SAFE_MAX_ACTIVE_KV_BYTES", "1500K")
    flags = ["--config", str(file), "--max-active-memory-bytes", "1G", "--json"]
    assert main(["doctor", *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"]["name"] == str(tiny_model)
    assert found["ceiling"]["bytes"] == 10**9
    assert found["model"]["flags"][:4] == [
        *("--max-active-memory-bytes", "1000000000"),
        *("--max-active-kv-bytes", "1500000"),
    ]
    assert found["kv_disk"]["path"] == str(tmp_path / "kv")
    assert found["kv_disk"]["limit"] == 3 * 10**9
    assert found["kv_disk"]["left_free"] == 0
    # With a file that no server would take it says so, and the rest.
    file.write_text('model = "/no/such/model"\n')
    assert main(["doctor", "--config", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "! mlx-safe serve would not start: --model /no/such/model" in shown


def test_the_doctor_judges_a_file_together_with_its_own_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, kept = tmp_path / "c.toml", tmp_path / "kv"
    file.write_text('kv-disk-bytes = "3G"\n')
    flags = ["--config", str(file), "--kv-dir", str(kept)]
    assert main(["doctor", *flags]) == 0
    shown = capsys.readouterr().out
    assert f"defaults    {file} sets kv-disk-bytes\n" in shown
    assert f"{kept}: 0 files, 0 B of 3.0 GB;" in shown
    # What the file alone says is named with it.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "text").touch()
    file.write_text(f'kv-dir = "{tmp_path / "other"}"\n')
    assert main(["doctor", "--config", str(file)]) == 2
    assert f"(--kv-dir comes from {file})\n" in capsys.readouterr().err


def test_the_doctor_with_a_model_that_cannot_be_run(
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("[GatherMM::eval] Currently only supports float32.\nMore.")

    monkeypatch.setattr("mlx_safe.doctor.calibrate", fail)
    assert main(["doctor", "--model", str(tiny_model)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.endswith(
        f"--model {tiny_model}: cannot be run: [GatherMM::eval] Currently only "
        "supports float32. More."
    )


def test_what_the_doctor_recommends_can_be_served(
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def measured(model: Any, make_cache: Any, transients: Transients) -> CacheCost:
        """The model's caches, and a step as if it took 20 kB for each token.

        What one of so small a model takes differs by a tenth from run to run.
        """
        transients.observe(64, 1024, 64 * 20_000)
        return calibrate(model, make_cache, Transients())

    monkeypatch.setattr("mlx_safe.doctor.calibrate", measured)

    def told(*limits: str) -> str:
        assert main(["doctor", "--model", str(tiny_model), *limits]) == 0
        return capsys.readouterr().out

    # There is room for a request, and none for the smallest usual step: nothing is left
    # for the prompt cache, and the server takes no --prompt-cache-bytes 0.
    model = examine(str(tiny_model))["model"]["bytes"]
    narrow = told("--max-active-memory-bytes", str(model + 400_000))
    assert "recommended" in narrow and "--prompt-cache-bytes" not in narrow
    wide = told("--max-active-memory-bytes", str(model + 10_000_000))
    assert "recommended" in wide and "--prompt-cache-bytes" in wide
    # It is the limit that leaves no room, not the model that is too large.
    limit = "--max-active-kv-bytes 1"
    assert f"it does not fit with {limit}: take" in told(*limit.split())


def test_the_doctor_on_a_mac() -> None:
    from mlx_safe.doctor import wired_limit_advice
    from mlx_safe.memory.machine import Machine

    mac = Machine("darwin", "Apple M4 Pro", True, 48 * 2**30, 40 * 10**9)
    advice = wired_limit_advice(mac)
    assert "sysctl iogpu.wired_limit_mb=40960" in advice
    assert "from 36.0 GB to 38.7 GB" in advice and "risk" in advice
    mac = Machine("darwin", "Apple M1", True, 16 * 2**30, 12 * 10**9, 14 * 2**30)
    assert "limit_mb is 14336, that is 15.0 GB;" in wired_limit_advice(mac)
