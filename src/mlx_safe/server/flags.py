"""The flags of ``mlx-safe serve``, in the groups of its help."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from .._command import Parser, json_value, number, path_or_name
from ..memory.sizes import parse_size, parse_size_or_zero
from . import logs, supervisor
from .access import KEY_RULE, is_key
from .body import DEFAULT_MAX_BYTES

__all__ = ["own_parser", "whole_parser"]

CONFIGURATION = "configuration"
MODEL = "model"
ACCESS = "address and access"
ANSWERS = "what requests leave open"
PROMPTS = "prompts"
MEMORY = "memory"
DISK = "KV caches on disk"
RECOVERY = "when something fails"
LOG = "the log"
MORE = "more of mlx_lm.server"
GROUPS = (
    *(CONFIGURATION, MODEL, ACCESS, ANSWERS, PROMPTS),
    *(MEMORY, DISK, RECOVERY, LOG, MORE),
)

# Where a flag of mlx-lm's stands in the help; one that is not here is in `MORE`.
MLX_LM_GROUPS = {
    **dict.fromkeys(("model", "adapter_path", "draft_model", "pipeline"), MODEL),
    **dict.fromkeys(("trust_remote_code", "num_draft_tokens"), MODEL),
    **dict.fromkeys(("chat_template", "use_default_chat_template"), MODEL),
    "allowed_origins": ACCESS,
    **dict.fromkeys(("temp", "top_p", "top_k", "min_p", "max_tokens"), ANSWERS),
    "chat_template_args": ANSWERS,
    **dict.fromkeys(("decode_concurrency", "prompt_concurrency"), MEMORY),
    **dict.fromkeys(("prompt_cache_size", "kv_bits", "kv_group_size"), MEMORY),
    "quantized_kv_start": MEMORY,
}

# Fewer tokens than a model's templates take are of no use to anyone.
KV_WINDOW_MIN = 32
# MLX's positions are 32 bits wide: what is added to a larger number becomes negative.
COUNT_MAX = 2**30


def own_parser() -> Parser:
    """The parser of the flags that mlx-lm does not have, or takes as any text."""
    parser = Parser(
        prog="mlx-safe serve",
        add_help=False,
        allow_abbrev=False,
        description="mlx_lm.server, protected, with every flag of it. What the command "
        "line does not say is taken from the environment (MLX_SAFE_PORT for --port), "
        "then from --config.",
    )
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    _add_configuration_flags(groups[CONFIGURATION])
    _add_model_flags(groups[MODEL])
    _add_access_flags(groups[ACCESS])
    _add_prompt_flags(groups[PROMPTS])
    _add_memory_flags(groups[MEMORY])
    _add_disk_flags(groups[DISK])
    _add_recovery_flags(groups[RECOVERY])
    _add_log_flags(groups[LOG])
    return parser


def whole_parser(mlx_lm: argparse.ArgumentParser) -> Parser:
    """`own_parser` with the flags of mlx-lm's parser that it does not have."""
    parser = own_parser()
    groups = {group.title: group for group in parser._action_groups}
    own = parser._option_string_actions
    for action in mlx_lm._actions:
        same = [own[name] for name in action.option_strings if name in own]
        if not same:
            # A template has several lines, and "" as its default.
            if action.nargs != 0 and action.dest != "chat_template":
                action.type = _STRICT.get(action.type, action.type)
            groups[MLX_LM_GROUPS.get(action.dest, MORE)]._add_action(action)
        elif same[0].default is None:
            same[0].default = action.default
    return parser


def _add_configuration_flags(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "-h", "--help", action="store_true", help="print this help, and end"
    )
    parser.add_argument(
        "--config",
        type=path_or_name,
        metavar="FILE",
        help="a TOML file with flags under their own names, such as port = 8081",
    )
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print the flags that would hold, as such a file and with where each "
        "comes from, and end; secrets are left out",
    )


