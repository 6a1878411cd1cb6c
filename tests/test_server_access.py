"""Who may ask: keys, certificates, and a port that others can reach."""

from __future__ import annotations

import base64
import contextlib
import os
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from email.message import Message
from pathlib import Path

import openai
import pytest

from mlx_safe.server.access import Access, is_loopback, read_keys
from support.server import Server, eventually

KEY, OTHER_KEY = "a-key-of-the-tests", "another-key"
RIGHT = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"{OTHER_KEY}\n\n{KEY}\n")
    file.chmod(0o600)
    return file


@pytest.fixture(scope="module")
def server(tiny_model: Path, key_file: Path) -> Iterator[Server]:
    with Server(
        tiny_model, "--api-key-file", str(key_file), headers=RIGHT
    ).wait_ready() as server:
        yield server


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": "Bearer "},
        {"Authorization": KEY},
        {"Authorization": f"Token {KEY}"},
        {"x-api-key": KEY},  # of Anthropic's paths
        {"Authorization": "Basic " + base64.b64encode(f":{KEY}".encode()).decode()},
        {"Authorization": "Bearer \u00e9"},
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/metrics"])
def test_without_the_key(server: Server, headers: dict[str, str], path: str) -> None:
    is_post = path.endswith("completions")
    ask = server.post({}, path, headers=headers) if is_post else None
    answer = ask or server.get(path, headers=headers)
    assert answer.status == 401
    assert answer.error["code"] == "invalid_api_key"
    assert answer.error["type"] == "invalid_request_error"
    assert answer.headers["www-authenticate"] == 'Bearer realm="mlx-safe"'


def test_every_method_and_path_needs_it_but_health(server: Server) -> None:
    for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"):
        for path in ("/", "/v1/models/x", "/nothing", "/metrics?x", "/v1//models"):
            assert server.get(path, headers={}, method=method).status == 401, path
    assert server.get("/health", headers={}).status == 200
    assert server.get("/health?x=1", headers={}).status == 200
    assert server.get("/health/../metrics", headers={}).status == 401
    # A browser asks so before it sends the key.
    asked = server.get("/v1/chat/completions", headers={}, method="OPTIONS")
    assert asked.status == 204
    assert "Authorization" in asked.headers["access-control-allow-headers"]


@pytest.mark.parametrize("path", ["/metrics", "/status.json"])
def test_a_scrape_without_the_key_is_told(server: Server, path: str) -> None:
    """Nobody saw why a Prometheus had nothing, nor who tried keys there."""

    def refused() -> float:
        return server.metric(
            "mlx_safe_requests_total", code="invalid_api_key", status="401"
        )

    before, lines = refused(), server.log.count(f"path={path} outcome=refused")
    assert server.get(path, headers={}).status == 401
    assert eventually(lambda: refused() == before + 1)
    server.wait_for_log(f"path={path} outcome=refused", lines + 1)
    assert f"path={path} outcome=refused code=invalid_api_key client=127.0.0.1" in (
        server.log
    )
    assert server.get(path).status == 200
    assert refused() == before + 1
    assert f"path={path} outcome=ok" not in server.log


def test_with_a_key(server: Server) -> None:
    assert server.chat().status == 200
    for key in (KEY, OTHER_KEY):
        headers = {"Authorization": f"bearer   {key} "}
        assert server.get("/v1/models", headers=headers).status == 200


def test_anthropics_paths(server: Server) -> None:
    path = "/v1/messages"
    refused = server.post({}, path, headers={"x-api-key": "wrong"})
    assert refused.status == 401
    assert refused.json["type"] == "error"
    assert refused.json["error"]["type"] == "authentication_error"
    for headers in ({"x-api-key": KEY}, RIGHT):
        assert server.post({}, path, headers=headers).status != 401
    version = {"x-api-key": KEY, "anthropic-version": "2023-06-01"}
    assert server.get("/v1/models", headers=version).status == 200


