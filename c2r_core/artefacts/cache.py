"""One locked, content-addressed cache of what is costly: harvested activations and trained SAEs."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from c2r_core.artefacts.checksums import compare, of_file
from c2r_core.artefacts.fields import read_object
from c2r_core.artefacts.fingerprints import all_modules, fingerprint
from c2r_core.artefacts.paths import cache_dir

CODE: dict[str, tuple[str, ...]] = {
    "activations": ("c2r_core.data.harvest",),
    "words": ("c2r_core.data.words",),
}
"""By kind of artefact, the code that can change one, as `fingerprints` takes it. A call may say more."""
LIBRARIES = ("torch", "transformers", "transformer_lens")
CHECKED_BY_THEIR_READER = ("activations", "remote", "sae", "stack")
"""Kinds whose files carry checksums of their own."""
CHECKSUMS, KEY = "checksums.json", "key.json"


class DamagedArtefact(ValueError):
    """A file of an artefact in the cache is missing or not what was built."""


def cached(
    kind: str,
    key: Mapping[str, Any],
    build: Callable[[Path], object],
    *,
    code: Sequence[str] = (),
    resumable: bool = False,
) -> Path:
    """Folder of the artefact described by `key`; `build(folder)` fills it the first time.

    The address is a hash of the kind, the key, the code that can change such an artefact and the
    versions of torch, transformers and transformer_lens. Two processes that want the same artefact
    build it once. A build that fails or is killed leaves nothing that could be taken for an artefact.

    The kind, such as "activations" or "sae", names the sub-folder. The key is all else that decides the
    content, in JSON's types (else it is a TypeError): configuration, seed, resolved precision, fingerprint of
    the data; it is kept beside the artefact in `key.json`. `code` has entries, as `fingerprints` takes them,
    beside those that CODE has for the kind; with neither, all code counts. A resumable build can go on from
    what an earlier one, killed or failed, left in its folder; so that is kept instead of removed.

    Raises
    ------
    OSError
        If the disk is full; it says where, and how to move the cache.
    DamagedArtefact
        If a file in the folder is missing or not what was built; it is named. Of kinds that are
        CHECKED_BY_THEIR_READER their reader says so.
    """
    entries = sorted({*CODE.get(kind, ()), *code}) or all_modules()
    described = {
        "kind": kind,
        "key": key,
        "entries": entries,
        "code": _fingerprint(tuple(entries)),
        "libraries": _libraries(),
    }
    text = json.dumps(described, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    address = hashlib.sha256(text.encode()).hexdigest()[:20]
    folder = cache_dir() / kind / address
    has_checksums = kind not in CHECKED_BY_THEIR_READER
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                _build(folder, text, build, resumable, has_checksums)
                return folder
    if has_checksums:
        try:
            _check(folder)
        except ValueError as error:
            raise DamagedArtefact(str(error)) from error
    return folder


def _check(folder: Path) -> None:
    """Raise a ValueError unless the files of an artefact are those that were built."""
    remedy = f"Delete {folder}; it is made anew when it is needed."
    stated = folder / CHECKSUMS
    if not stated.is_file():
        raise ValueError(f"{stated} is missing. {remedy}")
    expected, found = read_object(stated, remedy), _checksums(folder)
    for name in sorted({*expected, *found}):
        if name not in found:
            raise ValueError(f"{folder / name} is missing. {remedy}")
        compare(folder / name, expected.get(name), found[name], remedy)


def _checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that an artefact consists of, by their place in the folder."""
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*")}
    return {
        name: of_file(file)
        for name, file in files.items()
        if file.is_file() and name not in (CHECKSUMS, KEY)
    }


def _build(
    folder: Path,
    key_text: str,
    build: Callable[[Path], object],
    resumable: bool,
    has_checksums: bool,
) -> None:
    part = folder.with_suffix(".part")
    if not resumable:
        shutil.rmtree(part, ignore_errors=True)
    part.mkdir(exist_ok=True)
    try:
        build(part)
        if has_checksums:
            checksums = json.dumps(_checksums(part), indent=2)
            (part / CHECKSUMS).write_text(checksums + "\n", encoding="utf-8")
        (part / KEY).write_text(key_text + "\n", encoding="utf-8")
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


_fingerprint = functools.cache(fingerprint)


@functools.cache
def _libraries() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "not installed"
    return found


def prune(dry_run: bool = False) -> tuple[int, int]:
    """Remove what no code here would find, and remains of dead builds.

    Returns how many entries and bytes are gone, or with `dry_run` would be.
    """
    removed = freed = 0
    for folder in sorted(cache_dir().glob("*/*")):
        if not folder.is_dir() or _is_current(folder):
            continue
        lock = FileLock(folder.with_suffix(".lock"), blocking=False)
        try:
            with lock:
                freed += sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
                removed += 1
                if not dry_run:
                    shutil.rmtree(folder)
        except Timeout:  # being built
            continue
    return removed, freed


def _is_current(folder: Path) -> bool:
    try:
        described = json.loads((folder / KEY).read_text(encoding="utf-8"))
        entries = tuple(described["entries"])
    except (OSError, ValueError, KeyError):
        return False
    try:
        is_same = described["code"] == _fingerprint(entries)
    except ModuleNotFoundError:
        # A module of the user's own that is not imported now may well be there.
        is_same = not all(entry.startswith("c2r_core.") for entry in entries)
    return is_same and described["libraries"] == _libraries()
