"""Processes that each hold a part of the latents train the SAE that one would train."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from c2r_core.data.batches import ToyBatches
from c2r_core.data.toy import FeatureTree
from c2r_core.saes import create_sae, save_sae
from c2r_core.training import (
    C2R,
    Orthogonality,
    TrainConfig,
    create_regulariser,
    create_shard,
    gather_shards,
    sharded,
    train,
    train_sharded,
)
from processes import errors, in_processes, run_file

CASES = {
    "c2r": ("batch_topk", [C2R(0.3)]),
    "orthogonality": ("batch_topk", [Orthogonality(0.1)]),
    "both": ("topk", [C2R(0.3, every=3, alpha=0.5, decoder_norm=False), Orthogonality(0.1)]),
    "plain": ("topk", []),
}
SIZES = {"d_in": 20, "d_sae": 32, "k": 2, "seed": 1}
STEPS = 20
# A bound that acts, and dead latents to be revived.
CONFIG = TrainConfig(
    steps=STEPS, lr=5e-3, clip_norm=0.05, dead_after=2, log_every=1, checkpoint_every=5
)


def batches():
    toy = ToyBatches(FeatureTree(d_in=20, n_parents=2, children_per_parent=2, n_singles=4), 64, 3)
    return lambda step: toy(step).double()


def new_sae(architecture, rank=0, world=1):
    """The whole SAE, or a process's shard; its first latents are silent, so that some shards may be."""
    create = create_shard if world > 1 else create_sae
    sae = create(architecture, **SIZES).double()
    with torch.no_grad():
        sae.b_enc[: max(0, 8 - rank * len(sae.b_enc))] = -2.0
    return sae


