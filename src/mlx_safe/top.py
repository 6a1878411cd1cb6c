"""``mlx-safe top``: what ``/status.json`` says, in a terminal."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import signal
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ._command import CommandError, Parser, number
from ._output import complain
from .memory.sizes import format_size
from .server.access import KEY_RULE, is_key, lines_of_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table
    from rich.text import Text

__all__ = ["look", "render", "top"]

URL = "http://127.0.0.1:8080"
PORT_MAX = 65535
TIMEOUT_S = 10.0
VERSION = 1
# In terminals of 80 columns; in narrower ones by so much less.
BAR_WIDTH = 48
NAME_MAX = 78
# "chatcmpl-", eight digits, which tell a request from the others in the log, and "…".
ID_WIDTH = 18
COLUMNS = ("request", "state", "prompt", "read", "made", "time")
# What is left out where there is no room, the first first. One looks for id and state.
LEFT_OUT = ("prompt", "read", "made", "time")
MARKS_MAX = 5
PARTS = {
    "model": ("model", "blue"),
    "prompt_cache": ("prompt cache", "cyan"),
    "caches": ("caches of requests", "green"),
    "pool": ("MLX's pool", "yellow"),
}
KINDS = {
    "fault": ("failed", "red"),
    "replays": ("replayed", "yellow"),
    "evictions": ("evicted", "dim"),
    "preempted": ("put back", "yellow"),
    "refused": ("refused", "yellow"),
    "resets": ("reset", "dim"),
    "start": ("started", "dim"),
}


class NoAnswer(Exception):
    """The server cannot be asked; the message says why."""


def top(arguments: Sequence[str]) -> int:
    """The command.

    Returns:
        the exit status: 0; with ``--once`` 1 when the server does not answer.

    Raises:
        CommandError: an argument is wrong, or rich is missing.
    """
    asked = _parser().parse_args(list(arguments))
    if not 0.1 <= asked.every <= 3600:
        raise CommandError("--every: must be from 0.1 to 3600 seconds")
    given = [x for x in (asked.server, asked.url, asked.port) if x is not None]
    if len(given) > 1:
        raise CommandError(f"{' and '.join(given)}: name the server once")
    url = _url(given[0] if given else URL)
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        raise CommandError("top needs rich: pip install 'rich>=13'") from None
    key = _key(asked.api_key_file)
    console = Console()
    # On a dumb terminal, which has no cursor to move, rich's `Live` shows nothing.
    if console.is_terminal and not console.is_dumb_terminal and not asked.once:
        with contextlib.suppress(KeyboardInterrupt):
            _watch(console, url, key, asked.every)
        return 0
    try:
        console.print(render(look(url, key)))
    except NoAnswer as e:
        complain(f"mlx-safe: {e}")
        return 1
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="mlx-safe top",
        allow_abbrev=False,
        description="What a server does now: its memory, requests and failures.",
    )
    parser.add_argument(
        "server",
        nargs="?",
        metavar="SERVER",
        help=f"its port, its host and port, or its URL (default: {URL})",
    )
    parser.add_argument("--url", metavar="URL", help="the same")
    parser.add_argument(
        "--port", type=_port, metavar="N", help="the same, of this machine"
    )
    parser.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="the server's, of which the first key is sent (default: the key in "
        "MLX_SAFE_API_KEY, if there is one)",
    )
    parser.add_argument(
        "--every",
        type=number,
        default=2.0,
        metavar="SECONDS",
        help="how often it is asked (default: 2)",
    )
    parser.add_argument(
        "--once",
        action="store_true",
        help="print it once, and end; so it does where the output is no terminal, or "
        "a dumb one",
    )
    return parser


def _port(text: str) -> str:
    if not text.isdecimal() or not 1 <= int(text) <= PORT_MAX:
        raise argparse.ArgumentTypeError(f"must be from 1 to {PORT_MAX}, not {text!r}")
    return text


def _url(server: str) -> str:
    """Of a port, ``HOST:PORT``, or a URL, that of the status page as well."""
    url = f"http://127.0.0.1:{server}" if server.isdecimal() else server
    url = url if "://" in url else f"http://{url}"
    url = url.rstrip("/").removesuffix("/status.json").removesuffix("/status")
    try:
        parts = urllib.parse.urlsplit(url)
        is_one = parts.scheme in ("http", "https") and bool(parts.hostname)
        is_one = is_one and parts.port != 0 and url.isprintable() and " " not in url
    except ValueError:  # of a port, or of brackets
        is_one = False
    if not is_one:
        raise CommandError(f"{server}: must be a port, HOST:PORT, or a URL as {URL}")
    return url


def _key(path: str | None) -> str | None:
    if path is None:
        place, key = "MLX_SAFE_API_KEY", os.environ.get("MLX_SAFE_API_KEY", "")
        if not key:
            return None
    else:
        place = f"--api-key-file {path}"
        key = lines_of_keys(path, place)[0]
    if not is_key(key):
        raise CommandError(f"{place}: a key {KEY_RULE}")
    return key


def look(url: str, key: str | None = None) -> dict[str, Any]:
    """Asks the server at ``url``, without a history.

    Raises:
        NoAnswer: it does not listen, refuses, or is another version.
    """
    address = url.rstrip("/") + "/status.json?history=none"
    request = urllib.request.Request(address)
    if key is not None:
        request.add_header("Authorization", f"Bearer {key}")
    # A proxy of the environment would not see the server as this machine does.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=TIMEOUT_S) as answer:
            found = _printable(json.load(answer))
    except urllib.error.HTTPError as e:
        why = {
            401: "it needs a key: --api-key-file, or MLX_SAFE_API_KEY"
            if key is None
            else "it does not take this key",
            404: "it shows no status, or only to its own machine (--status-page), "
            "or is no mlx-safe serve",
        }.get(e.code, f"it answers {e.code}")
        raise NoAnswer(f"{url}: {why}") from None
    except (OSError, http.client.HTTPException) as e:
        reason = getattr(e, "reason", e)
        if isinstance(reason, ssl.SSLCertVerificationError):
            why = f"{reason.verify_message}: SSL_CERT_FILE=FILE names one to trust"
            raise NoAnswer(f"{url}: its certificate is not trusted ({why})") from None
        if isinstance(reason, ssl.SSLError):
            raise NoAnswer(f"{url}: it speaks no HTTPS, or another TLS") from None
        why = getattr(reason, "strerror", None) or str(reason) or type(e).__name__
        if isinstance(reason, http.client.RemoteDisconnected):
            why = "it closes the connection: does it speak https?"
        raise NoAnswer(f"{url}: no answer ({why})") from None
    except (ValueError, RecursionError):
        raise NoAnswer(f"{url}: it is no mlx-safe serve") from None
    if not isinstance(found, dict) or found.get("version") != VERSION:
        raise NoAnswer(f"{url}: it is another version of mlx-safe")
    return found


def _printable(value: Any) -> Any:
    """``value``, of JSON, with no text that a terminal would obey."""
    if isinstance(value, str):
        return "".join(c if c.isprintable() else " " for c in value)
    if isinstance(value, dict):
        return {_printable(k): _printable(v) for k, v in value.items()}
    return [_printable(v) for v in value] if isinstance(value, list) else value


def _watch(console: Console, url: str, key: str | None, every_s: float) -> None:
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    # Killed, it would leave the terminal on this screen and without a cursor.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    last: RenderableType = Text("")
    with Live(last, console=console, screen=True, auto_refresh=False) as live:
        while True:
            try:
                last = shown = render(look(url, key))
            except NoAnswer as e:
                shown = Group(Text(str(e), style="bold red"), last)
            live.update(shown, refresh=True)
            time.sleep(every_s)


def render(status: dict[str, Any]) -> RenderableType:
    """``status``, as `look` returns it, for a terminal of any width.

    The requests are the last: where there are many, the screen ends among them.
    """
    from rich.console import Group

    return Group(
        _headline(status["server"], status["time"]),
        *_memory(status["memory"]),
        *_rest(status),
        _requests(status["requests"]),
    )


class _Fitted:
    """What depends on the room there is: ``make(console, options)``."""

    def __init__(
        self, make: Callable[[Console, ConsoleOptions], RenderableType]
    ) -> None:
        self._make = make

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        yield self._make(console, options)


class _Parts:
    """Parts side by side; a line ends between two of them, and within none."""

    def __init__(self, *parts: Text, between: str = "  ") -> None:
        self._parts, self._between = parts, between

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[Text]:
        from rich.text import Text

        line = Text()
        for part in self._parts:
            longer = Text.assemble(line, self._between, part) if line else part
            if line and longer.cell_len > options.max_width:
                yield line
                longer = part
            line = longer
        yield line


def _end_of(name: str, width: int) -> str:
    """Of a path the end tells more."""
    from rich.cells import cell_len

    if cell_len(name) <= width:
        return name
    while name and cell_len(name) >= width:
        name = name[1:]
    return f"…{name}"


def _headline(server: dict[str, Any], now: float) -> RenderableType:
    from rich.text import Text

    state, reason = server["state"], server["reason"]
    style = {"ok": "green", "failed": "red"}.get(state, "yellow")
    name = str(server["model"] or "mlx-safe")
    rest = (
        Text(f"{state}: {reason}" if reason else state, style),
        Text(f"up {_lasts(now - server['started'])}, pid {server['pid']}", "dim"),
    )
    return _Fitted(
        lambda _, options: _Parts(
            Text(_end_of(name, min(NAME_MAX, options.max_width)), "bold"), *rest
        )
    )


def _memory(memory: dict[str, Any]) -> list[RenderableType]:
    from rich.text import Text

    ceiling, parts = memory["ceiling"], memory["parts"]
    most = max(ceiling, sum(parts[name] for name in PARTS), 1)
    end = f"] ceiling {format_size(ceiling)}"

    def bar(_: Console, options: ConsoleOptions) -> Text:
        width = max(1, min(BAR_WIDTH, options.max_width - 1 - len(end)))
        full, empty = "#." if options.ascii_only else "█·"
        line = Text("[")
        for name, (_text, style) in PARTS.items():
            line.append(full * round(width * parts[name] / most), style)
        line.truncate(width + 1)  # parts are rounded, each for itself
        line.append(empty * (width + 1 - len(line)), "dim")
        return line.append(end)

    legend = [
        Text(f"{text} {format_size(parts[name])}", style)
        for name, (text, style) in PARTS.items()
    ]
    legend.append(Text(f"other programs {format_size(parts['other'])}", "dim"))
    lowered = [Text(memory["lowered"], "yellow")] if memory["lowered"] else []
    return [_Fitted(bar), _Parts(*legend), *lowered]


def _requests(requests: dict[str, Any]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    title = f"{requests['in_flight']} in flight, {requests['waiting']} of them waiting"
    rows = [_cells(r) for r in requests["list"]]

    def table(_: Console, options: ConsoleOptions) -> Table:
        found = Table(title=title, title_justify="left", box=None, pad_edge=False)
        shown = _shown(rows, options.max_width)
        found.add_column("request")  # the one that is cut where room is short
        for column in shown[1:]:
            justify: Any = "left" if column == "state" else "right"
            found.add_column(column, justify=justify, no_wrap=True)
        for r, cells in zip(requests["list"], rows, strict=True):
            style = "yellow" if r["waits"] else ""
            name = Text(cells["request"], no_wrap=True, overflow="ellipsis")
            found.add_row(name, *(cells[column] for column in shown[1:]), style=style)
        return found

    return _Fitted(table)


def _shown(rows: Sequence[dict[str, str]], width: int) -> list[str]:
    """The columns that have room, with two between them."""
    from rich.cells import cell_len

    widths = {
        column: max(cell_len(x) for x in (column, *(cells[column] for cells in rows)))
        for column in COLUMNS
    }
    widths["request"] = min(widths["request"], ID_WIDTH)
    found = list(COLUMNS)
    for column in LEFT_OUT:
        if sum(widths[x] + 2 for x in found) - 2 <= width:
            break
        found.remove(column)
    return found


def _cells(request: dict[str, Any]) -> dict[str, str]:
    """By the name of the column."""
    again = f" (again {request['replays']})" if request["replays"] else ""
    prompt, to_read = request["prompt_tokens"], request["to_read"]
    return {
        "request": request["id"][:22],
        "state": request["state"] + again,
        "prompt": "" if prompt is None else str(prompt),
        "read": f"{request['read_tokens']}/{to_read}" if to_read else "",
        "made": f"{request['produced']}/{request['max_tokens']}",
        "time": _lasts(request["seconds"]),
    }


def _rest(status: dict[str, Any]) -> list[RenderableType]:
    from rich.text import Text

    counts, cache, disk = status["counts"], status["prompt_cache"], status["disk"]
    ended = ", ".join(f"{n} {k}" for k, n in status["requests"]["outcomes"].items())
    lines = [
        f"ended: {ended or 'none'}; {status['requests']['tokens']} tokens",
        f"{counts['failures']} failures, {counts['replays']} replays, "
        f"{counts['preempted']} put back, {counts['refused']} refused for memory",
        f"prompt cache: {format_size(cache['bytes'])} of "
        f"{format_size(cache['limit'])}, {cache['entries']} entries, "
        f"{counts['hits']} hits, {counts['misses']} misses, "
        f"{counts['evictions']} evicted",
    ]
    if disk is not None:
        state = "" if disk["off"] is None else f"; off: {disk['off']}"
        lines.append(
            f"on disk: {format_size(disk['bytes'])} of {format_size(disk['limit'])}, "
            f"{disk['files']} files, {disk['restored']} restored{state}"
        )
    found: list[RenderableType] = [
        _Parts(*map(Text, re.split("(?<=[,;]) ", line)), between=" ") for line in lines
    ]
    for mark in status["marks"][-MARKS_MAX:]:
        text, style = KINDS.get(mark["kind"], (mark["kind"], ""))
        times = f" x{mark['count']}" if mark["count"] > 1 else ""
        about = f": {mark['text']}" if mark["text"] else ""
        found.append(Text(f"{_clock(mark['time'])} {text}{times}{about}", style))
    for report in status["reports"]:
        line = f"{_clock(report['time'])} report {report['id']}: {report['headline']}"
        if report.get("server"):
            line += f" ({report['server']})"
        found.append(Text(line, "red"))
    return found


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))


def _lasts(seconds: float) -> str:
    for unit, factor in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * factor:
            return f"{seconds / factor:.0f} {unit}"
    return f"{seconds:.0f} s"
