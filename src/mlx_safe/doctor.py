"""``mlx-safe doctor``: what this machine is, what is active, and what fits."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from . import install
from ._command import (
    CommandError,
    Parser,
    in_one_line,
    need_mlx,
    path_or_name,
)
from .checks import BAD, ServerFlags, all_checks
from .kv.directory import Directory, NotOurs
from .kv.store import DISK_BYTES, Limits
from .memory.ceiling import FOOTPRINT_SHARE, GPU_SHARE, ceiling
from .memory.demand import Demand, step_sizes
from .memory.estimate import CacheCost, Transients, calibrate
from .memory.machine import Machine, Usage, read_machine, usage
from .memory.sizes import flag_size, format_size, parse_size, parse_size_or_zero
from .memory.sizing import Sizing, format_tokens, sizing

__all__ = ["doctor", "examine", "render", "wired_limit_advice"]

# mlx_lm.server's default.
STEP = 2048
# For macOS and all that is not MLX, when the wired limit is raised.
LEFT_TO_SYSTEM = 8 * 2**30


def doctor(arguments: Sequence[str]) -> int:
    """The command.

    Raises:
        CommandError: the model cannot be loaded; the message says why.
    """
    asked = _parser().parse_args(list(arguments))
    flags = ServerFlags.read(_servers_words(asked), os.environ)
    with _filled_in(asked, flags):
        found = _examined(asked, flags)
    print(json.dumps(found, indent=2) if asked.json else render(found))
    return 0


def _examined(asked: argparse.Namespace, flags: ServerFlags) -> dict[str, Any]:
    if asked.model is None and (asked.adapter_path or asked.draft_model):
        raise CommandError("--adapter-path and --draft-model need --model")
    found = examine(
        asked.model,
        _size("--max-active-memory-bytes", asked.max_active_memory_bytes),
        _size("--max-active-kv-bytes", asked.max_active_kv_bytes),
        adapter=asked.adapter_path,
        draft=asked.draft_model,
        flags=flags,
    )
    limits = _kv_limits(asked)
    if asked.kv_dir is not None:
        found["kv_disk"] = _kv_disk(asked.kv_dir, limits, found)
    return found


# What the server takes as well.
SERVERS_OWN = (
    *("model", "adapter_path", "draft_model", "max_active_memory_bytes"),
    *("max_active_kv_bytes", "kv_dir", "kv_disk_bytes", "kv_free_bytes"),
)


def _servers_words(asked: argparse.Namespace) -> list[str]:
    """What the command line says of flags that a server has as well."""
    given = {name: getattr(asked, name) for name in ("config", *SERVERS_OWN)}
    return [
        f"--{name.replace('_', '-')}={value}"
        for name, value in given.items()
        if value is not None
    ]


def _filled_in(
    asked: argparse.Namespace, flags: ServerFlags
) -> AbstractContextManager[None]:
    """What is not said is taken from where the server would take it.

    Returns:
        In it, a `CommandError` says where a flag that it names comes from.
    """
    found = flags.settings
    if found is None:
        return nullcontext()  # a line of the checks says why
    for name in SERVERS_OWN:
        if getattr(asked, name) is None:
            setattr(asked, name, getattr(found.values, name))
    return found.with_places()


def _parser() -> Parser:
    parser = Parser(
        prog="mlx-safe doctor",
        allow_abbrev=False,
        description="What this machine is, what is active on it, and what fits. What "
        "the command line does not say is taken from the environment, then from "
        "--config, as the server does.",
    )
    text: Any = {"type": path_or_name}
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="load this model, measure it, and size flags",
        **text,
    )
    parser.add_argument(
        "--max-active-memory-bytes",
        metavar="SIZE",
        help="the server's flag of this name",
    )
    parser.add_argument(
        "--max-active-kv-bytes", metavar="SIZE", help="the server's flag of this name"
    )
    for flag in ("--adapter-path", "--draft-model"):
        parser.add_argument(
            flag, metavar="PATH", help="the server's flag of this name", **text
        )
    parser.add_argument(
        "--kv-dir",
        metavar="DIR",
        help="the server's flag of this name: is it usable?",
        **text,
    )
    for flag in ("--kv-disk-bytes", "--kv-free-bytes"):
        parser.add_argument(flag, metavar="SIZE", help="the server's flag of this name")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="the server's file of this name: does it fit, and what fits with it?",
        **text,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _kv_limits(asked: argparse.Namespace) -> Limits:
    size = _size("--kv-disk-bytes", asked.kv_disk_bytes)
    free = _size("--kv-free-bytes", asked.kv_free_bytes, parse_size_or_zero)
    for flag, value in (("--kv-disk-bytes", size), ("--kv-free-bytes", free)):
        if asked.kv_dir is None and value is not None:
            raise CommandError(f"{flag} needs --kv-dir")
    return Limits(size or DISK_BYTES, free=free)


def _size(
    flag: str, value: str | int | None, parse: Callable[[str], int] = parse_size
) -> int | None:
    """``value`` as it is, if it is none of the command line's."""
    try:
        return parse(value) if isinstance(value, str) else value
    except ValueError as e:
        raise CommandError(f"{flag} {e}") from e


