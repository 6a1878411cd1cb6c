"""The cases of the matrix: what happens to the server, and how a client is to take it.

Each case runs all its clients, at once where it can, and gives the outcome of each. A
fault in a batch strikes all who are in it, a process that is killed all who are
connected: one server and one fault are enough for all clients.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from protocol import Outcome, Task

from clients.stage import Client, Drivers, SupervisedServer, base_url
from support import scripted_model
from support.server import BATCH_RUNS_S, CONTROLLED, NEVER, Server, eventually

TOKENS = 40  # of an answer
ENDLESS = 20_000
LONG = "x" * 3000  # over MAX_PROMPT
MAX_PROMPT = ("--max-prompt-tokens", "2000")
NO_REPLAY = ("--replay-attempts", "0")
CALM = f"any:{NEVER}"
POSTED = "method=POST path=/v1/chat/completions"
# The clients wait for five seconds, or longer by up to a quarter.
RETRY_AFTER_S = 5.0

Outcomes = dict[str, Outcome]


class Stage:
    """The servers, each started when it is first asked for, and the clients."""

    def __init__(
        self, tiny: Path, scripted: Path, directory: Path, drivers: Drivers
    ) -> None:
        self._tiny, self._scripted, self._directory = tiny, scripted, directory
        self.drivers = drivers
        self._servers: dict[str, Server] = {}
        self.seen: dict[str, Outcomes] = {}

    def outcomes(self, case: Case) -> Outcomes:
        """What became of a case, by client; it is run once."""
        if case.name not in self.seen:
            # One that fails is not run for each client again.
            self.seen[case.name] = {}
            self.seen[case.name] = case.run(self, case.clients(self.drivers))
        assert self.seen[case.name], f"{case.name} failed before"
        return self.seen[case.name]

    def server(self, name: str, *arguments: str) -> Server:
        """A `CONTROLLED` server; those of one name are one."""
        if name not in self._servers:
            model = self._scripted if name == "tools" else self._tiny
            self._servers[name] = Server(model, *arguments, program=CONTROLLED)
            self._servers[name].wait_ready()
        return self._servers[name]

    def supervised(self) -> SupervisedServer:
        """Its children are `CONTROLLED`."""
        server = self._servers.get("supervised")
        if server is None:
            server = SupervisedServer(self._tiny, self._directory)
            self._servers["supervised"] = server
        assert isinstance(server, SupervisedServer)
        server.wait_ready()
        return server

    @property
    def call_bias(self) -> dict[str, float]:
        """With it the scripted model calls its tool."""
        return scripted_model.bias(self._scripted, call=True)

    def kill(self, name: str) -> None:
        """Ends a server as the system does when memory runs out."""
        server = self._servers.pop(name)
        server.process.kill()
        server.stop()

    def stop(self) -> None:
        for server in self._servers.values():
            server.stop()


def task(server: Server, client: str, **more: object) -> Task:
    """Each client's prompt is its own, so is its answer."""
    values: dict[str, object] = {
        "prompt": f"hello from {client}",
        "max_tokens": TOKENS,
        **more,
    }
    return Task(base_url(server), **values)  # type: ignore[arg-type]


def all_at_once(server: Server, drivers: Drivers, **more: object) -> Outcomes:
    """Everybody asks; waits for all."""
    start_all(server, drivers, **more)
    return {name: driver.outcome() for name, driver in drivers.items()}


def start_all(server: Server, drivers: Drivers, **more: object) -> None:
    for driver in drivers.values():
        driver.wait_ready()
    for name, driver in drivers.items():
        driver.start(task(server, name, **more))


@contextmanager
def held(server: Server, drivers: Drivers, **more: object) -> Iterator[None]:
    """All ask while the server is held in another's step; then it goes on.

    So that they are in one batch, and have nothing yet.
    """
    server.hold(3)
    threading.Thread(
        target=server.chat,
        kwargs={"stream": True, "max_tokens": 3 * TOKENS},
        daemon=True,
    ).start()
    server.wait_held()
    try:
        start_all(server, drivers, **more)
        server.wait_for_clients(len(drivers) + 1)
        server.wait_held(BATCH_RUNS_S)  # or the other would go on alone for so long
        yield
    finally:
        server.go()


