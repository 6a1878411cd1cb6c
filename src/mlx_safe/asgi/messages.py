"""What goes over ASGI: responses, and what there is to read in an application's.

Event loop's thread; all but the ``send_`` functions are pure.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from .. import errors
from .._exceptions import behind
from ..errors import is_allocation_failure

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]

# What MLX says of a failed command buffer, and of a failed call of CUDA.
_QUOTED = re.compile(
    r"\[METAL\][^\"\n]*|\w+\([^\"\n]*\) failed(?:: | with code: )[^\"\n\\]*"
)
_BETWEEN_EVENTS = re.compile(rb"\r\n\r\n|\n\n|\r\r")
# How whole streams end: OpenAI's chat and completions, Anthropic's messages, and
# OpenAI's responses.
_ENDED = re.compile(
    rb"(?:^|[\r\n])(?:data: ?\[DONE\]|event: ?message_stop"
    rb"|event: ?response\.(?:completed|incomplete|failed))[ \t]*(?:[\r\n]|$)"
)
_LAST = re.compile(rb"data: ?\[DONE\]|event: ?message_stop")
_ANTHROPIC = re.compile(r"(?:^|/)v1/messages(?:/|$)")
# Of a response that is replaced, what is said of its body.
_OF_THE_BODY = (b"content-", b"transfer-encoding", b"etag", b"last-modified")
_OF_A_REPLY = (*_OF_THE_BODY, b"accept-ranges", b"retry-after")


def route(scope: MutableMapping[str, Any]) -> str:
    """The path below where the application is mounted, or a proxy has it."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "").rstrip("/"))


def is_anthropic(path: str) -> bool:
    """Whether a path, wherever it is mounted, is of Anthropic's API."""
    return _ANTHROPIC.search(path) is not None


def is_event_stream(start: Message) -> bool:
    """Of a response whose events can be read, and added to."""
    found = {name.lower(): value.lower() for name, value in start.get("headers", ())}
    kind = found.get(b"content-type", b"").strip()
    encoding = found.get(b"content-encoding", b"identity").strip()
    return bool(kind.startswith(b"text/event-stream") and encoding == b"identity")


def is_whole(start: Message) -> bool:
    """Of a response that is no stream: it says how long it is, or has no body."""
    names = {name.lower() for name, _ in start.get("headers", ())}
    return b"content-length" in names or start["status"] in (204, 304)


def has_ended(tail: bytes) -> bool:
    """Whether a stream has the end that OpenAI's and Anthropic's APIs give it."""
    return _ENDED.search(tail) is not None


def answerable(exc: BaseException) -> Exception | None:
    """Of ``exc``, its causes and the parts of a group: what `reply_for` answers.

    The first, but what is fatal before all others.
    """
    first: Exception | None = None
    for one in behind(exc):
        fault = errors.from_exception(one)
        if fault is not None and fault.fatal:
            return fault
        if fault is None and isinstance(one, Exception):
            first = first or (one if is_allocation_failure(one) else None)
        first = first or fault
    return first


def quoted_by(exc: BaseException) -> errors.GPUError | None:
    """The fault whose message is in the text of ``exc``, or of what is behind it.

    Engines pass an error's text, not the error, from their thread to the handler's.
    """
    found = (named_in(str(one).encode("utf-8", "replace")) for one in behind(exc))
    return next((fault for fault in found if fault is not None), None)


def named_in(text: bytes) -> errors.GPUError | None:
    """The fault whose message of MLX is quoted in ``text``, JSON or not."""
    for found in _QUOTED.finditer(text.decode("utf-8", "replace")):
        kind = errors.kind_in_message(found[0])
        if kind is not None:
            return kind.make(found[0])
    return None


def fault_at_the_end(tail: bytes, tail_max: int) -> errors.GPUError | None:
    """The fault that the last event of a stream tells of as its error.

    An answer may quote one, too: of a conversation about them, say.
    """
    is_cut = len(tail) >= tail_max
    events = _BETWEEN_EVENTS.split(tail)
    while events and _tells_nothing(_without_comments(events[-1])):
        events.pop()  # a ping that came after it, or the stream's end
    if not events or (is_cut and len(events) == 1):
        return None  # no error is so long
    last = _without_comments(events[-1])
    return named_in(last) if _is_of_an_error(last) else None


def tells_of_error(part: bytes) -> bool:
    """Whether part of a stream has an event that tells of an error."""
    events = map(_without_comments, _BETWEEN_EVENTS.split(part))
    return any(
        not _tells_nothing(event)
        and _is_of_an_error(event, named_in(event) is not None)
        for event in events
    )


def _without_comments(event: bytes) -> bytes:
    lines = event.splitlines()
    return b"\n".join(n for n in lines if n.strip() and not n.startswith(b":"))


def _tells_nothing(event: bytes) -> bool:
    return not event or _LAST.match(event) is not None


def _is_of_an_error(event: bytes, if_words: bool = True) -> bool:
    """``if_words``: of an event that is no JSON."""
    fields = [line.partition(b":")[::2] for line in event.splitlines()]
    if (b"event", b"error") in [(name, value.strip()) for name, value in fields]:
        return True
    data = b"\n".join(value.strip() for name, value in fields if name == b"data")
    try:
        return _tells_of_error(json.loads(data))
    except ValueError:
        return if_words


def _tells_of_error(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_tells_of_error, value))
    if not isinstance(value, dict):
        return False
    for key, one in value.items():
        if key in ("error", "errors", "detail") and one:
            return True
        if key == "message" and isinstance(one, str):
            return True
        if key in ("type", "status", "finish_reason") and one in ("error", "failed"):
            return True
        if _tells_of_error(one):
            return True
    return False


def decoded(start: Message, body: bytes, size: int) -> bytes:
    """A body as a client reads it, ``size`` bytes at most; as it is if nobody can."""
    found = {bytes(n).lower(): bytes(v) for n, v in start.get("headers", ())}
    if found.get(b"content-encoding", b"").strip().lower() not in (b"gzip", b"deflate"):
        return body
    try:
        return zlib.decompressobj(32 + zlib.MAX_WBITS).decompress(body, size)
    except zlib.error:
        return body


def kept_headers(start: Message) -> Headers:
    """Of a response that is replaced: those that are not of its body.

    A browser reads no answer without those of CORS.
    """
    found = [(bytes(n), bytes(v)) for n, v in start.get("headers", ())]
    return [(n, v) for n, v in found if not n.lower().startswith(_OF_A_REPLY)]


async def send_json(
    send: Send,
    status: int,
    body: dict[str, Any],
    headers: Headers = (),
    *,
    head: bool = False,
) -> None:
    """A whole response; ``head``: of a HEAD, which has no body."""
    content = json.dumps(body).encode()
    await send_bytes(send, status, content, "application/json", headers, head=head)


async def send_bytes(
    send: Send,
    status: int,
    content: bytes,
    kind: str,
    headers: Headers = (),
    *,
    head: bool = False,
) -> None:
    """As `send_json`, with a body of any kind."""
    fields = [
        *headers,
        (b"content-type", kind.encode()),
        (b"content-length", str(len(content)).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": b"" if head else content})
