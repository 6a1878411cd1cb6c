"""Chromium without a window: ``make client-browser``."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def command(folder: Path, *options: str) -> list[str]:
    """What starts it, with its files in ``folder``."""
    return [
        *(next(filter(None, map(shutil.which, BROWSERS))), "--headless"),
        *("--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
        *("--disable-background-networking", "--disable-component-update"),
        *(f"--user-data-dir={folder / 'profile'}", "--hide-scrollbars", *options),
    ]


def browse(folder: Path, url: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Lets Chromium load ``url`` and run its script for some seconds."""
    return subprocess.run(
        command(folder, "--virtual-time-budget=5000", *options, url),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def ask(folder: Path, url: str, script: str, *options: str) -> Any:
    """What ``script`` says in that page as soon as it says something.

    By the protocol of the developer's tools: a page with workers is not waited for by
    the clock of `browse`.

    Raises:
        AssertionError: it has said nothing in a minute.
    """
    with _tools(folder, *options) as browser:
        numbers = itertools.count(1)

        def call(method: str, session: str | None = None, **params: Any) -> Any:
            asked: dict[str, Any] = {"method": method, "params": params}
            asked["id"] = next(numbers)
            if session is not None:
                asked["sessionId"] = session
            browser.send(json.dumps(asked))
            while True:  # events come between
                answer = json.loads(browser.recv(timeout=60))
                if answer.get("id") == asked["id"]:
                    return answer["result"]

        page = call("Target.createTarget", url=url)["targetId"]
        session = call("Target.attachToTarget", targetId=page, flatten=True)[
            "sessionId"
        ]
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            said = call(
                "Runtime.evaluate", session, expression=script, returnByValue=True
            )
            value = said["result"].get("value")
            if value:
                call("Browser.close")
                return value
            time.sleep(0.1)
    raise AssertionError(f"{script} says nothing in {url}")


@contextlib.contextmanager
def _tools(folder: Path, *options: str) -> Iterator[ClientConnection]:
    """A browser, and a connection to its tools."""
    started = subprocess.Popen(
        command(folder, "--remote-debugging-port=0", *options, "about:blank"),
        stderr=subprocess.PIPE,
        text=True,
    )
    with started as process:
        assert process.stderr is not None
        try:
            said = iter(process.stderr)
            line = next(line for line in said if "DevTools listening on" in line)
            with connect(line.split()[-1], max_size=None) as browser:
                yield browser
            process.communicate(timeout=60)  # what it writes at its end
        finally:
            process.kill()
