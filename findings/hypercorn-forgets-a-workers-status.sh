#!/usr/bin/env bash
# hypercorn 0.18.0: a worker that leaves with a status of its own ends it with status 0.
#
# The application leaves with status 75 (EX_TEMPFAIL, "start me again"). By default
# hypercorn has it in one child process. That child's end ends hypercorn, too, with
# status 0, so that nobody starts it again: Restart=on-failure of systemd does not. With
# --workers 0 the application is in hypercorn's own process, and the status is 75. run()
# has the status, and asks once more when the list of those that have ended is empty.
#
# Guess beforehand: 75 in both, or a new worker, as uvicorn's --workers has one.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check hypercorn==0.18.0
cat > "$work/leaves.py" << 'PY'
import os


async def app(scope, receive, send):
    if scope["type"] == "http":
        os._exit(75)
PY
cat > "$work/seen.py" << 'PY'
import http.client
import socket
import subprocess
import sys
import time


def status(*options):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = subprocess.Popen(
        [sys.executable, "-m", "hypercorn", *options, "-b", f"127.0.0.1:{port}",
         "leaves:app"],
    )
    try:
        for _ in range(300):
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
                connection.request("GET", "/")
                break
            except ConnectionRefusedError:
                time.sleep(0.1)
        return program.wait(30)
    finally:
        program.kill()
        program.wait()


found = status(), status("--workers", "0")
print("status with one worker, and with none:", *found)
sys.exit(found != (0, 75))
PY
cd "$work"
"$work/venv/bin/python" seen.py
