"""What one request's failure costs the others: nothing, where it is known whose it is.

The failures are raised by the test's own code in the server's process: where
mlx-lm runs something for each request by itself, and in a step of all.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.programs import program
from support.server import Server, eventually

PATHS: dict[str, dict[str, Any]] = {"batched": {}, "sequential": {"seed": 1}}
# Where the request fails that has this `min_p`.
PLACES = {
    "sampler": 0.101,
    "processor": 0.102,
    "sampler made": 0.103,
    "processors made": 0.104,
    "detokenizer": 0.105,
    "greedy sampler": 0.106,
    "stop words": 0.107,
    "top_logprobs": 0.108,
}
# What else it asks for, to come there.
FOR_PLACE: dict[str, dict[str, Any]] = {
    "greedy sampler": {"temperature": 0},
    "stop words": {"stop": ["fails"]},
    "top_logprobs": {"logprobs": True, "top_logprobs": 7},
}
# In a prompt: the step that reads it fails, for all its requests.
FORWARD = "\x07\x07\x07"
# In a prompt: a step that goes on from an entry of the prompt cache fails.
POISONED = "\x08\x08\x08"
# The same, when the prompt has been read and stored.
LATE = "\x0e\x0e\x0e"

FAILING = program("fails_for_one_request")


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Server]:
    places = repr((PLACES, FORWARD, POISONED, LATE))
    program = FAILING.replace("eval(sys.argv.pop(1))", places)
    with Server(tiny_model, "--prompt-cache-size", "40", program=program) as server:
        yield server.wait_ready()


def cached(server: Server, text: str) -> int:
    """How much of a prompt was in the prompt cache."""
    usage = server.chat(text, max_tokens=2).json["usage"]
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def warm(server: Server, text: str) -> int:
    """Puts ``text`` into the prompt cache; how much of it is there then."""
    cached(server, text)
    assert eventually(lambda: cached(server, text) > 400)
    return cached(server, text)


RESETS = "mlx_safe_resets_total"


def bad(place: str, **more: Any) -> dict[str, Any]:
    if place == "inserted":
        return {"max_tokens": 77, **more}
    # A penalty, so that there are processors.
    wishes = {"temperature": 1, "min_p": PLACES[place], "presence_penalty": 0.1}
    wishes |= FOR_PLACE.get(place, {})
    return {"max_tokens": 40, **wishes, **more}


def check_soundness(server: Server) -> None:
    """A request after a failure is served, and draws as if by chance."""
    drawn = {server.chat(temperature=1, max_tokens=8).text for _ in range(3)}
    assert len(drawn) > 1, "all were drawn with one key"
    assert server.chat(temperature=1, seed=3).status == 200
    assert server.get("/health").status == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("place", [*PLACES, "inserted"])
def test_its_own_failure_is_not_seen_by_the_others(
    server: Server, place: str, stream: bool
) -> None:
    text = f"{place} {stream} " + "ship " * 100
    before = warm(server, text)
    calm = server.chat(f"innocent {place}", max_tokens=150).text
    resets, replays = server.metric(RESETS), server.metric("mlx_safe_replays_total")
    told = server.log.count("one request fails; the others go on")
    with server.chatting(1, max_tokens=400, stream=True) as others:
        server.wait_for_requests(1)
        innocent = server.chat(f"innocent {place}", max_tokens=150)
        answer = server.chat(**bad(place, stream=stream))
        assert answer.error["code"] == "internal_generation_error"
        assert answer.done if answer.events else answer.status == 500
    assert innocent.text == calm
    assert others[0].done and others[0].error is None
    # Nothing was dropped, and nobody's prompt was read again.
    assert (server.metric(RESETS), server.metric("mlx_safe_replays_total")) == (
        resets,
        replays,
    )
    server.wait_for_log("one request fails; the others go on", told + 1)
    assert cached(server, text) == before
    check_soundness(server)


@pytest.mark.parametrize("place", PLACES)
def test_alone_it_costs_the_prompt_cache_nothing(server: Server, place: str) -> None:
    text = f"alone {place} " + "ship " * 100
    before = warm(server, text)
    answer = server.chat(**bad(place, seed=1))
    assert answer.status == 500
    assert cached(server, text) == before
    check_soundness(server)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_step_that_fails_ends_the_culprit_only(
    server: Server, path: str, stream: bool
) -> None:
    text = f"step {path} {stream} " + "ship " * 100
    before = warm(server, text)
    calm = server.chat("hello from client 0", max_tokens=150).text
    with server.chatting(1, max_tokens=150, stream=True) as others:
        server.wait_for_requests(1)
        answer = server.chat(f"ring {FORWARD}", stream=stream, **PATHS[path])
    assert answer.error["code"] == "internal_generation_error"
    assert others[0].done and others[0].text == calm
    # What had been complete before is no cause of it.
    assert cached(server, text) == before
    check_soundness(server)


def test_an_entry_that_fails_whoever_goes_on_from_it_is_forgotten(
    server: Server,
) -> None:
    asked = {"text": f"poisoned {POISONED} " + "ship " * 100, "seed": 1}
    assert server.chat(**asked).status == 200
    assert eventually(lambda: server.chat(**asked).status == 500)
    # It is not gone on from any more.
    again = server.chat(**asked)
    assert again.status == 200
    assert again.json["usage"]["prompt_tokens_details"]["cached_tokens"] < 400


def test_so_is_one_that_fails_who_has_stored_its_own_prompt_since(
    server: Server,
) -> None:
    """What it stored is nearer to its prompt than what it began from."""
    begins = f"late {LATE} " + "ship " * 100
    assert server.chat(begins + "one").status == 200
    # It begins from an entry of the first one's, longer than what they share.
    found = [server.chat(begins + "another").status for _ in range(2)]
    assert found == [500, 200], "it lives for ever"
