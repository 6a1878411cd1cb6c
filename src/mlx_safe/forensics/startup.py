"""What `mlx_safe.install` does with the reports of those who ran before.

`install` comes here at import of the package, but only where `_paths.has_news`.
"""

from __future__ import annotations

import shlex

from .. import _paths
from . import orphans, reader, store, words
from .records import Report

__all__ = ["tell", "tend"]


def tend(directory: str, *, quietly: bool = False) -> None:
    """Adopts what the dead have left, says that it is there, prunes.

    Args:
        directory: of the reports; it exists.
        quietly: leaves the telling for a later `tell`.

    Raises:
        OSError: the directory cannot be read.
    """
    orphans.adopt(directory)
    if not quietly:
        tell(directory)
    store.prune(directory)


def tell(directory: str | None = None, server: dict[str, object] | None = None) -> None:
    """One line in the log for the reports that have had none yet.

    Of several processes, one announces each report. Of those that a server has left,
    only one with the same port and model announces them.

    Args:
        directory: None: where the reports of this process go.
        server: what `_reports.name_process` got for this one; None: it is none.
    """
    directory = directory or _paths.report_dir()
    try:
        found = store.entries(directory)
    except OSError as e:
        store.log.warning("cannot look for reports in %s: %s", directory, e.strerror)
        return
    fresh = [
        (entry, report)
        for entry in found
        if not entry.announced
        and _is_ours(report := reader.read(entry.path), server)
        and store.mark_announced(entry)
    ]
    if not fresh:
        return
    newest, report = fresh[-1]
    more = f" (and {len(fresh) - 1} before it)" if len(fresh) > 1 else ""
    store.log.warning(
        # By its path: who reads the log may be another user, with another directory.
        "new report%s%s: %s; see it with: mlx-safe reports show %s",
        f" of the server {whose}" if (whose := words.server_of(report)) else "",
        more,
        words.headline(report),
        shlex.quote(str(newest.path)),
    )


def _is_ours(report: Report, server: dict[str, object] | None) -> bool:
    named = report.context.get("server")
    if not isinstance(named, dict) or server is None:
        return not named
    # It may tell more of a server than what it is known by.
    return all(named.get(name) == value for name, value in server.items())
