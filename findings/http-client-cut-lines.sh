#!/usr/bin/env bash
# CPython's http.client (seen with 3.11.7), and urllib3 2.8.0 on top of it.
#
# A chunked answer (RFC 9112, 7.1) is cut: the connection closes before the last chunk.
# Guess before looking: whichever way the body is read, IncompleteRead is raised.
# Seen: `response.read()` and `read1()` raise http.client.IncompleteRead; `readline()` and
# `for line in response`, which is how event streams are read, end as if all had come. The
# buffered readline asks HTTPResponse.peek, which swallows IncompleteRead ("peek doesn't
# worry about protocol"), and gets b"", which is an end. urllib3's `stream()` raises
# ProtocolError, as one would have guessed.
# So a client that reads lines with the standard library cannot tell a cut stream.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'urllib3==2.8.0'
cat > "$folder/look.py" <<'END'
import http.client
import socket
import threading

import urllib3

EVENT = b"data: one\n\n"
HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
listener = socket.create_server(("127.0.0.1", 0))
port = listener.getsockname()[1]


def serve() -> None:
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(HEAD + b"%x\r\n%b\r\n" % (len(EVENT), EVENT))


threading.Thread(target=serve, daemon=True).start()


def seen(read) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/")
    try:
        return f"ended, {b''.join(read(connection.getresponse()))!r}"
    except http.client.IncompleteRead:
        return "IncompleteRead"


def seen_by_urllib3() -> str:
    answer = urllib3.PoolManager().request(
        "GET", f"http://127.0.0.1:{port}/", preload_content=False, retries=False
    )
    try:
        return f"ended, {b''.join(answer.stream())!r}"
    except urllib3.exceptions.ProtocolError:
        return "ProtocolError"


found = {
    "read": seen(lambda r: [r.read()]),
    "read1": seen(lambda r: iter(r.read1, b"")),
    "readline": seen(lambda r: iter(r.readline, b"")),
    "lines": seen(list),
    "urllib3 stream": seen_by_urllib3(),
}
for name, what in found.items():
    print(f"{name}: {what}")
ended = f"ended, {EVENT!r}"
assert found == {
    "read": "IncompleteRead",
    "read1": "IncompleteRead",
    "readline": ended,
    "lines": ended,
    "urllib3 stream": "ProtocolError",
}, "the behaviour has changed"
END
"$folder/venv/bin/python" "$folder/look.py"
