"""On a Mac that is emulated: methods that are replaced, before and after."""

import ctypes

import machpy
import mlx.core as mx

import mlx_safe

mlx_safe.install()
mx.eval(mx.exp(mx.array([1.0])))
count = machpy.simulator("metalsim_modified_methods", ctypes.c_uint32)
before = count()
mlx_safe.uninstall()
mx.eval(mx.exp(mx.array([1.0])))
print(before > 0, count())
