"""``mlx-safe reports``: list, show, export, prune."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import _paths
from .._command import CommandError, Parser
from . import export, orphans, reader, render, store, words
from .records import Report, Unreadable
from .words import Section

__all__ = ["reports"]

LATEST = "latest"


def _parser() -> Parser:
    parser = Parser(
        prog="mlx-safe reports",
        allow_abbrev=False,
        description="Reads the crash reports of this machine. Without a verb: list.",
    )
    json_flag: dict[str, Any] = {"action": "store_true", "help": "for programs"}
    which = f"a report's id, a path, or {LATEST}"
    parser.add_argument("--json", **json_flag)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")

    def verb_of(name: str, text: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=text, description=text)

    listing = verb_of("list", "one line for each, the newest last")
    show = verb_of("show", "what happened, for people")
    show.add_argument("report", nargs="?", default=LATEST, help=f"{which} (default)")
    for verb in (listing, show):
        # The default is the main parser's, so that --json may stand before.
        verb.add_argument("--json", default=argparse.SUPPRESS, **json_flag)
    out = verb_of("export", "a copy without what is private")
    out.add_argument("report", help=which)
    out.add_argument("-o", "--output", metavar="FILE", help="where; -: stdout")
    out.add_argument(
        "--with-fields",
        action="store_true",
        help="keep the fields of the program's own breadcrumbs",
    )
    verb_of("prune", "remove the oldest, as every start does")
    return parser


def reports(arguments: Sequence[str]) -> int:
    """Runs the command; returns the exit status.

    Raises:
        CommandError: a user's mistake, with what to do.
    """
    parsed = _parser().parse_args(list(arguments))
    directory = _paths.report_dir()
    try:
        _look_at(directory)
        if parsed.verb == "show":
            _show(directory, parsed.report, as_json=parsed.json)
        elif parsed.verb == "export":
            _export(directory, parsed.report, parsed.output, parsed.with_fields)
        elif parsed.verb == "prune":
            _prune(directory)
        else:
            _list(directory, as_json=parsed.json)
    except OSError as e:
        if e.filename is None:
            raise  # all that is opened here has a name: stdout, see `cli.main`
        raise CommandError(f"{e.filename}: {e.strerror}") from e
    return 0


def _look_at(directory: str) -> None:
    """Makes reports of those who died; makes no directory, whose name may be wrong."""
    if Path(directory).is_dir():
        orphans.adopt(directory)


def _none_in(directory: str) -> str:
    """That there are no reports, and whether that is since there is no directory."""
    is_named = os.environ.get("MLX_SAFE_REPORT_DIR")
    if not is_named or Path(directory).is_dir():
        return f"no reports in {directory}"
    return f"no reports in {directory}: it does not exist (MLX_SAFE_REPORT_DIR)"


def _list(directory: str, *, as_json: bool) -> None:
    found = [(entry, reader.read(entry.path)) for entry in store.entries(directory)]
    if as_json:
        print(json.dumps([_summary(entry, r) for entry, r in found], indent=2))
        return
    if not found:
        print(_none_in(directory))
        return
    rows: list[tuple[str, ...]] = [("id", "when", "why", "pid", "", "what")]
    for entry, report in found:
        why, new = report.why or "?", "" if entry.seen else "new"
        server = words.server_of(report)
        what = words.headline(report) + (f" ({server})" if server else "")
        at = words.when(entry.seconds)
        rows.append((entry.id, at, why, str(entry.pid), new, what))
    render.table(Section(f"reports in {directory}", rows))


def _summary(entry: store.Entry, report: Report) -> dict[str, Any]:
    return {
        "id": entry.id,
        "path": str(entry.path),
        "time_ns": report.time_ns or entry.seconds * 1_000_000_000,
        "pid": entry.pid,
        "why": report.why,
        "code": report.code,
        "headline": words.headline(report),
        "server": words.server_of(report),
        "new": not entry.seen,
        "size": entry.size,
        "problems": report.problems,
    }


def _show(directory: str, which: str, *, as_json: bool) -> None:
    entry, path = _find(directory, which)
    report = reader.read(path)
    if entry is None and isinstance(report, Unreadable):
        raise CommandError(f"{path}: {report.problems[0]}")
    if as_json:
        text = {"headline": words.headline(report), "advice": words.advice(report)}
        print(json.dumps({"path": str(path), **text, **report.as_dict()}, indent=2))
    else:
        print(path)
        render.show(words.sections(report))
    if entry is not None:
        store.mark_seen(entry)


def _find(directory: str, which: str) -> tuple[store.Entry | None, Path]:
    """(what the directory says of it, where it is).

    Raises:
        CommandError: there is none.
    """
    listed = store.entries(directory)
    if which == LATEST:
        if not listed:
            raise CommandError(_none_in(directory))
        return listed[-1], listed[-1].path
    for entry in listed:
        if which in (entry.id, entry.path.name, str(entry.path)):
            return entry, entry.path
    path = Path(which)
    if os.sep in which or path.suffix == ".json":
        if "\0" in which or not os.path.lexists(path):
            raise CommandError(f"no such file: {which}")
        return None, path
    raise CommandError(
        f"no report {which!r} in {directory}; `mlx-safe reports` lists them"
    )


def _export(directory: str, which: str, output: str | None, with_fields: bool) -> None:
    _, path = _find(directory, which)
    report = reader.read(path)
    if report.why is None and report.problems:
        raise CommandError(f"{path}: {report.problems[0]}")
    copy = export.exported(report, with_fields=with_fields)
    text = json.dumps(copy, indent=2) + "\n"
    if output == "-":
        sys.stdout.write(text)
        return
    target = Path(output or f"mlx-safe-report-{path.stem}.json")
    try:
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise CommandError(f"{target} exists; choose another with -o FILE") from None
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as e:
        target.unlink(missing_ok=True)  # half a copy is of no use
        raise CommandError(f"{target}: {e.strerror}") from e
    print(f"written: {target}")
    print("left out: " + ("; ".join(copy["left_out"]) or "nothing"))
    print("Read it before you send it: texts of exceptions and stacks are in it.")


def _prune(directory: str) -> None:
    removed = store.prune(directory)
    keep, keep_bytes = store.limits()
    print(
        f"removed {len(removed)} reports; kept are the newest {keep}, of "
        f"{words.size(keep_bytes)} in all"
    )
