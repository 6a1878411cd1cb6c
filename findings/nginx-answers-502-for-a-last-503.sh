#!/usr/bin/env bash
# nginx 1.22.1 (Debian 12, nginx-light), which must be installed.
#
# Two servers in an upstream with `max_fails=1`, and `proxy_next_upstream http_503`. Each
# answers a single 503 to a request that is sent to it first, one second after the other.
# nginx's manual (ngx_http_upstream_module): "If a successful response could not be
# obtained from any of the servers, the client will receive the result of the
# communication with the last server."
# Guess before looking: the second client gets that 503, with its body; a third one gets
# the 200 that both servers have for it.
# Seen: the second gets a 502 of nginx's own, since no server is left to be asked next
# ("no live upstreams" in the log). So does everyone until fail_timeout has passed.
# So an upstream of which a server may answer one 503 needs a second group with the same
# servers and max_fails=0, and `error_page 502` to get there (examples/nginx.conf).
set -euo pipefail

PATH=$PATH:/usr/sbin
nginx -v 2>&1 | grep -F nginx/1.22.1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
chmod 711 "$folder"
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
    def do_GET(self):
        fails, self.server.fails = self.server.fails, False
        body = b"later" if fails else b"fine"
        self.send_response(503 if fails else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def serve():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.fails = False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as s:
        return s.getsockname()[1]


def get(path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path)
    answer = connection.getresponse()
    body = answer.read().decode()
    return answer.status, body if len(body) < 20 else "a page of nginx's"


servers, port = [serve(), serve()], free_port()
listed = "".join(
    f"server 127.0.0.1:{s.server_port} max_fails=1 fail_timeout=5s;" for s in servers
)
kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
paths = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
(folder / "settings").write_text(f"""
daemon off; pid {folder}/pid; error_log {folder}/log error; events {{}}
http {{
    access_log off; {paths}
    upstream both {{ hash $uri consistent; {listed} }}
    server {{
        listen 127.0.0.1:{port};
        location / {{ proxy_pass http://both; proxy_next_upstream error http_503; }}
    }}
}}""")
nginx = subprocess.Popen(["nginx", "-p", folder, "-e", "stderr", "-c", folder / "settings"])
try:
    for _ in range(100):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except OSError:
            time.sleep(0.05)
    home = {}  # a path that goes to each server first
    for i in range(64):
        servers[0].fails = True
        assert get(f"/{i}") == (200, "fine")
        home.setdefault(servers[0].fails, f"/{i}")
        if not servers[0].fails:
            time.sleep(7)  # that one is left alone for five seconds
        if len(home) == 2:
            break
    servers[0].fails = True
    print("the first of them fails once:", get(home[False]))
    assert not servers[0].fails
    time.sleep(1)
    servers[1].fails = True
    second = get(home[True])
    third = get(home[True])
    time.sleep(7)
    later = get(home[True])
    print("then the second:", second, "- at once:", third, "- after 7 s:", later)
    print((folder / "log").read_text().splitlines()[-1][:100])
finally:
    nginx.terminate()
    nginx.wait(10)
own = (502, "a page of nginx's")
sys.exit((second, third, later) != (own, own, (200, "fine")))
END
python3 -I "$folder/look.py" "$folder"
