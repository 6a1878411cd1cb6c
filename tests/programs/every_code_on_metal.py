"""Each code of a failed command buffer becomes an error of its class."""

import sys
from typing import Any

import mlx_safe
from mlx_safe import testing
from support.simulated import fail_next

mode: Any = sys.argv[1]
mlx_safe.install(mode=mode)
for code in (2, 3, 5, 6, 8, 9, 0xA, 0xB, 0xE, 0x10, 0x11, 7):
    fail_next(code)
    try:
        testing.run_command_buffer()
    except RuntimeError as e:
        error = mlx_safe.errors.from_exception(e)
        assert type(error) is mlx_safe.errors.kind_of(code).error, (code, error)
        assert mlx_safe.faults()[-1].code == code
    else:
        raise AssertionError(code)
    testing.run_command_buffer()
