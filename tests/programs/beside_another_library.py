"""Another library replaces one of our methods."""

import ctypes
import sys
from typing import Any

import mlx_safe
from mlx_safe import testing
from support.simulated import fail_next, sim

mode: Any = sys.argv[1]
P = ctypes.c_void_p
Method = ctypes.CFUNCTYPE(None, P, P)  # void (*)(id, SEL)


def of_runtime(name, *types):
    function = getattr(sim, name)
    function.restype, function.argtypes = P, types
    return function


owner = of_runtime("objc_getClass", ctypes.c_char_p)(b"_MTLCommandBuffer")
commit = of_runtime("sel_registerName", ctypes.c_char_p)(b"commit")
method = of_runtime("class_getInstanceMethod", P, P)(owner, commit)
replace = of_runtime("method_setImplementation", P, P)
calls: list[object] = []


@Method
def theirs(self, selector):
    calls.append(self)
    original(self, selector)


status = mlx_safe.install(mode=mode)
assert status.verified and not any("Metal" in r for r in status.reasons)
original = Method(replace(method, ctypes.cast(theirs, P)))
fail_next()
try:
    with mlx_safe.guard():
        testing.run_command_buffer()
except mlx_safe.errors.MetalOutOfMemoryError as e:
    assert len(e.faults) == 1 and calls
else:
    raise AssertionError("nothing was raised")

mlx_safe.uninstall()
status = mlx_safe.status()
assert not status.installed and not status.metal_hooks
assert "another library has replaced" in status.reasons[-1], status.reasons
assert status.hooked == ("-[_MTLCommandBuffer commit]",), status.hooked
del calls[:]
testing.run_command_buffer()
assert calls

status = mlx_safe.install(mode=mode)
assert status.verified and not any("Metal" in r for r in status.reasons)
replace(method, ctypes.cast(original, P))
mlx_safe.uninstall()
assert mlx_safe.status().hooked == ()
assert mlx_safe.status().reasons == ("not installed: call install()",)
