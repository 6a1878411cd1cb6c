"""What stands behind an exception. For any thread."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["behind", "clear_frames"]


def behind(exc: BaseException) -> Iterator[BaseException]:
    """``exc``, then its causes and contexts and the parts of groups, each once."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [exc]
    while pending:
        current = pending.pop(0)
        if current is None or id(current) in seen:  # a group may be its part's context
            continue
        seen.add(id(current))
        pending += [current.__cause__, current.__context__]
        pending += getattr(current, "exceptions", ())
        yield current


def clear_frames(exc: BaseException) -> None:
    """Frees the locals of every frame that ``exc``, and what is behind it, hold."""
    import traceback

    for one in behind(exc):
        traceback.clear_frames(one.__traceback__)
        one.__traceback__ = None
