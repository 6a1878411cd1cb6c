"""mlx-lm's batch generator, held between its steps.

Used by the generation thread only.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from .admission import Admission

__all__ = ["watched"]


def watched(cls: Any, admission: Admission) -> Any:
    """The class ``cls`` (mlx-lm's `BatchGenerator`), asking before each step."""

    class Watched(cls):  # type: ignore[misc]
        def insert_segments(self, *args: Any, **kwargs: Any) -> Any:
            uids = super().insert_segments(*args, **kwargs)
            admission.inserted(uids)
            return uids

        def next(self) -> Any:
            leaving = admission.before_step()
            if leaving:
                # No step is run; mlx-lm takes out of the batch what has been
                # stopped when it gets a sign of it.
                return [_sign_of(ticket.uid) for ticket in leaving], []
            admission.observer.begin()
            prompts, generated = super().next()
            admission.observer.end_of_batch_step(
                prompts, generated, admission.lengths()
            )
            return prompts, generated

    Watched.__name__ = cls.__name__
    return Watched


def _sign_of(uid: Any) -> Any:
    """A `PromptProcessingBatch.Response` that tells of nothing."""
    return SimpleNamespace(
        uid=uid, progress=(0, 0), end_of_segment=False, end_of_prompt=False
    )