def _add_access_flags(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--host",
        type=path_or_name,
        default="127.0.0.1",
        metavar="NAME",
        help="the address to listen on (default: 127.0.0.1, this machine only)",
    )
    parser.add_argument(
        "--port",
        type=_port,
        default=8080,
        metavar="N",
        help="the port to listen on; 0: any that is free (default: 8080)",
    )
    parser.add_argument(
        "--api-key",
        type=_key,
        metavar="KEY",
        help="what clients must send, as OpenAI's and Anthropic's do; all but /health "
        "needs it. The list of processes shows it: better is --api-key-file, or "
        "MLX_SAFE_API_KEY in the environment (default: everyone may ask)",
    )
    parser.add_argument(
        "--api-key-file",
        type=path_or_name,
        metavar="FILE",
        help="a file with such keys, one on each line; any of them will do",
    )
    parser.add_argument(
        "--ssl-certfile",
        type=path_or_name,
        metavar="FILE",
        help="serve HTTPS with this certificate (PEM, with its chain)",
    )
    parser.add_argument(
        "--ssl-keyfile",
        type=path_or_name,
        metavar="FILE",
        help="the certificate's private key (PEM; default: in --ssl-certfile)",
    )
    parser.add_argument(
        "--status-page",
        choices=["loopback", "anywhere", "off"],
        default="loopback",
        help="who may see /status and /status.json: clients on this machine, all that "
        "may ask, or nobody (default: loopback)",
    )


def _add_log_flags(parser: argparse._ActionsContainer) -> None:
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
        "--log-file",
        type=path_or_name,
        metavar="FILE",
        help="append the log to FILE, which may be moved away at any time: the next "
        "line makes it anew (default: stderr)",
    )


def _add_recovery_flags(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--allow-untested-mlx-lm",
        action="store_true",
        help="start with an mlx-lm that is newer than the tested ones, if it has "
        "all that this server needs",
    )
    parser.add_argument(
        "--require-hooks",
        action="store_true",
        help="on a Mac, do not start where faults of the GPU cannot be caught",
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


def _add_prompt_flags(parser: argparse._ActionsContainer) -> None:
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


def _add_memory_flags(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--max-request-bytes",
        type=_size,
        default=DEFAULT_MAX_BYTES,
        metavar="SIZE",
        help="how large the body of a request may be; a larger one is a 413 before it "
        "is read (default: 32MiB)",
    )
    parser.add_argument(
        "--max-active-memory-bytes",
        type=_size,
        metavar="SIZE",
        help="how much MLX may hold at any time, such as 20G (default: 90%% of what "
        "Metal recommends, or of the card, or 75%% of the RAM without a GPU)",
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


def _add_model_flags(parser: argparse._ActionsContainer) -> None:
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


def _add_disk_flags(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--kv-dir",
        type=path_or_name,
        metavar="DIR",
        help="keep KV caches on disk in DIR, so that conversations outlive memory, "
        "faults and the process; the files hold the conversations (default: not kept)",
    )
    parser.add_argument(
        "--kv-disk-bytes",
        type=_size,
        metavar="SIZE",
        help="how much --kv-dir may hold, such as 50G; what was used least goes first "
        "(default with --kv-dir: 20G)",
    )
    parser.add_argument(
        "--kv-free-bytes",
        type=_size_or_zero,
        metavar="SIZE",
        help="what --kv-dir leaves free on its volume; 0: nothing "
        "(default: 10G, or a tenth of a volume under 100G)",
    )


def _name(text: str) -> str:
    # One that no request could name: `schema.Name`.
    if not text.strip() or text != text.strip() or not text.isprintable():
        raise argparse.ArgumentTypeError(f"must be a name, not {text!r}")
    return text


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be from 0 to 65535, not {text!r}")
    return int(text)


def _key(text: str) -> str:
    # Says nothing of the text, which is a secret.
    if not is_key(text):
        raise argparse.ArgumentTypeError(KEY_RULE)
    return text


def _whole(text: str) -> int:
    if not text.removeprefix("-").isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}")
    if len(text) > 20 or abs(int(text)) > COUNT_MAX:
        raise argparse.ArgumentTypeError(f"must be at most {COUNT_MAX}, not {text!r}")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}")
    return _whole(text)


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


def _size(text: str, parse: Callable[[str], int] = parse_size) -> int:
    try:
        return parse(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def _size_or_zero(text: str) -> int:
    return _size(text, parse_size_or_zero)


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


# What mlx-lm's flags take in the place of anything that Python makes one of.
_STRICT: dict[Any, Any] = {
    int: _whole,
    float: number,
    json.loads: json_value,
    **dict.fromkeys((str, None), path_or_name),
}