def test_openais_client_knows_what_is_wrong(server: Server) -> None:
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{server.port}/v1", api_key="wrong", max_retries=0
    ) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        assert caught.value.code == "invalid_api_key"
        assert client.with_options(api_key=KEY).models.list().data


def test_no_key_is_in_the_log_or_a_report(server: Server, key_file: Path) -> None:
    server.get("/v1/models", headers={"Authorization": "Bearer not-the-one"})
    server.get("/v1/models")
    for text in (KEY, OTHER_KEY, "not-the-one"):
        assert text not in server.log


def test_a_body_that_was_refused_is_no_next_request(server: Server) -> None:
    smuggled = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), 30) as s:
        s.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(smuggled), smuggled)
        )
        s.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: s.recv(1 << 16), b""))
    assert answer.count(b"HTTP/1.1 401") == 1
    assert answer.count(b"HTTP/1.1 ") == 1


# -- what needs no server ----------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "own"),
    [
        ("127.0.0.1", True),
        ("127.8.0.1", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.3", False),
        ("fe80::1%en0", False),
        ("-", False),
    ],
)
def test_what_this_machine_is(address: str, own: bool) -> None:
    assert is_loopback(address) is own


@pytest.mark.parametrize(
    ("peer", "headers", "shown"),
    [
        ("127.0.0.1", {"Host": "127.0.0.1:8080"}, True),
        ("::1", {"Host": "[::1]:8080"}, True),
        ("127.0.0.1", {"Host": "LOCALHOST:80"}, True),
        ("127.0.0.1", {}, True),
        ("192.168.0.3", {"Host": "127.0.0.1"}, False),
        # A page elsewhere whose name means this machine by now.
        ("127.0.0.1", {"Host": "evil.example:8080"}, False),
        # A proxy on this machine that asks for somebody else.
        ("127.0.0.1", {"Host": "127.0.0.1", "X-Forwarded-For": "10.0.0.1"}, False),
        ("127.0.0.1", {"Host": "127.0.0.1", "x-forwarded-host": "a.example"}, False),
        ("127.0.0.1", {"Host": "127.0.0.1", "Via": "1.1 proxy"}, False),
    ],
)
def test_who_sees_the_status(peer: str, headers: dict[str, str], shown: bool) -> None:
    message = Message()
    for name, value in headers.items():
        message[name] = value
    asked = ("GET", "/status.json", message, peer)
    assert (Access().refusal(*asked) is None) is shown
    assert Access(status_page="anywhere").refusal(*asked) is None
    refused = Access(status_page="off").refusal(*asked)
    assert refused is not None and refused.status == 404


def test_each_host_of_a_request_must_be_this_machine() -> None:
    message = Message()
    for host in ("localhost", "evil.example"):
        message["Host"] = host
    assert Access().refusal("GET", "/status", message, "127.0.0.1") is not None


def test_files_of_keys(tmp_path: Path) -> None:
    from mlx_safe._command import CommandError

    file = tmp_path / "keys"
    file.write_text("one\n two \n\n")
    assert read_keys("zero", str(file)) == ("zero", "one", "two")
    for text, why in (("\n", "there is no key in it"), ("a b\n", "a key must be")):
        file.write_text(text)
        with pytest.raises(CommandError, match=why) as caught:
            read_keys(None, str(file))
        assert "a b" not in str(caught.value)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(CommandError, match="is not UTF-8"):
        read_keys(None, str(file))


# -- addresses ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "warned"), [((), True), (("--api-key=k",), False)]
)
def test_a_port_that_others_can_reach(
    tiny_model: Path, arguments: tuple[str, ...], warned: bool
) -> None:
    with Server(tiny_model, "--host", "0.0.0.0", *arguments).wait_ready() as server:
        text = "0.0.0.0 can be reached from other machines, and there is no --api-key"
        assert (text in server.log) is warned


