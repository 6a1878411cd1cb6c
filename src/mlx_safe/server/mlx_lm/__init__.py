"""Everything that touches mlx-lm. No module outside this folder imports it.

- `compat`: what differs between its versions, and the check at start.
- `handler`, `batches`, `prompt_cache`: subclasses of its own.
- `kv_window`, `model_facts`, `model_loading`, `speculative`: its models.

Imports nothing itself: the process that supervises the server has no mlx.
"""
