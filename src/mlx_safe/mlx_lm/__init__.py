"""`protect`: a server that uses mlx-lm's `BatchGenerator` answers in spite of a fault.

    import mlx_safe.mlx_lm

    mlx_safe.mlx_lm.protect()

From then on each `BatchGenerator` keeps what was inserted into it and which tokens it
has returned. When a step fails on the GPU, it drops what the step may have left
unwritten. It begins again with every request, under the same uid, from its prompt and
the tokens that it has returned. It returns none of them twice. Its server sees a step
that takes longer.

It raises the `GPUError` where that would not be exact: see `protect`.

| Module | What is in it |
|---|---|
| `batch` | what is kept of one generator, and what follows a failure of it |
| `sequences` | one request: what was inserted and produced, and how to go on with it |
| `callables` | samplers and processors: which depend on their arguments alone |
| `births` | caches know which faults were before them |
| `places` | in mlx-lm 0.31.3, a sampler and penalties stay with their request |
| `stops` | stop words after some tokens of an answer |

mlx-lm 0.31.3 to 0.32. Importing this does not import mlx-lm.
"""

from __future__ import annotations

from .callables import replayable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["protect", "replayable", "unprotect"]

# As `mlx-safe serve --replay-attempts`.
ATTEMPTS = 2


def protect(
    cls: Any = None, *, attempts: int = ATTEMPTS, keep_caches: bool = True
) -> None:
    """Protects every `BatchGenerator` that is made from now on. Main thread, once.

    The class is changed, so a module that has imported it already has it protected.
    Called again it changes the settings.

    After a fault that may pass, or a failed allocation, all are begun again. Where that
    helps, fewer at a time and in smaller steps. The last time they run one by one, so
    that one that fails every time does not take others along. Otherwise, and when the
    attempts are used up, ``next`` raises the `GPUError`, with the reason as its note,
    until the server removes or inserts something. It is raised, too, when

    - a sampler or a logits processor may have a state (see `replayable`);
    - MLX was seeded (``mx.random.seed``) for an answer that is drawn;
    - tokens came that did not pass by the generator, or it has requests that were
      inserted before;
    - ``keep_caches`` is false, and a request came with a cache that its tokens
      (``all_tokens``) do not explain.

    A cache that goes to the server (of an answer that has ended, of ``extract_cache``
    or ``remove``) is computed first. So no prompt cache keeps what a fault has spoilt.
    A cache that comes with an insert has a prompt that was read outside the generator.
    It may be of a fault since the last step, unless it was made after it. Then the
    request begins from its tokens where they explain the cache. Else the next step
    raises.

    Args:
        cls: mlx-lm's class, or a copy of it in another package; None: mlx-lm's.
        attempts: how often a request is begun again.
        keep_caches: a cache that a request comes with, and that its tokens do not
            explain, stays in memory as long as the request does.

    Raises:
        ImportError: there is no mlx-lm.
        TypeError: ``cls`` is not made as expected, or a subclass of it is protected;
            the message says what is missing. (A subclass of one that is protected
            is so as well, and shares its settings.)
        ValueError: ``attempts`` is negative.
    """
    from . import batch

    if attempts < 0:
        raise ValueError(f"attempts must be at least 0, not {attempts}")
    batch.protect(_class() if cls is None else cls, attempts, keep_caches)


def unprotect(cls: Any = None) -> None:
    """Undoes `protect`; what runs is run again no more."""
    from . import batch

    batch.unprotect(_class() if cls is None else cls)


def _class() -> Any:
    from mlx_lm.generate import BatchGenerator

    return BatchGenerator
