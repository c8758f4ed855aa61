"""Stores on remote storage: one machine harvests, others train.

    copy_to("my_activations", "s3://bucket/my_activations")  # where the store is
    store = open_remote("s3://bucket/my_activations")  # on any other machine

Any address that fsspec knows will do: s3://, gs://, hf://, https:// (to read), file://, or a path. Most
protocols need a package of their own, and take credentials from where that package looks for them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from c2r_core.artefacts.cache import cached
from c2r_core.artefacts.files import check_room, whole_file, whole_folder
from c2r_core.data.store import FORMAT_VERSION, KEPT, MANIFEST, TOKENS, ActivationStore
from c2r_core.errors import needs_extra

needs_extra("lm", "fsspec")

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


def open_remote(url: str, folder: str | Path | None = None) -> ActivationStore:
    """Open the store at an address; its files are fetched once.

    The manifest is read first. Without a `folder` the store is kept in the cache, under the address and the
    manifest: where it is there already nothing else is fetched, and a fetch that was killed goes on with the
    first file that is missing. A folder given appears when all is there; if it holds this store already, it
    is opened. Sizes are compared with the manifest, contents are not.

    Parameters
    ----------
    url : str
        Address of the store's folder, as `copy_to` was given it.
    folder : str or Path, optional
        Where to keep the store.

    Raises
    ------
    ValueError
        If the protocol is unknown, the manifest is damaged or of another format, or a file is not as the
        manifest says.
    ImportError
        If the protocol needs a package that is not installed.
    FileNotFoundError
        If there is no store at the address, or one of its files is missing.
    FileExistsError
        If the folder holds something else.
    """
    remote = _Remote.at(url)
    manifest = remote.manifest()
    if manifest is None:
        raise FileNotFoundError(
            f"{url} holds no {MANIFEST}: check the address, or copy a store there with copy_to()."
        )
    if folder is None:
        key = {"url": url, "manifest": hashlib.sha256(manifest).hexdigest()}
        code = ["c2r_core.data.store:FORMAT_VERSION"]

        def fetch(part: Path) -> None:
            remote.fetch(manifest, part)

        return ActivationStore.open(cached("remote", key, fetch, code=code, resumable=True))
    own = Path(folder) / MANIFEST
    if not (own.is_file() and own.read_bytes() == manifest):
        with whole_folder(folder, replace=False) as part:
            remote.fetch(manifest, part)
    return ActivationStore.open(folder)


def copy_to(store_folder: str | Path, url: str) -> None:
    """Copy a store to an address, for `open_remote`; what was copied there already is left as it is.

    The manifest comes last, so that nobody opens a store that is not all there.

    Parameters
    ----------
    store_folder : str or Path
        As `harvest` made it.
    url : str
        Address of a folder of its own.

    Raises
    ------
    FileNotFoundError or ValueError
        If the folder holds no whole store, as `ActivationStore.open` says.
    ValueError
        If the protocol is unknown, or a file did not arrive in its size.
    ImportError
        If the protocol needs a package that is not installed.
    FileExistsError
        If there is another store at the address.
    """
    folder, remote = Path(store_folder), _Remote.at(url)
    ActivationStore.open(folder)
    manifest, there = (folder / MANIFEST).read_bytes(), remote.manifest()
    if there == manifest:
        return
    if there is not None:
        raise FileExistsError(f"{url} holds another store: name a new address, or delete that one.")
    remote.files.makedirs(remote.root, exist_ok=True)
    for name in _names(manifest):
        remote.files.put_file(str(folder / name), remote.path(name))
    remote.files.invalidate_cache()
    for name in _names(manifest):
        arrived, n_bytes = remote.files.size(remote.path(name)), (folder / name).stat().st_size
        if arrived != n_bytes:
            raise ValueError(
                f"{name} has {arrived:,} bytes at {url} and {n_bytes:,} here; copy the store again."
            )
    remote.files.pipe_file(remote.path(MANIFEST), manifest)


@dataclass(frozen=True)
class _Remote:
    """A folder on some file system."""

    url: str
    files: AbstractFileSystem
    root: str

    @classmethod
    def at(cls, url: str) -> _Remote:
        from fsspec.core import url_to_fs

        try:
            files, root = url_to_fs(url)
        except ValueError as error:
            raise ValueError(
                f"{url!r} cannot be opened ({error}); expected an address such as 's3://bucket/store' or "
                "'file:///folder/store'."
            ) from error
        except ImportError as error:
            raise ImportError(f"{url!r} needs a package that is not installed: {error}.") from error
        return cls(url, files, root.rstrip("/"))

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def manifest(self) -> bytes | None:
        """The store's manifest as it stands; None if there is none."""
        try:
            return self.files.cat_file(self.path(MANIFEST))
        except FileNotFoundError:
            return None

    def fetch(self, manifest: bytes, folder: Path) -> None:
        """Bring all files into a folder, the manifest last; those that are there are not fetched again."""
        names = _names(manifest)
        for scratch in folder.glob("*.part"):  # of a fetch that was killed
            shutil.rmtree(scratch)
        missing = [name for name in names if not (folder / name).is_file()]
        check_room(folder, sum(n_bytes or 0 for n_bytes in (names[name] for name in missing)))
        for name in missing:
            try:
                with whole_file(folder / name) as part:
                    self.files.get_file(self.path(name), str(part))
                    self._check(name, part.stat().st_size, names[name])
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"{name} is missing from the store at {self.url}; copy the store there again."
                ) from error
        with whole_file(folder / MANIFEST) as part:
            part.write_bytes(manifest)
        store = ActivationStore.open(folder)
        self._check(TOKENS, store.contexts.size, store.manifest.n_tokens, "tokens")
        self._check(KEPT, int(store.kept.sum()), store.manifest.n_kept, "kept tokens")

    def _check(self, name: str, found: int, expected: int | None, what: str = "bytes") -> None:
        if expected is not None and found != expected:
            raise ValueError(
                f"{name} from {self.url} has {found:,} {what}, the manifest says {expected:,}; copy the "
                "store there again."
            )


def _names(manifest: bytes) -> dict[str, int | None]:
    """Every file of a store but the manifest, and its size in bytes where the manifest says it."""
    try:
        content = json.loads(manifest)
        version = content["format_version"]
        shards = {shard["name"]: shard["n_bytes"] for shard in content["shards"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"The {MANIFEST} is not that of a store ({error!r}).") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"The store has format {version}; this code reads {FORMAT_VERSION}.")
    outside = [name for name in shards if PurePosixPath(name).name != name or "\\" in name]
    if outside:
        raise ValueError(f"The {MANIFEST} names files outside of its store: {outside}.")
    return {TOKENS: None, KEPT: None, **shards}
