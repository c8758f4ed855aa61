"""One locked, content-addressed cache of what is dear: harvested activations and trained SAEs."""

from __future__ import annotations

import ast
import errno
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

from c2r_core.artefacts.paths import cache_dir

_PACKAGE = Path(__file__).resolve().parent.parent
ARTEFACT_CODE = (
    "*.py",
    "losses/**/*.py",
    "saes/**/*.py",
    "data/**/*.py",
    "training/**/*.py",
    "artefacts/paths.py",
    "experiments/synthetic.py",
    "experiments/benchmark_runs.py",
    "experiments/language_model.py",
)
"""The parts of c2r_core whose code can change an artefact."""
LIBRARIES = ("torch", "transformers", "transformer_lens")


def cached(
    kind: str,
    key: Mapping[str, Any],
    build: Callable[[Path], object],
    *,
    resumable: bool = False,
) -> Path:
    """Folder of the artefact described by `key`; `build(folder)` fills it the first time.

    The address is a hash of the kind, the key, the code that can influence an artefact (ARTEFACT_CODE)
    and the versions of torch, transformers and transformer_lens. Two processes that want the same
    artefact build it once. A build that fails or is killed leaves nothing that could be taken for
    an artefact.

    Parameters
    ----------
    kind : str
        Sort of artefact, such as "activations" or "sae": the name of the sub-folder.
    key : mapping
        Everything else that decides the content, in JSON's types: configuration, seed, resolved
        precision, fingerprint of the data. It is kept beside the artefact in `key.json`.
    build : callable
        Takes an empty folder and writes the artefact into it.
    resumable : bool
        `build` can go on from what an earlier build, killed or failed, left in its folder; so that
        is kept instead of removed.

    Raises
    ------
    TypeError
        If the key is not plain JSON.
    OSError
        If the disk is full; it says where, and how to move the cache.
    """
    described = {
        "kind": kind,
        "key": key,
        "code": code_fingerprint(),
        "libraries": {library: version(library) for library in LIBRARIES},
    }
    text = json.dumps(described, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    address = hashlib.sha256(text.encode()).hexdigest()[:20]
    folder = cache_dir() / kind / address
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            _build(folder, text, build, resumable)
    return folder


def _build(folder: Path, key_text: str, build: Callable[[Path], object], resumable: bool) -> None:
    part = folder.with_suffix(".part")
    if not resumable:
        shutil.rmtree(part, ignore_errors=True)
    part.mkdir(exist_ok=True)
    try:
        build(part)
        (part / "key.json").write_text(key_text + "\n", encoding="utf-8")
        part.rename(folder)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(
                errno.ENOSPC,
                f"the disk is full; free some space, or set C2R_CACHE to a folder elsewhere "
                f"(cache now: {cache_dir()})",
            ) from error
        raise
    finally:
        if not resumable:
            shutil.rmtree(part, ignore_errors=True)


@functools.cache
def code_fingerprint(patterns: tuple[str, ...] = ARTEFACT_CODE) -> str:
    """Hash of the code in some files of c2r_core; comments and docstrings do not count."""
    digest = hashlib.sha256()
    for file in sorted(file for pattern in patterns for file in _PACKAGE.glob(pattern)):
        digest.update(file.relative_to(_PACKAGE).as_posix().encode())
        digest.update(_meaning(file.read_text(encoding="utf-8")).encode())
    return digest.hexdigest()[:20]


def _meaning(source: str) -> str:
    """The syntax tree without comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [statement for statement in node.body if not _is_text(statement)]
    return ast.dump(tree)


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
