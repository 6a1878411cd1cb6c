"""On a Mac that is emulated: a message to what is no object."""

import ctypes

import machpy
import mlx.core as mx

import mlx_safe

mlx_safe.install(signals=True)
mx.eval(mx.exp(mx.array([1.0])))
send = machpy.simulator("objc_msgSend", None, ctypes.c_void_p, ctypes.c_void_p)
send(0x10, 0x20)
