"""The flags of ``mlx-safe serve``, and what must hold for them before a model loads."""

from __future__ import annotations

import argparse
from pathlib import Path

from .._command import CommandError, Parser
from ..memory.sizes import parse_size
from . import logs, supervisor
from .body import DEFAULT_MAX_BYTES
from .mlx_lm.protocols import CliArgs

__all__ = ["check_flags", "check_paths", "own_parser"]

# Fewer tokens than a model's templates take are of no use to anyone.
KV_WINDOW_MIN = 32


def own_parser() -> Parser:
    """The parser of the flags that mlx-lm does not have, or takes as any text."""
    parser = Parser(
        prog="mlx-safe serve",
        add_help=False,
        allow_abbrev=False,
        description="mlx_lm.server, protected. Takes these options, and every "
        "option of mlx_lm.server, listed below.",
    )
    _add_recovery_flags(parser)
    _add_prompt_flags(parser)
    _add_memory_flags(parser)
    _add_model_flags(parser)
    _add_disk_flags(parser)
    _add_log_flags(parser)
    return parser


def _add_log_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--log-level",
        type=str.upper,
        choices=logs.LEVELS,
        default="INFO",
        help="what is logged, the line of each request (INFO) among it (default: INFO)",
    )
    parser.add_argument(
        "--log-format",
        choices=logs.FORMATS,
        default="text",
        help="how: as text, or an object of JSON a line (default: text)",
    )
    parser.add_argument(
        "--require-hooks",
        action="store_true",
        help="on a Mac, do not start where faults of the GPU cannot be caught",
    )


def _add_recovery_flags(parser: Parser) -> None:
    parser.add_argument(
        "--allow-untested-mlx-lm",
        action="store_true",
        help="start with an mlx-lm that is newer than the tested ones, if it has "
        "all that this server needs",
    )
    parser.add_argument(
        "--replay-attempts",
        type=_count,
        default=2,
        metavar="N",
        help="how often a request is run again after a fault of the GPU before its "
        "client gets a 503; 0: never (default: 2)",
    )
    parser.add_argument(
        "--stall-timeout",
        type=_seconds,
        default=600.0,
        metavar="SECONDS",
        help="a generation step without progress for so long is fatal: clients get a "
        "503, and the process ends with status 75; 0: never (default: 600)",
    )
    parser.add_argument(
        "--step-seconds",
        type=_seconds,
        default=5.0,
        metavar="SECONDS",
        help="how long a step of a prompt may take: as many tokens are read in one; "
        "0: --prefill-step-size alone counts (default: 5)",
    )
    parser.add_argument(
        "--keepalive-after",
        type=_seconds,
        default=5.0,
        metavar="SECONDS",
        help="a stream that has no token after so long gets comments, which begin it "
        "with a 200; a failure before has its own status (default: 5)",
    )
    parser.add_argument(
        "--supervise",
        action="store_true",
        help="start the server again when it ends, in a small parent process that "
        "keeps the port open meanwhile",
    )
    parser.add_argument(
        "--hold-seconds",
        type=_seconds,
        default=supervisor.HOLD_S,
        metavar="SECONDS",
        help="with --supervise: how long a request waits for the next server before "
        "its client gets a 503; 0: not at all (default: 60)",
    )


def _add_prompt_flags(parser: Parser) -> None:
    parser.add_argument(
        "--max-prompt-tokens",
        type=_positive,
        metavar="N",
        help="tokens that a prompt may have (default: what the model was made for)",
    )
    parser.add_argument(
        "--prompt-overflow-policy",
        choices=["error", "truncate"],
        default="error",
        help="a longer prompt is refused with a 400 (error), or the oldest turns of "
        "the chat are left out (truncate) (default: error)",
    )
    parser.add_argument(
        "--prompt-keep-tokens",
        type=_count,
        default=0,
        metavar="N",
        help="with truncate: tokens of the beginning that stay; of a chat, whole "
        "messages after the system prompt, which always stays (default: 0)",
    )
    parser.add_argument(
        "--max-kv-size",
        type=_window,
        metavar="N",
        help="tokens that a request's KV cache holds: the model sees the last N "
        "only, and answers get worse beyond them (default: no limit)",
    )


def _add_memory_flags(parser: Parser) -> None:
    parser.add_argument(
        "--max-request-bytes",
        type=_size,
        default=DEFAULT_MAX_BYTES,
        metavar="SIZE",
        help="how large the body of a request may be; a larger one is a 413 before it "
        "is read (default: 32M)",
    )
    parser.add_argument(
        "--max-active-memory-bytes",
        type=_size,
        metavar="SIZE",
        help="how much MLX may hold at any time, such as 20G (default: 90%% of what "
        "Metal recommends, or 75%% of the RAM without a GPU)",
    )
    parser.add_argument(
        "--max-active-kv-bytes",
        type=_size,
        metavar="SIZE",
        help="how much the KV caches of the requests that run may hold together "
        "(default: what the ceiling leaves)",
    )
    parser.add_argument(
        "--memory-wait",
        type=_seconds,
        default=60.0,
        metavar="SECONDS",
        help="how long a request that does not fit now waits for those that run "
        "before its client gets a 503; 0: not at all (default: 60)",
    )
    parser.add_argument(
        "--prompt-cache-bytes",
        type=_size,
        metavar="SIZE",
        help="how much the prompt cache may hold (default: half of what the model "
        "leaves below the ceiling)",
    )
    parser.add_argument(
        "--prefill-step-size",
        type=_positive,
        metavar="N",
        help="how many tokens of a prompt are read at once; less when memory is "
        "short (default: 2048)",
    )


