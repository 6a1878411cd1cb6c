"""The search of the documentation in a browser: ``make docs client-browser``.

It runs in the page, and asks nobody but the one who serves the page.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from clients.browser import ask

SITE = Path(__file__).parents[2] / "build" / "site"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    assert (SITE / "index.html").exists(), "make docs makes the site"
    handler = functools.partial(Quiet, directory=str(SITE))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join(10)


# The links that it has found, or nothing as long as it looks.
FOUND = """
(() => {
  const said = document.querySelector(".md-search-result__meta").innerText;
  const links = [...document.querySelectorAll("a.md-search-result__link")];
  return /document/.test(said) && [said, links.map(x => x.pathname)];
})()
"""


@pytest.mark.parametrize(
    ("words", "page"), [("ballast", "/hardware.html"), ("nobodysaysthis", None)]
)
def test_the_search_finds_what_is_there(
    address: str, tmp_path: Path, words: str, page: str | None
) -> None:
    log = tmp_path / "net.json"
    url = f"http://{address}/index.html?q={words}"
    said, links = ask(tmp_path, url, FOUND, f"--log-net-log={log}")
    if page is None:
        assert said == "No matching documents" and links == []
    else:
        assert page in links, said
    asked = set(re.findall(r'"url":"(https?://[^"]+)"', log.read_text()))
    assert any(a.endswith("search_index.json") for a in asked)
    assert {urlsplit(a).netloc for a in asked} == {address}
