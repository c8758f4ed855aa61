"""Where downloaded data and cached results live on disk, and how a folder is written whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[2]


def project_folder(variable: str, name: str) -> Path:
    """The folder that an environment variable names, else `name` in the checkout or the user's cache."""
    if os.environ.get(variable):
        return Path(os.environ[variable]).expanduser().resolve()
    if (_CHECKOUT / "pyproject.toml").is_file():
        return _CHECKOUT / name
    import platformdirs

    return Path(platformdirs.user_cache_dir("c2r")) / name


def data_dir() -> Path:
    """Folder of language models and text: $C2R_DATA, else `data/` of the checkout, else the user's cache."""
    return project_folder("C2R_DATA", "data")


def cache_dir() -> Path:
    """Folder of harvested activations and trained SAEs: $C2R_CACHE, else `cache/` likewise."""
    return project_folder("C2R_CACHE", "cache")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder to fill, which becomes `folder` only when the block ends without an error.

    A folder already there is replaced at that moment; after an error it is as it was before, and
    the scratch folder is gone.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        yield part
        part.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        old = part.with_suffix(".old")
        if folder.exists():
            folder.rename(old)
        try:
            part.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
