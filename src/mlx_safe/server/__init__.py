"""mlx_lm.server, protected. Start it with ``mlx-safe serve``.

`serve` runs mlx-lm's own ``main``, whose functions and classes `mlx_lm` replaces and
subclasses. What it relies on, all of it, stands in `mlx_lm.protocols`, with what is
overridden and why. `mlx_lm.seams` compares that with the installed mlx-lm at start.

mlx_lm.server                    here                why
===============================  ==================  ==========================
``run`` (module attribute)       `launcher.run`      binds the port first, builds
                                                     the two classes below
``ResponseGenerator._generate``  `generator`,        a step that fails must not
                                 `recovery`          end the generation thread
``ResponseGenerator.             `generator`         the one place that every
_next_request``                                      request passes: its queue is
                                                     replaced by an `InFlight`
``ResponseGenerator._tokenize``  `generator`,        refuses or cuts a prompt that
                                 `overflow`,         is too long; tells a bad
                                 `model_limits`      request from a failed
                                                     generation; a replay
                                                     goes on after the tokens that
                                                     its client has
same, and ``BatchGenerator``     `scheduler`,        asks for memory, and before
                                 `headroom`,         each step
                                 `batches`
``ResponseGenerator.             `replay`,           stop words, sampler, text and
_make_state_machine``,           `own_failures`      prefill step of a replay; what
``_make_sampler``,                                   fails there ends one request
``_make_logits_processors``,
``BatchGenerator``,
``tokenizer.detokenizer``
``ResponseGenerator.             `generator`         a client that left ends its
_serve_single``                                      request within a step
``ResponseGenerator.             `ranks`, and in     with more than one rank
_share_request``,                `generator`         all take the same steps
``._share_object``
``ResponseGenerator.generate``   `generator`         hands over what mlx-lm's
                                                     handler wants generated
``APIHandler.handle_completion`` `handler`,          answers: calls of tools that
                                 `answers`,          cannot be read, choices, log-
                                 `choices`           probabilities, failures
``APIHandler.generate_response,  `answers`           the frame of an answer
completion_usage_response``
``APIHandler.                    `handler`           ``n``; up to 20 alternatives
validate_model_parameters,
_validate``
``_format_top_logprobs``         `logprobs`,         in order, and as many as
                                 `own_failures`      there are; as above
``mlx_lm.sample_utils``          `generator`         is loaded anew by the thread
                                                     that samples (MLX 0.31.2)
``tokenizer.rfind_think_start``  `replay`            short prompts (0.31.3)
``APIHandler.do_GET``            `handler`           /metrics, one model, 404 and
                                                     405 of ours
``APIHandler.do_POST``           `handler`, `body`,  reads a request that `schema`
                                 `schema`            has checked and put right
``APIHandler.                    `handler`           an image that cannot be had
handle_chat_completions``                            is told in our words
``APIHandler`` as a handler of    `wire`              HTTP/1.1: chunked streams,
HTTP                                                 connections that are kept
``APIHandler.                    `handler`           tells the truth
handle_health_check``
``GenerationBatch.filter``       `compat`            0.31.3: penalties stay with
                                                     their request
``LRUPromptCache``               `prompt_cache`      entries are complete and hold
                                                     what they count
same                             `kv_tier`           --kv-dir: from and to the disk
``Model.make_cache``             `kv_window`         --max-kv-size
``ResponseGenerator.generate``   `model_names`       an unknown model is a 404, at
                                                     once
``ModelProvider.load``,          `generator`,        what is loaded stays until the
``._load`` (object), ``load``    `model_loading`     next can take its place
``ResponseGenerator.             `generator`         asked of the model that is
_is_batchable``                                      named, not of the one before
``APIHandler.                    `model_names`       lists what requests may name
handle_models_request``
draft ``Model.__call__``         `speculative`       takes and gives the target's
                                                     tokens
===============================  ==================  ==========================

`mlx_lm` has all that touches mlx-lm (`generator` still apart), and `mlx_lm.compat`
checks at start that it is where this patch expects it.
=======
- Start: `serve`, `flags`, `supervisor`, `holding`, `handover`.
- HTTP: `http_server`, `wire`, `body`, `responses`, `endpoints`, `replies`.
- A request: `schema`, `messages`, `strict_json`, `model_names`, `model_limits`.
- Generation: `generator`, `admission`, `replay`, `recovery`, `own_failures`.
- An answer: `answers`, `choices`, `tool_calls`, `logprobs`.
"""
