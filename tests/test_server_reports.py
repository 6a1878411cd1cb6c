"""What a server that dies, or that fails, leaves for the morning after."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from support.programs import program
from support.server import CONTROLLED, Server, eventually

TEXT = "unmistakable words of a prompt"

LOSES = program("loses_its_signals")
RARELY = program("reports_rarely")


def only_report(directory: Path) -> dict[str, Any]:
    """The one report; nothing else is left."""
    (path,) = directory.iterdir()
    text = path.read_text()
    assert "unmistakable" not in text
    report: dict[str, Any] = json.loads(text)
    assert report["complete"] is True
    return report


@pytest.mark.parametrize("more", [{}, {"seed": 1}], ids=["batched", "sequential"])
def test_segfault_in_the_midst_of_an_answer(
    tiny_model: Path, private_reports: Path, more: dict[str, int]
) -> None:
    messages = [{"role": "user", "content": TEXT}]
    asked = {"messages": messages, "max_tokens": 100_000, "stream": True, **more}
    with Server(tiny_model, program=CONTROLLED).wait_ready() as server:
        assert server.chat().status == 200
        # Long answers leave so many breadcrumbs that the first are forgotten.
        server.hold(50)
        with server.stream(asked) as lines:
            assert next(line for line in lines if line.startswith(b"data: "))
            server.wait_held()
            os.kill(server.process.pid, signal.SIGSEGV)
            assert server.wait() == -signal.SIGSEGV
    report = only_report(private_reports)
    assert report["why"] == "signal" and report["signal"]["name"] == "SIGSEGV"
    (request,) = report["requests"]
    assert request["id"].startswith("chatcmpl-")
    assert request["path"] == "/v1/chat/completions"
    assert request["prompt_tokens"] > 5 and request["tokens"] > 0
    assert request["age_ms"] >= 0
    memory = report["memory"]
    assert 0 < memory["active"] <= memory["peak"] < memory["footprint"]
    assert memory["footprint"] < memory["ceiling"] < memory["system_total"]
    assert report["memory_history"]
    assert report["context"]["mlx_lm"] and report["context"]["hooks"]["signals"]
    assert "mlx_lm" in report["python_stacks"]
    crumbs = report["breadcrumbs"]
    assert ("server", "ok") in {(c["kind"], c["text"]) for c in crumbs}
    ceilings = [c["fields"]["bytes"] for c in crumbs if c["kind"] == "ceiling"]
    assert len(ceilings) == 1
    told = [c for c in crumbs if c["fields"].get("id") == request["id"]]
    assert [c["text"] for c in told][:2] == ["taken", "begun"]
    assert any(c["text"] == "completed" for c in crumbs)  # the first one


def test_a_library_that_takes_the_signals_does_not_keep_them(
    tiny_model: Path, private_reports: Path
) -> None:
    """As LLVM does when Open MPI is there, and pocl: MLX loads libmpi at the start."""
    with Server(tiny_model, program=LOSES).wait_ready() as server:
        assert server.chat().status == 200
        server.process.send_signal(signal.SIGUSR1)
        server.wait_for_log("it came")
        os.kill(server.process.pid, signal.SIGSEGV)
        assert server.wait() == -signal.SIGSEGV
    assert only_report(private_reports)["signal"]["name"] == "SIGSEGV"


def test_stall(tiny_model: Path, private_reports: Path) -> None:
    with Server(
        tiny_model, "--stall-timeout", "4", inject="any:1:0:once:stall"
    ).wait_ready() as server:
        assert server.chat(TEXT).status == 503
        assert server.wait() == 75
    report = only_report(private_reports)
    assert report["why"] == "stall"
    told = report["exception_message"]
    (request,) = report["requests"]
    assert told.startswith("a step made no progress for 4 s (prefill for ")
    assert request["id"] in told
    assert len(report["requests"]) == 1
    assert "in step" in report["python_stacks"]


def test_the_gpu_is_lost(tiny_model: Path, private_reports: Path) -> None:
    with Server(tiny_model, inject="decode:9:4").wait_ready() as server:
        assert server.chat(TEXT, max_tokens=64).status == 503
        assert server.wait() == 75
    report = only_report(private_reports)
    assert report["why"] == "fault" and report["code"] == 4
    assert len(report["requests"]) == 1


def test_a_fault_that_the_request_outlives(
    tiny_model: Path, private_reports: Path
) -> None:
    inject = "decode:5:8,decode:9:8"
    with Server(tiny_model, inject=inject, program=RARELY).wait_ready() as server:
        assert server.chat(TEXT, max_tokens=64).status == 200
        assert server.metric("mlx_safe_reports_suppressed_total") == 1
        # It is written beside the recovery, and not in it.
        written = "mlx_safe_reports_written_total"
        assert eventually(lambda: server.metric(written) == 1)
        (path,) = (p for p in private_reports.iterdir() if p.name[0].isdigit())
        report = json.loads(path.read_text())
        assert report["why"] == "fault" and report["code"] == 8
        assert "Insufficient Memory" in report["exception_message"]
        assert len(report["requests"]) == 1


# Takes its time to write the report of a fault.
SLOWLY = program("reports_slowly")


def test_who_ends_waits_for_the_report_of_a_fault(
    tiny_model: Path, private_reports: Path
) -> None:
    with Server(tiny_model, inject="decode:5:8", program=SLOWLY).wait_ready() as server:
        assert server.chat(TEXT, max_tokens=8).status == 200
        server.wait_for_log("a report is being written")
        assert server.stop() == 0
    assert only_report(private_reports)["code"] == 8


def test_sigkill_and_sigterm(tiny_model: Path, private_reports: Path) -> None:
    """The one leaves its run file with the last figures, the other nothing."""
    with Server(tiny_model).wait_ready() as server:
        run_file = [f"run-{server.process.pid}.json"]
        # Another name stands beside it for a moment, now and then.
        assert eventually(
            lambda: [p.name for p in private_reports.iterdir()] == run_file
        )
        assert server.stop() == 0
        assert list(private_reports.iterdir()) == []
    with Server(tiny_model).wait_ready() as server:
        assert server.chat(TEXT).status == 200
        assert "mlx_safe_reports_failed_total 0.0" in server.get("/metrics").body
        server.process.kill()
        assert server.wait() == -signal.SIGKILL
    # It may have been about to write it anew.
    (private_reports / f".run-{server.process.pid}").unlink(missing_ok=True)
    left = only_report(private_reports)
    assert left["why"] == "running" and left["pid"] == server.process.pid
