"""Writing whole: what errors, killed processes, rivals and full disks leave behind."""

from __future__ import annotations

import errno
import os
import resource
import threading

import pytest

from c2r_core.artefacts.files import DiskFullError, check_room, whole_file, whole_folder
from forks import forked


def fill(folder, text="new"):
    (folder / "a").write_text(text)
    (folder / "deep").mkdir()
    (folder / "deep" / "b").write_text(text)


def content(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()
    }


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_whole_and_replaces_the_one_before(tmp_path):
    target = tmp_path / "parent" / "target"
    for text in ("old", "new"):
        with whole_folder(target) as part:
            fill(part, text)
            assert not target.exists() or content(target)["a"] == "old"
        assert content(target) == {"a": text, "deep/b": text}
    assert names(target.parent) == ["target"]


def test_after_an_error_all_is_as_before(tmp_path):
    (tmp_path / "file").write_text("old")
    with whole_folder(tmp_path / "folder") as part:
        fill(part, "old")
    for writer, write in ((whole_folder, fill), (whole_file, lambda p: p.write_text("new"))):
        target = tmp_path / ("folder" if writer is whole_folder else "file")
        with pytest.raises(RuntimeError, match="half"), writer(target) as part:
            write(part)
            raise RuntimeError("half")
    assert names(tmp_path) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == content(tmp_path / "folder")["a"] == "old"


def test_only_an_empty_folder_gives_way_without_replace(tmp_path):
    (tmp_path / "target").mkdir()
    with whole_folder(tmp_path / "target", replace=False) as part:
        fill(part)
    with (
        pytest.raises(FileExistsError, match="another process.*target"),
        whole_folder(tmp_path / "target", replace=False) as part,
    ):
        fill(part, "newer")
    assert content(tmp_path / "target")["a"] == "new" and names(tmp_path) == ["target"]


def test_permissions_are_those_of_any_new_file_and_the_umask_is_left_alone(tmp_path, monkeypatch):
    before = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", None)
        with whole_folder(tmp_path / "folder") as part:
            fill(part)
        with whole_file(tmp_path / "file") as part:
            part.write_text("x")
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_threads_that_replace_one_folder_leave_one_of_theirs(tmp_path):
    failures = []

    def work(text):
        try:
            for _ in range(5):
                with whole_folder(tmp_path / "target") as part:
                    fill(part, text)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(text,)) for text in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = content(tmp_path / "target")
    assert not failures and len(set(found.values())) == 1 and len(found) == 2
    assert names(tmp_path) == ["target"]


def _die_half_way(folder, how):
    with how(folder / "target") as part:
        (part / "a" if how is whole_folder else part).write_text("half")
        os._exit(9)


@pytest.mark.parametrize("how", [whole_folder, whole_file])
def test_what_a_killed_process_left_is_no_ones_and_stays(tmp_path, how):
    process = forked(_die_half_way, tmp_path, how)
    process.start()
    process.join()
    assert process.exitcode == 9
    (left,) = names(tmp_path)
    assert left.startswith("target.") and left.endswith(".part")
    with how(tmp_path / "target") as part:
        (part / "b" if how is whole_folder else part).write_text("whole")
    assert names(tmp_path) == ["target", left], "it might be that of a process at work"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("100 requested and 50 written"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
@pytest.mark.parametrize("how", [whole_folder, whole_file])
def test_a_full_disk_says_what_to_do(tmp_path, how, error):
    with (
        pytest.raises(DiskFullError, match="the disk is full.*C2R_CACHE.*target") as caught,
        how(tmp_path / "target"),
        how(tmp_path / "other" / "target"),
    ):
        raise error
    assert "other" in str(caught.value), "explained once, where it happened"
    assert caught.value.errno == errno.ENOSPC and not list(tmp_path.rglob("*target*"))


def test_a_write_that_the_system_refuses_is_explained(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(DiskFullError), whole_file(tmp_path / "big") as part:
            part.write_bytes(b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == []


def test_other_errors_pass(tmp_path):
    with pytest.raises(PermissionError, match="no"), whole_file(tmp_path / "file"):
        raise PermissionError(errno.EACCES, "no")


def test_room_is_checked_before_the_work(tmp_path):
    check_room(tmp_path, 1)
    with pytest.raises(DiskFullError, match=f"{10**18:,} bytes are needed"):
        check_room(tmp_path, 10**18)
