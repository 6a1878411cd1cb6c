"""Where the server's flags come from: command line, environment, file."""

from __future__ import annotations

import errno
import os
import plistlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_safe._command import CommandError, Parser
from mlx_safe.doctor import doctor
from mlx_safe.kv.store import DISK_BYTES
from mlx_safe.memory.sizes import parse_size
from mlx_safe.server.access import read_keys
from mlx_safe.server.configuration import Settings, printed, resolve, variable_of
from mlx_safe.server.flag_checks import check_flags
from mlx_safe.server.flags import own_parser, whole_parser
from mlx_safe.server.tls import Tls
from support import child

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def parser() -> Parser:
    from mlx_safe.server.mlx_lm.patch import parser_of
    from mlx_safe.server.mlx_lm.requirements import import_server

    return whole_parser(parser_of(import_server()))


def settings(
    parser: Parser, *words: str, file: Path | None = None, **environment: str
) -> Settings:
    more = [] if file is None else ["--config", str(file)]
    return resolve(parser, [*words, *more], environment)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    found = tmp_path / "mlx-safe.toml"
    found.write_text(
        """
        port = 9001
        temp = 0.5
        max-active-memory-bytes = "20G"
        kv-disk-bytes = 5_000_000
        kv-free-bytes = 0
        supervise = true
        served-model-name = ["one", "two words"]
        allowed-origins = ["http://a", "http://b"]
        chat-template-args = {enable_thinking = false}
        """
    )
    return found


def test_each_place_gives_way_to_the_one_before(parser: Parser, file: Path) -> None:
    assert settings(parser).values.port == 8080
    assert settings(parser, file=file).values.port == 9001
    assert settings(parser, file=file, MLX_SAFE_PORT="9002").values.port == 9002
    found = settings(parser, "--port", "9003", file=file, MLX_SAFE_PORT="9002")
    assert found.values.port == 9003
    assert found.sources["port"] == "command line"
    assert found.sources["temp"] == str(file)
    assert found.sources["top_p"] == "default"


def test_a_file_has_every_kind_of_value(parser: Parser, file: Path) -> None:
    found = settings(parser, file=file).values
    assert found.temp == 0.5
    assert found.max_active_memory_bytes == 20 * 10**9
    assert found.kv_disk_bytes == 5_000_000
    assert found.kv_free_bytes == 0
    assert found.supervise is True
    assert found.served_model_name == ["one", "two words"]
    assert found.allowed_origins == ["http://a", "http://b"]
    assert found.chat_template_args == {"enable_thinking": False}


def test_a_list_is_replaced_and_a_switch_is_turned_off(
    parser: Parser, file: Path
) -> None:
    found = settings(
        parser,
        "--served-model-name",
        "mine",
        file=file,
        MLX_SAFE_SUPERVISE="0",
        MLX_SAFE_SERVED_MODEL_NAME="theirs",
    ).values
    assert found.served_model_name == ["mine"]
    assert found.supervise is False
    named = settings(parser, MLX_SAFE_SERVED_MODEL_NAME="one, two words").values
    assert named.served_model_name == ["one", "two words"]


def test_every_flag_can_be_in_the_environment(parser: Parser) -> None:
    names = [variable_of(action) for action in parser._actions]
    assert len(names) == len(set(names)) > 40
    assert settings(parser, MLX_SAFE_TRUST_REMOTE_CODE="yes").values.trust_remote_code
    assert settings(parser, MLX_SAFE_MODEL="m").values.model == "m"
    # What is empty is not set, as containers have it.
    assert settings(parser, MLX_SAFE_PORT="").values.port == 8080


