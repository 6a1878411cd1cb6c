"""What a request may name: models, adapters and drafts, found without loading any.

Looked up on the thread of the request's handler, so that an unknown name
is refused at once. Reads directories; goes to no hub.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from .._command import endless_in
from .mlx_lm import hub
from .mlx_lm.protocols.models import CliArgs
from .replies import BadRequest, ModelNotFound

__all__ = ["DEFAULT", "ModelNames", "Named"]

log = logging.getLogger("mlx_safe.server")

# What mlx-lm puts for a field that a request does not have.
DEFAULT = "default_model"


class Named(NamedTuple):
    """What mlx-lm loads: paths, or names of the hub. In the order of its ``load``."""

    model: str | None
    adapter: str | None = None
    draft: str | None = None


class _Unsuitable(Exception):
    """A directory that is no model; the text is for the log."""


class ModelNames:
    """The names that this server knows. Any thread.

    Args:
        cli_args: mlx-lm's flags.
        served: names for the model that the server was started with.
        only_served: every other name is unknown.
        download: a name of the hub that is not here is downloaded.
    """

    def __init__(
        self,
        cli_args: CliArgs,
        served: Sequence[str] = (),
        only_served: bool = False,
        download: bool = False,
    ) -> None:
        self._served = list(served)
        self._only_served = only_served
        self._download = download
        self._remote_code = bool(getattr(cli_args, "trust_remote_code", False))
        self.default = Named(
            cli_args.model, cli_args.adapter_path, cli_args.draft_model
        )

    @property
    def default_name(self) -> str:
        """What answers call the model for a request that names none."""
        return self._served[0] if self._served else DEFAULT

    # -- what there is -----------------------------------------------------------

    @property
    def own(self) -> list[str]:
        """Names of the model that the server was started with; first the main one."""
        if self._served:
            return self._served
        model = self.default.model
        if not model:
            return []
        return [str(Path(model).resolve()) if _is_dir(model) else model]

    def listed(self) -> list[str]:
        """What ``/v1/models`` lists: its own names, and what the hub's cache has."""
        found = list(self.own)
        if not self._only_served:
            found += [name for name in _in_hub_cache() if name not in found]
        return found

    def knows(self, name: str) -> bool:
        """Whether ``name`` is one of those that are listed, or means one of them."""
        if name in self.listed():
            return True
        return bool(self.default.model) and name != DEFAULT and self._is_own(name)

    # -- what a request means ------------------------------------------------------

    def find(
        self, model: object, adapter: object = None, draft: object = None
    ) -> Named:
        """What to load for a request with these fields; None: it has none.

        The draft model and the adapters of the command line belong to its model. A
        request that names another has those that it names itself.

        Raises:
            ModelNotFound: one of them is not known here.
            BadRequest: one of them is no name.
        """
        model = _text(model, "model")
        adapter = _text(adapter, "adapters")
        draft = _text(draft, "draft_model")
        if model is None or self._is_own(model):
            found = self.default
            if not found.model:
                raise ModelNotFound(
                    "The request must name a model: the server was started without.",
                    param="model",
                )
        else:
            found = Named(self._find_model(model, "model"))
        if adapter is not None and not _same(adapter, found.adapter):
            found = found._replace(adapter=self._find_adapter(adapter))
        if draft is not None and draft != DEFAULT:
            known = self.default.draft
            same = _same(draft, known)
            path = known if same else self._find_model(draft, "draft_model")
            found = found._replace(draft=path)
        return found

    def _is_own(self, name: str) -> bool:
        if name == DEFAULT or name in self._served:
            return True
        if self._served and self._only_served:
            return False
        return _same(name, self.default.model)

    def _find_model(self, name: str, param: str) -> str:
        unknown = ModelNotFound(f"The model {_shown(name)} does not exist.", param)
        if self._only_served:
            raise unknown
        try:
            local = Path(name) if _is_dir(name) else hub.cached_model(name)
            if local is not None:
                _check_model(local, self._remote_code)
                return str(local)
        except _Unsuitable as e:
            log.info("a request names %s, which is no model: %s", _shown(name), e)
            raise unknown from e
        if self._download and hub.is_hub_name(name):
            return name
        raise unknown

    def _find_adapter(self, name: str) -> str:
        here = Path(name)
        files = ("adapter_config.json", "adapters.safetensors")
        if self._only_served or not all(_is_file(here / file) for file in files):
            raise ModelNotFound(
                f"The adapter {_shown(name)} does not exist.", "adapters"
            )
        return name


def _check_model(directory: Path, remote_code: bool) -> None:
    """Raises `_Unsuitable` when mlx-lm could not load ``directory`` in any case."""
    try:
        if (name := endless_in(directory)) is not None:
            raise _Unsuitable(f"{name} in it is no file")
        config = json.loads((directory / "config.json").read_bytes())
        kind = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise _Unsuitable(f"its config.json has no model_type ({e!r})") from e
    brings_its_own = remote_code and config.get("model_file")
    if not brings_its_own and not hub.knows_model_type(config):
        raise _Unsuitable(f"mlx-lm does not know the type {kind!r}")
    missing = [name for name in _weights(directory) if not _is_file(directory / name)]
    if missing:
        raise _Unsuitable(f"{missing[0]} is not there")


def _weights(directory: Path) -> Iterator[str]:
    try:
        index = json.loads((directory / "model.safetensors.index.json").read_bytes())
        yield from sorted(set(index["weight_map"].values()))
    except FileNotFoundError:
        if not any(directory.glob("model*.safetensors")):
            yield "model.safetensors"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise _Unsuitable(f"model.safetensors.index.json cannot be read ({e!r})") from e


def _in_hub_cache() -> Iterator[str]:
    for name in hub.cached_names():
        local = hub.cached_model(name)
        try:
            if local is not None:
                _check_model(local, remote_code=False)
                yield name
        except _Unsuitable:
            continue


def _text(name: object, param: str) -> str | None:
    if name is not None and not isinstance(name, str):
        raise BadRequest(f"{param} must be a string.", param)
    return name


def _same(name: str, known: str | None) -> bool:
    """Whether both are the same word or the same directory."""
    if known is None or name == known:
        return name == known
    if not (_is_dir(name) and _is_dir(known)):
        return False
    return Path(name).resolve() == Path(known).resolve()


def _is_dir(name: str) -> bool:
    # "" would be the current directory.
    try:
        return bool(name) and Path(name).is_dir()
    except (OSError, ValueError):  # too long, a NUL
        return False


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _shown(name: str) -> str:
    """``name`` for a message: somebody else's text, so in quotes and not too long."""
    text = json.dumps(name)
    return text if len(text) <= 200 else f'{text[:200]}…"'