def run(case, rank, world, source, checkpoint=None):
    """A shard, its history, and the least number of kept activations and of neighbours in other shards."""
    architecture, penalties = CASES[case]
    sae, kept, elsewhere = new_sae(architecture, rank, world), [], []
    usual = sharded.sharded_losses, sharded.pair_terms

    def losses(*given):
        found = usual[0](*given)
        kept.append(len(found.feature_acts.values))
        return found

    def pair_terms(norms, W_dec, index, alpha):
        elsewhere.append(int((index // len(W_dec) != rank).sum()))
        return usual[1](norms, W_dec, index, alpha)

    sharded.sharded_losses, sharded.pair_terms = losses, pair_terms
    try:
        history = train_sharded(
            sae, source, CONFIG, penalties, checkpoint=checkpoint, progress=False
        )
    finally:
        sharded.sharded_losses, sharded.pair_terms = usual
    return sae, history, {"least_kept": min(kept), "least_elsewhere": min(elsewhere, default=None)}


def worker(folder: Path, cases: list[str]) -> None:
    """What each process does."""
    rank, world, dying = dist.get_rank(), dist.get_world_size(), folder / "dies"
    usual = batches()

    for case in cases:
        checkpoint = folder / f"checkpoint-{case}-{rank}"  # a disk of its own
        early = Path(f"{checkpoint}-early")

        def source(step, checkpoint=checkpoint, early=early):
            with (folder / f"asked-{rank}").open("a") as asked:
                asked.write(f"{step}\n")
            if step == 12 and dying.exists():
                if rank == 1:
                    os._exit(3)
            elif step == 12:
                shutil.copytree(checkpoint, early)
            return usual(step)

        sae, history, seen = run(case, rank, world, source, checkpoint)
        again, repeated, _ = run(case, rank, world, usual, early)
        state, once_more = sae.state_dict(), again.state_dict()
        seen["resumed"] = repeated == history and all(
            torch.equal(state[k], once_more[k]) for k in state
        )
        seen["files"] = [path.name for path in checkpoint.iterdir()]
        (folder / f"{case}-{rank}.json").write_text(json.dumps([history.records, seen]))
        whole = gather_shards(sae)
        assert (whole is None) == (rank > 0)
        if whole is not None:
            save_sae(whole, folder / case)


def scenarios(folder: Path) -> dict:
    """All that takes several processes; they are forked from one, which has read torch once."""
    torch.set_num_threads(1)
    two, four = folder / "two", folder / "four"
    for made in (two, four):
        made.mkdir()
    found = {"two": in_processes(two, 2, lambda: worker(two, list(CASES)))}
    (four / "dies").touch()
    found["dies"] = in_processes(four, 4, lambda: worker(four, ["c2r"]))
    found["errors"] = [(four / f"error-{rank}").read_text() for rank in (0, 2, 3)]
    (four / "dies").unlink()
    (four / "asked-0").unlink()
    found["goes on"] = in_processes(four, 4, lambda: worker(four, ["c2r"]))
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of all scenarios, and what became of their processes."""
    folder = tmp_path_factory.mktemp("sharded")
    run_file(__file__, folder)
    return folder, json.loads((folder / "found.json").read_text())


def check(folder: Path, case: str, n: int) -> list[dict]:
    """Compare with one process; what each process has seen."""
    architecture, penalties = CASES[case]
    alone = new_sae(architecture)
    history = train(alone, batches(), CONFIG, penalties, progress=False)
    assert max(record["aux_k"] for record in history.records) > 0, "something is revived"
    saved = load_file(folder / case / "sae.safetensors")
    assert saved.keys() == alone.state_dict().keys()
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(saved[name], tensor, rtol=0, atol=1e-9, msg=name)
    ours, theirs = folder / case, save_sae(alone, folder / f"{case}-alone")
    configs = [json.loads((place / "config.json").read_text()) for place in (ours, theirs)]
    for config in configs:
        del config["config_sha256"], config["weights_sha256"]  # weights are equal but for rounding
    assert configs[0] == configs[1]
    all_seen = []
    for rank in range(n):
        records, seen = json.loads((folder / f"{case}-{rank}.json").read_text())
        for ours, found in zip(history.records, records, strict=True):
            assert ours.keys() == found.keys()
            assert all(found[key] == pytest.approx(ours[key], abs=1e-9) for key in ours)
        assert seen["resumed"], "to the bit"
        assert seen["files"] == [f"step-{STEPS}.shard-{rank}-of-{n}.safetensors"]
        all_seen.append(seen)
    return all_seen


def test_shards_are_trained_as_the_whole_is(trained):
    folder, found = trained
    assert found["two"][0] == [0, 0], errors(folder / "two")
    for case, (_, penalties) in CASES.items():
        for seen in check(folder / "two", case, 2):
            assert not penalties or seen["least_elsewhere"] > 0, "neighbours in other shards"


def test_one_that_dies_stops_the_others_and_the_run_goes_on(trained):
    folder, found = trained
    statuses, seconds = found["dies"]
    assert statuses == [1, 3, 1, 1] and seconds < 60
    assert all("RuntimeError" in error and "gloo" in error for error in found["errors"])
    assert found["goes on"][0] == [0] * 4, errors(folder / "four")
    first, *steps = map(int, (folder / "four" / "asked-0").read_text().split())
    assert first == 0 and steps == list(range(10, STEPS)), "from the last checkpoint on"
    seen = check(folder / "four", "c2r", 4)
    assert seen[0]["least_kept"] == 0, "a shard that keeps nothing goes on too"


@pytest.fixture
def group():
    """One process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def two(group, monkeypatch):
    """The first of two processes, as far as what it makes and refuses goes."""
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)


@pytest.mark.parametrize("d_sae", [4, 38, 64])
def test_a_shard_is_drawn_as_a_part_of_the_whole(two, monkeypatch, d_sae):
    monkeypatch.setattr(sharded, "_DRAWN", 16)
    whole = create_sae("batch_topk", d_in=3, d_sae=d_sae, k=2, seed=7)
    for rank in (0, 1):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        shard = create_shard("batch_topk", d_in=3, d_sae=d_sae, k=2, seed=7)
        own = slice(rank * d_sae // 2, (rank + 1) * d_sae // 2)
        assert torch.equal(shard.W_dec, whole.W_dec[own])
        assert torch.equal(shard.W_enc, whole.W_enc[:, own])
        assert shard.W_enc.stride() == whole.W_enc[:, own].stride()
        assert torch.equal(shard.b_enc, whole.b_enc[own]) and shard.d_sae == d_sae
        assert shard.state_dict().keys() == whole.state_dict().keys()


def test_what_cannot_be_shared_out_is_refused(two):
    with pytest.raises(ValueError, match="'relu' SAE cannot be shared out; expected one of topk"):
        create_shard("relu", **SIZES)
    with pytest.raises(ValueError, match="d_sae is 33; expected a multiple of the 2 processes"):
        create_shard("topk", **SIZES | {"d_sae": 33})
    with pytest.raises(ValueError, match="k is 40; expected an integer from 1 to d_sae=32"):
        create_shard("topk", **SIZES | {"k": 40})
    shard = create_shard("topk", **SIZES).double()
    for whole in (
        create_sae("topk", **SIZES),
        create_sae("relu", d_in=20, d_sae=32, l1_weight=0.1),
        create_sae("topk", **SIZES | {"seed": [0, 1]}),
    ):
        with pytest.raises(ValueError, match="is no shard for 2 processes; expected what"):
            train_sharded(whole, batches(), CONFIG)
    with pytest.raises(ValueError, match="resample_every is 1; expected 0"):
        train_sharded(shard, batches(), TrainConfig(2, resample_every=1))


@pytest.mark.parametrize(
    "penalty", [C2R(1.0, chunk_size=8), create_regulariser("minimum", weight=1)]
)
def test_a_penalty_that_is_not_exact_over_shards_is_refused(group, penalty):
    with pytest.raises(ValueError, match="cannot act on latents that are shared out"):
        train_sharded(create_shard("topk", **SIZES).double(), batches(), CONFIG, [penalty])


def test_shards_that_start_unlike_are_refused(group, monkeypatch):
    def gather(told, own):
        told[:] = [own | {"step": 5}]

    shard = create_shard("topk", **SIZES).double()
    monkeypatch.setattr(dist, "all_gather_object", gather)
    with pytest.raises(ValueError, match="unlike first batches, settings or SAEs"):
        train_sharded(shard, batches(), CONFIG)


def test_a_checkpoint_that_is_not_of_these_processes_is_refused(group, monkeypatch, tmp_path):
    (tmp_path / "step-5.shard-0-of-2.safetensors").touch()
    with pytest.raises(ValueError, match="a checkpoint of 2 processes, but now there are 1"):
        sharded._newest(tmp_path)

    def gather(told, own):
        told[:] = [own, (set(), set())]

    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    with pytest.raises(ValueError, match=r"process 0: \[5\]; process 1: none. Bring the files"):
        sharded._newest(tmp_path)


def test_without_a_group_it_says_how_to_make_one():
    for call in (lambda: create_shard("topk", **SIZES), lambda: gather_shards(new_sae("topk"))):
        with pytest.raises(RuntimeError, match=r"init_process_group\(\) first"):
            call()


if __name__ == "__main__":
    given = Path(sys.argv[1])
    (given / "found.json").write_text(json.dumps(scenarios(given)))