def test_the_file_can_be_named_in_the_environment(parser: Parser, file: Path) -> None:
    assert settings(parser, MLX_SAFE_CONFIG=str(file)).values.port == 9001


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("prot = 1", "there is no flag 'prot'; did you mean 'port'?"),
        ("max_kv_size = 64", "did you mean 'max-kv-size'?"),
        ("config = 'other'", "there is no flag 'config'"),
        ("[server]\nport = 1", "there is no flag 'server'"),
        ("port = 'x'", "port: must be from 0 to 65535, not 'x'"),
        ("port = true", "port: must be a value, not true or false"),
        ("supervise = 1", "supervise: must be true or false"),
        ("temp = 'warm'", "temp: must be a number, not 'warm'"),
        ("log-level = 'LOUD'", "log-level: invalid choice: 'LOUD'"),
        ("port = 2026-11-28", "port: must be text, a number"),
        ("port =", "is not TOML: "),
        ("chat-template-args = " + "[" * 10_000, "is not TOML: too many brackets"),
        ("port = " + "9" * 5000, "is not TOML: "),
        ("[port]\na = 1", "port: cannot be a table"),
        ("[[served-model-name]]\na = 1", "served-model-name: cannot be a table"),
        ("served-model-name = [['a', 'b']]", "cannot be an array of arrays"),
        ("#" * 2**20 + "\n", "is larger than 1048576 bytes"),
        ("model = ''", "model: must be a printable text, not ''"),
        ('kv-dir = "a\\u0000b"', "kv-dir: must be a printable text"),
        ("max-kv-size = 1_073_741_825", "max-kv-size: must be at most 1073741824"),
    ],
)
def test_a_mistake_in_the_file(
    parser: Parser, tmp_path: Path, text: str, why: str
) -> None:
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(CommandError) as caught:
        settings(parser, file=file)
    assert str(caught.value).startswith(f"--config {file}: ")
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "bytes", "none"])
@pytest.mark.parametrize("flag", ["config", "api-key-file", "ssl-certfile"])
def test_what_is_no_file(tmp_path: Path, flag: str, kind: str) -> None:
    """It was waited for, for ever, and without a word."""
    path = Path("/dev/zero") if kind == "device" else tmp_path / "named"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "bytes":
        path.write_bytes(b"\xff\xfe")
    why = {
        "pipe": "must be a file; each start reads it again",
        "device": "must be a file; each start reads it again",
        "directory": f"cannot be read: {os.strerror(errno.EISDIR)}",
        "bytes": "there is no certificate" if "ssl" in flag else "is not UTF-8",
        "none": f"cannot be read: {os.strerror(errno.ENOENT)}",
    }[kind]
    readers: dict[str, Callable[[], object]] = {
        "config": lambda: resolve(own_parser(), ["--config", str(path)], {}),
        "api-key-file": lambda: read_keys(None, str(path)),
        "ssl-certfile": lambda: Tls(str(path), None),
    }
    with pytest.raises(CommandError, match=f"^--{flag} {path}: {why}"):
        readers[flag]()


def _has_kernel_log() -> bool:
    """Root's, and in most containers not even that."""
    try:
        os.close(os.open("/proc/kmsg", os.O_RDONLY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not _has_kernel_log(), reason="/proc/kmsg may not be read here")
@pytest.mark.parametrize(
    "arguments",
    [
        ("serve", "--config", "{}"),
        ("serve", "--api-key-file", "{}"),
        ("serve", "--ssl-certfile", "{}"),
        ("serve", "--ssl-certfile", "{certificate}", "--ssl-keyfile", "{}"),
        ("top", "--once", "--api-key-file", "{}"),
    ],
)
def test_a_file_that_has_no_end(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """The kernel's log says that it is a regular file, and its reader waits."""
    certificate = tmp_path / "certificate.pem"
    certificate.write_text("-----BEGIN CERTIFICATE-----\n")
    link = tmp_path / "link"
    link.symlink_to("/proc/kmsg")
    words = [word.format(link, certificate=certificate) for word in arguments]
    done = child.run(
        f"import sys; from mlx_safe.cli import main; sys.exit(main({words!r}))",
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"mlx-safe: {words[-2]} {link}: ")


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("PORT", "x", "MLX_SAFE_PORT: must be from 0 to 65535, not 'x'"),
        ("SUPERVISE", "maybe", "MLX_SAFE_SUPERVISE: must be 1 or 0, not 'maybe'"),
        ("TEMP", "warm", "MLX_SAFE_TEMP: must be a number, not 'warm'"),
        ("API_KEY", "", "MLX_SAFE_API_KEY is empty"),
    ],
)
def test_a_mistake_in_the_environment(
    parser: Parser, name: str, text: str, why: str
) -> None:
    with pytest.raises(CommandError) as caught:
        resolve(parser, [], {f"MLX_SAFE_{name}": text})
    assert str(caught.value).startswith(why)


TEXTS = (
    *("config", "host", "api-key-file", "ssl-certfile", "ssl-keyfile", "kv-dir"),
    *("model", "draft-model", "adapter-path", "served-model-name"),
)


@pytest.mark.parametrize("flag", ["model", "draft-model", "kv-dir", "config"])
def test_doctor_takes_no_other(flag: str) -> None:
    with pytest.raises(CommandError, match=f"--{flag}: must be a printable text"):
        doctor([f"--{flag}="])


