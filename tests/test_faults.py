"""What a disk, a cable or a hand may do to a file: nothing is read that is not what was written."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from architectures import make
from c2r_core.artefacts.results import read_json
from c2r_core.data.batches import ToyBatches
from c2r_core.data.toy import FeatureTree
from c2r_core.data.words import FirstLetterTask
from c2r_core.formats import open_sae
from c2r_core.saes import BatchTopKSAE, load_sae, save_sae
from c2r_core.training import C2R, TrainConfig, train
from c2r_core.training.checkpoints import read_checkpoint, write_checkpoint
from conftest import PROJECT
from faults import accepted, flip, some_bits
from foreign_saes import write_dictionary_learning
from inject_faults import CUTS, FAULTS
from processes import environment

TREE = FeatureTree(d_in=20, n_parents=2, children_per_parent=2, n_singles=4)
CONFIG = TrainConfig(steps=17, lr=5e-3, log_every=4, checkpoint_every=5)


def length_of_header(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


# -- saved SAEs ---------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> Path:
    sae = make("batch_topk")
    sae.norm_factor = 0.25
    return save_sae(sae, tmp_path / "sae", trained_on={"model": "a-model", "lr": 0.004})


def test_no_flipped_bit_of_a_saved_sae_is_read(saved):
    config, weights = saved / "config.json", saved / "sae.safetensors"
    every_bit = range(8 * config.stat().st_size)
    assert not accepted(config, every_bit, lambda: load_sae(saved))
    header = length_of_header(weights)
    bits = some_bits(weights, 100, end=header) + some_bits(weights, 200, first_byte=header)
    assert not accepted(weights, bits, lambda: load_sae(saved))
    assert not accepted(weights, bits[-20:], lambda: open_sae(saved))


def test_files_of_another_sae_and_cut_ones_are_refused(saved, tmp_path):
    other = save_sae(make("batch_topk", seed=1), tmp_path / "other")
    for name in ("config.json", "sae.safetensors"):
        whole = (saved / name).read_bytes()
        shutil.copy(other / name, saved / name)
        with pytest.raises(ValueError, match=r"sae.safetensors is not what was saved.*Restore"):
            load_sae(saved)
        for length in (0, 1, len(whole) // 2, len(whole) - 2):
            (saved / name).write_bytes(whole[:length])
            with pytest.raises(ValueError, match=rf"{name} is (damaged|not what was saved)"):
                load_sae(saved)
        (saved / name).write_bytes(whole)
    assert load_sae(saved).norm_factor == 0.25


def test_a_damaged_sae_can_be_saved_again(saved):
    sae = load_sae(saved)
    flip(saved / "sae.safetensors", 8 * 2000)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_sae(sae, saved)
    save_sae(sae, saved, overwrite=True)
    flip(saved / "config.json", 100)
    save_sae(sae, saved)  # the weights are these very ones
    assert torch.equal(load_sae(saved).W_dec, sae.W_dec)


def test_folders_of_version_1_load(saved):
    sae, file = load_sae(saved), saved / "config.json"
    config = json.loads(file.read_text())
    sums = {name: config.pop(name) for name in ("config_sha256", "weights_sha256")}
    assert config["format_version"] == 2

    def load(**changes):
        file.write_text(json.dumps(config | changes))
        return load_sae(saved)

    old = load(format_version=1)
    assert torch.equal(old.W_dec, sae.W_dec)
    assert (old.config, old.trained_on, old.norm_factor) == (
        sae.config,
        sae.trained_on,
        sae.norm_factor,
    )
    with pytest.raises(ValueError, match="config.json is not what was saved"):
        load()
    with pytest.raises(ValueError, match="one too many"):
        load(format_version=1, **sums)
    assert load(**sums).config == sae.config


def test_names_and_numbers_of_any_kind_keep_the_checksum(tmp_path):
    about = {"größe": "µ \U0001f600", "lr": 1e-5, "none": float("inf"), 7: "seven", "b": True}
    folder = save_sae(make("topk"), tmp_path / "sae", trained_on=about)
    assert load_sae(folder).trained_on == {str(name): value for name, value in about.items()}


# -- checkpoints --------------------------------------------------------------------------------


class Killed(BaseException):
    """In place of a process that dies."""


class Dying(ToyBatches):
    stop_at = -1

    def __call__(self, step):
        if step == self.stop_at:
            raise Killed
        return super().__call__(step)


def trained(checkpoint: Path | None = None, *, stop_at: int = -1):
    sae, batches = BatchTopKSAE(20, 30, k=2), Dying(TREE, 32, 0)
    batches.stop_at = stop_at
    if stop_at >= 0:
        with pytest.raises(Killed):
            train(sae, batches, CONFIG, [C2R(0.1)], checkpoint=checkpoint, progress=False)
        return sae, None
    return sae, train(sae, batches, CONFIG, [C2R(0.1)], checkpoint=checkpoint, progress=False)


def steps(path: Path) -> dict[str, int]:
    """The step of every file in a folder; each must be a whole checkpoint."""
    return {file.name: read_checkpoint(file)[1]["step"] for file in sorted(path.iterdir())}


def written(path: Path, step: int, last: int = 30) -> None:
    tensors = {"a": torch.full((3, 2), step, dtype=torch.bfloat16), "b": torch.tensor(step)}
    write_checkpoint(path, tensors, {"step": step, "run": {"config": {"steps": last}}})


def test_no_flipped_bit_of_a_checkpoint_is_read(tmp_path):
    path = tmp_path / "run.safetensors"
    trained(path)
    header = length_of_header(path)
    bits = some_bits(path, 200, end=header) + some_bits(path, 100, first_byte=header)
    assert not accepted(path, bits, lambda: read_checkpoint(path))


def test_tensors_and_state_of_two_checkpoints_do_not_mix(tmp_path):
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    written(one, 1)
    written(other, 2)
    a, b = one.read_bytes(), other.read_bytes()
    header = length_of_header(one)
    assert header == length_of_header(other)
    one.write_bytes(a[:header] + b[header:])
    with pytest.raises(ValueError, match="one.safetensors .* is damaged .*SHA-256"):
        read_checkpoint(one)


DAMAGES = {
    "a flipped bit": lambda file: flip(file, 8 * file.stat().st_size - 100),
    "no UTF-8": lambda file: flip(file, 8 * 40 + 7),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "empty": lambda file: file.write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_training_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path, damage):
    path, previous = tmp_path / "run.safetensors", tmp_path / "run.previous.safetensors"
    whole, history = trained()
    trained(path, stop_at=12)
    both = {previous.name: 5, path.name: 10}
    assert steps(tmp_path) == both
    damage(path)
    with pytest.warns(UserWarning, match=rf"{path} .*damaged.* {previous}, of step 5\."):
        trained(path, stop_at=13)
    assert steps(tmp_path) == both, "the damaged one took no whole one's place"
    damage(path)
    with pytest.warns(UserWarning, match="of step 5"):
        sae, resumed = trained(path)
    assert resumed.records == history.records
    for name, tensor in whole.state_dict().items():
        assert torch.equal(sae.state_dict()[name], tensor), name
    assert steps(tmp_path) == {path.name: 17}, "the end keeps one"


def test_two_damaged_checkpoints_are_refused(tmp_path):
    path, previous = tmp_path / "run.safetensors", tmp_path / "run.previous.safetensors"
    trained(path, stop_at=12)
    flip(path, 9000)
    flip(previous, 9000)
    with pytest.raises(ValueError, match=rf"{path} .*delete it.*{previous} .*damaged"):
        trained(path)
    path.unlink()
    trained(path, stop_at=7)
    assert steps(tmp_path) == {path.name: 5}, "deleted, it starts anew, and what was left is gone"


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("step", [15, 30])
def test_killed_between_two_renames_both_names_are_whole(tmp_path, monkeypatch, after, step):
    path = tmp_path / "run.safetensors"
    written(path, 5)
    written(path, 10)
    assert list(steps(tmp_path).values()) == [5, 10]
    rename, done = Path.replace, []

    def dying(file, target):
        if len(done) == after:
            raise Killed
        done.append(target)
        return rename(file, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", dying)
        if after and step == 30:
            patched.setattr(Path, "unlink", lambda *_, **__: dying(None, None))
        with pytest.raises(Killed):
            written(path, step)
    assert list(steps(tmp_path).values()) == [5, step if after else 10]
    written(path, 20)
    written(path, 30)
    assert list(steps(tmp_path).values()) == [30]


def test_a_disk_without_hard_links_keeps_two_as_well(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for step in (5, 10, 15):
        written(tmp_path / "run.safetensors", step)
    assert list(steps(tmp_path).values()) == [10, 15]


def test_checkpoints_of_earlier_versions_are_read(tmp_path):
    path = tmp_path / "run.safetensors"
    whole, _ = trained()
    trained(path, stop_at=12)
    tensors, state = read_checkpoint(path)
    state["run"]["config"]["checkpoint_every"] = CONFIG.checkpoint_every
    save_file(tensors, path, metadata={"state": json.dumps(state)})
    with warnings.catch_warnings(action="error"):
        sae, _ = trained(path)
    assert torch.equal(sae.W_dec, whole.W_dec)


# -- other files --------------------------------------------------------------------------------


def test_no_utf8_and_no_json_are_refused_by_name(tmp_path):
    task = FirstLetterTask(
        words=("a",),
        activations=torch.zeros(1, 2),
        letters=torch.zeros(1, dtype=torch.long),
        is_test=torch.zeros(1, dtype=torch.bool),
        hook_name="hook",
        prefix="",
        n_dropped=0,
    )
    for content in (b"\xff{}", b"{", b"3"):
        file = tmp_path / "result.json"
        file.write_bytes(content)
        if content != b"3":
            with pytest.raises(ValueError, match=r"result.json is not valid JSON"):
                read_json(file)
        for name in ("task.json", "task.safetensors"):
            task.save(tmp_path / "task")
            (tmp_path / "task" / name).write_bytes(content)
            with pytest.raises(ValueError, match=rf"{name} is damaged"):
                FirstLetterTask.load(tmp_path / "task")


def test_a_damaged_pickle_is_refused_by_name(tmp_path):
    write_dictionary_learning(tmp_path)
    file = tmp_path / "ae.pt"
    # Most damage to another library's numbers shows nowhere; what can be seen must be said so.
    commands = file.read_bytes().index(b"\x80\x02")
    bits = some_bits(file, 200, first_byte=commands, end=commands + 400)
    whole = file.read_bytes()
    for bit in bits:
        flip(file, bit)
        try:
            open_sae(tmp_path)
        except ValueError as error:
            assert "ae.pt" in str(error), f"bit {bit}: {error!r}"
        file.write_bytes(whole)


# -- all of them, at random moments ----------------------------------------------------------------


ROW = re.compile(r"^(\S.*?) +(\d+) +(\d+) +(0|\d+ \w+) +(\d+) +\d+$", re.MULTILINE)
"""Of the table that `make faults` prints: fault, tries, survived, work lost, silent, seconds."""


def test_some_faults_in_real_work_cost_no_more_than_they_may():
    """A small share of `make faults`."""
    command = [sys.executable, PROJECT / "tests" / "inject_faults.py", "--share", "0.02"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row[0] for row in ROW.findall(done.stdout)] == list(FAULTS)
    assert re.search(r"^\d+ faults, 0 wrong in silence, done twice at most", done.stdout, re.M)


def test_every_fault_is_on_the_page_with_what_it_cost():
    page = (PROJECT / "docs" / "faults.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (.+?) \|", page, re.MULTILINE)[1:] == list(FAULTS)
    (printed,) = re.findall(r"```\n\$ .*?\n(.*?)```", page, re.DOTALL)
    rows = ROW.findall(printed)
    assert [row[0] for row in rows] == list(FAULTS)
    assert all(tries == survived and silent == "0" for _, tries, survived, _, silent in rows)
    n_tries = sum(int(row[1]) for row in rows)
    assert re.search(rf"^{n_tries} faults, 0 wrong in silence", printed, re.MULTILINE)
    assert CUTS >= 20, "of the training of each architecture"
