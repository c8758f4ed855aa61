"""Where downloaded data and cached results live on disk."""

from __future__ import annotations

import os
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[2]


def project_folder(variable: str, name: str) -> Path:
    """The folder that an environment variable names, else `name` in the checkout or the user's cache."""
    if os.environ.get(variable):
        return Path(os.environ[variable]).expanduser().resolve()
    if (_CHECKOUT / "pyproject.toml").is_file():
        return _CHECKOUT / name
    import platformdirs  # comes with the extras

    return Path(platformdirs.user_cache_dir("c2r")) / name


def checkout() -> Path:
    """The project's folder; the current one if the package is installed without it."""
    return _CHECKOUT if (_CHECKOUT / "pyproject.toml").is_file() else Path.cwd()


def data_dir() -> Path:
    """Folder of language models and text: $C2R_DATA, else `data/` of the checkout, else the user's cache."""
    return project_folder("C2R_DATA", "data")


def cache_dir() -> Path:
    """Folder of harvested activations and trained SAEs: $C2R_CACHE, else `cache/` likewise."""
    return project_folder("C2R_CACHE", "cache")
