"""The load of the scoreboard: a script drawn from a seed, and what its clients saw.

The script is the same for every server. Several clients go through it side by side,
each with its own conversations; a turn carries what that server itself, undisturbed,
answered before. A request is tried as openai-python tries it, up to three times: after
a lost connection or a 408, 409, 429 or 5xx while nothing has come yet. It is tried as
late as ``Retry-After`` says.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from support.server import Answer

CHAT = "/v1/chat/completions"
CLIENTS = 4
HANG_S = 30.0  # without a byte
HANGS_MAX = 2  # in a row, then a client gives up: the rest of its requests is lost
TRIES = 3
RETRIED = {408, 409, 429}
RETRY_AFTER_MAX_S = 60.0
# How often each kind of conversation is drawn.
KINDS = {"chat": 4, "turns": 3, "tools": 2, "long": 2, "leave": 1}
WORDS = ("ship", "sail", "wind", "rope", "deck", "mast", "tide", "port", "keel", "buoy")
TOOL = {
    "type": "function",
    "function": {
        "name": "depth",
        "description": "The depth of the water, in metres.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string"}},
            "required": ["place"],
        },
    },
}


@dataclass
class Turn:
    """One request of the script.

    Attributes:
        number: its place in the script; unique.
        kind: one of `KINDS`.
        messages: what this turn adds to the conversation.
        fields: of the body, besides model and messages.
        fault: a plan that is written just before it is sent; "" for none.
    """

    number: int
    kind: str
    messages: list[dict[str, Any]]
    fields: dict[str, Any]
    fault: str = ""

    @property
    def tokens(self) -> int:
        return int(self.fields["max_tokens"])


Conversation = list[Turn]


@dataclass
class Script:
    """What each client does, in this order."""

    clients: list[list[Conversation]]

    @property
    def turns(self) -> list[Turn]:
        return [t for client in self.clients for talk in client for t in talk]


def make_script(seed: int, requests: int) -> Script:
    """At least ``requests`` requests, spread over `CLIENTS` clients."""
    draw = random.Random(f"script {seed}")
    clients: list[list[Conversation]] = [[] for _ in range(CLIENTS)]
    number = 0
    while number < requests:
        kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
        talk = _conversation(draw, kind, number)
        min(clients, key=lambda c: sum(map(len, c))).append(talk)
        number += len(talk)
    return Script(clients)


def _conversation(draw: random.Random, kind: str, number: int) -> Conversation:
    words = {"long": 250, "turns": 25}.get(kind, draw.choice((3, 12)))
    turns = []
    for i in range(draw.choice((3, 4)) if kind == "turns" else 1):
        text = f"{number + i}: " + " ".join(draw.choices(WORDS, k=words))
        messages = [{"role": "user", "content": text}]
        fields: dict[str, Any] = {
            "max_tokens": draw.choice((8, 16, 32)),
            "temperature": 0,
            "stream": draw.random() < 0.5,
        }
        if kind == "tools":
            messages += _tool_call(draw)
            fields["tools"] = [TOOL]
        elif kind == "leave":
            fields.update(stream=True, max_tokens=64)
        elif number % 8 == 0:
            fields["seed"] = 1  # with a seed mlx-lm answers one at a time
        if i == 0:
            messages.insert(0, {"role": "system", "content": "You are a pilot."})
        turns.append(Turn(number + i, kind, messages, fields))
    return turns


def _tool_call(draw: random.Random) -> list[dict[str, Any]]:
    """What a model asked of a tool before, and what that said."""
    place = draw.choice(WORDS)
    arguments = json.dumps({"place": place})
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "depth", "arguments": arguments},
    }
    return [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": f"{place}: 12"},
    ]


def plan_faults(
    script: Script, seed: int, per_hundred: float, card: bool = False
) -> int:
    """Puts so many faults into the script, drawn from ``seed``; how many."""
    draw = random.Random(f"faults {seed} {per_hundred}")
    turns = script.turns
    for turn in turns:
        turn.fault = ""
    count = round(len(turns) * per_hundred / 100)
    for i, turn in enumerate(draw.sample(turns, count)):
        at = f"any:{draw.randrange(1, 12)}"
        turn.fault = _cuda_fault(at, i) if card else _metal_fault(at, i)
    return count


def _metal_fault(at: str, number: int) -> str:
    """As on a Mac: the hooks see it, and MLX raises it."""
    # Timeout, hang, innocent victim, out of memory, interactivity.
    at = f"{at}:{(2, 3, 5, 8, 14)[number % 5]}:once"
    return f"{at}:record,{at}:raise"


def _cuda_fault(at: str, number: int) -> str:
    """Out of memory; one in five a failed launch, after which CUDA takes no work."""
    return f"{at}:{(2, 2, 719, 2, 2)[number % 5]}:once:cuda"


@dataclass
class Seen:
    """What became of one request; times in seconds of `time.time`.

    Attributes:
        outcome: "right", "wrong", "cut" (it looked whole), "lost", "hang", or "left".
        told: what the last try was told, when it was not right.
        tries: how often it was sent.
        sent: the first time; asked: the last time.
        first: the first byte of the body. end: the last one.
    """

    number: int
    kind: str
    outcome: str = "lost"
    told: str = ""
    tries: int = 0
    sent: float = 0.0
    asked: float = 0.0
    first: float = 0.0
    end: float = 0.0
    tokens: int = 0


@dataclass
class Result:
    """What all clients saw. ``began``, ``ended``: of the whole, `time.time`."""

    seen: list[Seen] = field(default_factory=list)
    began: float = 0.0
    ended: float = 0.0


class Client:
    """Goes through its part of the script.

    Args:
        model: what the body names.
        texts: what the undisturbed server answers, by the number of the turn; `learn`
            fills it.
    """

    def __init__(self, port: int, model: str, texts: dict[int, str]) -> None:
        self._port, self._model, self._texts = port, model, texts
        self.refused: dict[int, str] = {}
        self._hangs = 0

    def learn(self, talk: Conversation) -> None:
        """Asks undisturbed; an answer that is none is noted in ``refused``."""
        for turn, body in self._bodies(talk):
            if turn.kind == "leave":
                continue
            seen = Seen(turn.number, turn.kind)
            answer = self._try(body, seen)
            if _failure(answer, turn):
                self.refused[turn.number] = seen.told or answer.body[:200]
                return
            self._texts[turn.number] = answer.text

    def go_through(self, talk: Conversation, plan: Callable[[str], None]) -> list[Seen]:
        found = []
        for turn, body in self._bodies(talk):
            if turn.kind != "leave" and turn.number not in self._texts:
                continue  # refused by the undisturbed server as well
            if self._hangs >= HANGS_MAX:
                found.append(Seen(turn.number, turn.kind, told="given up"))
                continue
            if turn.fault:
                plan(turn.fault)
            if turn.kind == "leave":
                seen = self._leave(turn, body)
            else:
                seen = self._ask(turn, body, self._texts[turn.number])
            self._hangs = self._hangs + 1 if seen.outcome == "hang" else 0
            found.append(seen)
        return found

    def _bodies(self, talk: Conversation) -> Iterator[tuple[Turn, dict[str, Any]]]:
        messages: list[dict[str, Any]] = []
        for turn in talk:
            messages += turn.messages
            yield turn, {"model": self._model, "messages": messages, **turn.fields}
            text = self._texts.get(turn.number, "")
            messages.append({"role": "assistant", "content": text})

    def _ask(self, turn: Turn, body: dict[str, Any], right: str) -> Seen:
        seen = Seen(turn.number, turn.kind, sent=time.time())
        while True:
            seen.tries += 1
            answer = self._try(body, seen)
            seen.outcome, seen.told, again = judge(answer, turn, right)
            if not again or seen.tries == TRIES:
                break
            time.sleep(_pause_s(answer, seen.tries))
        seen.tokens = turn.tokens if seen.outcome == "right" else 0
        return seen

    def _connection(self) -> contextlib.closing[http.client.HTTPConnection]:
        return contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", self._port, timeout=HANG_S)
        )

    def _try(self, body: dict[str, Any], seen: Seen) -> Answer:
        answer, pieces = Answer(None), []
        seen.asked = time.time()
        seen.first = 0.0
        with self._connection() as connection:
            try:
                response = _post(connection, body)
                answer.status = response.status
                answer.headers = {k.lower(): v for k, v in response.getheaders()}
                while piece := response.read1(1 << 16):
                    seen.first = seen.first or time.time()
                    pieces.append(piece)
                # Else a cut looks whole, with a length that is known.
                if response.length:
                    raise http.client.IncompleteRead(b"", response.length)
            except TimeoutError:
                answer.broken = "hang"
            except (OSError, http.client.HTTPException) as e:
                answer.broken = type(e).__name__
        seen.end = time.time()
        answer.body = b"".join(pieces).decode(errors="replace")
        with contextlib.suppress(ValueError):
            answer.with_events()
        return answer

    def _leave(self, turn: Turn, body: dict[str, Any]) -> Seen:
        """Goes after the first piece of the answer."""
        now = time.time()
        seen = Seen(turn.number, turn.kind, "left", sent=now, asked=now, tries=1)
        with self._connection() as connection:
            try:
                _post(connection, body).read1(1 << 16)
            except TimeoutError:
                seen.outcome = "hang"
            except (OSError, http.client.HTTPException) as e:
                seen.told = type(e).__name__
        seen.first = seen.end = time.time()
        return seen


def _post(
    connection: http.client.HTTPConnection, body: dict[str, Any]
) -> http.client.HTTPResponse:
    """The answer's head; what there is of its body has not been read."""
    head = {"Content-Type": "application/json"}
    connection.request("POST", CHAT, json.dumps(body).encode(), head)
    return connection.getresponse()