COUNTS = (
    *("max-prompt-tokens", "prompt-keep-tokens", "max-kv-size", "prefill-step-size"),
    *("replay-attempts", "decode-concurrency", "prompt-concurrency", "max-tokens"),
    *("prompt-cache-size", "quantized-kv-start", "num-draft-tokens", "top-k"),
)


@pytest.mark.parametrize("flag", TEXTS)
@pytest.mark.parametrize("text", ["", "  ", "a\nb", "a\0b"])
def test_a_text_is_one(parser: Parser, flag: str, text: str) -> None:
    """An empty one is a script's variable that is not set."""
    with pytest.raises(CommandError, match=f"--{flag}: must be a ") as caught:
        settings(parser, f"--{flag}={text}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flag", COUNTS)
@pytest.mark.parametrize("text", ["1073741825", "9" * 30, "9" * 5000])
def test_a_number_is_one_that_mlx_can_count_to(
    parser: Parser, flag: str, text: str
) -> None:
    """Every request failed: its positions and such a window together overflow."""
    if f"--{flag}" not in parser._option_string_actions:
        assert flag == "quantized-kv-start"  # mlx-lm 0.31 has no such flag
        return
    with pytest.raises(CommandError, match="must be at most 1073741824"):
        settings(parser, f"--{flag}={text}")


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_a_file_may_begin_with_a_mark(
    parser: Parser, tmp_path: Path, start: bytes
) -> None:
    file = tmp_path / "c.toml"
    file.write_bytes(start + b"port = 9001\r\nmodel = 'm'\r\n")
    assert settings(parser, file=file).values.port == 9001
    keys = tmp_path / "keys"
    keys.touch(mode=0o600)
    keys.write_bytes(start + b"first\r\n\r\nsecond")
    assert read_keys(None, str(keys)) == ("first", "second")


@pytest.mark.parametrize(
    ("flag", "text", "why"),
    [
        ("allowed-origins", "http://a,,http://b", "--allowed-origins: '' is no origin"),
        (
            "allowed-origins",
            "a\nX-B: c",
            "--allowed-origins: 'a\\nX-B: c' is no origin",
        ),
        ("chat-template", "{% if", "--chat-template: is no Jinja template (line 1): "),
        ("chat-template", "{{ messages }", "--chat-template: is no Jinja template"),
        ("chat-template", "chatml.jinja", "--chat-template: has no messages in it; "),
    ],
)
def test_what_would_spoil_every_answer(
    parser: Parser, flag: str, text: str, why: str
) -> None:
    found = settings(parser, f"--{flag}={text}").values
    with pytest.raises(CommandError) as caught:
        check_flags(found, found)
    assert str(caught.value).startswith(why)


