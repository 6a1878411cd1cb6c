"""``mlx-safe run -- CMD …``: any Python program that uses MLX, protected.

| Module | What is in it |
|---|---|
| `command` | the command line, and the environment of the program |
| `restarts` | ``--supervise``: starts it again |
| ``startup/`` | on the program's path, so that Python runs its ``sitecustomize`` |
"""
