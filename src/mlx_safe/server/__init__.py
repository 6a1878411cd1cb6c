"""mlx_lm.server, protected. Start it with ``mlx-safe serve``.

`serve` runs mlx-lm's own ``main``, whose functions and classes `mlx_lm` replaces and
subclasses. What it relies on, all of it, stands in `mlx_lm.protocols`, with what is
overridden and why. `mlx_lm.seams` compares that with the installed mlx-lm at start.

- Start: `serve`, `flags`, `flag_checks`, `configuration`, `supervisor`, `holding`,
  `handover`.
- HTTP: `http_server`, `tls`, `wire`, `access`, `body`, `responses`, `endpoints`,
  `handler`, `replies`, `openapi`; `status` and `status_page` of what the operator sees.
- A request: `schema`, `messages`, `strict_json`, `model_names`, `model_limits`.
- Generation: `generator`, `scheduler`, `request`, `prompts`, `parts`, `recovery`.
- An answer: `answers`, `choices`, `tool_calls`, `logprobs`.
- Its record: `logs`, `exchange`, `metrics`, `live`, `step`.
"""