def examine(
    model: str | None = None,
    explicit: int | None = None,
    kv_limit: int | None = None,
    *,
    adapter: str | None = None,
    draft: str | None = None,
    flags: ServerFlags | None = None,
) -> dict[str, Any]:
    """All that the command tells, JSON-able. Sizes in bytes.

    Args:
        model: directory or hub name of a model that is loaded and measured.
        explicit: ``--max-active-memory-bytes``. kv_limit: ``--max-active-kv-bytes``.
        adapter, draft: ``--adapter-path`` and ``--draft-model`` of the server.
        flags: of the server; None: those of the environment.

    Raises:
        CommandError: mlx is missing or broken, or the model cannot be loaded or run.
    """
    status = install().as_dict()
    if status["mlx_version"] is None:
        raise CommandError(f"{status['reasons'][0]}")  # type: ignore[index]
    need_mlx()
    machine, now = read_machine(), usage()
    limits = ceiling(
        machine,
        explicit=explicit,
        overhead=now.overhead if machine.card is None else 0,
        card_share=now.card_share,
    )
    found: dict[str, Any] = {
        "machine": _about(machine, now),
        "protection": status,
        "ceiling": {
            "bytes": limits.size,
            "limits": [
                {"name": x.name, "bytes": x.size, "source": x.source}
                for x in limits.limits
            ],
        },
        "wired_limit": {
            "bytes": machine.wired_limit,
            "advice": wired_limit_advice(machine),
        },
    }
    found["checks"] = all_checks(flags or ServerFlags.read((), os.environ))
    if model is not None:
        loaded = _load(model, adapter, draft)
        found["model"] = _measure(model, loaded, limits.size, explicit, kv_limit)
        for flag, value in (("--draft-model", draft), ("--adapter-path", adapter)):
            if value is not None:
                found["model"]["flags"][:0] = [flag, value]
    return found


def _about(machine: Machine, now: Usage) -> dict[str, Any]:
    return {
        "system": _system(),
        "device": machine.device,
        "gpu": machine.gpu,
        "memory": machine.total,
        "available": now.available,
        "python": platform.python_version(),
    }


def _kv_disk(path: str, limits: Limits, found: dict[str, Any]) -> dict[str, Any]:
    """What ``--kv-dir`` has, and has room for.

    Raises:
        CommandError: the server could not use it.
    """
    try:
        directory = Directory(path)
    except NotOurs as e:
        raise CommandError(f"--kv-dir {e}") from e
    try:
        sizes = [entry.size for entry in directory.scan().values()]
        free, volume = directory.files.free_bytes(directory.fd)
        private = directory.is_private
    except OSError as e:
        raise CommandError(f"--kv-dir {path}: {e.strerror}") from e
    finally:
        directory.close()
    a_token = found.get("model", {}).get("bytes_per_token")
    left = limits.floor(volume)
    room = max(min(limits.size, sum(sizes) + free - left), 0)
    return {
        "path": path,
        "files": len(sizes),
        "bytes": sum(sizes),
        "limit": limits.size,
        "free": free,
        "left_free": left,
        "private": private,
        "tokens": room // a_token if a_token else None,
    }


