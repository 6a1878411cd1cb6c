"""Each fixture of the plugin, in this process."""

import mlx.core as mx
import pytest
from plugin_model import PROMPT, TOKEN, Model


def test_by_code_and_place(metal_fault, model):
    plan = metal_fault("decode", step=2, code=0xE)
    model(PROMPT)
    model(inputs=TOKEN)
    with pytest.raises(RuntimeError, match="Impacting Interactivity"):
        model(None, input_embeddings=mx.zeros((1, 1, 8)))
    assert plan.fired == 1
    model(TOKEN)


def test_the_last_plan_is_gone(metal_fault, model):
    model(TOKEN)


def test_out_of_memory(out_of_memory_after, model):
    out_of_memory_after(2, persistent=True)
    model(PROMPT)
    model(TOKEN)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="Insufficient Memory"):
            model(TOKEN)


def test_a_small_gpu(gpu_ceiling, model):
    small = gpu_ceiling("1k")
    with pytest.raises(RuntimeError, match="Insufficient Memory"):
        model(mx.zeros((64, 64), mx.int32))
    assert (small.steps, small.struck) == (1, 1)


def test_a_large_one_is_no_error(gpu_ceiling, model):
    assert gpu_ceiling("2G").size == 2 * 10**9
    model(TOKEN)


def test_a_model_that_is_not_loaded(metal_fault):
    plain = metal_fault.attach(Model())
    metal_fault("prefill")
    with pytest.raises(RuntimeError):
        plain(PROMPT)
