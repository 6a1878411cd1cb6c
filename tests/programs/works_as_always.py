"""Ordinary work of a GPU is no fault."""

import mlx.core as mx

import mlx_safe

with mlx_safe.guard():
    a = mx.random.normal((512, 512))
    for _ in range(50):
        a = mx.tanh(a @ a)
    mx.eval(a)
mx.synchronize()
assert mlx_safe.epoch() == 0 and mlx_safe.status().verified
