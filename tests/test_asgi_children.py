"""Servers that have their model in a child, under ``mlx-safe run --asgi``."""

from __future__ import annotations

import contextlib
import http.client
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_safe.asgi.children import Children
from support.programs import PROGRAMS
from support.server import Answer, Server, free_port


class Parent(Server):
    def __init__(self, tmp_path: Path) -> None:
        self.port, self.tls, self.headers = free_port(), None, {}
        run = [sys.executable, "-m", "mlx_safe", "run", "--asgi", "--", sys.executable]
        env = {**os.environ, "MLX_SAFE_REPORT_DIR": str(tmp_path / "reports")}
        self.start([*run, str(PROGRAMS / "model_in_a_child.py"), str(self.port)], env)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Parent]:
    parent = Parent(tmp_path)
    try:
        parent.wait_listening()
        assert parent.get("/sum").body == "3"
        yield parent
    finally:
        parent.stop()


@pytest.mark.parametrize("how", ["killed", "terminate", "lost"])
def test_who_waits_for_a_child_that_has_ended_has_an_answer(
    server: Parent, how: str
) -> None:
    """Its server would wait for ever; it starts another for the next request."""
    answers: dict[str, Answer] = {}

    def get(path: str) -> None:
        answers[path] = server.get(path)

    threads = [
        threading.Thread(target=get, args=(p,)) for p in ("/waits?stream", f"/{how}")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers[f"/{how}"].status == 503
    assert answers[f"/{how}"].error["code"] == "unavailable"
    assert answers[f"/{how}"].headers["retry-after"] == "5"
    assert answers["/waits?stream"].body.endswith("data: [DONE]\n\n")
    assert server.get("/sum").body == "3"


def test_a_child_that_is_asked_to_end_is_its_servers_affair(server: Parent) -> None:
    def get() -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            server.get("/asked_to_end")

    waits = threading.Thread(target=get)
    waits.start()
    waits.join(2.0)
    assert waits.is_alive()
    assert server.get("/sum").body == "3"
    server.stop()
    waits.join(60)


def test_a_child_that_nobody_waits_for_has_ended_once() -> None:
    """Each request that came later had the error, too, for as long as nobody did."""
    children = Children()
    child = multiprocessing.get_context("spawn").Process(
        target=os._exit, args=(75,), daemon=True
    )
    child.start()
    found: list[Exception] = []
    while not found:
        found = [*children.lost()]
    assert len(found) == 1 and "status 75" in str(found[0])
    assert children.lost() == [] == children.lost()
    child.join(60)
