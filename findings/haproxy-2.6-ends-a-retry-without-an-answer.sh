#!/usr/bin/env bash
# HAProxy 2.6.12 (Debian 12), which must be installed.
#
# A request waits at one of two servers. Meanwhile the checks of both fail, and then that
# server answers 503, which is to be tried again (`retry-on … junk-response … 503`).
# No server is there to try it with.
# Guess before looking: the client gets HAProxy's own 503, "No server is available to
# handle this request", or the server's.
# Seen: HAProxy's 503, when its connection to the server is a new one. When it had one from
# an earlier request it closes the client's connection without a byte.
# So a backend whose servers may fail their checks all at once needs `backup` servers
# without checks: the same ones (examples/haproxy.cfg).
set -euo pipefail

PATH=$PATH:/usr/sbin
haproxy -v | grep -F 'version 2.6.12'
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/look.py" <<'END'
import http.client
import pathlib
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

folder = pathlib.Path(sys.argv[1])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):  # the check
        self.answer(503 if asked.is_set() else 200)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        if is_warm.is_set():
            asked.set()
            go.wait(30)
        self.answer(503 if is_warm.is_set() else 200)

    def answer(self, status):  # in one piece
        head = f"HTTP/1.1 {status} -\r\nContent-Length: 5\r\n\r\n"
        self.wfile.write(f"{head}later".encode())

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args):  # checks end with a reset
        pass


def serve():
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def post():
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", "/", b"x")
    try:
        answer = connection.getresponse()
    except http.client.RemoteDisconnected:
        seen.append("nothing")
    else:
        theirs = b"No server is available" in answer.read()
        seen.append((answer.status, "HAProxy's" if theirs else "the server's"))


with socket.create_server(("127.0.0.1", 0)) as s:
    port = s.getsockname()[1]
servers = [serve(), serve()]
listed = "\n".join(
    f"    server s{s.server_port} 127.0.0.1:{s.server_port} check inter 200ms fall 1 rise 1"
    for s in servers
)
(folder / "settings").write_text(f"""
defaults
    mode http
    timeout connect 2s
    timeout client 30s
    timeout server 30s
    option http-buffer-request
    retries 3
    option redispatch 1
    retry-on conn-failure empty-response junk-response response-timeout 503
frontend clients
    bind 127.0.0.1:{port}
    default_backend servers
backend servers
    option httpchk GET /health
    http-check expect status 200
{listed}
""")
seen = []
for earlier in (0, 8):
    asked, go, is_warm = threading.Event(), threading.Event(), threading.Event()
    haproxy = subprocess.Popen(
        ["haproxy", "-db", "-f", folder / "settings"], stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(100):
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                time.sleep(0.05)
        time.sleep(1)
        for _ in range(earlier):  # HAProxy has connections to both of them then
            post()
        is_warm.set()
        waits = threading.Thread(target=post)
        waits.start()
        asked.wait(10)
        time.sleep(2)  # both checks have failed
        go.set()
        waits.join(30)
    finally:
        haproxy.terminate()
        haproxy.wait(10)
    print(f"after {earlier} requests the client got: {seen[-1]}")
sys.exit((seen[0], seen[-1]) != ((503, "HAProxy's"), "nothing"))
END
python3 -I "$folder/look.py" "$folder"
