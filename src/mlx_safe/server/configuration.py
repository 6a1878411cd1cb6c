"""Where the flags' values come from: command line, environment, file, in this order.

A value of the environment or of the file becomes the word that the command line would
have (``--port=8081``). The same parser reads it, so it is checked in the same way.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .._command import CommandError, Parser, in_one_line, json_value, read_text

__all__ = [
    *("Settings", "log_format_of", "option_of", "printed", "resolve", "variable_of"),
]

# Of one start, and of no file.
NOT_IN_A_FILE = ("help", "print_config", "config")
SECRETS = ("api_key",)
# Variables that are no flag's: of the library, and what the supervisor tells a server.
OTHER_VARIABLES = (
    *(
        "MLX_SAFE_AUTOINSTALL",
        "MLX_SAFE_RUN",
        "MLX_SAFE_CHECK_INVARIANTS",
    ),
    *("MLX_SAFE_LISTEN_FD", "MLX_SAFE_CHANNEL_FD", "MLX_SAFE_BORN_S"),
    *("MLX_SAFE_LAST_START_S",),
)
OTHERS = (
    "MLX_SAFE_TEST_",
    "MLX_SAFE_REPORT",
    "MLX_SAFE_METAL_",
    "MLX_SAFE_REQUIRE_",
    "MLX_SAFE_INJECT",
)
TRUE, FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_UNSET = object()

DEFAULT = "default"
COMMAND_LINE = "command line"

# By the flag's name, without dashes.
Values = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """The flags' values, and where each comes from, both by `argparse`'s ``dest``.

    Attributes:
        unknown: variables that look like flags' and are none.
    """

    values: argparse.Namespace
    sources: Mapping[str, str]
    unknown: tuple[str, ...] = ()

    @contextlib.contextmanager
    def with_places(self) -> Iterator[None]:
        """A `CommandError` from inside says where the flags that it names come from.

        The environment and a file, that is: the command line is before one's eyes.
        """
        try:
            yield
        except CommandError as e:
            message = str(e)
            named = dict.fromkeys(re.findall(r"(?<!\S)--([a-z][a-z-]*[a-z])", message))
            places = [
                f"--{name} comes from {place}"
                for name in named
                if (place := self.sources.get(name.replace("-", "_"), DEFAULT))
                not in (DEFAULT, COMMAND_LINE)
                and place not in message
            ]
            if not places:
                raise
            raise CommandError(f"{message} ({', '.join(places)})") from e


def option_of(action: argparse.Action) -> str:
    """The long name of a flag, without the dashes."""
    return next(
        (o[2:] for o in action.option_strings if o.startswith("--")), action.dest
    )


def variable_of(action: argparse.Action) -> str:
    """The environment's name for a flag: MLX_SAFE_PORT for --port."""
    return "MLX_SAFE_" + option_of(action).upper().replace("-", "_")


def resolve(
    parser: Parser,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    partial: bool = False,
) -> Settings:
    """The values that hold.

    Args:
        arguments: the command line after ``mlx-safe serve``.
        environment: as `os.environ`.
        partial: flags that ``parser`` does not know are left alone.

    Raises:
        CommandError: a value is wrong, or there is no such flag; with its place.
    """
    given = _given(parser, arguments, partial)
    named = _of_environment(parser, environment)
    path = given.get("config", named.pop("config", None))
    filed = {} if path is None else _of_file(parser, path, partial)
    sources = dict.fromkeys((a.dest for a in parser._actions), DEFAULT)
    sources |= dict.fromkeys(filed, str(path))
    sources |= {
        a.dest: variable_of(a) for a in parser._actions if a.dest in named
    } | dict.fromkeys(given, COMMAND_LINE)
    # argparse fills in the rest, and makes values of defaults that are text.
    values = parser.parse_args([], argparse.Namespace(**{**filed, **named, **given}))
    if path is not None:
        values.config = path
    return Settings(values, sources, _unknown(parser, environment))


