"""mlx_lm.server as it is, with nothing but the injected fault."""

import mlx_lm.server as server

import mlx_safe  # follows MLX_SAFE_INJECT

assert not mlx_safe.status().installed
server.main()
