"""What is known of mlx-lm. No module outside this folder imports it.

- `protocols`: all that is relied on, as types. `seams` compares it with the installed
  mlx-lm, `requirements` says which version to install.
- `patch`: replaces functions of mlx-lm's server. `bases` has the classes that
  `generator`, `handler` and `prompt_cache` subclass.
- `kv_tier`: KV caches from and to the disk; `kv_layout`, `kv_parts`: which of them;
  `kv_capture`: what is written of them, and when; `kv_restore`: what is read, and when.
- `compat`: what differs between versions.
- `hub`, `kv_window`, `model_facts`, `model_loading`, `speculative`, `chat_template`:
  its models.

Imports nothing itself: the process that supervises the server has no mlx.
"""
