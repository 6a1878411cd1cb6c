"""Draws what a terminal shows: screenshot.py [OPTIONS] FILE.png COMMAND...

The command runs in a terminal of its own, so that it has its colours. Chromium draws
the lines (`make client-browser`). ``--lines N``: the first N alone. ``--replace OLD
NEW``: names of this machine that nobody else needs.

Exit status: 0, or 1 when the command failed or could not be drawn.
"""

from __future__ import annotations

import argparse
import io
import os
import pty
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")
LETTER, LINE, EDGE = 7.83, 18, 12  # pixels, of a monospaced font of 13
# As `Console.export_html` fills it in.
PAGE = f"""<!doctype html><meta charset="utf-8"><style>
html, body {{{{ margin: 0; background: #0c0c0c; color: #d9d9d9; }}}}
pre {{{{ margin: {EDGE}px; font: 13px/{LINE}px "DejaVu Sans Mono", monospace; }}}}
</style><pre>{{code}}</pre>"""


def printed(command: list[str], columns: int) -> str:
    """What it writes to a terminal of so many columns.

    Raises:
        SystemExit: it failed.
    """
    ours, its = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm-256color"}
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=its, stderr=its, env=environment
    ) as process:
        os.close(its)
        pieces = []
        while True:
            try:
                piece = os.read(ours, 1 << 16)
            except OSError:  # Linux: nobody has the other end any more
                break
            if not piece:
                break
            pieces.append(piece)
    os.close(ours)
    said = b"".join(pieces).decode(errors="replace").replace("\r\n", "\n")
    if process.returncode:
        sys.exit(f"{command[0]} failed:\n{said}")
    return said


def page(said: str, columns: int) -> str:
    """A page of HTML with the text in its colours."""
    console = Console(record=True, width=columns, file=io.StringIO())
    console.print(Text.from_ansi(said), soft_wrap=True)
    return console.export_html(theme=MONOKAI, inline_styles=True, code_format=PAGE)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--columns", type=int, default=110)
    parser.add_argument("--lines", type=int)
    parser.add_argument("--replace", nargs=2, action="append", default=[])
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit("no Chromium: make client-browser")
    said = printed(arguments.command, arguments.columns)
    for old, new in arguments.replace:
        said = said.replace(old, new)
    lines = said.rstrip("\n").split("\n")[: arguments.lines]
    width = round(arguments.columns * LETTER) + 2 * EDGE
    with tempfile.TemporaryDirectory() as directory:
        html = Path(directory, "page.html")
        html.write_text(page("\n".join(lines), arguments.columns))
        subprocess.run(
            [
                *(browser, "--headless", "--no-sandbox", "--disable-gpu"),
                f"--user-data-dir={directory}/profile",
                f"--window-size={width},{len(lines) * LINE + 2 * EDGE}",
                *("--hide-scrollbars", f"--screenshot={arguments.file.resolve()}"),
                html.as_uri(),
            ],
            check=True,
            capture_output=True,
            timeout=120,
        )


if __name__ == "__main__":
    main()
