"""``/status`` in a browser, Chromium without a window: ``make client-browser``.

``MLX_SAFE_SCREENSHOTS=DIR`` keeps what it drew.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from clients.browser import browse
from support.server import BATCH_RUNS_S, CONTROLLED, Server, kept_in

KEEP = os.environ.get("MLX_SAFE_SCREENSHOTS")
WIDE, PHONE = (1000, 1100), (390, 1500)
TOP_ROWS = 40


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One that has had a fault and an eviction, with two requests in flight."""
    disk = tmp_path_factory.mktemp("kv")
    with Server(
        tiny_model,
        *("--max-active-memory-bytes", "12M", "--prompt-cache-size", "2"),
        *kept_in(disk),
        program=CONTROLLED,
    ).wait_ready() as server:
        for i in range(4):
            server.chat(f"text {i} of a longer conversation " * 30, max_tokens=30)
        server.plan("decode:5:8")
        assert server.chat(max_tokens=20).status == 200
        server.plan("any:1000000000")
        server.hold(30)
        with server.chatting(2, max_tokens=40):
            try:
                server.wait_held(BATCH_RUNS_S)
                time.sleep(4)  # two samples
                yield server
            finally:
                server.go()


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}/status#other"


def test_the_page_is_drawn_and_asks_nobody_else(server: Server, tmp_path: Path) -> None:
    log = tmp_path / "net.json"
    seen = browse(tmp_path, url(server), "--dump-dom", f"--log-net-log={log}")
    dom = seen.stdout
    assert 'data-drawn="yes"' in dom, seen.stderr
    # Neither a mistake of the script nor of its policy.
    console = [x for x in seen.stderr.splitlines() if "CONSOLE" in x]
    assert console == []
    # Its parts, requests, marks, and nothing that was refused.
    assert all(f'class="p-{part}"' in dom for part in ("model", "caches", "pool"))
    assert dom.count("chatcmpl-") == 2
    for text in ("2 in flight", ">decode<", "of 40", "replayed", "evicted", "ceiling"):
        assert text in dom, text
    assert re.search(r"metal out of memory", dom)
    assert 'id="notice" role="alert"></section>' in dom
    found = set(re.findall(r'"url":"(https?://[^"]+)"', log.read_text()))
    assert any(address.endswith("/status.json?history=short") for address in found)
    assert {urlsplit(a).netloc for a in found} == {f"127.0.0.1:{server.port}"}


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("size", [WIDE, PHONE])
def test_it_can_be_read(
    server: Server, tmp_path: Path, size: tuple[int, int], dark: bool
) -> None:
    name = f"status-{'phone' if size is PHONE else 'wide'}{'-dark' if dark else ''}.png"
    file = Path(KEEP or tmp_path) / name
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    browse(
        tmp_path,
        url(server),
        *(f"--window-size={size[0]},{size[1]}", f"--screenshot={file}", *scheme),
    )
    width, height, light = picture(file)
    assert (width, height) == size
    # The background, which is most of it.
    assert light < 60 if dark else light > 180
    if KEEP:  # `test_server_status` asks whether they are of the page as it is
        digest = hashlib.sha256(server.get("/status").body.encode()).hexdigest()
        (Path(KEEP) / "status-page.sha256").write_text(f"{digest}\n")


def test_a_browser_can_give_the_key(tiny_model: Path, tmp_path: Path) -> None:
    with Server(tiny_model, "--api-key", "k").wait_ready() as server:
        place = f"127.0.0.1:{server.port}/status"
        for key, drawn in (("k", True), ("wrong", False)):
            seen = browse(tmp_path, f"http://x:{key}@{place}", "--dump-dom")
            assert ("data-drawn" in seen.stdout) is drawn, seen.stderr


def picture(file: Path) -> tuple[int, int, float]:
    """Width, height, and how light a PNG is on average, from 0 to 255."""
    data = file.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height, depth, kind = struct.unpack(">IIBB", data[16:26])
    assert depth == 8 and kind in (2, 6)
    packed, at = b"", 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        if data[at + 4 : at + 8] == b"IDAT":
            packed += data[at + 8 : at + 8 + length]
        at += 12 + length
    step = 3 if kind == 2 else 4
    rows = zlib.decompress(packed)
    return width, height, lightness(rows, width * step, TOP_ROWS, step)


def lightness(raw: bytes, stride: int, height: int, step: int) -> float:
    """The mean of the first channel of the first rows (PNG, section 9.2)."""
    before = bytearray(stride)
    total = 0
    for row in range(height):
        start = row * (stride + 1)
        kind, line = raw[start], bytearray(raw[start + 1 : start + 1 + stride])
        for i in range(stride):
            left = line[i - step] if i >= step else 0
            up, corner = before[i], before[i - step] if i >= step else 0
            line[i] = (line[i] + predicted(kind, left, up, corner)) % 256
        total += sum(line[::step])
        before = line
    return total / (height * (stride // step))


def predicted(kind: int, left: int, up: int, corner: int) -> int:
    if kind == 4:
        guess = left + up - corner
        return min((left, up, corner), key=lambda x: abs(guess - x))
    return (0, left, up, (left + up) // 2)[kind]