# -- certificates ------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes"),
            *("-days", "2", "-subj", "/CN=127.0.0.1"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
            *("-out", str(certificate), "-keyout", str(key)),
        ],
        check=True,
        capture_output=True,
        timeout=60,
    )
    return certificate, key


def tls_server(
    model: Path, certificate: tuple[Path, Path], *arguments: str, inject: str = ""
) -> Server:
    context = ssl.create_default_context(cafile=str(certificate[0]))
    files = (
        "--ssl-certfile",
        str(certificate[0]),
        "--ssl-keyfile",
        str(certificate[1]),
    )
    return Server(model, *files, *arguments, tls=context, inject=inject)


@pytest.fixture(scope="module")
def tls(tiny_model: Path, certificate: tuple[Path, Path]) -> Iterator[Server]:
    level = ("--log-level", "DEBUG")
    with tls_server(tiny_model, certificate, *level).wait_ready() as server:
        yield server


def test_https(tls: Server) -> None:
    assert f"listening at https://127.0.0.1:{tls.port}" in tls.log
    assert tls.log.count("cert.pem: it ends on ") == 1  # in two days
    whole = tls.chat("hello", max_tokens=20)
    assert whole.status == 200
    streamed = tls.chat("hello", max_tokens=20, stream=True)
    assert streamed.done and streamed.text == whole.text
    # One connection, one request after the other.
    with contextlib.closing(tls.connect()) as connection:
        for _ in range(3):
            connection.request("GET", "/v1/models")
            response = connection.getresponse()
            assert response.status == 200 and response.read()


def test_a_large_body_over_https(tls: Server) -> None:
    long = tls.post({"messages": [{"role": "user", "content": "x" * 3_000_000}]})
    assert long.status == 400
    assert long.error["code"] == "context_length_exceeded"


def test_a_client_that_leaves_over_https(tls: Server) -> None:
    before = tls.disconnects
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 100_000}
    with tls.stream({**body, "stream": True}) as lines:
        next(lines)
    assert eventually(lambda: tls.disconnects > before), tls.log
    assert eventually(lambda: tls.metric("mlx_safe_requests_in_flight") == 0)


def test_a_client_that_speaks_no_tls(tls: Server) -> None:
    with socket.create_connection(("127.0.0.1", tls.port), 30) as s:
        s.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert b"200" not in s.recv(1 << 16)
    tls.wait_for_log(
        "DEBUG - a client and this server cannot agree on TLS: HTTP_REQUEST"
    )
    assert tls.get("/health").status == 200


def test_what_is_said_at_the_end_arrives_over_https(
    tiny_model: Path, certificate: tuple[Path, Path]
) -> None:
    """A fatal fault: everyone has an answer before the process leaves."""
    with tls_server(tiny_model, certificate, inject="decode:2:4") as server:
        server.wait_ready()
        answers = server.chats(3)
        assert [a.status for a in answers] == [503] * 3
        assert all(a.broken is None for a in answers)
        assert server.wait() == 75


def test_a_restart_under_https_is_a_pause_for_who_comes_later(
    tiny_model: Path, certificate: tuple[Path, Path]
) -> None:
    with tls_server(
        tiny_model, certificate, "--supervise", inject="decode:6:4"
    ) as server:
        server.wait_ready()
        assert server.chat().status == 503
        # The next server has the same plan; nothing but a token is asked of it.
        later = server.chat(max_tokens=1)
        assert later.status == 200, server.log


CA = """
[ca]
default_ca = it
[it]
database = index
serial = serial
new_certs_dir = .
default_md = sha256
policy = any
[any]
commonName = supplied
"""


