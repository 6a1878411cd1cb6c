"""The servers and the clients of the matrix, each in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from protocol import Outcome, Task

from support.programs import program
from support.server import CONTROLLED, Server

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

LIMIT_S = 120.0


@dataclass(frozen=True)
class Client:
    """One of the real clients.

    Attributes:
        driver: its file in drivers/.
        package: what is pinned: the name of a Python package, of one of npm's, or
            of a program.
        venv: of .venvs/; empty for what runs elsewhere.
        attempts: how often it asks when it is told to come again.
        keeps_after_a_stream: whether its connection is good for another request then;
            openai's synchronous client does not read on after ``[DONE]``.
        lets_go: whether it closes the connection of an answer that is interrupted.
    """

    name: str
    driver: str
    package: str
    venv: str = ""
    attempts: int = 3
    keeps_after_a_stream: bool = True
    lets_go: bool = True

    @property
    def python(self) -> Path:
        return ROOT / ".venvs" / self.venv / "bin" / "python"

    def missing(self) -> str | None:
        """What is to be installed before it can be run; None when nothing is."""
        if self.venv:
            found = ROOT.glob(
                f".venvs/{self.venv}/lib/python3.*/site-packages/*.dist-info"
            )
            names = {p.name.split("-")[0].replace("_", "-").lower() for p in found}
            return None if self.package in names else f"pip: {self.package}"
        if self.driver.endswith(".mjs"):
            if shutil.which("node") is None:
                return "node"
            there = (HERE / "node_modules" / self.package).is_dir()
            return None if there else f"npm: {self.package}"
        return None if shutil.which(self.package) else self.package

    def command(self) -> list[str]:
        """What runs its driver."""
        program = str(HERE / "drivers" / self.driver)
        if self.driver.endswith(".mjs"):
            return [str(shutil.which("node")), program]
        return [str(self.python) if self.venv else sys.executable, program]

    def version(self) -> str:
        """What is installed, for the table."""
        if self.venv:
            code = f"import importlib.metadata as m; print(m.version({self.package!r}))"
            return _said([str(self.python), "-c", code])
        if self.driver.endswith(".mjs"):
            package = HERE / "node_modules" / self.package / "package.json"
            return str(json.loads(package.read_text())["version"])
        return _said([self.package, "--version"]).split()[1]


def _said(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()


CLIENTS = [
    Client(
        "openai-python",
        "openai_python.py",
        "openai",
        "clients",
        keeps_after_a_stream=False,
    ),
    Client("openai-node", "openai_node.mjs", "openai"),
    Client("Vercel AI SDK", "ai_sdk.mjs", "ai"),
    Client("litellm", "litellm_library.py", "litellm", "clients"),
    Client("langchain-openai", "langchain.py", "langchain-openai", "clients"),
    Client("pydantic-ai", "pydantic_ai_direct.py", "pydantic-ai-slim", "clients"),
    Client(
        "aider",
        "aider_scripted.py",
        "aider-chat",
        "aider",
        attempts=6,  # it lets openai's client make its three twice
        keeps_after_a_stream=False,
        lets_go=False,
    ),
    Client("curl", "curl_program.py", "curl", attempts=1),
]


class Driver:
    """A client's process, which does one task after another."""

    def __init__(self, client: Client) -> None:
        self.client = client
        # Clients without a proxy for what is on this machine.
        environment = dict(os.environ, NO_PROXY="*", no_proxy="*", PYTHONUTF8="1")
        self._process = subprocess.Popen(
            client.command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._said: list[str] = []
        self._news = threading.Condition()
        self._ready = self._begun = self._ended = False
        self._outcome: Outcome | None = None
        self._readers = [
            threading.Thread(target=read, daemon=True)
            for read in (self._read, self._read_log)
        ]
        for reader in self._readers:
            reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            found = json.loads(line)
            with self._news:
                self._ready |= "ready" in found
                self._begun |= "begun" in found
                if "text" in found:
                    self._outcome = Outcome(**found)
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def _read_log(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._said.append(line)

    def _wait(self, condition: Callable[[], object], what: str) -> None:
        with self._news:
            self._news.wait_for(lambda: condition() or self._ended, LIMIT_S)
            assert condition(), f"{self.client.name}: {what}:\n{''.join(self._said)}"

    def wait_ready(self) -> None:
        """Waits until the client is imported."""
        self._wait(lambda: self._ready, "did not start")

    def start(self, task: Task) -> None:
        """Begins a task; `outcome` waits for its end."""
        self.wait_ready()
        self._begun, self._outcome = False, None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(task)) + "\n")
        self._process.stdin.flush()

    def wait_begun(self) -> None:
        """Waits until the first text has come, or all is over."""
        self._wait(lambda: self._begun or self._outcome, "no text has come")

    def outcome(self) -> Outcome:
        """Waits for the end of the task."""
        self._wait(lambda: self._outcome, "has no outcome")
        assert self._outcome is not None
        return self._outcome

    def do(self, task: Task) -> Outcome:
        """One task, from its beginning to its end."""
        self.start(task)
        return self.outcome()

    def stop(self) -> None:
        """Ends the process."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(60)
        for reader in self._readers:
            reader.join(60)
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()


Drivers = Mapping[str, Driver]


@contextmanager
def drivers(clients: list[Client]) -> Iterator[Drivers]:
    """A driver of each client, by its name."""
    with ExitStack() as stack:
        found = {}
        for client in clients:
            found[client.name] = Driver(client)
            stack.callback(found[client.name].stop)
        yield found


# A supervisor whose servers are `CONTROLLED`, through a named pipe: the supervisor
# gives its servers no standard input.
PIPED = CONTROLLED.replace("sys.stdin", "open(os.environ['CONTROL'])")
SUPERVISED = f"PROGRAM = {PIPED!r}\n{program('supervises_a_text')}"


class SupervisedServer(Server):
    """`CONTROLLED` servers under a supervisor: one after another on one port."""

    def __init__(self, model: Path, directory: Path, *arguments: str) -> None:
        control = directory / "control"
        os.mkfifo(control)
        # For reading, too: then neither side waits for the other to open it.
        self._control = os.open(control, os.O_RDWR)
        environment = {"CONTROL": str(control), "MLX_SAFE_INJECT": f"any:{10**9}"}
        super().__init__(model, *arguments, env=environment, program=SUPERVISED)

    def tell(self, line: str) -> None:
        os.write(self._control, line.encode() + b"\n")

    def stop(self) -> int:
        status = super().stop()
        os.close(self._control)
        return status


def base_url(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}/v1"
