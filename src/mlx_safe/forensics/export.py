"""A copy of a report for a bug report, without what is private.

Members that are not known to be harmless are left out, not the other way round.
The copy is one JSON file, a report as any other. It can be read with an editor before
it is sent, and shown with ``mlx-safe reports show FILE``. An archive would hold this
one file and hide what is in it.
"""

from __future__ import annotations

import getpass
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .records import Report

__all__ = ["exported"]

# What of `context` is about the machine and not about its user.
_CONTEXT = ("mlx_safe", "mlx", "mlx_lm", "python", "os", "machine", "hooks")
# Shorter names are part of too many words.
_NAME_MIN = 3
# Breadcrumbs of this kind are the program's own, not ours.
_NOTE = "note"


def exported(report: Report, *, with_fields: bool = False) -> dict[str, Any]:
    """The members of ``report`` that may be shown to strangers.

    Args:
        with_fields: keeps the fields of the program's own breadcrumbs.

    Returns:
        A JSON-able report with one more member, ``left_out``: what was left out,
        one line each.
    """
    left_out = []
    kept = report.members()
    if kept.pop("argv0", None) is not None:
        left_out.append("the name of the program (argv0)")
    context = kept.get("context", {})
    if set(context) - set(_CONTEXT):
        left_out.append("members of context other than versions and hooks")
        kept["context"] = {n: v for n, v in context.items() if n in _CONTEXT}
    if report.other:
        left_out.append(f"members that are not known: {len(report.other)}")
    if _drop_ids(kept):
        left_out.append("the ids of the requests")
    if not with_fields and _drop_fields(kept.get("breadcrumbs", ())):
        left_out.append("the fields of the program's own breadcrumbs (--with-fields)")
    redact, replaced = _redactor()
    kept = redact(kept)
    left_out += [f"{what}, {n} times" for what, n in replaced.items() if n]
    # Last is ``complete``, which says that nothing is missing behind it.
    complete = kept.pop("complete", False)
    return {**kept, "left_out": left_out, "complete": complete}


def _drop_ids(kept: dict[str, Any]) -> bool:
    """Of the requests in flight, and in our own breadcrumbs of any request."""
    crumbs = kept.get("breadcrumbs", ())
    ours = [c for c in crumbs if c.get("kind", _NOTE) != _NOTE]
    places = [*kept.get("requests", ()), *(crumb["fields"] for crumb in ours)]
    found = [place.pop("id", None) for place in places]
    return any(found)


def _drop_fields(breadcrumbs: list[dict[str, Any]]) -> bool:
    dropped = False
    for crumb in breadcrumbs:
        if crumb.get("kind", _NOTE) == _NOTE and crumb.pop("fields", None):
            dropped = True
    return dropped


def _redactor() -> tuple[Callable[[Any], Any], dict[str, int]]:
    """(what replaces private names in every text of a value, how often it did)."""
    rules = _rules()
    replaced = dict.fromkeys((what for what, _, _ in rules), 0)

    def redact(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: redact(member) for name, member in value.items()}
        if isinstance(value, list):
            return [redact(member) for member in value]
        if not isinstance(value, str):
            return value
        for what, pattern, instead in rules:
            value, times = pattern.subn(instead, value)
            replaced[what] += times
        return value

    return redact, replaced


def _rules() -> list[tuple[str, re.Pattern[str], str]]:
    """(what, pattern, what stands instead), in the order of their use."""
    # The report may come from another machine or user.
    homes = [r"/Users/[^/\s:'\"]+", r"/home/[^/\s:'\"]+", "/root"]
    home = _home()
    if home:
        homes.insert(0, re.escape(home))
    # Up to the end of that part of the path: /root is not in /rootless.
    home_pattern = re.compile(rf"(?:{'|'.join(homes)})(?![\w.-])")
    rules = [("home directories", home_pattern, "~")]
    names = (
        ("the user's name", _user(), "<user>"),
        ("the host's name", platform.node(), "<host>"),
        ("the host's name", platform.node().partition(".")[0], "<host>"),
    )
    for what, name, instead in names:
        if len(name) >= _NAME_MIN:
            pattern = rf"(?<![A-Za-z0-9_]){re.escape(name)}(?![A-Za-z0-9_])"
            rules.append((what, re.compile(pattern, re.IGNORECASE), instead))
    return rules


def _home() -> str:
    try:
        return str(Path.home()).rstrip("/")
    except RuntimeError:  # a number without an entry, in a container
        return ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # as above
        return ""
