"""Under a random load each request is one line, and the metrics are their sum.

What clients saw, what the log says of each and what ``/metrics`` counted are three
accounts of the same requests: they are held against each other.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.server import CONTROLLED, Answer, Server, eventually

CLIENTS, ROUNDS = 6, 8
WORDS = [f"w{i}" for i in range(40)]

Line = dict[str, Any]


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Server]:
    flags = ("--log-format", "json", "--max-prompt-tokens", "120")
    with Server(tiny_model, *flags, program=CONTROLLED) as found:
        yield found.wait_ready()


def lines(server: Server) -> list[Line]:
    texts = [x for x in server.log.splitlines() if x.startswith("{")]
    return [json.loads(text) for text in texts]


def samples(server: Server) -> Counter[tuple[str, tuple[tuple[str, str], ...]]]:
    """The counters, and the counts and sums of the histograms."""
    found: Counter[tuple[str, tuple[tuple[str, str], ...]]] = Counter()
    for family in text_string_to_metric_families(server.get("/metrics").body):
        for sample in family.samples:
            if family.type == "counter" or sample.name.endswith(("_count", "_sum")):
                labels = tuple(sorted(sample.labels.items()))
                found[sample.name, labels] = sample.value  # type: ignore[assignment]
    return found


@dataclass
class Seen:
    """What a client saw. ``answer`` None: it left before it had one."""

    status: int | None
    seconds: float
    answer: Answer | None = None


class Load:
    """Clients that ask whatever comes to their mind."""

    def __init__(self, server: Server, seed: int) -> None:
        self._server = server
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self.seen: list[Seen] = []
        self.errors: list[BaseException] = []

    def run(self) -> None:
        threads = [
            threading.Thread(target=self._client, args=(self._random.random(),))
            for _ in range(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive(), self._server.log
        assert not self.errors, self.errors

    def _client(self, seed: float) -> None:
        mine = random.Random(seed)
        try:
            for _ in range(ROUNDS):
                kind = mine.choice((self._whole, self._whole, self._wrong, self._leave))
                began = time.monotonic()
                status, answer = kind(mine)
                seen = Seen(status, time.monotonic() - began, answer)
                with self._lock:
                    self.seen.append(seen)
        except BaseException as e:
            self.errors.append(e)

    def _body(self, mine: random.Random) -> dict[str, Any]:
        text = " ".join(mine.choices(WORDS, k=mine.randint(1, 20)))
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": mine.randint(1, 12),
        }
        if mine.random() < 0.4:
            body["seed"] = mine.randint(1, 99)
        if mine.random() < 0.3:
            body["n"] = mine.randint(2, 3)
        if mine.random() < 0.5:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body

    def _whole(self, mine: random.Random) -> tuple[int | None, Answer]:
        answer = self._server.post(self._body(mine))
        return answer.status, answer

    def _wrong(self, mine: random.Random) -> tuple[int | None, Answer]:
        long = {"role": "user", "content": "one " * 400}
        answer = mine.choice(
            (
                lambda: self._server.post(b"{"),
                lambda: self._server.post(b"[1]", "/v1/completions"),
                lambda: self._server.chat(temperature=-1),
                lambda: self._server.chat(model="nosuch"),
                lambda: self._server.post({"messages": [long]}),
                lambda: self._server.get("/nowhere"),
                lambda: self._server.get("/v1/chat/completions"),
                lambda: self._server.get("/v1/models"),
            )
        )()
        return answer.status, answer

    def _leave(self, mine: random.Random) -> tuple[int | None, None]:
        body = {**self._body(mine), "max_tokens": 10**5}
        with self._server.connected(body, reset=mine.random() < 0.5) as s:
            if mine.random() < 0.5 and body.get("stream"):
                return int(s.recv(200).split()[1]), None
            time.sleep(mine.random() / 5)
        return None, None


def ended(line: Line) -> tuple[str, str]:
    return line["outcome"], str(line["status"])


def usage_of(answer: Answer) -> Any:
    return (answer.events[-1] if answer.events else answer.json).get("usage")


# What happens to the GPU meanwhile.
PLANS = (
    "any:40:2",
    ",".join(f"any:{i}:8" for i in range(40, 47)),  # more than two attempts
    "any:50:0:once:bug",
)


@pytest.mark.parametrize("seed", range(len(PLANS)))
def test_the_three_accounts_agree(server: Server, seed: int) -> None:
    server.renew()
    before, load = samples(server), Load(server, seed)
    server.plan(PLANS[seed])
    load.run()

    def told() -> list[Line]:
        return [x for x in lines(server) if x["message"] == "request"]

    assert eventually(lambda: len(told()) >= len(load.seen), 30), server.log
    assert eventually(lambda: server.get("/health").json["in_flight"] == 0)
    assert len(told()) == len(load.seen), server.log  # one line each
    check_lines(told(), load.seen)
    check_failures(told(), [x for x in lines(server) if x["level"] != "INFO"])
    check_sums(told(), samples(server), before)


def check_lines(told: list[Line], seen: list[Seen]) -> None:
    """Each answer by its id, and the others by their numbers."""
    by_id = {x["id"]: x for x in told if x["id"] != "-"}
    assert len(by_id) == sum(x["id"] != "-" for x in told)
    stayed = [s for s in seen if s.answer is not None]
    for one in stayed:
        assert one.answer is not None and one.answer.broken is None
        if one.status != 200 or '"object": "list"' in one.answer.body:
            continue
        first = one.answer.events[0] if one.answer.events else one.answer.json
        line = by_id[first["id"]]
        if one.answer.error is not None:  # after the 200 of its stream
            assert ended(line) == ("failed", "200") and line["end"] == "error_event"
            assert line["code"] == one.answer.error["code"]
            continue
        usage = usage_of(one.answer)
        assert ended(line) == ("ok", "200") and line["end"] == "whole"
        assert line["prompt_tokens"] == usage["prompt_tokens"]
        assert line["tokens"] == usage["completion_tokens"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        assert line["cached_tokens"] == cached
        assert 0 < line["first_token_s"] <= line["duration_s"]
        assert line["duration_s"] <= one.seconds + 0.5  # its client may be quicker
    statuses = Counter(str(x["status"]) for x in told if x["outcome"] != "client_left")
    # A refusal may be sent before it is seen that its client has left.
    assert Counter(str(s.status) for s in stayed) <= statuses
    left = [x for x in told if x["outcome"] == "client_left"]
    assert len(left) <= len(seen) - len(stayed)
    for line in left:
        assert line["end"] == ("unsent" if line["status"] == "none" else "cut")
        assert "code" not in line


def check_failures(told: list[Line], warnings: list[Line]) -> None:
    """Who was run again and who failed, by their own lines and by those of faults."""
    assert warnings

    def touched(how: str) -> Counter[str]:
        # The second of an answer's choices has its id and "-1".
        ids = [i for x in warnings for i in x.get(how, ())]
        return Counter("-".join(i.split("-")[:6]) for i in ids)

    replays = Counter({x["id"]: x["replays"] for x in told if "replays" in x})
    assert touched("replayed") == replays
    failed = {x["id"] for x in told if x["outcome"] == "failed"}
    assert failed <= {*touched("ended")}
    left = {x["id"] for x in told if x["outcome"] == "client_left"}
    assert {*touched("ended")} <= failed | left


def check_sums(told: list[Line], after: Counter[Any], before: Counter[Any]) -> None:
    def rise(name: str, **labels: str) -> float:
        return sum(
            value - before[key]
            for key, value in after.items()
            if key[0] == name and labels.items() <= dict(key[1]).items()
        )

    def total(field: str) -> float:
        return sum(x.get(field) or 0 for x in told)

    requests = "mlx_safe_requests_total"
    assert rise(requests) == len(told)
    for (outcome, status), count in Counter(map(ended, told)).items():
        assert rise(requests, outcome=outcome, status=status) == count
    for code, count in Counter(x.get("code", "") for x in told).items():
        assert rise(requests, code=code) == count
    assert rise("mlx_safe_prompt_tokens_total") == total("prompt_tokens")
    assert rise("mlx_safe_prompt_tokens_cached_total") == total("cached_tokens")
    assert rise("mlx_safe_generated_tokens_total") == total("tokens")
    assert rise("mlx_safe_replays_total") == total("replays")
    again = sum(x["outcome"] == "ok" and "replays" in x for x in told)
    assert rise("mlx_safe_requests_replayed_total") == again
    for name, field in (
        ("mlx_safe_time_to_first_token_seconds", "first_token_s"),
        ("mlx_safe_time_per_token_seconds", "tokens_per_s"),
    ):
        assert rise(f"{name}_count") == sum(field in x for x in told)
    first = rise("mlx_safe_time_to_first_token_seconds_sum")
    assert first == pytest.approx(total("first_token_s"), abs=0.001)
    generating = [x for x in told if "tokens" in x]
    duration = "mlx_safe_request_duration_seconds"
    assert rise(f"{duration}_count") == len(generating)
    spent = sum(x["duration_s"] for x in generating)
    assert rise(f"{duration}_sum") == pytest.approx(spent, abs=0.001)
