"""On a Mac that is emulated: an exception reaches terminate on a thread of C++."""

import time

import mlx_safe
from mlx_safe import _core

mlx_safe.install()
_core.testing_throw_on_foreign_thread("thrown here")
time.sleep(30)
