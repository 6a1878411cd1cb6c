"""A real card: out of memory raises and passes, the ceiling is the card's.

Plain device memory only, as MLX's own arrays are: never more managed memory than free.
"""

from __future__ import annotations

import re
from pathlib import Path

from mlx_safe.memory.ceiling import GPU_SHARE
from mlx_safe.memory.machine import read_machine, usage
from support import child, hog
from support.programs import program, with_suite
from support.server import Server

TESTS = str(Path(hog.__file__).parents[1])


def test_out_of_memory_raises_and_passes() -> None:
    told = child.run(
        program("runs_out_of_memory"), timeout=300, PYTHONPATH=with_suite()
    ).stdout
    assert "raised CudaOutOfMemoryError 2 True" in told
    assert "after it 2000.0" in told


def test_the_ceiling_is_the_cards(tiny_model: Path) -> None:
    machine = read_machine()
    now = usage()
    assert machine.card is not None and now.card_free is not None
    assert 0 < now.card_free <= machine.card
    with Server(tiny_model).wait_ready() as server:
        ceiling = server.metric("mlx_safe_memory_ceiling_static_bytes")
        assert ceiling <= GPU_SHARE * machine.card + 1
        assert re.search("of the card|on the card", server.log)


def test_a_server_answers_503_and_then_200(tiny_model: Path, tmp_path: Path) -> None:
    trigger = tmp_path / "hog"
    arguments = ("--replay-attempts", "0")
    environment = {"HOG": str(trigger), "TESTS": TESTS}
    with Server(
        tiny_model, *arguments, program=program("hungry_server"), env=environment
    ) as server:
        server.wait_ready()
        assert server.chat().status == 200
        trigger.touch()
        failed = server.chat(timeout=300.0)
        assert failed.status == 503, (failed, server.log)
        assert failed.error["code"] == "cuda_out_of_memory"
        assert "retry-after" in failed.headers
        trigger.unlink()
        assert server.chat(timeout=60.0).status == 200
        assert server.get("/health").status == 200
