"""Starting the server: what it takes, and what it says when it cannot."""

from __future__ import annotations

import errno
import functools
import os
import re
import shutil
import socket
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest

from mlx_safe.cli import main
from mlx_safe.server.supervisor import cannot_listen
from support import child, warm
from support.models import make_fp8
from support.programs import program
from support.server import Server, free_port


def serve(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return warm.run(
        f"""
        import sys
        from mlx_safe.cli import main
        sys.exit(main(["serve", *{list(arguments)!r}]))
        """,
        timeout=180,
        **environment,
    )


def assert_one_clear_line(
    done: subprocess.CompletedProcess[str], *contains: str
) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "usage:" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    for text in contains:
        assert text in last


def test_a_model_that_does_not_exist() -> None:
    done = serve("--model", "/no/such/model", "--port", str(free_port()))
    assert_one_clear_line(done, "/no/such/model", "there is no such directory")


@pytest.mark.parametrize("flag", ["--model", "--draft-model"])
def test_a_mistyped_path_that_might_be_a_name_of_the_hub(
    tiny_model: Path, flag: str
) -> None:
    """The hub's libraries do not say what they were looking for."""
    models = {"--model": str(tiny_model), flag: "models/nosuch"}
    arguments = [word for pair in models.items() for word in pair]
    done = serve(*arguments, "--port", str(free_port()), HF_HUB_OFFLINE="1")
    said = f"there is no directory models/nosuch here ({flag}), and on the hub: "
    assert_one_clear_line(done, "the model cannot be loaded: ", said)
    assert done.stderr.count("cannot be loaded") == 1


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    done = serve("--model", str(tmp_path), "--port", str(free_port()))
    assert_one_clear_line(done, "there is no config.json")


@pytest.mark.parametrize("flag", ["--model", "--draft-model", "--adapter-path"])
@pytest.mark.parametrize("name", ["config", "other"])
def test_a_pipe_in_a_directory(tmp_path: Path, flag: str, name: str) -> None:
    """mlx-lm would wait for ever for who writes into the pipe."""
    config = "adapter_config.json" if flag == "--adapter-path" else "config.json"
    if name == "other":
        (tmp_path / config).write_text("{}")
    os.mkfifo(tmp_path / (config if name == "config" else "tokenizer.json"))
    said = "tokenizer.json in it is no file"
    if name == "config":
        said = f"there is no {config} in it"
    done = serve(flag, str(tmp_path), "--port", str(free_port()))
    assert_one_clear_line(done, f"{flag} {tmp_path}: {said}")


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    done = serve("--model", str(tmp_path), "--port", str(free_port()))
    assert_one_clear_line(done, f"the model cannot be loaded: --model {tmp_path}: ")
    (tmp_path / "config.json").write_text("{")
    done = serve("--model", str(tmp_path), "--port", str(free_port()))
    assert_one_clear_line(done, f"--model {tmp_path}: a file is not JSON: ")


def test_a_model_whose_answers_would_be_noise(tiny_model: Path, tmp_path: Path) -> None:
    """MLX reads FP8 weights as the whole numbers that their bits are."""
    model = shutil.copytree(tiny_model, tmp_path / "fp8")
    make_fp8(model)
    said = ".weight is uint8, as MLX reads FP8, and mlx-lm does not decode it"
    done = serve("--model", str(model), "--port", str(free_port()))
    assert_one_clear_line(done, f"the model cannot be loaded: --model {model}: ", said)
    done = warm.run(
        f"""
        import sys
        from mlx_safe.cli import main
        sys.exit(main(["doctor", "--model", {str(model)!r}]))
        """,
        timeout=180,
    )
    assert_one_clear_line(done, f"--model {model}: cannot be loaded: ", said)
    with Server(tiny_model) as server:
        refused = server.wait_ready().chat(model=str(model))
        assert refused.error["code"] == "model_not_found"
        assert server.chat().status == 200
        assert said in server.log


def test_paths_that_cannot_be_read_are_no_tracebacks(tmp_path: Path) -> None:
    from mlx_safe._command import CommandError
    from mlx_safe.server.flag_checks import check_paths

    # What may not be read is read all the same by root, as whom CI runs.
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path, why in (
        (str(loop), f"cannot be read: {os.strerror(errno.ELOOP)}"),
        ("/" + 300 * "a", f"cannot be read: {os.strerror(errno.ENAMETOOLONG)}"),
        (
            "~nobody-of-this-name/m",
            "no such directory (the shell does not expand ~ here)",
        ),
        ("~/m", "no such directory (the shell does not expand ~ here)"),
    ):
        with pytest.raises(CommandError, match=re.escape(why)):
            check_paths(Namespace(model=path))


def test_somebody_elses_message_in_one_line() -> None:
    """The hub's and transformers' begin with a line that says nothing."""
    from mlx_safe._command import in_one_line

    assert in_one_line(ValueError("one of:\n(1) a\n(2) b")) == "one of: (1) a (2) b"
    assert in_one_line(ValueError()) == "ValueError"
    assert len(in_one_line(ValueError("model.layers.0, " * 1000))) == 500


@pytest.mark.parametrize(
    "message",
    [
        "[metal::malloc] Attempting to allocate 17179869184 bytes which is greater "
        "than the maximum allowed buffer size of 9534832640 bytes.",
        "[METAL] Command buffer execution failed: Insufficient Memory "
        "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
    ],
)
def test_no_memory_for_the_model_is_no_mistake(tiny_model: Path, message: str) -> None:
    """What died before may not have given its memory back yet: try again."""
    done = child.run(program("cannot_load"), message, tiny_model)
    assert done.returncode == 75, done.stderr
    assert "the model cannot be loaded: " + message[:15] in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use(tiny_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = str(s.getsockname()[1])
        done = serve("--model", str(tiny_model), "--port", port)
    assert_one_clear_line(done, f"cannot listen on 127.0.0.1:{port}", "--port")


@pytest.mark.parametrize(
    ("arguments", "contains"),
    [
        (("--port", "123456"), "--port: must be from 0 to 65535, not '123456'"),
        (("--temp", "-3"), "--temp -3.0: must be at least 0"),
        (("--temp", "nan"), "--temp nan: must be a finite number"),
        (("--temp", "hot"), "--temp: must be a number, not 'hot'"),
        (("--top-p", "1.5"), "--top-p 1.5: must be at most 1"),
        (("--min-p", "-1"), "--min-p -1.0: must be at least 0"),
        (("--top-k", "-7"), "--top-k -7: must be at least -1"),
        (("--max-tokens", "0"), "--max-tokens 0: must be at least 1"),
        (("--num-draft-tokens", "-1"), "--num-draft-tokens -1: must be at least 0"),
        (("--chat-template-args", "[1]"), "--chat-template-args [1]: must be an"),
        (("--chat-template-args", "{a"), "--chat-template-args: must be JSON, not"),
        (("--chat-template-args", "[" * 100_000), "too many brackets"),
        (("--ssl-certfile", "/no/cert"), "--ssl-certfile /no/cert: cannot be read"),
        (("--ssl-keyfile", "/no/key"), "--ssl-keyfile needs --ssl-certfile"),
        (("--api-key-file", "/no/key"), "--api-key-file /no/key: cannot be read"),
        (("--config", "/no/config"), "--config /no/config: cannot be read"),
        (("--host", "no.such.host.invalid"), "--host no.such.host.invalid"),
        (("--host", "a..b"), "--host a..b: is no name of a host"),
        (("--host", "192.0.2.1"), "give --host an address of this machine"),
        (("--adapter-path", "/no/adapter"), "--adapter-path /no/adapter"),
        (("--no-such-flag",), "--no-such-flag"),
        (("--max-active-memory-bytes", "5X"), "not '5X'"),
        (("--served-model-name", "a\tname"), "must be a name"),
    ],
)
def test_bad_flags(tiny_model: Path, arguments: tuple[str, ...], contains: str) -> None:
    done = serve("--model", str(tiny_model), "--port", str(free_port()), *arguments)
    assert_one_clear_line(done, contains)


def test_a_port_that_is_roots() -> None:
    refused = PermissionError(errno.EACCES, "no")
    said = str(cannot_listen("127.0.0.1", 80, refused))
    assert said == (
        f"cannot listen on 127.0.0.1:80: {os.strerror(errno.EACCES)}; those below "
        "1024 are root's: choose a larger --port"
    )
    # What else forbids it, SELinux say.
    said = str(cannot_listen("127.0.0.1", 8080, refused))
    assert said.endswith("choose another --host or --port")


@pytest.mark.parametrize("command", ["run", "doctor", "top", "status", "reports", "kv"])
def test_each_command_has_a_help(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: mlx-safe {command} ")


def test_a_bad_plan(tiny_model: Path) -> None:
    done = serve("--model", str(tiny_model), MLX_SAFE_INJECT="sometimes")
    assert_one_clear_line(done, "MLX_SAFE_INJECT", "sometimes")


@pytest.mark.parametrize(
    ("version", "contains"),
    [("0.31.1", "too old"), ("0.33.0", "newer than"), ("2.0", "newer than")],
)
def test_an_mlx_lm_that_does_not_fit(version: str, contains: str) -> None:
    done = child.run(
        f"""
        import sys
        from mlx_safe.cli import main
        from mlx_safe.server.mlx_lm import requirements
        requirements.installed_version = lambda: {version!r}
        sys.exit(main(["serve"]))
        """
    )
    assert_one_clear_line(done, contains, "pip install 'mlx-lm>=0.31.3,<0.33'")


def test_an_mlx_lm_whose_seams_have_moved() -> None:
    done = child.run(
        """
        import sys
        import mlx_lm.server as server
        from mlx_safe.cli import main
        del server.ResponseGenerator._next_request
        sys.exit(main(["serve", "--allow-untested-mlx-lm"]))
        """
    )
    assert_one_clear_line(done, "ResponseGenerator._next_request is gone")


def test_the_installed_mlx_lm_has_every_seam() -> None:
    import mlx_lm.server

    from mlx_safe.server.mlx_lm import seams

    assert seams.missing_seams(mlx_lm.server) == []


@pytest.mark.parametrize(
    ("seam", "gone"),
    [
        ("get_system_fingerprint", "mlx_lm.server.get_system_fingerprint"),
        ("APIHandler.handle_models_request", "APIHandler.handle_models_request"),
        ("BatchGenerator.next", "BatchGenerator.next"),
        ("GenerationContext", "GenerationContext.prompt"),
        ("LRUPromptCache.nbytes", "LRUPromptCache.nbytes"),
    ],
)
def test_a_seam_that_is_gone(
    monkeypatch: pytest.MonkeyPatch, seam: str, gone: str
) -> None:
    import mlx_lm.server

    from mlx_safe.server.mlx_lm import seams

    monkeypatch.delattr(f"mlx_lm.server.{seam}")
    assert f"{gone} is gone" in "; ".join(seams.missing_seams(mlx_lm.server))


@pytest.mark.parametrize(
    ("name", "attribute"),
    [
        ("BatchGenerator", "_unprocessed_sequences"),
        ("BatchGenerator", "_prompt_batch"),
        ("ResponseGenerator", "requests"),
        ("LRUPromptCache", "_trie"),
    ],
)
def test_an_attribute_that_has_another_name(
    monkeypatch: pytest.MonkeyPatch, name: str, attribute: str
) -> None:
    """Nothing but an object that was made can tell."""
    import mlx_lm.server

    from mlx_safe.server.mlx_lm import seams

    cls = getattr(mlx_lm.server, name)
    make = cls.__init__

    @functools.wraps(make)
    def renamed(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        setattr(self, f"{attribute}_", self.__dict__.pop(attribute))

    monkeypatch.setattr(cls, "__init__", renamed)
    missing = "; ".join(seams.missing_seams(mlx_lm.server))
    assert f"{name}.{attribute}" in missing and "is gone" in missing


def test_a_flag_of_mlx_lm_that_is_gone() -> None:
    from mlx_safe._command import CommandError
    from mlx_safe.server.mlx_lm import requirements

    flags = ("model", "draft_model", "num_draft_tokens", "prefill_step_size")
    cli_args = SimpleNamespace(**dict.fromkeys(flags), prompt_cache_size=1)
    provider = SimpleNamespace(
        model=None, draft_model=None, model_key=None, cli_args=cli_args
    )
    with pytest.raises(CommandError, match=r"\.prompt_cache_bytes is gone"):
        requirements.check_provider(provider)


@pytest.mark.parametrize(
    ("missing", "package"),
    [
        ("mlx", "mlx"),
        ("mlx_lm", "mlx-lm>=0.31.3,<0.33"),
        ("prometheus_client", "prometheus-client>=0.20"),
        ("pydantic", "pydantic>=2.7"),
    ],
)
def test_without_a_package(missing: str, package: str) -> None:
    """What it says to install is what is missing: mlx-safe is on no index."""
    done = child.run(program("lacks_a_package"), missing)
    assert_one_clear_line(done, "is not installed", f"pip install '{package}")


NO_DRIVER = "libcuda.so.1: cannot open shared object file: No such file or directory"


@pytest.mark.parametrize("command", ["serve", "doctor"])
@pytest.mark.parametrize(
    ("failure", "why"),
    [
        # Not every library that is missing or does not fit is an ImportError.
        (
            OSError("libmlx.so:\n no such file"),
            "mlx cannot be imported (libmlx.so: no ",
        ),
        # What mlx[cuda13] 0.32.4 raises on a machine without a driver.
        (ImportError(NO_DRIVER), "this machine has no NVIDIA driver (libcuda.so.1)"),
    ],
)
def test_a_broken_mlx(
    tmp_path: Path, command: str, failure: Exception, why: str
) -> None:
    (tmp_path / "mlx").mkdir()
    core = tmp_path / "mlx" / "core.py"
    core.write_text(f"raise {failure!r}")
    done = child.run(
        f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from mlx_safe.cli import main
        sys.exit(main([{command!r}]))
        """
    )
    assert_one_clear_line(done, f"mlx-safe: {why}", "pip install")
    assert len(done.stderr.splitlines()) == 1


def test_every_flag_of_mlx_lm_is_taken() -> None:
    stock = subprocess.run(
        [sys.executable, "-m", "mlx_lm", "server", "--help"],
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    ).stdout
    ours = serve("--help")
    assert ours.returncode == 0
    flags = set(re.findall(r"--[a-z][a-z-]+", stock))
    assert len(flags) > 20
    assert flags <= set(re.findall(r"--[a-z][a-z-]+", ours.stdout))


def test_flags_arrive(tiny_model: Path) -> None:
    with Server(
        tiny_model, "--max-tokens", "3", "--log-level", "DEBUG"
    ).wait_ready() as server:
        answer = server.post({"messages": [{"role": "user", "content": "x"}]})
        assert answer.json["usage"]["completion_tokens"] == 3
        server.wait_for_log("DEBUG")


def test_sigterm_ends_it_quietly(tiny_model: Path) -> None:
    server = Server(tiny_model).wait_ready()
    server.chat()
    assert server.stop() == 0
    assert "Traceback" not in server.log
    assert "terminate" not in server.log


def test_health_and_clients_wait_for_the_model(tiny_model: Path) -> None:
    """While the model loads, /health says so and an early request waits."""
    slow = program("loads_when_asked")
    with Server(tiny_model, program=slow) as server:
        server.wait_listening()
        messages = [{"role": "user", "content": "early"}]
        with server.connected({"messages": messages, "max_tokens": 8}) as early:
            # The server accepts one after the other, so it has the request by now.
            health = server.get("/health")
            assert health.status == 503
            assert health.json["reason"] == "the model is being loaded"
            server.tell("load")
            assert b" 200 OK" in early.recv(100)
        assert server.get("/health").status == 200


def test_cli_usage() -> None:
    def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "mlx_safe", *arguments],
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )

    assert cli("--help").returncode == 0
    assert cli("--version").stdout.startswith("mlx-safe ")
    assert '"mode"' in cli("status", "--json").stdout
    assert cli("status").returncode == 0
    assert_one_clear_line(cli("fly"), "no command 'fly'")
    assert_one_clear_line(cli("status", "--fast"), "see mlx-safe status --help")


def cli_into(stdout: int | IO[str], *arguments: str) -> tuple[int, str]:
    """(exit status, stderr) of the command that writes to ``stdout``."""
    done = subprocess.run(
        [sys.executable, "-m", "mlx_safe", *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=180,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("arguments", [("--help",), ("status",), ("serve", "--help")])
def test_whoever_reads_has_seen_enough(arguments: tuple[str, ...]) -> None:
    """As with `mlx-safe status | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert cli_into(writer, *arguments) == (141, "")
    finally:
        os.close(writer)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize(
    "arguments",
    [
        *(("status",), ("status", "--json"), ("--help",), ("top", "--help")),
        *(("run", "--help"), ("reports", "--help"), ("serve", "--help")),
    ],
)
def test_a_full_disk_is_one_line(arguments: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        told = "mlx-safe: stdout: No space left on device\n"
        assert cli_into(full, *arguments) == (2, told)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("arguments", [("fly",), ("serve", "--model", "/no/such")])
def test_a_mistake_is_status_2_where_nobody_can_be_told(
    arguments: tuple[str, ...],
) -> None:
    """A service's manager started it again and again: it was 1."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "mlx_safe", *arguments],
            stderr=full,
            timeout=180,
            check=False,
        )
    assert done.returncode == 2


def test_a_stdout_for_reading_is_one_line() -> None:
    with Path(os.devnull).open() as empty:
        told = "mlx-safe: stdout: Bad file descriptor\n"
        assert cli_into(empty, "--version") == (2, told)


@pytest.mark.parametrize(
    "arguments",
    [
        *(("--version",), ("--help",), ("status",), ("reports", "--help")),
        *(("serve", "--help"), ("serve", "--print-config"), ("run", "--help")),
    ],
)
def test_what_cannot_be_told_is_one_line(arguments: tuple[str, ...]) -> None:
    """It was status 0, and nothing."""
    done = child.run(
        f"""
        import os, sys
        os.close(1)
        sys.stdout = None
        from mlx_safe.cli import main
        sys.exit(main({list(arguments)!r}))
        """
    )
    assert (done.returncode, done.stderr) == (
        2,
        "mlx-safe: there is no stdout to write to\n",
    )


def test_a_path_that_the_terminal_has_not(tmp_path: Path) -> None:
    """It was a traceback."""
    done = child.run(
        "import sys; from mlx_safe.cli import main; sys.exit(main(['status']))",
        MLX_SAFE_REPORT_DIR=str(tmp_path / "ü"),
        PYTHONIOENCODING="ascii",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{tmp_path}/?\n" in done.stdout


STDOUT_IS_CLOSED = """
import os, sys
os.close(1)
sys.stdout = None
from mlx_safe.cli import main
sys.exit(main(["serve", *sys.argv[1:]]))
"""


def test_a_server_needs_no_stdout(tiny_model: Path) -> None:
    """As ``mlx-safe serve >&-`` has none: it ended with a traceback and status 1."""
    with Server(tiny_model, program=STDOUT_IS_CLOSED).wait_ready() as server:
        if sys.platform == "linux":  # or a KV cache, or a client, has the number
            opened = Path(f"/proc/{server.process.pid}/fd/1").readlink()
            assert opened == Path(os.devnull)
        assert server.stop() == 0
        assert "Traceback" not in server.log
    lost = Server(tiny_model, program=STDOUT_IS_CLOSED, inject="decode:3:4")
    with lost.wait_ready() as server:
        assert server.chat().status == 503
        assert server.wait() == 75


def test_a_supervisor_needs_no_stdout(tiny_model: Path) -> None:
    with Server(tiny_model, "--supervise", program=STDOUT_IS_CLOSED) as server:
        assert server.wait_ready().chat().status == 200
        assert server.stop() == 0


def test_a_program_needs_no_stdout() -> None:
    done = child.run(
        """
        import os, sys
        os.close(1)
        sys.stdout = None
        from mlx_safe.cli import main
        sys.exit(main(["run", "--", sys.executable, "-c", "print('lost')"]))
        """
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_what_may_be_missed_is_a_warning(tiny_model: Path) -> None:
    """It was a word in the middle of the line that the server is ready."""
    nowhere = {"MLX_SAFE_REPORT_DIR": "/dev/null/reports"}
    with Server(tiny_model, "--log-level", "warning", env=nowhere) as server:
        server.wait_ready()
        lost = "WARNING - nothing will say what ends this server: no crash reports: "
        assert lost in server.log
        assert server.log.count("/dev/null/reports") == 1  # one mistake, one line


def test_print_config_tells_of_names_that_mean_nothing(tiny_model: Path) -> None:
    done = serve("--model", str(tiny_model), "--print-config", MLX_SAFE_PROT="1")
    assert done.returncode == 0, done.stderr
    assert (
        "WARNING - MLX_SAFE_PROT in the environment belongs to no flag" in done.stderr
    )
    assert "MLX_SAFE_PROT" not in done.stdout