def test_a_template_of_its_own_is_taken(parser: Parser) -> None:
    text = (
        "{%- for m in messages %}{% if loop.index > 9 %}{% break %}{% endif %}\n"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    found = settings(parser, f"--chat-template={text}").values
    check_flags(found, found)


def test_a_variable_that_is_no_flags_is_told(parser: Parser) -> None:
    found = settings(parser, MLX_SAFE_PROT="1", MLX_SAFE_INJECT="decode:1:8")
    assert found.unknown == ("MLX_SAFE_PROT",)


def test_a_value_that_cannot_be_says_where_it_comes_from(
    parser: Parser, file: Path
) -> None:
    file.write_text("top-p = 2.0\n")
    for given, says in (
        (
            settings(parser, file=file),
            f"--top-p 2.0: .* \\(--top-p comes from {file}\\)$",
        ),
        (settings(parser, MLX_SAFE_TEMP="-3"), r"\(--temp comes from MLX_SAFE_TEMP\)$"),
        (settings(parser, "--temp=-3"), "must be at least 0.0$"),
    ):
        with pytest.raises(CommandError, match=says), given.with_places():
            check_flags(given.values, given.values)


@pytest.mark.parametrize("start", ["--print-config", "--supervise"])
def test_a_mistake_in_the_environment_names_its_variable(start: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mlx_safe", "serve", "--port", "0", start],
        env={**os.environ, "MLX_SAFE_SSL_KEYFILE": "/none", "MLX_SAFE_TEMP": "-3"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.endswith("(--ssl-keyfile comes from MLX_SAFE_SSL_KEYFILE)")


def test_a_file_with_a_key_that_others_can_read_is_told(file: Path) -> None:
    def told() -> str:
        flags = ("--config", str(file), "--print-config")
        done = subprocess.run(
            [sys.executable, "-m", "mlx_safe", "serve", *flags],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert "s3cret" not in done.stdout + done.stderr
        return done.stderr

    file.write_text("port = 9001\n")
    assert told() == ""
    file.write_text('api-key = "s3cret"\n')
    file.chmod(0o644)
    assert f"--config {file}: others can read it (chmod 600)" in told()
    file.chmod(0o600)
    assert told() == ""


def test_a_flag_that_there_is_not_is_guessed_at() -> None:
    with pytest.raises(CommandError, match=r"--modle x; did you mean --model\?; see"):
        parser = Parser(prog="it")
        parser.add_argument("--model")
        parser.parse_args(["--modle", "x"])


def test_what_is_printed_can_be_read_and_has_no_secret(
    parser: Parser, file: Path, tmp_path: Path
) -> None:
    before = settings(
        parser, "--api-key", "s3cret", "--chat-template", 'a "model"\x7f\n', file=file
    )
    text = printed(parser, before)
    assert "s3cret" not in text
    assert "# api-key is not shown (command line)" in text
    assert f"port = 9001  # {file}" in text
    assert "# top-p = 1.0" in text
    again = tmp_path / "again.toml"
    again.write_text(text)
    after = vars(settings(parser, file=again).values)
    for name, value in vars(before.values).items():
        if name not in ("api_key", "config"):
            assert after[name] == value, name


def test_what_is_not_set_is_printed_with_what_applies(parser: Parser) -> None:
    text = printed(parser, settings(parser))
    assert "# kv-disk-bytes is not set (default with --kv-dir: 20G)\n" in text
    assert parse_size("20G") == DISK_BYTES
    assert "bytes is not set (default: 90% of what Metal recommends, or" in text
    assert "# model is not set\n" in text


def test_the_supervisor_knows_its_own_flags_alone(file: Path) -> None:
    found = resolve(
        own_parser(), ["--temp", "1", "--config", str(file)], {}, partial=True
    )
    assert (found.values.port, found.values.supervise) == (9001, True)


def test_the_help_has_each_flag_once(parser: Parser) -> None:
    text = parser.format_help()
    described = text.partition("\n\n")[2]
    for action in parser._actions:
        option = action.option_strings[-1]
        lines = [x for x in described.splitlines() if x.strip().startswith(option)]
        starts = [x for x in lines if x.split()[0].rstrip(",") == option]
        assert len(starts) == 1 or option == "--help", option
    assert "more of mlx_lm.server" not in described  # each has its place


def test_the_example_is_taken(parser: Parser) -> None:
    text = (EXAMPLES / "mlx-safe.toml").read_text(encoding="utf-8")
    found = settings(parser, file=EXAMPLES / "mlx-safe.toml").values
    assert found.served_model_name == ["qwen"] and found.only_served_model
    # What is a comment in it would be taken as well.
    for line in re.findall(r"^# ([a-z-]+ = .*)$", text, re.MULTILINE):
        key = line.partition(" ")[0]
        assert f"--{key}" in parser._option_string_actions


def test_the_services_start_with_flags_that_there_are(parser: Parser) -> None:
    unit = (EXAMPLES / "mlx-safe.service").read_text(encoding="utf-8")
    (start,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    with (EXAMPLES / "org.mlx-safe.serve.plist").open("rb") as file:
        plist = plistlib.load(file)
    cluster = (EXAMPLES / "kubernetes.yaml").read_text(encoding="utf-8")
    listed = re.search(r"^ +args:\n((?: +(?:- |#).*\n)+)", cluster, re.MULTILINE)
    assert listed is not None
    pod = re.findall(r"^ +- (\S+)$", listed[1], re.MULTILINE)
    for words in (start.split(), plist["ProgramArguments"], pod):
        assert words[0].rpartition("/")[2] == "mlx-safe" and words[1] == "serve"
        assert parser.parse_args(words[2:]).supervise
    # Kubernetes would name the service in MLX_SAFE_PORT, and no pod would start.
    assert re.search(r"^ +enableServiceLinks: false$", cluster, re.MULTILINE)
    assert plist["StandardErrorPath"] == plist["StandardOutPath"]
    # What is opened by launchd cannot be moved away.
    log = plist["ProgramArguments"][-1]
    assert log.endswith("serve.log") and log != plist["StandardErrorPath"]