def _system() -> str:
    if platform.system() == "Darwin":
        return f"macOS {platform.mac_ver()[0]} {platform.machine()}"
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def wired_limit_advice(machine: Machine) -> str:
    """What ``iogpu.wired_limit_mb`` is, and what raising it would give and risk."""
    if machine.recommended is None:
        return "does not apply: MLX computes on no Metal device here"
    now = machine.wired_limit or machine.recommended
    most = machine.total - max(LEFT_TO_SYSTEM, machine.total // 8)
    state = (
        "not set: the system's own limit holds"
        if machine.wired_limit is None
        else f"iogpu.wired_limit_mb is {machine.wired_limit // 2**20}, that is "
        f"{format_size(machine.wired_limit)}"
    )
    if most <= now:
        return f"{state}; raising it would leave too little to the system"
    after = min(int(GPU_SHARE * most), int(FOOTPRINT_SHARE * machine.total))
    return (
        f"{state}; 'sudo sysctl iogpu.wired_limit_mb={most // 2**20}' would raise the "
        f"ceiling from {format_size(GPU_SHARE * now)} to {format_size(after)} until "
        "the machine restarts. The risk: wired memory cannot be paged out, so other "
        "programs are squeezed, and kernel panics have been reported with it"
    )


def _load(name: str, adapter: str | None, draft: str | None) -> list[Any]:
    """The model, and the draft model if there is one, each with its tokenizer.

    Raises:
        CommandError: one cannot be loaded.
    """
    from .server.flag_checks import check_paths
    from .server.mlx_lm.model_facts import why_not_servable
    from .server.mlx_lm.requirements import import_server

    server = import_server()
    check_paths(argparse.Namespace(model=name, adapter_path=adapter, draft_model=draft))
    loaded = []
    for flag, path, options in (
        ("--model", name, {"adapter_path": adapter}),
        ("--draft-model", draft, {}),
    ):
        if path is None:
            continue
        try:
            model, tokenizer = server.load(path, **options)[:2]
            if (why := why_not_servable(model)) is not None:
                raise ValueError(why)
            loaded.append((model, tokenizer))
        except Exception as e:
            why = in_one_line(e)
            raise CommandError(f"{flag} {path}: cannot be loaded: {why}") from e
    return loaded


def _measure(
    name: str,
    loaded: list[Any],
    ceiling_size: int,
    explicit: int | None,
    kv_limit: int | None,
) -> dict[str, Any]:
    from .server.mlx_lm import compat
    from .server.model_limits import context_of

    transients = Transients()
    layers: tuple[Any, ...] = ()
    try:
        for model, _ in loaded:
            make_cache = partial(compat.make_cache, model)
            layers += calibrate(model, make_cache, transients).layers
    except Exception as e:
        raise CommandError(f"--model {name}: cannot be run: {in_one_line(e)}") from e
    cost = CacheCost(layers)
    weights = usage().active
    fits = sizing(
        model=weights,
        ceiling=ceiling_size,
        demand=Demand(cost, transients),
        steps=partial(step_sizes, STEP),
        kv_limit=kv_limit,
        context=context_of(*loaded[0]),
    )
    return {
        "name": name,
        "bytes": weights,
        "bytes_per_token": cost.per_token,
        "room_bytes": fits.room,
        "room_tokens": fits.room_tokens,
        "two_tokens": fits.two_tokens,
        "prompt_cache_bytes": fits.prompt_cache,
        "context_tokens": fits.context,
        "step": fits.step,
        "step_bytes": fits.transient,
        "flags": _flags(fits, explicit, kv_limit),
        "summary": str(fits),
    }


def _flags(fits: Sizing, explicit: int | None, kv_limit: int | None) -> list[str]:
    """The limit of a prompt, and what the server would choose by itself.

    Only what was given, when nothing fits.
    """
    # Without these the others would stand below other limits.
    given = {
        "--max-active-memory-bytes": explicit,
        "--max-active-kv-bytes": kv_limit,
    }
    flags = [x for k, v in given.items() if v is not None for x in (k, str(v))]
    if fits.room_tokens == 0:
        return flags
    prompt_tokens = fits.prompt_tokens()
    if prompt_tokens is not None:
        flags += ["--max-prompt-tokens", str(prompt_tokens)]
    if fits.prompt_cache > 0:  # the server takes no size of 0
        flags += ["--prompt-cache-bytes", flag_size(fits.prompt_cache)]
    if fits.step != STEP:
        flags += ["--prefill-step-size", str(fits.step)]
    return flags


def render(found: dict[str, Any]) -> str:
    """What `examine` found, for people."""
    machine, protection = found["machine"], found["protection"]
    available = machine["available"]
    free = "" if available is None else f", {format_size(available)} available"
    hooks = "hooked and verified" if protection["verified"] else "not hooked"
    if not machine["system"].startswith("macOS") and not protection["metal_hooks"]:
        hooks = "none here"
    lines = [
        f"machine     {machine['device']}, {format_size(machine['memory'])}{free}",
        f"system      {machine['system']}, Python {machine['python']}",
        f"mlx         {protection['mlx_version']}, regime {protection['mode']}",
        *(f"            {note}" for note in protection["mlx_notes"]),
        f"Metal       {hooks}",
        *(f"            {reason}" for reason in protection["reasons"]),
        f"ceiling     {format_size(found['ceiling']['bytes'])}, the smallest of",
        *(
            f"            {format_size(x['bytes']):>9}  {x['source']}"
            for x in found["ceiling"]["limits"]
        ),
        f"wired limit {found['wired_limit']['advice']}",
        *_render_checks(found["checks"]),
    ]
    if "model" in found:
        lines += _render_model(found["model"])
    if "kv_disk" in found:
        lines += _render_kv_disk(found["kv_disk"])
    return "\n".join(lines)


def _render_kv_disk(kept: dict[str, Any]) -> list[str]:
    tokens = kept["tokens"]
    lines = [
        f"KV on disk  {kept['path']}: {kept['files']} files, "
        f"{format_size(kept['bytes'])} of {format_size(kept['limit'])}; "
        f"{format_size(kept['free'])} free on the volume, "
        f"{format_size(kept['left_free'])} of it left to others",
    ]
    if kept["free"] + kept["bytes"] < kept["left_free"]:
        lines.append(f"            {BAD}nothing is written: see --kv-free-bytes")
    if tokens is not None:
        room = format_tokens(tokens)
        lines.append(f"            room for {room} of what grows with the text")
    if not kept["private"]:
        lines.append("            others can read it: the files are the conversations")
    return lines


def _render_checks(checks: dict[str, list[str]]) -> list[str]:
    return [
        f"{'' if i else name:11} {line}"
        for name, lines in checks.items()
        for i, line in enumerate(lines)
    ]


def _render_model(model: dict[str, Any]) -> list[str]:
    lines = [
        f"model       {model['name']}: {model['summary']}",
        f"            {format_size(model['bytes_per_token'])} for each token; a step "
        f"of {model['step']} tokens takes {format_size(model['step_bytes'])}",
    ]
    if model["context_tokens"] is not None:
        lines.append(f"            made for {model['context_tokens']} tokens at most")
    if model["room_tokens"] == 0:
        given = f" with {' '.join(model['flags'])}" if model["flags"] else ""
        return [*lines, f"            it does not fit{given}: take a smaller one"]
    command = ["mlx-safe serve --model", model["name"], *model["flags"]]
    return [
        *lines,
        f"recommended {' '.join(command)}",
        f"            room for {format_tokens(model['room_tokens'])} of one request, "
        f"prompt and answer; {format_tokens(model['two_tokens'])} of each of two at "
        "once",
    ]
