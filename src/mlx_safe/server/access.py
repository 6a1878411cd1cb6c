"""Who may ask: the keys of ``--api-key``, and where ``/status`` may be seen from.

Knows nothing of mlx-lm. Any thread.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import json
import logging
from collections.abc import Iterable
from email.message import Message
from pathlib import Path

from .._command import CommandError, read_text
from .replies import BadRequest, Reply, reply_for

__all__ = [
    *("KEY_RULE", "STATUS", "Access", "challenge", "is_key", "is_loopback"),
    *("lines_of_keys", "read_keys", "refusal_body", "warn_of_others"),
]

log = logging.getLogger("mlx_safe.server")

KEY_RULE = "must be printable ASCII without spaces, and not empty"
# Load balancers ask it; it tells figures at most.
OPEN = ("/health",)
STATUS = ("/status", "/status.json")
# What a proxy says of the client it asks for: then that one is not on this machine.
# "x-forwarded-": For, Host, Proto, … as they have it.
FORWARDED = ("forwarded", "x-forwarded-", "x-real-ip", "via", "cf-connecting-ip")


def is_key(text: str) -> bool:
    """Whether a header can carry ``text`` as a key."""
    return text.isascii() and text.isprintable() and text != "" and " " not in text


def read_keys(key: str | None, path: str | None) -> tuple[str, ...]:
    """The keys of ``--api-key`` and ``--api-key-file``; none: everyone may ask.

    Raises:
        CommandError: the file cannot be read, or a line of it is no key.
    """
    keys = [] if key is None else [key]
    if path is not None:
        given = f"--api-key-file {path}"
        found = lines_of_keys(path, given)
        if not all(map(is_key, found)):
            raise CommandError(f"{given}: a key {KEY_RULE}")
        warn_of_others(path, given)
        keys += found
    return tuple(keys)


def lines_of_keys(path: str, given: str) -> list[str]:
    """What a file of keys has, one or more; whether each is one is not looked at.

    Raises:
        CommandError: ``given``, the flag and its value, is no such file.
    """
    lines = read_text(path, given).splitlines()
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise CommandError(f"{given}: there is no key in it")
    return found


def warn_of_others(path: str, given: str) -> None:
    """A line where others can read a file with keys; ``given`` names it."""
    try:
        is_open = bool(Path(path).stat().st_mode & 0o044)
    except OSError:  # it has gone meanwhile
        return
    if is_open:
        log.warning("%s: others can read it (chmod 600)", given)


def is_loopback(address: str) -> bool:
    """Whether ``address``, an IP address in text, is this machine's own."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)  # ::ffff:127.0.0.1
    return (mapped or found).is_loopback


def _is_loopback_name(host: str) -> bool:
    # Of a page elsewhere whose name was made to mean this machine (DNS rebinding), the
    # browser sends that name.
    name = host.strip().rpartition("]")[0].lstrip("[") or host.strip().split(":")[0]
    return name.lower() == "localhost" or is_loopback(name)


class Access:
    """What one server lets pass.

    Args:
        keys: any of them opens it; none: it is open.
        status_page: as of ``--status-page``.
    """

    def __init__(self, keys: Iterable[str] = (), status_page: str = "loopback") -> None:
        self._keys = tuple(key.encode() for key in keys)
        self._status_page = status_page

    @property
    def is_open(self) -> bool:
        """Everyone may ask."""
        return not self._keys

    def refusal(
        self, method: str, path: str, headers: Message, peer: str
    ) -> BadRequest | None:
        """Why a request may not be answered; None: it may.

        Args:
            path: without its query. peer: the client's address.
        """
        if path in STATUS and not self._shows_status(headers, peer):
            return BadRequest("There is no such path.", status=404, code="not_found")
        # A browser's question before the request (CORS) carries no key.
        if not self._keys or path in OPEN or method == "OPTIONS":
            return None
        given = list(_given(path, headers))
        if not given:
            return _unauthorized("This server needs an API key: send it as a Bearer.")
        if sum(map(self._is_right, given)):
            return None
        return _unauthorized("The API key is not right.")

    def _is_right(self, given: bytes) -> bool:
        # All are compared, each in constant time.
        return sum(hmac.compare_digest(given, key) for key in self._keys) > 0

    def _shows_status(self, headers: Message, peer: str) -> bool:
        if self._status_page != "loopback":
            return self._status_page == "anywhere"
        if any(name.lower().startswith(FORWARDED) for name in headers):
            return False
        hosts = headers.get_all("Host", ["localhost"])
        return is_loopback(peer) and all(map(_is_loopback_name, hosts))


def _unauthorized(message: str) -> BadRequest:
    return BadRequest(message, status=401, code="invalid_api_key")


def _given(path: str, headers: Message) -> Iterable[bytes]:
    """The keys that a request has, wherever they may be."""
    for value in headers.get_all("Authorization", []):
        scheme, _, rest = str(value).strip().partition(" ")
        if scheme.lower() == "bearer":
            yield _bytes(rest.strip())
        # What a browser asks its user for; the name is of no interest.
        elif scheme.lower() == "basic" and path in STATUS:
            try:
                decoded = base64.b64decode(rest.strip(), validate=True)
            except (binascii.Error, ValueError):
                continue
            yield decoded.partition(b":")[2]
    if is_anthropic(path, headers):
        for value in headers.get_all("x-api-key", []):
            yield _bytes(str(value).strip())


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def is_anthropic(path: str, headers: Message) -> bool:
    """Whether the request is one of Anthropic's API."""
    return path.startswith("/v1/messages") or "anthropic-version" in headers


def challenge(path: str) -> str:
    """The ``WWW-Authenticate`` of a 401: browsers ask for a key at the page only."""
    kind = "Basic" if path in STATUS else "Bearer"
    return f'{kind} realm="mlx-safe"'


def refusal_body(error: BadRequest, path: str, headers: Message) -> bytes:
    """The error in the form of the path's API."""
    reply: Reply = reply_for(error)
    if not is_anthropic(path, headers):
        return json.dumps({"error": reply.error()}).encode()
    kind = "authentication_error" if reply.status == 401 else "not_found_error"
    inner = {"type": kind, "message": str(error)}
    return json.dumps({"type": "error", "error": inner}).encode()