def log_format_of(arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """``--log-format``, also where other flags, or the file, are wrong.

    Errors are logged in it: as text, where it cannot be known.
    """
    for flags in (("--log-format", "--config"), ("--log-format",)):
        parser = Parser(prog="mlx-safe serve", add_help=False, allow_abbrev=False)
        for flag in flags:  # a file that cannot be read says nothing
            parser.add_argument(flag)
        with contextlib.suppress(CommandError):
            found = resolve(parser, arguments, environment, partial=True)
            return "json" if found.values.log_format == "json" else "text"
    return "text"


def _given(parser: Parser, words: Sequence[str], partial: bool = False) -> Values:
    """What ``words`` say, without defaults."""
    lists = (argparse._AppendAction, argparse._ExtendAction)
    marked = argparse.Namespace(
        **{a.dest: [] if isinstance(a, lists) else _UNSET for a in parser._actions}
    )
    if partial:
        parser.parse_known_args(list(words), marked)
    else:
        parser.parse_args(list(words), marked)
    return {k: v for k, v in vars(marked).items() if v is not _UNSET and v != []}


def _actions(parser: Parser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if action.dest not in NOT_IN_A_FILE:
            yield action


def _of_environment(parser: Parser, environment: Mapping[str, str]) -> Values:
    found: Values = {}
    for action in parser._actions:
        name = variable_of(action)
        text = environment.get(name, "")
        if action.dest in ("help", "print_config") or name not in environment:
            continue
        if text == "":
            if action.dest in SECRETS:  # or it would be open to everyone
                raise CommandError(f"{name} is empty: unset it, or give it a key")
            continue  # as containers pass what is not set
        value: Any = text
        if action.nargs == 0:
            if text.lower() not in TRUE + FALSE:
                raise CommandError(f"{name}: must be 1 or 0, not {text!r}")
            value = text.lower() in TRUE
        elif isinstance(action.default, list):
            value = [part.strip() for part in text.split(",")]
        found |= _read(parser, action, value, name)
    return found


def _table(path: str) -> Values:
    try:
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib
    except ModuleNotFoundError:
        raise CommandError("--config needs tomli: pip install 'tomli>=2'") from None
    given = f"--config {path}"
    text = read_text(path, given)
    try:
        found: Values = tomllib.loads(text)
    except RecursionError:
        why = "too many brackets in one another"
    except ValueError as e:  # of a number with thousands of digits as well
        why = in_one_line(e)
    else:
        return found
    raise CommandError(f"{given}: is not TOML: {why}")


def _unknown(parser: Parser, environment: Mapping[str, str]) -> tuple[str, ...]:
    known = {*map(variable_of, parser._actions), *OTHER_VARIABLES}
    return tuple(
        name
        for name in sorted(environment)
        if name.startswith("MLX_SAFE_")
        and name not in known
        and not name.startswith(OTHERS)
    )


def _of_file(parser: Parser, path: str, partial: bool) -> Values:
    given = f"--config {path}"
    flags = {option_of(action): action for action in _actions(parser)}
    found: Values = {}
    for key, value in _table(path).items():
        if key in flags:
            found |= _read(parser, flags[key], value, f"{given}: {key}")
        elif not partial:
            raise CommandError(f"{given}: there is no flag {key!r}{_meant(key, flags)}")
    return found


def _meant(key: str, flags: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(key.replace("_", "-"), list(flags), 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _read(parser: Parser, action: argparse.Action, value: object, place: str) -> Values:
    """What the flag has as ``value``; ``place`` is named when that is wrong."""
    try:
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise CommandError("must be true or false")
            return {action.dest: value}
        is_list = isinstance(action.default, list)
        values = value if is_list and isinstance(value, list) else [value]
        for v in values:
            # Of the types that a file can have, JSON alone is given as a table.
            if isinstance(v, dict) and action.type is not json_value:
                raise CommandError("cannot be a table")
            if isinstance(v, list) and v is not value:
                raise CommandError("cannot be an array of arrays")
        words = [f"--{option_of(action)}={_word(v)}" for v in values]
        return _given(parser, words)
    except CommandError as e:
        why = str(e).removesuffix(f"; see {parser.prog} --help")
        why = why.removeprefix(f"argument {'/'.join(action.option_strings)}: ")
        raise CommandError(f"{place}: {why}") from None


def _word(value: object) -> str:
    if isinstance(value, bool):
        raise CommandError("must be a value, not true or false")
    if isinstance(value, (str, int, float)):
        return str(value)
    if isinstance(value, list):
        return ",".join(map(_word, value))
    if isinstance(value, dict):
        try:
            return json.dumps(value)
        except TypeError:  # a date
            pass
    raise CommandError("must be text, a number, true or false, or an array of them")


def printed(parser: Parser, settings: Settings) -> str:
    """The settings as a file for ``--config``; defaults are comments, secrets left out.

    Returns:
        TOML. Each line says where its value comes from.
    """
    lines: list[str] = []
    for group in parser._action_groups:
        own = [a for a in group._group_actions if a.dest not in NOT_IN_A_FILE]
        if own:
            lines += ["", f"# {group.title}"]
            lines += [_line(action, settings) for action in own]
    return "\n".join(lines[1:]) + "\n"


def _line(action: argparse.Action, settings: Settings) -> str:
    key, source = option_of(action), settings.sources[action.dest]
    value = getattr(settings.values, action.dest)
    if value is None or value == []:
        # What holds then may depend on the model and the machine: the help has it.
        text = (action.help or "").replace("%%", "%")
        found = re.search(r" \(default[^()]*\)$", text)
        return f"# {key} is not set{found[0] if found else ''}"
    if action.dest in SECRETS:
        return f"# {key} is not shown ({source})"
    text = f"{key} = {_toml(value)}"
    return f"# {text}" if source == DEFAULT else f"{text}  # {source}"


def _toml(value: object) -> str:
    if isinstance(value, dict):
        value = json.dumps(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    # JSON's strings, numbers, true and false are TOML's; but for one character.
    return json.dumps(value).replace("\x7f", "\\u007f")