def judge(answer: Answer, turn: Turn, right: str) -> tuple[str, str, bool]:
    """(outcome, what was told, whether a client tries again)."""
    if answer.broken == "hang":
        return "hang", "hang", False
    if failure := _failure(answer, turn):
        if failure == "no end":
            return "cut", failure, False
        status = answer.status
        again = status is None or status in RETRIED or status >= 500
        return "lost", failure, again
    text = (answer.text or "").strip()
    if text == right.strip():
        return "right", "", False
    return ("cut" if right.strip().startswith(text) else "wrong"), text, False


def _failure(answer: Answer, turn: Turn) -> str:
    """Why there is no text that a client would take; "" when there is one.

    "no end": a stream that stopped as if it was whole, without `finish_reason`.
    """
    if answer.broken:
        return answer.broken
    if answer.status != 200:
        return str(answer.status)
    if turn.fields["stream"]:
        choices = [c for e in answer.events for c in e.get("choices") or ()]
        told = any("error" in e for e in answer.events) or "event: error" in answer.body
        if told or any(c.get("finish_reason") == "error" for c in choices):
            return "error event"
        return "" if any(c.get("finish_reason") for c in choices) else "no end"
    try:
        answer.text  # noqa: B018
    except (KeyError, TypeError, ValueError, IndexError):
        return "200 without an answer"
    return ""


def _pause_s(answer: Answer, tries: int) -> float:
    with contextlib.suppress(KeyError, ValueError):
        return min(float(answer.headers["retry-after"]), RETRY_AFTER_MAX_S)
    return min(0.5 * 2.0 ** (tries - 1), 8.0)


def go(
    script: Script,
    port: int,
    model: str,
    texts: dict[int, str],
    plan: Callable[[str], None],
) -> Result:
    """All clients at once; returns when the last one is done."""
    result = Result(began=time.time())

    def one(talks: list[Conversation]) -> None:
        client = Client(port, model, texts)
        for talk in talks:
            result.seen += client.go_through(talk, plan)

    threads = [threading.Thread(target=one, args=(talks,)) for talks in script.clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    result.ended = time.time()
    return result


def learn(script: Script, port: int, model: str) -> tuple[dict[int, str], list[str]]:
    """The texts of an undisturbed server, asked one after another; what it refused."""
    texts: dict[int, str] = {}
    client = Client(port, model, texts)
    for talks in script.clients:
        for talk in talks:
            client.learn(talk)
    return texts, [f"{n}: {why}" for n, why in sorted(client.refused.items())]
