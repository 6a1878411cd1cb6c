"""On a Mac that is emulated: a fault and a mistake are exceptions of their types."""

import machpy
import mlx.core as mx

import mlx_safe

mlx_safe.install()
mx.eval(mx.exp(mx.array([1.0])))
machpy.fail(1)
try:
    mx.eval(mx.exp(mx.array([1.0])))
    print("nothing raised")
except RuntimeError as e:
    print(type(e).__name__)
try:
    mlx_safe.install(mode="nonsense")  # type: ignore[arg-type]
except ValueError:
    print("ValueError")
