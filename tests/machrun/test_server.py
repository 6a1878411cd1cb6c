"""`mlx-safe serve` on the macOS wheels, with both mlx-lm: a fault costs no request.

The main cases of the server suites (tests/test_server_*.py), of one server for each
pair. The model's numbers are right, and its texts real, as everything is computed on
the CPU's stream. GPU work beside it fails, and so the hooks report real failures of
Metal.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import server as servers
from support.programs import program
from support.server import CONTROLLED, NEVER, STOCK, Answer, Server
from support.versions import OLDEST_PAIR, PAIRS

from .runner import Machine
from .setup.places import HERE

# A command buffer of the GPU that fails, whenever a line of standard input says so.
ON_THE_GPU = program("mac_fails_on_the_gpu")
FAILING = ON_THE_GPU + CONTROLLED.replace(
    'elif line == "go\\n":',
    """elif line == "metal\\n":
            threading.Thread(target=work_on_the_gpu, daemon=True).start()
            continue
        elif line == "go\\n":""",
)
STOCK_FAILING = (
    ON_THE_GPU
    + """
def listen():
    for line in sys.stdin:
        work_on_the_gpu()
threading.Thread(target=listen, daemon=True).start()
"""
    + STOCK
)
SLOW_START_S, SLOW_ANSWER_S = 560.0, 300.0
PATHS: dict[str, dict[str, int]] = {"batched": {}, "sequential": {"seed": 1}}
PHASES = {"prefill": "prefill:1:8", "decode": "decode:4:8"}
ARGUMENTS = ("--prefill-step-size", "256", "--prompt-cache-size", "0")
Texts = dict[str, str]


@pytest.fixture(scope="module", autouse=True)
def slow_servers() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(servers, "PYTHON", str(HERE / "python"))
        patch.setattr(servers, "START_TIMEOUT_S", SLOW_START_S)
        patch.setattr(servers, "REQUEST_TIMEOUT_S", SLOW_ANSWER_S)
        yield


def environment_of(version: str, reports: Path) -> dict[str, str]:
    return {
        **Machine(mlx=version, server=True).environment,
        "MACHRUN_DEVICE": "cpu",
        "MLX_SAFE_REPORT_DIR": str(reports),
    }


@pytest.fixture(scope="module", params=PAIRS)
def version(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def server(
    version: str,
    slow_servers: None,
    model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    environment = environment_of(version, tmp_path_factory.mktemp("reports"))
    inject = f"any:{NEVER}"  # or steps are not counted
    options: dict[str, Any] = {"program": FAILING, "env": environment, "inject": inject}
    with Server(model, *ARGUMENTS, **options) as started:
        yield started.wait_ready()


@pytest.fixture(scope="module")
def texts(server: Server) -> Texts:
    """What is answered without a fault, by path."""
    found = {path: server.chat(**more).text for path, more in PATHS.items()}
    assert all(found.values())
    return found


def assert_told(answer: Answer, code: str) -> None:
    assert answer.broken is None and answer.error["code"] == code
    assert answer.error["retry_after"] == 5
    if answer.events:
        assert answer.status == 200 and answer.done
    else:
        assert answer.status == 503 and answer.headers["retry-after"] == "5"


def test_it_is_ready_with_hooks_on_the_real_binaries(server: Server) -> None:
    assert "Metal is hooked and the hooks are verified" in server.log
    assert server.is_well()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("path", PATHS)
def test_a_failed_step_is_replayed_exactly(
    server: Server, texts: Texts, path: str, phase: str, stream: bool
) -> None:
    again = server.metric("mlx_safe_replays_total")
    server.plan(PHASES[phase])
    replayed = server.chat(stream=stream, **PATHS[path])
    assert (replayed.status, replayed.error, replayed.text) == (200, None, texts[path])
    assert not stream or replayed.done
    assert server.metric("mlx_safe_replays_total") == again + 1


def test_all_of_a_batch_are_replayed(server: Server) -> None:
    whole = [answer.text for answer in server.chats(3)]
    again = server.metric("mlx_safe_replays_total")
    server.hold(4)
    with server.chatting(3) as answers:
        server.wait_held()
        server.wait_for_clients(3)
        server.plan("any:1:8")
        server.go()
    assert [answer.text for answer in answers] == whole
    assert server.metric("mlx_safe_replays_total") > again


@pytest.mark.parametrize(
    ("number", "code"), [(8, "metal_out_of_memory"), (2, "metal_timeout")]
)
@pytest.mark.parametrize("path", PATHS)
def test_a_fault_that_stays_is_told(
    server: Server, texts: Texts, path: str, number: int, code: str
) -> None:
    for stream in (False, True):
        server.plan(f"decode:1:{number}:persistent")
        assert_told(server.chat(stream=stream, **PATHS[path]), code)
    server.plan(f"any:{NEVER}")
    assert server.chat(**PATHS[path]).text == texts[path]
    assert server.is_well()


def test_a_client_that_leaves_is_one_quiet_line(server: Server, texts: Texts) -> None:
    """Seen by kqueue, as far as guest/darwin.py has one."""
    seen = server.disconnects
    body = {
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 100_000,
        "stream": True,
    }
    with server.connected(body) as connection:
        assert connection.recv(100)
    server.wait_for_log("outcome=client_left", seen + 1)
    assert server.chat().text == texts["batched"]
    assert server.metric("mlx_safe_requests_in_flight") == 0


def test_a_buffer_that_fails_in_the_middle_is_a_fault_of_metal(
    server: Server, texts: Texts
) -> None:
    """Seen by the hooks alone: MLX's own work was on the CPU."""
    again = server.metric("mlx_safe_replays_total")
    server.hold(4)
    with server.chatting(1) as answers:
        server.wait_held()
        server.tell("metal")
        server.wait_for_log("metal: [METAL] Command buffer execution failed")
        server.go()
    (answer,) = answers
    assert answer.status == 200
    assert server.metric("mlx_safe_replays_total") == again + 1
    assert answer.text == server.chat("hello from client 0").text


# The last of a server's, which it ends.
def test_a_fatal_fault_answers_everyone_and_leaves(
    server: Server, version: str
) -> None:
    assert "Traceback" not in server.log
    terminates = version == OLDEST_PAIR[0]
    plan = "any:1:8:once:terminate" if terminates else "any:1:4"
    with server.chatting(3, max_tokens=100_000) as answers:
        server.wait_for_requests(3)
        server.wait_for_clients(3)
        server.hold(1)
        server.wait_held()
        server.plan(plan)
        server.go()
    for answer in answers:
        assert_told(answer, answer.error["code"] if terminates else "metal_device_lost")
    assert server.wait(SLOW_ANSWER_S) == 75


def test_without_us_the_same_buffer_ends_the_server(
    slow_servers: None, model: Path, tmp_path: Path
) -> None:
    """The control: mlx_lm.server with the older MLX, without mlx-safe."""
    environment = environment_of(OLDEST_PAIR[0], tmp_path)
    options: dict[str, Any] = {"program": STOCK_FAILING, "env": environment}
    environment["MLX_SAFE_AUTOINSTALL"] = "0"
    with Server(model, **options) as server:
        server.wait_ready()
        assert server.chat().status == 200
        server.tell("metal")
        assert server.wait(SLOW_ANSWER_S) == -6
        assert "std::runtime_error: [METAL] Command buffer execution" in server.log
