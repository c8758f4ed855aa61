"""Stores on remote storage: one machine harvests, others train.

    copy_to("my_activations", "s3://bucket/my_activations")  # where the store is
    store = open_remote("s3://bucket/my_activations")  # on any other machine

Any address that fsspec knows will do: s3://, gs://, hf://, https:// (to read), file://, or a path. Most
protocols need a package of their own, and take credentials from where that package looks for them.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from c2r_core.artefacts.cache import cached
from c2r_core.artefacts.checksums import compare, of_file
from c2r_core.artefacts.files import check_room, whole_file, whole_folder
from c2r_core.data.store import MANIFEST, ActivationStore, Manifest
from c2r_core.errors import needs_extra

needs_extra("lm", "fsspec")

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


def open_remote(url: str, folder: str | Path | None = None) -> ActivationStore:
    """Open the store at an address; its files are fetched once.

    The manifest is read first. Without a `folder` the store is kept in the cache, under the address and the
    manifest: where it is there already nothing else is fetched, and a fetch that was killed goes on with the
    first file that is missing. A folder given appears when all is there; if it holds this store already, it
    is opened. What is fetched is compared with its checksum.

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
    OSError
        If the address cannot be read, or the disk is full.
    """
    remote = _Remote.at(url)
    content = remote.manifest()
    if content is None:
        raise FileNotFoundError(
            f"{url} holds no {MANIFEST}: check the address, or copy a store there with copy_to()."
        )
    remedy = f"Delete what is at {url}, and copy the store there again."
    manifest = Manifest.read(content, f"{url}/{MANIFEST}", remedy)
    if folder is None:
        key = {"url": url, "manifest": hashlib.sha256(content).hexdigest()}
        code = ["c2r_core.data.store:FORMAT_VERSION"]

        def fetch(part: Path) -> None:
            remote.fetch(manifest, part)

        return ActivationStore.open(cached("remote", key, fetch, code=code, resumable=True))
    own = Path(folder) / MANIFEST
    if not (own.is_file() and own.read_bytes() == content):
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
        If the folder holds no whole store, as `ActivationStore.open` and `check` say.
    ValueError
        If the protocol is unknown, or a file did not arrive in its size.
    ImportError
        If the protocol needs a package that is not installed.
    FileExistsError
        If there is another store at the address.
    """
    folder, remote = Path(store_folder), _Remote.at(url)
    store = ActivationStore.open(folder)
    manifest, there = (folder / MANIFEST).read_bytes(), remote.manifest()
    if there == manifest:
        return
    if there is not None:
        raise FileExistsError(f"{url} holds another store: name a new address, or delete that one.")
    store.check()
    names = list(store.manifest.checksums())
    remote.files.makedirs(remote.root, exist_ok=True)
    for name in names:
        remote.files.put_file(str(folder / name), remote.path(name))
    remote.files.invalidate_cache()
    for name in names:
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

    def fetch(self, manifest: Manifest, folder: Path) -> None:
        """Bring all files into a folder, the manifest last; those that are there are not fetched again."""
        for scratch in folder.glob("*.part"):  # of a fetch that was killed
            shutil.rmtree(scratch)
        checksums = manifest.checksums()
        missing = {name: checksums[name] for name in checksums if not (folder / name).is_file()}
        sizes = {shard.name: shard.n_bytes for shard in manifest.shards}
        check_room(folder, sum(sizes.get(name, 0) for name in missing))
        for name, checksum in missing.items():
            try:
                with whole_file(folder / name) as part:
                    self.files.get_file(self.path(name), str(part))
                    remedy = "Fetch it again; if that does not help, copy the store there again."
                    compare(f"{name} from {self.url}", checksum, of_file(part), remedy)
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"{name} is missing from the store at {self.url}; copy the store there again."
                ) from error
        with whole_file(folder / MANIFEST) as part:
            part.write_bytes(manifest.as_bytes())
        ActivationStore.open(folder)