def amid(server: Server, drivers: Drivers, **more: object) -> None:
    """Holds the server when everybody has some of an answer."""
    with held(server, drivers, **more):
        server.hold(TOKENS // 2)
    server.wait_held()
    for driver in drivers.values():
        driver.wait_begun()


# ---- what happens


def answer(stage: Stage, drivers: Drivers) -> Outcomes:
    return all_at_once(stage.server("sound", *MAX_PROMPT), drivers)


def whole(stage: Stage, drivers: Drivers) -> Outcomes:
    return all_at_once(stage.server("sound", *MAX_PROMPT), drivers, stream=False)


def once(stage: Stage, drivers: Drivers) -> Outcomes:
    """All that is asked for in the first second fails in its first decode step."""
    server = stage.server("no replay", *NO_REPLAY)
    failed = server.log.count(POSTED)
    server.plan("decode:1:8:persistent")
    start_all(server, drivers)
    server.wait_for_log(POSTED, failed + len(drivers))
    server.plan(CALM)
    return {name: driver.outcome() for name, driver in drivers.items()}


def always(stage: Stage, drivers: Drivers) -> Outcomes:
    server = stage.server("failing", *NO_REPLAY)
    server.plan("any:1:8:persistent")
    outcomes = all_at_once(server, drivers)
    attempts = sum(driver.client.attempts for driver in drivers.values())
    server.wait_for_log(POSTED, attempts)
    assert server.log.count(POSTED) == attempts
    return outcomes


def replay(stage: Stage, drivers: Drivers) -> Outcomes:
    server = stage.server("sound", *MAX_PROMPT)
    replays = server.metric("mlx_safe_replays_total")
    with held(server, drivers):
        server.plan("decode:20:8")
    outcomes = {name: driver.outcome() for name, driver in drivers.items()}
    assert server.metric("mlx_safe_replays_total") >= replays + len(drivers)
    return outcomes


def event(stage: Stage, drivers: Drivers) -> Outcomes:
    """A fault in mid-stream."""
    server = stage.server("no replay", *NO_REPLAY)
    with held(server, drivers):
        server.plan("decode:20:2")
    return {name: driver.outcome() for name, driver in drivers.items()}


def killed_before(stage: Stage, drivers: Drivers, **more: object) -> Outcomes:
    """The process is killed before anybody has a byte."""
    server = stage.server("killed", *NO_REPLAY)
    server.hold(1)
    start_all(server, drivers, **more)
    server.wait_for_clients(len(drivers))
    stage.kill("killed")
    return {name: driver.outcome() for name, driver in drivers.items()}


def killed_whole(stage: Stage, drivers: Drivers) -> Outcomes:
    return killed_before(stage, drivers, stream=False)


def killed_amid(stage: Stage, drivers: Drivers) -> Outcomes:
    """The process is killed when everybody has some of an answer."""
    server = stage.server("killed", *NO_REPLAY)
    amid(server, drivers)
    stage.kill("killed")
    return {name: driver.outcome() for name, driver in drivers.items()}


def supervised_before(stage: Stage, drivers: Drivers) -> Outcomes:
    """The same, with a supervisor; the clients try nothing again."""
    server = stage.supervised()
    server.hold(1)
    start_all(server, drivers, retries=False)
    server.wait_for_clients(len(drivers))
    os.kill(server.ask("pid"), signal.SIGKILL)
    return {name: driver.outcome() for name, driver in drivers.items()}


def supervised_amid(stage: Stage, drivers: Drivers) -> Outcomes:
    server = stage.supervised()
    amid(server, drivers)
    os.kill(server.ask("pid"), signal.SIGKILL)
    return {name: driver.outcome() for name, driver in drivers.items()}


def restart(stage: Stage, drivers: Drivers) -> Outcomes:
    """They ask while the next server starts, once: it is a pause."""
    server = stage.supervised()
    died = "WARNING - SUPERVISOR - the server has ended"
    seen = server.log.count(died)
    os.kill(server.ask("pid"), signal.SIGKILL)
    server.wait_for_log(died, seen + 1)
    return all_at_once(server, drivers, retries=False)


def refused(stage: Stage, drivers: Drivers) -> Outcomes:
    server = stage.server("sound", *MAX_PROMPT)
    posted = server.log.count(POSTED)
    outcomes = all_at_once(server, drivers, prompt=LONG)
    server.wait_for_log(POSTED, posted + len(drivers))
    assert server.log.count(POSTED) == posted + len(drivers)  # nobody tries again
    return outcomes


def left(server: Server) -> float:
    """How many clients are counted as gone."""
    return server.metric("mlx_safe_requests_total", outcome="client_left")


def leaving(stage: Stage, drivers: Drivers) -> Outcomes:
    """One after another leaves in the midst of an answer."""
    server = stage.server("sound", *MAX_PROMPT)
    outcomes = {}
    for name, driver in drivers.items():
        disconnects, seen = server.disconnects, left(server)
        outcomes[name] = driver.do(task(server, name, leave=True, max_tokens=ENDLESS))
        if not driver.client.lets_go:
            driver.stop()
        # Its answer would go on for minutes.
        outcomes[name].left &= (
            eventually(lambda seen=seen: left(server) == seen + 1, 10)  # type: ignore[misc]
            and server.disconnects == disconnects + 1
            and server.metric("mlx_safe_requests_in_flight") == 0
        )
    return outcomes


def tools(stage: Stage, drivers: Drivers) -> Outcomes:
    server = stage.server("tools")
    more = {"tool": True, "logit_bias": stage.call_bias}
    return all_at_once(server, drivers, **more)


def connection(stage: Stage, drivers: Drivers) -> Outcomes:
    """One after another asks twice; the message says how many connections it took."""
    server = stage.server("sound", *MAX_PROMPT)
    outcomes = {}
    for name, driver in drivers.items():
        driver.wait_ready()
        before = server.ask("connections")
        stream = driver.client.keeps_after_a_stream
        if name == "curl":  # what it keeps ends with it
            outcomes[name] = driver.do(task(server, name, times=2))
        else:
            driver.do(task(server, name, stream=stream))
            outcomes[name] = driver.do(task(server, name, stream=stream))
        outcomes[name].message = str(server.ask("connections") - before)
    return outcomes


# ---- how a client is to take it

Expectation = Callable[[Client, Outcome, Outcome], None]


def is_answered(client: Client, found: Outcome, reference: Outcome) -> None:
    assert not found.told, found
    assert found.text == reference.text, found
    assert found.finish == "length", found


def is_answered_later(client: Client, found: Outcome, reference: Outcome) -> None:
    """Told once that it is to come again, it comes again."""
    if client.attempts == 1:
        is_refused(client, found, reference)
        return
    is_answered(client, found, reference)
    assert found.seconds >= RETRY_AFTER_S - 0.1, found


def is_refused(client: Client, found: Outcome, reference: Outcome) -> None:
    assert found.told, found
    assert not found.text and not found.finish_is_good, found
    assert found.status == 503 or "503" in found.message or client.name == "aider", (
        found
    )


def is_told(client: Client, found: Outcome, reference: Outcome) -> None:
    """Whatever it has of an answer, it knows that it is not all."""
    if client.name == "aider" and found.text == reference.text:
        assert "retried" in found.message, found  # and it has all, the second time
        return
    assert found.told, f"a silent truncation: {found}"
    assert not found.finish_is_good, found


def is_cut(client: Client, found: Outcome, reference: Outcome) -> None:
    is_told(client, found, reference)
    assert found.text or client.name == "aider", found


def is_the_users_mistake(client: Client, found: Outcome, reference: Outcome) -> None:
    if client.name == "aider":  # it has words of its own for a full context
        assert "has hit a token limit" in found.message, found
        return
    assert found.told, found
    assert found.status == 400, found
    assert found.code in ("context_length_exceeded", None), found


def has_left(client: Client, found: Outcome, reference: Outcome) -> None:
    assert found.left, found


def calls_the_tool(client: Client, found: Outcome, reference: Outcome) -> None:
    ((name, arguments),) = found.calls
    assert name == "look"
    assert set(json.loads(arguments)) == {"what"}
    assert found.finish in ("tool_calls", "tool-calls", "tool_call"), found


def takes_one_connection(client: Client, found: Outcome, reference: Outcome) -> None:
    assert not found.told, found
    assert int(found.message) <= 1, found


@dataclass(frozen=True)
class Case:
    """A column of the table.

    Attributes:
        run: lets it happen.
        expected: what must be so of each client's outcome.
        without: the clients that it is not for.
    """

    name: str
    run: Callable[[Stage, Drivers], Outcomes]
    expected: Expectation
    without: frozenset[str] = field(default_factory=frozenset)

    def clients(self, drivers: Drivers) -> Drivers:
        """Those that it is for."""
        return {n: d for n, d in drivers.items() if n not in self.without}


CASES = [
    Case("answer", answer, is_answered),
    Case("no stream", whole, is_answered),
    Case("503 once", once, is_answered_later),
    Case("503 always", always, is_refused),
    Case("fault, replayed", replay, is_answered),
    Case("error event", event, is_cut),
    Case("killed before the first token", killed_before, is_told),
    Case("killed, no stream", killed_whole, is_told),
    Case("killed in mid-stream", killed_amid, is_cut),
    Case("supervised, killed before the first token", supervised_before, is_answered),
    Case("supervised, killed in mid-stream", supervised_amid, is_answered),
    Case("asked during a restart", restart, is_answered),
    Case("400", refused, is_the_users_mistake),
    Case("tools", tools, calls_the_tool, frozenset({"aider"})),
    Case("second request, same connection", connection, takes_one_connection),
    # The last one: one client lets go only with its process.
    Case("cancel", leaving, has_left),
]
