"""A real server under a real out-of-memory: 503, then 200."""

from __future__ import annotations

from pathlib import Path

from support import hog
from support.server import Server

# The protected server, whose model takes all of the GPU's memory in a step for
# as long as the file named by HOG is there.
HUNGRY = """
import functools, os, sys
sys.path.insert(0, os.environ["TESTS"])
from pathlib import Path
import mlx.core as mx
import mlx_lm.server as server
from mlx_safe.cli import main
from support.hog import hog
load = server.ModelProvider.load
@functools.wraps(load)  # its parameters are looked at
def loaded(self, *args, **kwargs):
    model, tokenizer = load(self, *args, **kwargs)
    kind = type(model)
    if not getattr(kind, "hungry", False):
        call = kind.__call__
        def hungry(self, *args, **kwargs):
            if Path(os.environ["HOG"]).exists():
                mx.eval(hog())
            return call(self, *args, **kwargs)
        kind.__call__, kind.hungry = hungry, True
    return model, tokenizer
server.ModelProvider.load = loaded
sys.exit(main(["serve", *sys.argv[1:]]))
"""


def test_a_server_answers_503_and_then_200(tiny_model: Path, tmp_path: Path) -> None:
    trigger = tmp_path / "hog"
    environment = {
        "HOG": str(trigger),
        "TESTS": str(Path(hog.__file__).parents[1]),
        **hog.ENVIRONMENT,
    }
    arguments = ("--replay-attempts", "0")
    with Server(tiny_model, *arguments, program=HUNGRY, env=environment) as server:
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
