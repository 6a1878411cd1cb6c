"""The table of docs/clients.md: a row for each case, a column for each client."""

from __future__ import annotations

from collections.abc import Mapping

from protocol import Outcome

from clients.cases import CASES, Case
from clients.stage import Client

WHOLE = "whole answer"


def table(clients: list[Client], outcomes: Mapping[str, Mapping[str, Outcome]]) -> str:
    """Of the cases that were run, as Markdown; the last line counts the bad cells."""
    rows = [["", *(f"{c.name} {c.version()}" for c in clients)]]
    silent = 0
    for case in CASES:
        found = outcomes.get(case.name)
        if not found:
            continue
        cells = []
        for client in clients:
            outcome = found.get(client.name)
            whole = outcomes[CASES[0].name][client.name]
            cells.append(cell(case, client, outcome, whole) if outcome else "-")
        silent += sum("silent" in x for x in cells)
        rows.append([case.name, *cells])
    rows.insert(1, ["---"] * len(rows[0]))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", f"Silent truncations: {silent}."])


def cell(case: Case, client: Client, found: Outcome, whole: Outcome) -> str:
    """What its program gets to know."""
    if case.name == "cancel":
        if not found.left:
            return "goes on"
        return "cancelled" if client.lets_go else "cancelled when it ends"
    if case.name == "tools":
        return "called" if found.calls else "not called"
    if case.expected.__name__ == "takes_one_connection":
        kept = int(found.message) <= 1
        kind = "" if client.keeps_after_a_stream else ", without a stream"
        return f"kept{kind}" if kept else f"{found.message} connections"
    if found.told:
        status = f" {found.status}" if found.status and found.status >= 400 else ""
        return f"`{found.error.split('.')[-1].strip()}`{status}"
    if "has hit a token limit" in found.message:  # aider's words for a full context
        return "`has hit a token limit`"
    if found.text != whole.text:
        return "**silent truncation**"
    if case.name.startswith("503"):
        return f"{WHOLE} after `Retry-After`"
    return WHOLE + (", asked again" if "retried" in found.message else "")
