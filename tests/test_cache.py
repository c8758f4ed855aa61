from __future__ import annotations

import errno
import json
import os
import shutil
import time

import pytest

from c2r_core.artefacts.cache import DamagedArtefact, cached, prune
from c2r_core.artefacts.fingerprints import all_modules
from forks import forked


@pytest.fixture(autouse=True)
def cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("C2R_CACHE", str(tmp_path))
    return tmp_path


def write_artefact(folder):
    (folder / "weights").write_text("1 2 3")


def test_the_second_call_finds_what_the_first_built(cache_folder):
    calls = []

    def build(folder):
        calls.append(folder)
        write_artefact(folder)

    first = cached("sae", {"k": 3, "seed": 0}, build)
    assert cached("sae", {"seed": 0, "k": 3}, build) == first
    assert len(calls) == 1
    assert (first / "weights").read_text() == "1 2 3"
    assert first.parent == cache_folder / "sae"
    assert json.loads((first / "key.json").read_text())["key"] == {"k": 3, "seed": 0}


@pytest.mark.parametrize("other", [("sae", {"k": 4}), ("store", {"k": 3}), ("sae", {"k": "3"})])
def test_kind_and_every_value_of_the_key_count(other):
    assert cached("sae", {"k": 3}, write_artefact) != cached(*other, write_artefact)


@pytest.mark.parametrize(
    "damage, said",
    [
        (
            lambda folder: (folder / "inner" / "weights").write_text("1 2 4"),
            "is not what was saved",
        ),
        (lambda folder: (folder / "inner" / "weights").unlink(), "weights is missing"),
        (lambda folder: (folder / "more").write_text("1"), "more is not what was saved"),
        (lambda folder: (folder / "checksums.json").unlink(), "checksums.json is missing"),
        (lambda folder: (folder / "checksums.json").write_text("{"), "checksums.json is damaged"),
        (lambda folder: (folder / "checksums.json").write_text("[]"), "is no JSON object"),
        (lambda folder: (folder / "checksums.json").write_text("{}"), "should be None"),
    ],
)
def test_what_was_altered_is_refused_by_its_name_and_made_anew(damage, said):
    def build(folder):
        (folder / "inner").mkdir()
        write_artefact(folder / "inner")

    folder = cached("words", {"k": 3}, build)
    assert cached("words", {"k": 3}, build) == folder
    damage(folder)
    with pytest.raises(DamagedArtefact, match=f"{said}.* Delete {folder}; it is made anew"):
        cached("words", {"k": 3}, build)
    shutil.rmtree(folder)
    assert (cached("words", {"k": 3}, build) / "inner" / "weights").read_text() == "1 2 3"


def test_a_failing_build_leaves_nothing(cache_folder):
    def build(folder):
        write_artefact(folder)
        raise RuntimeError("diverged")

    with pytest.raises(RuntimeError, match="diverged"):
        cached("sae", {"k": 3}, build)
    assert not list(cache_folder.rglob("weights"))
    assert (cached("sae", {"k": 3}, write_artefact) / "weights").is_file()


def test_a_full_disk_says_what_to_do():
    def build(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="the disk is full.* C2R_CACHE"):
        cached("sae", {"k": 3}, build)


def test_the_key_must_be_plain():
    with pytest.raises(TypeError, match="not JSON serializable"):
        cached("sae", {"k": object()}, write_artefact)


def _build_and_die(folder):
    write_artefact(folder)
    os._exit(9)


def _build_slowly(folder):
    with open(folder.parent.parent / "builds", "a") as builds:
        builds.write("x")
    time.sleep(0.5)
    write_artefact(folder)


def _use(build):
    assert (cached("sae", {"k": 3}, build) / "weights").is_file()


def start_processes(build, count):
    """Exit codes of `count` processes that want the same artefact at the same time."""
    processes = [forked(_use, build) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def test_a_killed_build_leaves_nothing_that_counts():
    assert start_processes(_build_and_die, 1) == [9]
    calls = []
    folder = cached("sae", {"k": 3}, lambda folder: calls.append(list(folder.iterdir())))
    assert calls == [[]], "the next build starts with an empty folder"
    assert not (folder / "weights").exists()


def test_a_resumable_build_goes_on_from_what_was_left(cache_folder):
    def build_half(folder):
        (folder / "checkpoint").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached("sae", {"k": 3}, build_half, resumable=True)
    assert not (cache_folder / "sae").joinpath("weights").exists()
    found = []

    def build_rest(folder):
        found.append((folder / "checkpoint").read_text())
        write_artefact(folder)

    folder = cached("sae", {"k": 3}, build_rest, resumable=True)
    assert found == ["half"] and (folder / "weights").is_file()


def test_two_processes_build_once(cache_folder):
    assert start_processes(_build_slowly, 2) == [0, 0]
    assert (cache_folder / "builds").read_text() == "x"


def test_only_the_code_of_its_kind_counts(cache_folder):
    described = {}
    for kind, code in (("activations", []), ("sae", ["c2r_core.saes.topk"]), ("sae", [])):
        folder = cached(kind, {"k": 3}, write_artefact, code=code)
        described[kind, *code] = json.loads((folder / "key.json").read_text())["entries"]
    assert described == {
        ("activations",): ["c2r_core.data.harvest"],
        ("sae", "c2r_core.saes.topk"): ["c2r_core.saes.topk"],
        ("sae",): all_modules(),  # it is not said on what, so on everything
    }
    with_more = cached("activations", {"k": 3}, write_artefact, code=["c2r_core.data.words"])
    assert with_more != cached("activations", {"k": 3}, write_artefact)


def test_prune_removes_what_no_code_would_find(cache_folder):
    current, old, odd, own = (cached("sae", {"k": k}, write_artefact) for k in (1, 2, 3, 4))
    text = json.loads((old / "key.json").read_text())
    (old / "key.json").write_text(json.dumps(text | {"code": "of last year"}))
    (odd / "key.json").write_text(json.dumps(text | {"entries": ["c2r_core.gone"]}))
    entries = ["c2r_core.seeds", "their_plugin"]  # not imported here, so nothing is known of it
    (own / "key.json").write_text(json.dumps(text | {"entries": entries}))
    (cache_folder / "sae" / "dead.part").mkdir()
    assert prune(dry_run=True)[0] == 3 and old.is_dir()
    removed, freed = prune()
    assert removed == 3 and freed > 0
    left = {path.name for path in (cache_folder / "sae").glob("*") if path.is_dir()}
    assert left == {current.name, own.name}


def test_prune_leaves_what_is_being_built(cache_folder):
    def build(folder):
        assert prune()[0] == 0
        write_artefact(folder)

    assert (cached("sae", {"k": 3}, build) / "weights").is_file()
