"""Models that mlx-lm could load: what the hub's cache on this machine has of them.

Any thread. Nothing is downloaded, and no model is imported.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .protocols.opaque import Json

__all__ = ["cached_model", "cached_names", "is_hub_name", "knows_model_type"]


def knows_model_type(config: Json) -> bool:
    """Whether mlx-lm has a module for a model with this config. Imports none."""
    from mlx_lm import utils

    kind = config["model_type"]
    if not isinstance(kind, str):
        return False
    kind = utils.MODEL_REMAPPING.get(kind, kind)
    try:
        return importlib.util.find_spec(f"mlx_lm.models.{kind}") is not None
    except (ImportError, ValueError):
        return False


def is_hub_name(name: str) -> bool:
    """Whether the hub could have a model of this name."""
    from huggingface_hub import utils
    from huggingface_hub.errors import HFValidationError

    try:
        utils.validate_repo_id(name)  # type: ignore[attr-defined]
    except HFValidationError:
        return False
    return True


def cached_model(name: str) -> Path | None:
    """Where the hub's cache has the model ``name``. Goes to no hub."""
    from huggingface_hub import try_to_load_from_cache

    if not is_hub_name(name):
        return None
    config = try_to_load_from_cache(name, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def cached_names() -> list[str]:
    """The models that the hub's cache has, of whatever kind."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repositories = scan_cache_dir().repos
    except (CacheNotFound, OSError):
        return []
    return sorted(r.repo_id for r in repositories if r.repo_type == "model")
