"""Whose calls are generation steps: `attach`, `detach` and `attach_all`."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading

from .._after_import import after_import
from . import ceilings, plans

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

__all__ = ["attach", "attach_all", "attaches_all", "detach", "uncounted"]

# Parts of a model that programs call instead of the whole: mlx-vlm the first,
# speculative decoding the second. A call within a call is no step of its own.
_PARTS = ("language_model", "model")
_NN = "mlx.nn"

_in_a_step = threading.local()


def attach(model: Any, *, decode_width: int | None = None) -> Any:
    """Counts the calls of ``model`` as generation steps, and returns it.

    Calls of its parts ``model.language_model`` and ``model.model`` count as well,
    unless they are made by a call that is counted.

    Args:
        model: an ``mlx.nn.Module``. It may be called with tokens of shape (batch,
            length) or embeddings of shape (batch, length, hidden), by place or by
            name. Where it is given both, the embeddings say how long the step is.
            A call with neither is no step.
        decode_width: calls of at most this length are decode steps. With
            speculative decoding it is ``num_draft_tokens + 1``. By default 1, or
            what it was.

    The model keeps its class's name and its signature, and stays an instance of its
    class. Attaching twice counts once.

    Raises:
        TypeError: ``model`` cannot be called.
    """
    if not callable(model):
        raise TypeError(f"attach() needs a model that can be called, not {model!r}")
    if not _is_attached(model):
        _count_calls(model)
        plans.attached.append(type(model).__name__)
        plans.log("attached", type(model).__name__)
    for part in (model, *_parts(model)):
        if not _is_attached(part):
            _count_calls(part)
        if decode_width is not None:
            type(part)._mlx_safe_decode_width = decode_width
    return model


def detach(model: Any) -> Any:
    """Counts the calls of ``model`` and its parts no more, and returns it."""
    for part in (model, *_parts(model)):
        if _is_attached(part):
            part.__class__ = type(part).__mro__[1]
    return model


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """No call that the calling thread makes within it is a step: a measurement, say."""
    before = getattr(_in_a_step, "is_true", False)
    _in_a_step.is_true = True
    try:
        yield
    finally:
        _in_a_step.is_true = before


def _is_attached(model: Any) -> bool:
    return "_mlx_safe_decode_width" in vars(type(model))


def _parts(model: Any) -> list[Any]:
    found: list[Any] = []
    for holder in (model, getattr(model, _PARTS[0], None)):
        parts = (getattr(holder, name, None) for name in _PARTS)
        found += [part for part in parts if callable(part)]
    return found


def _count_calls(model: Any) -> None:
    cls = type(model)

    # Programs look at the parameters of a model's call.
    @functools.wraps(cls.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = functools.partial(cls.__call__, self, *args, **kwargs)
        length = _length(signature, (self, *args), kwargs)
        if length is None or getattr(_in_a_step, "is_true", False):
            return run()
        _in_a_step.is_true = True
        try:
            width = type(self)._mlx_safe_decode_width
            plans.step("decode" if length <= width else "prefill")
            return ceilings.run(run)
        finally:
            _in_a_step.is_true = False

    signature = inspect.signature(cls.__call__)
    added = {
        "__call__": call,
        "__module__": cls.__module__,
        "_mlx_safe_decode_width": 1,
    }
    model.__class__ = type(cls.__name__, (cls,), added)


def _length(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> int | None:
    """How many tokens each sequence of a call has; None: it has none."""
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:
        return None  # the call will say so itself
    flat: dict[str, Any] = {}
    for name, value in given.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            flat.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            flat.update({f"{name}{i}": one for i, one in enumerate(value)})
        else:
            flat[name] = value
    arrays = {name: x.shape for name, x in flat.items() if hasattr(x, "shape")}
    embeddings = [x for name, x in arrays.items() if "embed" in name]
    shape: Sequence[int]
    for shape in (*embeddings, *arrays.values()):
        if shape:
            return int(shape[1] if len(shape) > 1 else shape[0])
    return None


# -- each model that is loaded ------------------------------------------------------


_hooked: list[Callable[[], object] | None] = []


def attach_all(when_hooked: Callable[[], object] | None = None) -> None:
    """Attaches each model that is loaded from now on, by whatever library.

    All loaders of models end with ``mlx.nn.Module.load_weights``: mlx-lm's, mlx-vlm's,
    and copies of them. What generates is taken to be a module with ``layers``, its
    own or its language model's, as mlx-lm's and mlx-vlm's caches need them. MLX is
    not imported by this.

    Args:
        when_hooked: called once, when the program has imported ``mlx.nn``.
    """
    if _hooked:
        return
    _hooked.append(when_hooked)
    after_import({_NN: _hook})


def attaches_all() -> bool:
    """Whether `attach_all` was called."""
    return bool(_hooked)


def _hook(nn: Any) -> None:
    load_weights = nn.Module.load_weights

    @functools.wraps(load_weights)
    def load_and_attach(self: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = load_weights(self, *args, **kwargs)
        if callable(self) and any(
            hasattr(part, "layers") for part in (self, *_parts(self))
        ):
            attach(self)
        return loaded

    nn.Module.load_weights = load_and_attach
    if _hooked[0] is not None:
        _hooked[0]()
