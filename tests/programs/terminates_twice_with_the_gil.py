"""Two exceptions reach std::terminate, the second in a thread that holds the GIL."""

import ctypes
import sys

import mlx_safe
from mlx_safe import _core, testing

# ``std::terminate()`` of the C++ runtime that `_core` has loaded, with the GIL.
LIBRARY = "/usr/lib/libc++abi.dylib" if sys.platform == "darwin" else "libstdc++.so.6"
terminate = ctypes.PyDLL(LIBRARY)._ZSt9terminatev
sys.setswitchinterval(100)  # it gives the GIL to nobody while it waits
mlx_safe.install(on_terminate="drain")
mlx_safe.on_fault(lambda fault: print("answered", flush=True), drains=True)
testing.throw_on_foreign_thread()
while not _core.terminate_reached():
    pass
terminate()
