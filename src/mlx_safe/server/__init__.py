"""mlx_lm.server, protected. Start it with ``mlx-safe serve``.

What the patch touches, all of it:

===============================  ==================  ==========================
mlx_lm.server                    here                why
===============================  ==================  ==========================
``run`` (module attribute)       `launcher.run`      binds the port first, builds
                                                     the two classes below
``ResponseGenerator._generate``  `generator`,        a step that fails must not
                                 `recovery`          end the generation thread
``ResponseGenerator.             `generator`         the one place that every
_next_request``                                      request passes: its queue is
                                                     replaced by a `Ticket`
``ResponseGenerator._tokenize``  `generator`,        cuts a prompt that is too long;
                                 `overflow`          tells a bad request from a
                                                     failed generation; a replay
                                                     goes on after the tokens that
                                                     its client has
same, and ``BatchGenerator``     `admission`,        asks for memory, and before
                                 `batches`           each step
``ResponseGenerator.             `replay`            stop words, sampler, text and
_make_state_machine``,                               prefill step of a replay
``_make_sampler``,
``BatchGenerator``,
``tokenizer.detokenizer``
``ResponseGenerator.             `generator`         a client that left ends its
_serve_single``                                      request within a step
``ResponseGenerator.             `ranks`, and in     with more than one rank
_share_request``,                `generator`         all take the same steps
``._share_object``
``ResponseGenerator.generate``   `generator`         refuses while it must
``APIHandler.handle_completion`` `handler`           answers failures
``APIHandler.do_GET, do_POST``   `handler`           /metrics; bad bodies
``APIHandler`` as a handler of    `wire`              HTTP/1.1: chunked streams,
HTTP                                                 connections that are kept
``APIHandler.                    `handler`           tells the truth
handle_health_check``
``LRUPromptCache``               `prompt_cache`      entries are complete and hold
                                                     what they count
``Model.make_cache``             `kv_window`         --max-kv-size
``ModelProvider.load`` (object)  `generator`         an unknown model is a 404
===============================  ==================  ==========================

`compat` checks at start that they are where this patch expects them.
"""
