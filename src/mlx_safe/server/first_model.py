"""The first model is loaded, or the server ends with the reason in one line."""

from __future__ import annotations

import logging
from collections.abc import Callable

from .. import errors, status
from .._command import in_one_line
from .health import EXIT_REPLACE, Health
from .mlx_lm.protocols.models import ModelProvider
from .mlx_lm.sharing import RanksRefuse, meet
from .replies import ModelNotFound, Unavailable, is_allocation_failure
from .served_model import where

__all__ = ["load_first_model", "status_line"]

log = logging.getLogger("mlx_safe.server")


def load_first_model(
    provider: ModelProvider,
    health: Health,
    fail_everyone: Callable[[Exception], None],
) -> bool:
    """Whether it is there. If not, the process ends soon. Generation thread.

    Args:
        fail_everyone: answers all requests with an error.
    """
    try:
        provider.load_default()
    except Exception as e:
        _leave(e, provider, health, fail_everyone)
        return False
    health.enter("ok")
    log.info("ready: %s", status_line())
    return True


def _leave(
    exc: Exception,
    provider: ModelProvider,
    health: Health,
    fail_everyone: Callable[[Exception], None],
) -> None:
    # Of `ServedModel`, whose own text is cut.
    cause = exc.__cause__ or exc if isinstance(exc, ModelNotFound) else exc
    # What died here before may not have given its memory back yet.
    fault = errors.from_exception(cause)
    passing = is_allocation_failure(cause)
    passing = passing or (fault is not None and (fault.retryable or fault.fatal))
    code = EXIT_REPLACE if passing else 2
    place = "" if passing else where(provider.cli_args)
    log.error("the model cannot be loaded: %s%s", place, in_one_line(cause))
    health.restarts = code == EXIT_REPLACE
    health.enter("failed", "the model cannot be loaded")
    if isinstance(cause, RanksRefuse):
        meet()  # a rank that learns that another has ended, before this, leaves with 75
    error = Unavailable("The model cannot be loaded.", restarts=True)
    health.leave(code, lambda: fail_everyone(error))


def status_line() -> str:
    found = status()
    if found.verified:
        return f"{found.mode}, Metal is hooked and the hooks are verified"
    return "; ".join(found.reasons)
