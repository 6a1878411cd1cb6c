"""`mlx-safe serve` on the macOS wheels, with both mlx-lm: a fault costs no request.

The model's numbers are right, as everything is computed on the CPU's stream; GPU
work beside it fails, and so the hooks tell of real failures of Metal.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support import server as servers
from support.server import CONTROLLED, NEVER, Server

from .runner import Machine
from .setup.packages import PAIRS
from .setup.places import HERE

# A command buffer of the GPU that fails, whenever a line of standard input says so.
FAILING = CONTROLLED.replace(
    "def listen():",
    """def work_on_the_gpu():
    import machpy
    with mx.stream(mx.gpu):
        mx.eval(mx.exp(mx.array([1.0])))
        machpy.fail(1)
        try:
            mx.eval(mx.exp(mx.array([1.0])))
            mx.synchronize()
        except RuntimeError as e:
            os.write(1, f"metal: {e}\\n".encode())
def listen():""",
).replace(
    'elif line == "go\\n":',
    """elif line == "metal\\n":
            threading.Thread(target=work_on_the_gpu, daemon=True).start()
            continue
        elif line == "go\\n":""",
)
SLOW_START_S = 400.0


@pytest.fixture(scope="module", params=PAIRS)
def server(
    request: pytest.FixtureRequest,
    model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    machine = Machine(mlx=request.param, server=True)
    reports = tmp_path_factory.mktemp("reports")
    environment = {
        **machine.environment,
        "MACHRUN_DEVICE": "cpu",
        "MLX_SAFE_REPORT_DIR": str(reports),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(servers, "PYTHON", str(HERE / "python"))
        patch.setattr(servers, "START_TIMEOUT_S", SLOW_START_S)
        steps = f"any:{NEVER}"  # or they are not counted
        with Server(model, program=FAILING, env=environment, inject=steps) as started:
            yield started.wait_ready()


def test_it_is_ready_with_hooks_on_the_real_binaries(server: Server) -> None:
    assert "Metal is hooked and the hooks are verified" in server.log


@pytest.mark.parametrize("more", [{}, {"seed": 1}], ids=["batched", "sequential"])
def test_a_failed_step_is_replayed_exactly(
    server: Server, more: dict[str, int]
) -> None:
    whole = server.chat("Tell me.", **more)
    assert whole.status == 200 and len(whole.text) > 0
    again = server.log.count("requests run again: 1")
    server.plan("any:4")
    replayed = server.chat("Tell me.", **more)
    assert (replayed.status, replayed.text) == (200, whole.text)
    server.wait_for_log("requests run again: 1", again + 1)


def test_a_stream_goes_on_after_a_fault(server: Server) -> None:
    whole = server.chat("Go on.", stream=True)
    server.plan("any:5")
    replayed = server.chat("Go on.", stream=True)
    assert replayed.done and replayed.error is None
    assert replayed.text == whole.text


def test_a_buffer_that_fails_in_the_middle_is_a_fault_of_metal(server: Server) -> None:
    """Seen by the hooks alone: MLX's own work was on the CPU."""
    whole = server.chat("Once more.", max_tokens=12)
    server.hold(4)
    with server.chatting(1, max_tokens=12) as answers:
        server.wait_held()
        server.tell("metal")
        server.wait_for_log("metal: [METAL] Command buffer execution failed")
        server.go()
    assert answers[0].status == 200
    assert len(answers[0].text) == len(whole.text)
