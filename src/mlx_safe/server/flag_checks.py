"""What must hold for the flags before a model loads: paths, values, pairs of flags."""

from __future__ import annotations

import argparse
from pathlib import Path

from .._command import CommandError, endless_in
from .mlx_lm.protocols.models import CliArgs
from .replies import BadRequest

__all__ = ["check_flags", "check_paths"]


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
        option = _option(flag)
        if _is_there(Path(value), f"{option} {value}"):
            _check_directory(Path(value), f"{option} {value}", flag == "adapter_path")
        elif flag == "adapter_path" or not _may_be_on_the_hub(value):
            # Nor does mlx-lm: it opens the name as it is.
            is_home = value.startswith("~")
            home = " (the shell does not expand ~ here)" if is_home else ""
            raise CommandError(
                f"{option} {value}: there is no such directory{home}; give the path of "
                "an MLX model, or a hub name like mlx-community/SmolLM2-135M-Instruct"
            )


def _check_directory(path: Path, given: str, is_adapter: bool) -> None:
    first = "adapter_config.json" if is_adapter else "config.json"
    # Where one of them is a pipe, mlx-lm would wait for who writes into it.
    if _is_there(path / first, given) and (path / first).is_file():
        name = endless_in(path)
        if name is None:
            return
        raise CommandError(f"{given}: {name} in it is no file")
    what = "an adapter of mlx-lm's" if is_adapter else "an MLX model"
    raise CommandError(
        f"{given}: there is no {first} in it; it must be a directory with {what}"
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

    Values for what requests leave open become those that a request's would.

    Args:
        options: with the flags of this server. args: with those of mlx-lm's.

    Raises:
        CommandError: with the flag and what to do.
    """
    check_paths(args)
    if options.ssl_keyfile is not None and options.ssl_certfile is None:
        raise CommandError("--ssl-keyfile needs --ssl-certfile")
    _check_origins(args)
    _check_template(args)
    _settle_defaults(args)
    _check_kv_flags(options, args)
    _check_model_flags(options, args)
    for flag in ("kv_disk_bytes", "kv_free_bytes"):
        if getattr(options, flag) is not None and not options.kv_dir:
            raise CommandError(f"--{flag.replace('_', '-')} needs --kv-dir")


def _check_origins(args: CliArgs) -> None:
    for origin in args.allowed_origins:
        if not origin.strip() or not origin.isprintable():
            raise CommandError(f"--allowed-origins: {origin!r} is no origin")


def _check_template(args: CliArgs) -> None:
    """A chat template that cannot be one would make every chat a 400, or nonsense."""
    if not args.chat_template:
        return
    from .mlx_lm.chat_template import why_not

    why = why_not(args.chat_template)
    if why is not None:
        raise CommandError(f"--chat-template: {why}")


# What requests leave open: flag, and the field that it stands for.
DEFAULTS = {
    "temp": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "max_tokens": "max_tokens",
    "num_draft_tokens": "num_draft_tokens",
    "chat_template_args": "chat_template_kwargs",
}


def _settle_defaults(args: CliArgs) -> None:
    """A request without a field must be able to have the default as that field."""
    from . import schema  # needs pydantic, which was not looked for before

    there = {flag: field for flag, field in DEFAULTS.items() if hasattr(args, flag)}
    try:
        settled = schema.settled({there[f]: getattr(args, f) for f in there})
    except BadRequest as e:
        flag = next((f for f in there if there[f] == e.param), "")
        what = str(e).removeprefix(e.param or "").strip().rstrip(".")
        given = f"{_option(flag)} {getattr(args, flag, '')}"
        raise CommandError(f"{given}: {what}") from None
    for flag, field in there.items():
        if field in settled:
            setattr(args, flag, settled[field])


def _option(flag: str) -> str:
    return "--" + flag.replace("_", "-")


# Of MLX's quantization (0.31 to 0.32): the widths and the groups that have a kernel.
KV_BITS = (2, 3, 4, 5, 6, 8)
KV_GROUPS = (32, 64, 128)


def _check_quantization(args: CliArgs) -> None:
    for flag, known in (("kv_bits", KV_BITS), ("kv_group_size", KV_GROUPS)):
        value = getattr(args, flag, None)
        if value is not None and value not in known:
            names = ", ".join(map(str, known))
            raise CommandError(f"{_option(flag)} {value}: must be one of {names}")
    start = getattr(args, "quantized_kv_start", 0)
    if start < 0:
        raise CommandError(f"--quantized-kv-start {start}: must be 0 or more")


def _check_kv_flags(options: argparse.Namespace, args: CliArgs) -> None:
    if args.prompt_cache_size < 0:
        raise CommandError("--prompt-cache-size: must be 0 or more")
    # With 0 mlx-lm takes requests and never begins with them.
    for flag in ("prompt_concurrency", "decode_concurrency"):
        if getattr(args, flag) < 1:
            option = _option(flag)
            raise CommandError(f"{option} {getattr(args, flag)}: must be at least 1")
    _check_quantization(args)
    if options.max_kv_size is None:
        return
    # mlx-lm cannot rewind or quantize the rotating caches that it needs.
    for flag in ("draft_model", "kv_bits"):
        if getattr(args, flag, None):
            option = _option(flag)
            raise CommandError(f"--max-kv-size cannot be used with {option}")


def _check_model_flags(options: argparse.Namespace, args: CliArgs) -> None:
    for flag in ("served_model_name", "only_served_model"):
        if getattr(options, flag) and not args.model:
            raise CommandError(f"{_option(flag)} needs --model")
    if options.only_served_model and options.allow_model_download:
        raise CommandError(
            "--only-served-model cannot be used with --allow-model-download"
        )


def _may_be_on_the_hub(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))
