"""Several processes train the SAE that one would train; one that dies stops the others."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from c2r_core.data.batches import ToyBatches
from c2r_core.data.toy import FeatureTree
from c2r_core.saes import create_sae
from c2r_core.training import (
    C2R,
    Orthogonality,
    TrainConfig,
    distributed,
    train,
    train_distributed,
)
from processes import environment, errors, in_processes, run_file

ARGUMENTS = {
    "batch_topk": {"k": 2},
    "topk": {"k": 2},
    "matryoshka_batch_topk": {"k": 2, "group_fractions": (0.25, 0.75)},
    "relu": {"l1_weight": 0.02},
    "gated": {"l1_weight": 0.05},
}
TRAINED = {2: list(ARGUMENTS), 4: ["batch_topk"]}
"""What so many processes train."""
STEPS = 20


def batches():
    toy = ToyBatches(FeatureTree(d_in=20, n_parents=2, children_per_parent=2, n_singles=4), 64, 3)
    return lambda step: toy(step).double()


def new_sae(architecture):
    sae = create_sae(architecture, d_in=20, d_sae=32, seed=1, **ARGUMENTS[architecture]).double()
    if sae.target_l0:
        with torch.no_grad():
            sae.b_enc[:8] = -0.5  # silent at first, so that there is something to revive
    return sae


def run(trainer, architecture, checkpoint=None, source=None):
    """Penalties that apply rarely and always, a bound that acts, dead latents."""
    sae = new_sae(architecture)
    config = TrainConfig(
        steps=STEPS, lr=5e-3, clip_norm=0.05, dead_after=2, log_every=1, checkpoint_every=5
    )
    penalties = [C2R(0.3, every=3), Orthogonality(0.1)]
    options = {"checkpoint": checkpoint, "progress": False}
    history = trainer(sae, source or batches(), config, penalties, **options)
    return sae, history


def worker(folder: Path, architectures: list[str]) -> None:
    """What each process does."""
    rank, dying = torch.distributed.get_rank(), folder / "dies"

    usual = batches()

    def source(step):
        with (folder / f"asked-{rank}").open("a") as asked:
            asked.write(f"{step}\n")
        if rank == 1 and step == 12 and dying.exists():
            dying.unlink()
            os._exit(3)
        return usual(step)

    for architecture in architectures:
        sae, history = run(
            train_distributed, architecture, folder / f"{architecture}.safetensors", source
        )
        state = {name: tensor.tolist() for name, tensor in sae.state_dict().items()}
        found = {"state": state, "history": history.records}
        (folder / f"{architecture}-{rank}.json").write_text(json.dumps(found))


def torchrun(folder: Path) -> subprocess.CompletedProcess:
    """Two processes as a user starts them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return subprocess.run(
        [*command, __file__, str(folder)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=180,
    )


def check(folder: Path, architecture: str, n: int) -> None:
    alone, history = run(train, architecture)
    for rank in range(n):
        found = json.loads((folder / f"{architecture}-{rank}.json").read_text())
        for name, tensor in alone.state_dict().items():
            theirs = torch.tensor(found["state"][name], dtype=torch.float64)
            torch.testing.assert_close(theirs, tensor, rtol=0, atol=1e-9, msg=name)
        for ours, theirs in zip(history.records, found["history"], strict=True):
            assert ours.keys() == theirs.keys()
            assert all(theirs[key] == pytest.approx(ours[key], abs=1e-9) for key in ours)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    run_file(__file__, folder)
    return folder


@pytest.mark.parametrize("n", TRAINED)
def test_processes_train_the_sae_that_one_trains(n, trained):
    folder = trained / str(n)
    assert json.loads((folder / "statuses.json").read_text()) == [0] * n, errors(folder)
    for architecture in TRAINED[n]:
        check(folder, architecture, n)


def test_one_that_dies_stops_the_others_and_the_run_goes_on(tmp_path):
    (tmp_path / "dies").touch()
    started = time.monotonic()
    done = torchrun(tmp_path)
    assert done.returncode != 0 and time.monotonic() - started < 60
    assert re.search(r"exitcode *: 3\b", done.stderr)
    assert not (tmp_path / "batch_topk-0.json").exists()
    assert (tmp_path / "batch_topk.safetensors").exists()
    (tmp_path / "asked-0").unlink()
    assert torchrun(tmp_path).returncode == 0
    first, *steps = map(int, (tmp_path / "asked-0").read_text().split())
    assert first == 0 and steps == list(range(10, STEPS)), "from the last checkpoint on"
    check(tmp_path, "batch_topk", 2)


def test_ties_for_the_last_places_fill_them_and_no_more(monkeypatch):
    pre_acts = torch.tensor([[3.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 2.0]])
    other = torch.tensor([4.0, 1.0, 1.0, 1.0, 0.5, 0.0, 0.0, 0.0])
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    kept = {}
    for rank in (0, 1):
        of_each = {0: lambda own: [own, other], 1: lambda own: [other, own]}[rank]
        monkeypatch.setattr(distributed, "_all_gather", of_each)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        kept[rank] = sorted(pre_acts.flatten()[distributed._keep(pre_acts, 1)].tolist())
    assert kept == {0: [1.0, 2.0, 3.0], 1: [2.0, 3.0]}


def test_what_cannot_be_shared_is_refused(monkeypatch):
    config = TrainConfig(steps=2)
    with pytest.raises(RuntimeError, match=r"init_process_group\(\) first"):
        train_distributed(new_sae("relu"), batches(), config)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    stack = create_sae("relu", d_in=20, d_sae=32, l1_weight=0.1, seed=[0, 1])
    jump = create_sae("jump_relu", d_in=20, d_sae=32, target_l0=2)
    for sae, settings in (
        (stack, config),
        (jump, config),
        (new_sae("relu"), TrainConfig(2, resample_every=1)),
    ):
        with pytest.raises(ValueError, match="cannot share its batches"):
            train_distributed(sae, batches(), settings)


@pytest.fixture
def two(monkeypatch):
    """This process takes itself for the first of two that start alike."""

    def gather(told, own):
        told[:] = [own, own]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)


def test_processes_that_start_unlike_are_refused(two, monkeypatch):
    def gather(told, own):
        told[:] = [own, own | {"step": 5}]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(ValueError, match="The processes start from unlike SAEs"):
        run(train_distributed, "relu")


@pytest.mark.parametrize("n", [33, 2])
def test_a_batch_that_cannot_be_divided_is_refused(two, n):
    with pytest.raises(ValueError, match=f"step 0 has {n} samples; expected a multiple of the 2"):
        run(train_distributed, "relu", source=lambda step: batches()(step)[:n])


def test_a_share_that_keeps_nothing_is_named(two, monkeypatch):
    monkeypatch.setattr(distributed, "_all_gather", lambda own: [own, torch.full((4,), 9.0)])
    with pytest.raises(ValueError, match="None of the 4 largest .* share of 2 samples"):
        distributed._keep(torch.ones(2, 4), 1)


def all_trained(folder: Path) -> None:
    """The same from processes that are forked, which takes a third of the time of torchrun."""
    for n, architectures in TRAINED.items():
        own = folder / str(n)
        own.mkdir()
        statuses, _ = in_processes(own, n, lambda own=own, what=architectures: worker(own, what))
        (own / "statuses.json").write_text(json.dumps(statuses))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "RANK" in os.environ:  # one of torchrun's
        torch.distributed.init_process_group("gloo")
        worker(Path(sys.argv[1]), ["batch_topk"])
        torch.distributed.destroy_process_group()
    else:
        all_trained(Path(sys.argv[1]))
