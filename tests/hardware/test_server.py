"""A real server under a real out-of-memory: 503, then 200."""

from __future__ import annotations

from pathlib import Path

from support import hog
from support.programs import program
from support.server import Server


def test_a_server_answers_503_and_then_200(tiny_model: Path, tmp_path: Path) -> None:
    trigger = tmp_path / "hog"
    environment = {
        "HOG": str(trigger),
        "TESTS": str(Path(hog.__file__).parents[1]),
        **hog.ENVIRONMENT,
    }
    arguments = ("--replay-attempts", "0")
    with Server(
        tiny_model, *arguments, program=program("hungry_server"), env=environment
    ) as server:
        server.wait_ready()
        assert server.chat().status == 200
        trigger.touch()
        failed = server.chat(timeout=300.0)
        assert failed.status == 503, (failed, server.log)
        assert failed.error["code"] == "metal_out_of_memory"
        assert "retry-after" in failed.headers
        trigger.unlink()
        assert server.chat(timeout=60.0).status == 200
        assert server.get("/health").status == 200
