"""A store copied to remote storage and opened from there is the same, whole, and fetched once."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from c2r_core.artefacts import cache
from c2r_core.data.remote import copy_to, open_remote
from c2r_core.data.store import KEPT, MANIFEST, TOKENS, ActivationStore
from faults import flip
from stores import change_manifest, small_store

SHARD = {"name": "shard-00000.npy", "n_tokens": 640, "n_bytes": 640 * 128 + 128, "sha256": ""}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return small_store(tmp_path_factory.mktemp("harvested") / "store")


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    if request.param == "file":
        yield f"file://{tmp_path}/remote/store"
    else:
        yield "memory://bucket/store"
        MemoryFileSystem.store.clear()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("C2R_CACHE", str(tmp_path / "cache"))


def remote_file(url, name):
    files, root = fsspec.core.url_to_fs(url)
    return files, f"{root}/{name}"


def overwrite(url, name, content):
    files, path = remote_file(url, name)
    files.pipe_file(path, content)


def changed_manifest(store, **changes):
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(store.folder / MANIFEST, folder)
        change_manifest(Path(folder), lambda values: values.update(changes))
        return (Path(folder) / MANIFEST).read_bytes()


def fetched(monkeypatch):
    """The names of the files that are fetched from now on."""
    names = []
    for kind in ("memory", "file"):
        files = fsspec.get_filesystem_class(kind)
        plain = files.get_file

        def counted(self, path, *args, plain=plain, **kwargs):
            names.append(path.rpartition("/")[2])
            return plain(self, path, *args, **kwargs)

        monkeypatch.setattr(files, "get_file", counted)
    return names


def test_what_arrives_is_what_was_copied(store, url, tmp_path):
    copy_to(store.folder, url)
    for there in (open_remote(url), open_remote(url, tmp_path / "own")):
        assert there.manifest == store.manifest
        assert torch.equal(there.batch(range(len(store))), store.batch(range(len(store))))
        assert (there.contexts == store.contexts).all() and there.folder != store.folder


@pytest.mark.parametrize("own", [None, "own"])
def test_it_is_fetched_once(store, url, tmp_path, monkeypatch, own):
    copy_to(store.folder, url)
    folder, names = own and tmp_path / own, fetched(monkeypatch)
    first = open_remote(url, folder)
    assert sorted(names) == sorted([TOKENS, KEPT, *(s.name for s in store.manifest.shards)])
    names.clear()
    assert open_remote(url, folder).folder == first.folder and names == []


def test_another_store_at_the_address_is_fetched_anew(store, url):
    copy_to(store.folder, url)
    before = open_remote(url)
    overwrite(url, MANIFEST, changed_manifest(store, corpus_name="another"))
    after = open_remote(url)
    assert after.folder != before.folder and after.manifest.corpus_name == "another"


def test_a_fetch_that_failed_goes_on_where_it_was(store, url, monkeypatch):
    copy_to(store.folder, url)
    last = store.manifest.shards[-1].name
    files, path = remote_file(url, last)
    content = files.cat_file(path)
    overwrite(url, last, content[:-8])
    with pytest.raises(
        ValueError, match=f"{last} from {url} is not what was saved.*copy the store"
    ):
        open_remote(url)
    overwrite(url, last, content)
    names = fetched(monkeypatch)
    assert len(open_remote(url)) == len(store) and names == [last]


def test_a_killed_fetch_leaves_nothing_behind(store, url):
    copy_to(store.folder, url)
    folder = open_remote(url).folder
    half = folder.with_suffix(".part")
    folder.rename(half)
    (half / MANIFEST).unlink()
    (half / f"{TOKENS}.abc.part").mkdir()
    (half / f"{TOKENS}.abc.part" / TOKENS).write_bytes(b"half a file")
    assert open_remote(url).folder == folder and not list(folder.glob("*.part"))


@pytest.mark.parametrize("own", [None, "own"])
def test_a_missing_file_leaves_no_store(store, url, tmp_path, own):
    copy_to(store.folder, url)
    files, path = remote_file(url, TOKENS)
    files.rm(path)
    with pytest.raises(FileNotFoundError, match=f"{TOKENS} is missing from the store at {url}"):
        open_remote(url, own and tmp_path / own)
    assert not (tmp_path / "own").exists()
    assert not list((tmp_path / "cache").glob(f"**/{MANIFEST}"))


@pytest.mark.parametrize("own", [None, "own"])
@pytest.mark.parametrize("name", [TOKENS, KEPT, "shard-00002.npy"])
def test_what_changed_on_the_way_is_refused(store, url, tmp_path, own, name):
    copy_to(store.folder, url)
    content = bytearray((store.folder / name).read_bytes())
    content[-30] ^= 4
    overwrite(url, name, bytes(content))
    with pytest.raises(
        ValueError, match=f"{name} from {url} is not what was saved.*Fetch it again"
    ):
        open_remote(url, own and tmp_path / own)
    assert not (tmp_path / "own").exists()
    assert not list((tmp_path / "cache").glob(f"**/{MANIFEST}"))


def test_a_damaged_store_is_not_copied(store, url, tmp_path):
    folder = shutil.copytree(store.folder, tmp_path / "damaged")
    flip(folder / "shard-00001.npy", 8 * 1000)
    with pytest.raises(ValueError, match="shard-00001.npy is not what was saved"):
        copy_to(folder, url)
    with pytest.raises(FileNotFoundError, match=f"holds no {MANIFEST}"):
        open_remote(url)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format version 2; this code reads 3"),
        ({"shards": [SHARD | {"name": "../x.npy"}]}, r"named '\.\./x.npy'; expected shard-00000"),
        ({"shards": None}, "shards is None; expected tuple"),
        ({"n_tokens": 1}, "n_tokens is 1"),
    ],
)
def test_a_strange_manifest_is_refused_before_anything_is_fetched(
    store, url, monkeypatch, changes, message
):
    copy_to(store.folder, url)
    overwrite(url, MANIFEST, changed_manifest(store, **changes))
    names = fetched(monkeypatch)
    with pytest.raises(
        ValueError, match=f"{url}/{MANIFEST} .*{message}.*copy the store there again"
    ):
        open_remote(url)
    assert names == []


def test_a_file_that_arrives_short_is_named(store, url, monkeypatch):
    monkeypatch.setattr(fsspec.get_filesystem_class(url.partition(":")[0]), "size", lambda *_: 7)
    with pytest.raises(ValueError, match="has 7 bytes at .* here; copy the store again"):
        copy_to(store.folder, url)
    with pytest.raises(FileNotFoundError, match=f"holds no {MANIFEST}"):
        open_remote(url)


def test_the_manifest_is_written_last(store, url, monkeypatch):
    kind = fsspec.get_filesystem_class(url.partition(":")[0])
    plain = kind.put_file

    def cut_off(self, source, target, **kwargs):
        if target.endswith(KEPT):
            raise ConnectionError("gone")
        return plain(self, source, target, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(ConnectionError):
        patch.setattr(kind, "put_file", cut_off)
        copy_to(store.folder, url)
    with pytest.raises(FileNotFoundError, match=f"holds no {MANIFEST}"):
        open_remote(url)
    copy_to(store.folder, url)
    assert len(open_remote(url)) == len(store)


def test_a_copy_is_not_made_twice_nor_over_another(store, url, monkeypatch):
    copy_to(store.folder, url)
    kind = fsspec.get_filesystem_class(url.partition(":")[0])
    with monkeypatch.context() as patch:
        patch.setattr(kind, "put_file", lambda *args, **kwargs: pytest.fail("copied again"))
        copy_to(store.folder, url)
    overwrite(url, MANIFEST, changed_manifest(store, corpus_name="another"))
    with pytest.raises(FileExistsError, match="holds another store"):
        copy_to(store.folder, url)


def test_a_folder_that_holds_something_else_is_left_alone(store, url, tmp_path):
    copy_to(store.folder, url)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        open_remote(url, tmp_path / "own")
    assert (tmp_path / "own" / "notes.txt").read_text() == "mine"


def test_no_store_is_copied_from_a_folder_without_one(tmp_path, url):
    with pytest.raises(FileNotFoundError, match=f"holds no {MANIFEST}"):
        copy_to(tmp_path, url)


@pytest.mark.parametrize("call", [open_remote, lambda url: copy_to("anything", url)])
def test_an_unknown_protocol_is_named(call):
    with pytest.raises(ValueError, match="'nowhere://x/y' cannot be opened .*expected an address"):
        call("nowhere://x/y")


def test_a_protocol_without_its_package_says_which(monkeypatch):
    def without(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", without)
    with pytest.raises(ImportError, match=r"needs a package .*Install s3fs"):
        open_remote("s3://bucket/store")


def test_prune_keeps_what_was_fetched(store, url):
    copy_to(store.folder, url)
    folder = open_remote(url).folder
    cache.prune()
    assert ActivationStore.open(folder).manifest == store.manifest
