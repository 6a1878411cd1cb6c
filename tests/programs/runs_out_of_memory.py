"""What does not fit raises; what comes after it is right."""

import mlx.core as mx

import mlx_safe
from support.hog import hog

arrays = hog()
try:
    with mlx_safe.guard():
        mx.eval(arrays)
except mlx_safe.errors.OutOfMemoryError as e:
    print("raised", type(e).__name__, e.code, e.retryable)
del arrays
mx.clear_cache()
with mlx_safe.guard():
    total = (mx.ones((1000,)) + 1).sum()
    mx.eval(total)
print("after it", total.item(), "epoch", mlx_safe.epoch())
