"""``/status``: one page, which asks nobody but this server for anything.

It has no figures itself: its script fetches ``/status.json``. What may run and be
fetched is fixed by its headers (CSP): the script and the style by their hashes.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from pathlib import Path

__all__ = ["CONTENT_TYPE", "HEADERS", "body"]

CONTENT_TYPE = "text/html; charset=utf-8"


@functools.cache
def body() -> bytes:
    """The page, in UTF-8."""
    return Path(__file__).with_name("status.html").read_bytes()


def _hash_of(element: str) -> str:
    found = re.search(rb"<%b>(.*?)</%b>" % (2 * (element.encode(),)), body(), re.DOTALL)
    assert found is not None, element
    digest = base64.b64encode(hashlib.sha256(found[1]).digest()).decode()
    return f"'sha256-{digest}'"


HEADERS = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash_of('script')}",
            f"style-src {_hash_of('style')}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
