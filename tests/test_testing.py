"""The fault kit itself."""

from __future__ import annotations

import inspect
import re
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_safe import testing


class Model:
    def __call__(self, tokens: object, cache: object = None) -> str:
        return "logits"


def tokens(length: int) -> SimpleNamespace:
    return SimpleNamespace(shape=(1, length))


def calls_until_failure(model: object, length: int, limit: int = 10) -> int | None:
    for i in range(1, limit + 1):
        try:
            model(tokens(length))  # type: ignore[operator]
        except RuntimeError:
            return i
    return None


def test_the_nth_step_fails_once() -> None:
    model = testing.attach(Model())
    with testing.inject("decode", step=3) as plan:
        assert calls_until_failure(model, 1) == 3
        assert calls_until_failure(model, 1) is None
        assert (plan.fired, plan.seen) == (1, 13)


def test_persistent_ones_go_on() -> None:
    model = testing.attach(Model())
    with testing.inject("prefill", step=2, persistent=True):
        assert calls_until_failure(model, 5) == 2
        assert calls_until_failure(model, 5) == 1
    assert calls_until_failure(model, 5) is None


def test_phases_are_told_apart() -> None:
    model = testing.attach(Model(), decode_width=4)
    with testing.inject("prefill"):
        assert calls_until_failure(model, 4) is None
        assert calls_until_failure(model, 5) == 1
    with testing.inject("any", step=2):
        model(tokens(1))
        with pytest.raises(RuntimeError):
            model(tokens(9))


def test_attaching_twice_counts_once_and_keeps_the_type() -> None:
    model = Model()
    testing.attach(testing.attach(model))
    assert isinstance(model, Model)
    assert type(model).__name__ == "Model"
    assert list(inspect.signature(model).parameters) == ["tokens", "cache"]
    with testing.inject(step=2):
        assert calls_until_failure(model, 1) == 2


def test_what_is_detached_is_as_before() -> None:
    model = Model()
    testing.detach(testing.attach(model))
    assert type(model) is Model
    plan = testing.inject()
    assert calls_until_failure(model, 1) is None
    plan.cancel()


class Language:
    """As `LanguageModel` of mlx-vlm is called."""

    layers = ()

    def __call__(
        self,
        inputs: object,
        inputs_embeds: object = None,
        mask: object = None,
        cache: object = None,
        **kwargs: object,
    ) -> str:
        return "logits"


def shaped(*shape: int) -> SimpleNamespace:
    return SimpleNamespace(shape=shape)


MASK = shaped(1, 1, 9, 9)


@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize(
    "call",
    [
        lambda model, n: model(shaped(1, n)),
        lambda model, n: model(shaped(3, n), mask=MASK),
        lambda model, n: model(inputs=shaped(1, n), cache=[]),
        lambda model, n: model(mask=MASK, inputs=shaped(2, n)),
        lambda model, n: model(None, inputs_embeds=shaped(1, n, 64)),
        lambda model, n: model(None, shaped(1, n, 64), MASK),
        lambda model, n: model(inputs=None, mask=MASK, inputs_embeds=shaped(4, n, 64)),
        # The rest of a prompt, of which the embeddings are a part (mlx-vlm).
        lambda model, n: model(shaped(1, 40), inputs_embeds=shaped(1, n, 64)),
        lambda model, n: model(None, input_embeddings=shaped(1, n, 64)),
    ],
)
def test_a_call_by_place_by_name_or_with_embeddings(call: Any, length: int) -> None:
    model = testing.attach(Language())
    phases = {1: "decode", 7: "prefill"}
    other = testing.inject(phases[8 - length])
    with testing.inject(phases[length], step=2):
        assert call(model, length) == "logits"
        with pytest.raises(RuntimeError, match="Insufficient Memory"):
            call(model, length)
    other.cancel()
    assert other.seen == 0


def test_a_call_with_neither_is_no_step_and_a_wrong_one_says_so() -> None:
    model = testing.attach(Language())
    plan = testing.inject("any")
    assert model(None) == "logits"
    with pytest.raises(TypeError, match="inputs"):
        model()
    plan.cancel()
    assert plan.seen == 0


class Whole:
    """As a model of mlx-vlm: programs call it, or its language model."""

    def __init__(self) -> None:
        self.language_model = Language()

    def __call__(self, input_ids: object, pixel_values: object = None) -> str:
        return self.language_model(input_ids)


def test_a_call_within_a_call_is_no_step_of_its_own() -> None:
    whole = testing.attach(Whole())
    with testing.inject("prefill", step=3) as plan:
        whole(shaped(1, 5), shaped(1, 3, 224, 224))
        whole.language_model(None, inputs_embeds=shaped(1, 5, 8))
        with pytest.raises(RuntimeError):
            whole(shaped(1, 5))
    assert plan.seen == 3
    testing.detach(whole)
    assert type(whole.language_model) is Language


def test_a_measurement_is_no_step() -> None:
    model = testing.attach(Model())
    with testing.inject("any") as plan:
        with testing.uncounted():
            model(tokens(1))
        assert plan.seen == 0
        with pytest.raises(RuntimeError):
            model(tokens(1))


def test_a_plan_that_never_fired_is_an_error() -> None:
    model = testing.attach(Model())
    with (
        pytest.raises(
            testing.NeverFired,
            match=r"^decode:3:8:once:raise never fired: 2 decode steps were counted$",
        ),
        testing.inject("decode", step=3),
    ):
        model(tokens(1))
        model(tokens(1))
    with pytest.raises(KeyError), testing.inject("decode", step=3):
        raise KeyError("what went wrong is not hidden by it")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("decode", "cannot read 'decode'"),
        ("decode:0", "cannot read 'decode:0'"),
        ("sleep:1", "cannot read 'sleep:1'"),
        ("decode:1:8:always", "cannot read"),
        ("decode:1:8:once:explode", "cannot read"),
        ("decode:1:8:once:raise:more", "cannot read"),
    ],
)
def test_bad_plans_are_one_clear_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        testing.parse_plan(text)
    assert "\n" not in str(caught.value)


def test_a_whole_plan() -> None:
    assert testing.parse_plan("decode:3, prefill:1:0xe:persistent:record") == [
        {
            "phase": "decode",
            "step": 3,
            "code": 8,
            "persistent": False,
            "action": "raise",
        },
        {
            "phase": "prefill",
            "step": 1,
            "code": 14,
            "persistent": True,
            "action": "record",
        },
    ]


@given(st.text(alphabet="decode:prfilany0189x,- "))
def test_no_text_breaks_the_plan_reader(text: str) -> None:
    try:
        plans = testing.parse_plan(text)
    except ValueError as e:
        assert "MLX_SAFE_INJECT" in str(e)
    else:
        assert all(p["step"] >= 1 for p in plans)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": "3"}, "step must be a whole number from 1 on, not '3'"),
        ({"step": 0}, "step must be a whole number from 1 on, not 0"),
        ({"code": 2**31}, "code must be a whole number of 32 bits, not 2147483648"),
        ({"code": "8"}, "code must be a whole number of 32 bits, not '8'"),
    ],
)
def test_bad_arguments_are_one_clear_line(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        testing.inject(**arguments)


def test_what_is_no_model_is_said_at_once() -> None:
    with pytest.raises(TypeError, match="a model that can be called, not None"):
        testing.attach(None)
    with pytest.raises(ValueError, match="32 bits"):
        testing.record_fault(1 << 40)