def certified(certificate: tuple[Path, Path], folder: Path, *words: str) -> Path:
    """A certificate of `certificate`'s key; ``words``: of ``openssl ca``."""
    (folder / "ca").write_text(CA)
    (folder / "index").touch()
    (folder / "serial").write_text("01")
    of_ca, key = certificate
    if "-selfsign" not in words:
        words = (*words, "-cert", str(of_ca))
    for command in (
        ("req", "-new", "-subj", "/CN=box", "-key", str(key), "-out", "csr"),
        (
            *("ca", "-batch", "-notext", "-config", "ca", "-keyfile", str(key)),
            *("-in", "csr", "-out", "cert.pem", "-extfile", "ext", *words),
        ),
    ):
        subprocess.run(
            ["openssl", *command],
            check=True,
            capture_output=True,
            timeout=60,
            cwd=folder,
        )
    return folder / "cert.pem"


# The first {}: why; the second: today.
OF_DATE = (
    "clients refuse it ({}): put one there that is valid on {} and restart, or, where "
    "that is not today's date, set the clock"
)
EXPIRED = OF_DATE.format("certificate has expired", "{}")
EARLY = OF_DATE.format("certificate is not yet valid", "{}")
CLIENTS = "clients refuse it (unsuitable certificate purpose): put another one there"


@pytest.mark.parametrize("signed", ["by itself", "by another"])
@pytest.mark.parametrize(
    ("begins", "ends", "use", "says"),
    [
        (-2, -1, "serverAuth", EXPIRED),
        (1, 99, "serverAuth", EARLY),
        (-1, 99, "clientAuth", CLIENTS),
        (-1, 2, "serverAuth", " GMT: put a new one there and restart before"),
        (-1, 99, "serverAuth", None),
    ],
    ids=["expired", "not yet", "a client's", "soon", "sound"],
)
def test_a_certificate_that_clients_refuse_is_told_at_the_start(
    certificate: tuple[Path, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    begins: int,
    ends: int,
    use: str,
    says: str | None,
    signed: str,
) -> None:
    """One that an authority has signed, and one that is its own."""
    from mlx_safe.server.tls import Tls

    (tmp_path / "ext").write_text(
        f"basicConstraints=CA:FALSE\nextendedKeyUsage={use}\n"
    )
    dates = [
        time.strftime("%y%m%d%H%M%SZ", time.gmtime(time.time() + 86400 * days))
        for days in (begins, ends)
    ]
    words = ["-startdate", dates[0], "-enddate", dates[1]]
    words += ["-selfsign"] * (signed == "by itself")
    found = certified(certificate, tmp_path, *words)
    Tls(str(found), str(certificate[1])).warn_of_its_end()
    assert [r.levelname for r in caplog.records] == ["WARNING"] * bool(says)
    assert f"--ssl-certfile {found}: " * bool(says) in caplog.text
    assert (says or "").format(time.strftime("%Y-%m-%d")) in caplog.text


def test_a_certificate_that_cannot_be_used(
    certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    from mlx_safe._command import CommandError
    from mlx_safe.server.tls import Tls

    other = tmp_path / "other.pem"
    subprocess.run(
        ["openssl", "genrsa", "-out", str(other), "2048"],
        check=True,
        capture_output=True,
        timeout=60,
    )
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("no certificate")
    locked = tmp_path / "locked.pem"
    subprocess.run(
        [
            *("openssl", "rsa", "-aes256", "-passout", "pass:secret"),
            *("-in", str(certificate[1]), "-out", str(locked)),
        ],
        check=True,
        capture_output=True,
        timeout=60,
    )
    for files, why in (
        ((nonsense, None), "there is no certificate"),
        ((certificate[0], None), r"without --ssl-keyfile: there is no private key"),
        ((certificate[1], certificate[0]), r"-certfile \S+: there is no certificate"),
        ((certificate[0], certificate[0]), r"^--ssl-keyfile \S+: there is no private"),
        ((certificate[0], other), "key values mismatch"),
        ((certificate[0], locked), "it has a password"),
        ((tmp_path / "none", None), f"cannot be read: {os.strerror(2)}"),
    ):
        with pytest.raises(CommandError, match=why):
            Tls(str(files[0]), None if files[1] is None else str(files[1]))