def _add_model_flags(parser: Parser) -> None:
    parser.add_argument(
        "--served-model-name",
        action="append",
        type=_name,
        default=[],
        metavar="NAME",
        help="a name for --model: requests may use it, and /v1/models lists it "
        "instead of the path; may be given more than once",
    )
    parser.add_argument(
        "--only-served-model",
        action="store_true",
        help="requests may name nothing but the model that the server was started "
        "with: no other model, adapter or draft model",
    )
    parser.add_argument(
        "--allow-model-download",
        action="store_true",
        help="download a model of the hub that a request names (default: a model "
        "that is not on this machine is a 404)",
    )


def _add_disk_flags(parser: Parser) -> None:
    parser.add_argument(
        "--kv-dir",
        metavar="DIR",
        help="keep KV caches on disk in DIR, so that conversations outlive memory, "
        "faults and the process; the files hold what was said (default: not kept)",
    )
    parser.add_argument(
        "--kv-disk-bytes",
        type=_size,
        metavar="SIZE",
        help="how much --kv-dir may hold, such as 50G; what was used least goes first "
        "(default with --kv-dir: 20G)",
    )


def _name(text: str) -> str:
    # One that no request could name: `schema.Name`.
    if not text.strip() or text != text.strip() or not text.isprintable():
        raise argparse.ArgumentTypeError(f"must be a name, not {text!r}")
    return text


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}")
    return int(text)


def _positive(text: str) -> int:
    value = _count(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text!r}")
    return value


def _window(text: str) -> int:
    value = _count(text)
    if value < KV_WINDOW_MIN:
        raise argparse.ArgumentTypeError(
            f"must be at least {KV_WINDOW_MIN}, not {text!r}"
        )
    return value


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def _seconds(text: str) -> float:
    try:
        value = float(text)
        if not 0 <= value <= 1e6:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a number of seconds from 0 to 1000000, not {text!r}"
        ) from None
    return value


def check_paths(args: object) -> None:
    """Refuses paths that mlx-lm could not load, before it starts to load them.

    Args:
        args: with ``model``, ``draft_model`` and ``adapter_path``, each a str or None.

    Raises:
        CommandError: with the flag and what to do.
    """
    for flag in ("model", "draft_model", "adapter_path"):
        value = getattr(args, flag, None)
        if not value:
            continue
        option = "--" + flag.replace("_", "-")
        if _is_there(Path(value), f"{option} {value}"):
            config = Path(value) / "config.json"
            if flag != "adapter_path" and not _is_there(config, f"{option} {value}"):
                raise CommandError(
                    f"{option} {value}: there is no config.json in it; it must be "
                    "a directory with an MLX model"
                )
        elif flag == "adapter_path" or not _may_be_on_the_hub(value):
            # Nor does mlx-lm: it opens the name as it is.
            is_home = value.startswith("~")
            home = " (the shell does not expand ~ here)" if is_home else ""
            raise CommandError(
                f"{option} {value}: there is no such directory{home}; give the path of "
                "an MLX model, or a hub name like mlx-community/SmolLM2-135M-Instruct"
            )


def _is_there(path: Path, given: str) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as e:
        raise CommandError(f"{given}: cannot be read: {e.strerror}") from e
    return True


def check_flags(options: argparse.Namespace, args: CliArgs) -> None:
    """Refuses flags that cannot work, alone or together. Reads directories.

    Args:
        options: what `own_parser` has found. args: what mlx-lm's parser has found.

    Raises:
        CommandError: with the flag and what to do.
    """
    check_paths(args)
    _check_kv_flags(options, args)
    _check_model_flags(options, args)
    if options.kv_disk_bytes and not options.kv_dir:
        raise CommandError("--kv-disk-bytes needs --kv-dir")


def _check_kv_flags(options: argparse.Namespace, args: CliArgs) -> None:
    if args.prompt_cache_size < 0:
        raise CommandError("--prompt-cache-size: must be 0 or more")
    # With 0 mlx-lm takes requests and never begins with them.
    for flag in ("prompt_concurrency", "decode_concurrency"):
        if getattr(args, flag) < 1:
            option = "--" + flag.replace("_", "-")
            raise CommandError(f"{option} {getattr(args, flag)}: must be at least 1")
    if options.max_kv_size is None:
        return
    # mlx-lm cannot rewind or quantize the rotating caches that it needs.
    for flag in ("draft_model", "kv_bits"):
        if getattr(args, flag, None):
            option = "--" + flag.replace("_", "-")
            raise CommandError(f"--max-kv-size cannot be used with {option}")


def _check_model_flags(options: argparse.Namespace, args: CliArgs) -> None:
    for flag in ("served_model_name", "only_served_model"):
        if getattr(options, flag) and not args.model:
            raise CommandError(f"--{flag.replace('_', '-')} needs --model")
    if options.only_served_model and options.allow_model_download:
        raise CommandError(
            "--only-served-model cannot be used with --allow-model-download"
        )


def _may_be_on_the_hub(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))
