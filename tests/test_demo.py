"""`make demo`, as far as `.ci/run`, which has it run once, does not show it."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import child

TOOLS = Path(__file__).parent.parent / "tools"


def test_it_does_not_see_what_was_before(
    tiny_model: Path,
    private_reports: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its fault leaves a report, of which the server of the second run warned."""
    done = child.run(
        """
        import mlx_safe
        from mlx_safe import _reports
        _reports.write_fault("out of memory", 8)
        """
    )
    assert done.returncode == 0, done.stderr
    before = list(private_reports.glob("*.json"))
    assert len(before) == 1
    monkeypatch.syspath_prepend(TOOLS)
    import demo

    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / "server"
    with demo.running(["-m", "mlx_safe", "serve"], tiny_model, log) as server:
        assert demo.warnings_in(server.log()) == []
    assert list(private_reports.iterdir()) == before


def test_the_fault_is_in_the_middle_of_the_second_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(TOOLS)
    import demo

    answers = [demo.Answer("a b", "stop", tokens=n) for n in (8, 26, 8)]
    assert demo.plan_for(answers) == "decode:21:8"
    answers[2].failure = "it broke off"
    with pytest.raises(demo.DemoFailed):
        demo.plan_for(answers)


def test_the_answer_is_held_against_the_undisturbed_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(TOOLS)
    import demo

    def compared(wanted: str, got: str) -> str:
        first = demo.Answer("x")
        sides = [demo.Protected([first, demo.Answer(t)]) for t in (wanted, got)]
        return str(demo.comparison(*sides))

    assert compared("a b c", "a b c").endswith("all 3 words")
    assert "for 2 words, then other ones" in compared("a b c", "a b d")
