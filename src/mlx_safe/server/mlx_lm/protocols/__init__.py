"""All that this server relies on in mlx-lm, as types. This is the one list of it.

Two things compare it with the world: mypy with what the code uses, and `seams`, when
the server starts, with the mlx-lm that is installed. A class here has the name of
mlx-lm's class, or says what it stands for. A parameter that stands here is one that
this server passes, or mlx-lm passes to an override, by its place or its name.

What this server subclasses is a class, since mypy refuses calls of a protocol's method
by ``super()``; everything else is a protocol. Attributes that only one version of
mlx-lm has are in classes that end with that version.

- `opaque`: what is passed on without a look into it.
- `text`: tokenizers and stop words. `requests`: a request and its answer.
- `models`: models and their caches. `generation`: the batch and the prompt cache.
- `server`: the classes and functions of the module ``mlx_lm.server``.
"""
