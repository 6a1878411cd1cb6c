"""Numbers of all sizes through NSError's userInfo."""

import random

import mlx_safe
from mlx_safe import testing
from support.simulated import fail_next

random.seed(1)
mlx_safe.install(mode="intercept")
for _ in range(100):
    code = random.choice((random.randrange(1, 64), random.randrange(1, 2**31)))
    if code == 4:
        continue
    fail_next(code)
    try:
        testing.run_command_buffer()
    except RuntimeError as e:
        error = mlx_safe.errors.from_exception(e)
        assert error is not None and error.code == code, (code, e)
    assert mlx_safe.faults()[-1].code == code, code
    assert mlx_safe.faults()[-1].label == "mlx_safe.testing"
