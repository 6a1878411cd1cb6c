"""The simulated Metal as a package: loaded, and asked for a fault."""

import mlx_safe_metalsim as metalsim

metal = metalsim.load()
assert metalsim.environment({})["MLX_SAFE_METAL_RUNTIME"] == metal.path
metal.fail(code=2)
metal.set_memory(10**9)
assert metal.reset() and metal.totals["buffers_failed"] == 0
print(metal.path)
