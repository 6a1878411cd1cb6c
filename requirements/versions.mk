# The versions of MLX and mlx-lm that this project is tested with. They stand here
# alone: the Makefile includes this file, tests and tools read it (tests/support/
# versions.py), and tests/test_mlx_versions.py compares it with what is shipped.
# What MLX does in each version is the table of src/mlx_safe/_mlx_versions.py.

# The two pairs that must both work: the oldest, and the newest. `make test-mixed` runs
# the newest MLX with the oldest mlx-lm, which most servers of others run on.
INTERCEPT_MLX := 0.31.2
INTERCEPT_MLX_LM := 0.31.3
OBSERVE_MLX := 0.32.4
OBSERVE_MLX_LM := 0.32.2

# Executed by `make machrun`: each one whose behaviour differs, or might.
EXECUTED_MLX := 0.30.6 0.31.2 0.32.0 0.32.1 0.32.2 0.32.3 0.32.4
# Read by `make contract`.
READ_MLX := 0.29.4 0.30.6 0.31.2 0.32.0 0.32.4

# The first mlx-lm that the server refuses without --allow-untested-mlx-lm.
TOO_NEW_MLX_LM := 0.33
