"""On a Mac that is emulated: a small hook adds a Block to two buffers.

It throws when the next is committed. MACHRUN_HOOK: its library.
"""

import ctypes
import os

import machpy
import mlx.core as mx

image = machpy._load(os.environ["MACHRUN_HOOK"].encode())


def call(name):
    return ctypes.CFUNCTYPE(ctypes.c_int)(machpy._symbol(image, b"_" + name))()


def work():
    mx.eval(mx.exp(mx.array([1.0])))
    mx.synchronize()


work()
print("loaded", call(b"start"), flush=True)
work()
print("called", call(b"seen"), flush=True)
call(b"throw_once")
try:
    work()
    print("nothing raised")
except Exception as e:
    print(type(e).__name__, e)
