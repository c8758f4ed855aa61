"""Architectures: the sparse step, the contract, files and folding. Parametrised over the registry."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch

from architectures import BATCH, D_IN, D_SAE, batch, every_architecture, make
from c2r_core.formats import open_sae
from c2r_core.losses import c2r_from_norms, c2r_loss
from c2r_core.saes import (
    ARCHITECTURES,
    SAE,
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaBatchTopKSAE,
    PAnnealSAE,
    ReLUAprilSAE,
    ReLUSAE,
    StepInput,
    TopKSAE,
    create_sae,
    fold_norm_factor,
    load_sae,
    register,
    save_sae,
)
from c2r_core.saes.sparse import firing_counts, latent_norms
from c2r_core.saes.topk import largest_above, largest_entries

k_sparse = pytest.mark.parametrize("sae_class", [TopKSAE, BatchTopKSAE, MatryoshkaBatchTopKSAE])


def gradients(sae, loss):
    return torch.autograd.grad(loss, list(sae.parameters()))


@k_sparse
@pytest.mark.parametrize("with_dead", [False, True])
@pytest.mark.parametrize("progress", [0.0, 1.0])
def test_sparse_step_equals_the_dense_one(sae_class, with_dead, progress):
    sae = make(sae_class.architecture).double()
    x = batch(dtype=torch.float64)
    dead = torch.arange(D_SAE) % 4 == 0 if with_dead else None
    results = []
    for losses in (
        sae.training_losses(StepInput(x, progress=progress, dead=dead)),
        sae.dense_losses(StepInput(x, progress=progress, dead=dead)),
    ):
        penalty = c2r_from_norms(latent_norms(losses.feature_acts), sae.W_dec)
        total = losses.total(0.3) + 0.1 * penalty
        results.append((losses, total, gradients(sae, total)))
    (sparse, sparse_total, sparse_grads), (dense, dense_total, dense_grads) = results
    torch.testing.assert_close(sparse.feature_acts.to_dense(), dense.feature_acts)
    torch.testing.assert_close(sparse_total, dense_total)
    torch.testing.assert_close(sparse.min_active, dense.min_active)
    assert torch.equal(firing_counts(sparse.feature_acts), firing_counts(dense.feature_acts))
    for ours, reference in zip(sparse_grads, dense_grads, strict=True):
        torch.testing.assert_close(ours, reference)
    assert (dense.aux_k > 0) == with_dead


@k_sparse
def test_sparse_norms_give_the_loss_of_the_dense_activations(sae_class):
    sae = make(sae_class.architecture)
    acts = sae.training_losses(StepInput(batch())).feature_acts
    from_norms = c2r_from_norms(latent_norms(acts), sae.W_dec)
    torch.testing.assert_close(from_norms, c2r_loss(acts.to_dense(), sae.W_dec))


@k_sparse
def test_revival_reaches_the_encoder_of_dead_latents_only(sae_class):
    sae = make(sae_class.architecture)
    dead = torch.arange(D_SAE) < 5
    W_enc, b_enc, W_dec, _ = (
        dict(zip([n for n, _ in sae.named_parameters()], grads, strict=True))[name]
        for grads in [
            gradients_or_zero(sae, sae.training_losses(StepInput(batch(), dead=dead)).aux_k)
        ]
        for name in ("W_enc", "b_enc", "W_dec", "b_dec")
    )
    assert (W_enc[:, dead].abs().sum(0) > 0).any() and W_enc[:, ~dead].abs().sum() == 0
    assert b_enc[~dead].abs().sum() == 0
    assert (W_dec[dead].abs().sum(1) > 0).any() and W_dec[~dead].abs().sum() == 0


def gradients_or_zero(sae, loss):
    parameters = list(sae.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def test_topk_keeps_k_per_sample_and_batch_topk_k_on_average():
    x = batch() * torch.linspace(0.1, 3, BATCH).unsqueeze(1)  # samples of very different strength
    per_sample = (make("topk").training_losses(StepInput(x)).feature_acts.to_dense() > 0).sum(1)
    assert (per_sample == 3).all()
    per_sample = (make("batch_topk").training_losses(StepInput(x)).feature_acts.to_dense() > 0).sum(
        1
    )
    assert per_sample.sum() == 3 * BATCH and per_sample.unique().numel() > 1


@pytest.mark.parametrize("shape, n", [((3, 640), 20), ((640,), 1), ((641,), 20), ((2, 64), 60)])
def test_largest_entries_are_exact(shape, n):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(n))
    found = values.gather(-1, largest_entries(values, n)).sort(-1, descending=True).values
    torch.testing.assert_close(found, values.topk(n, dim=-1).values, rtol=0, atol=0)


@pytest.mark.parametrize("least", [-9.0, 0.0, 1.3, 1.45, 9.0])
def test_largest_above_a_guess_are_exact(least):
    values = torch.randn(640, generator=torch.Generator().manual_seed(0))
    found = values[largest_above(values, 40, least)].sort(descending=True).values
    torch.testing.assert_close(found, values.topk(40).values, rtol=0, atol=0)


def test_k_is_annealed_from_d_in():
    sae = make("batch_topk")
    kept = [
        len(sae.training_losses(StepInput(batch(), progress=p)).feature_acts.values)
        for p in (0, 0.005, 1)
    ]
    assert kept[0] == D_IN * BATCH and kept[0] > kept[1] > kept[2] == 3 * BATCH


def test_threshold_settles_at_the_smallest_kept_activation():
    sae = BatchTopKSAE(D_IN, D_SAE, k=3)
    losses = sae.training_losses(StepInput(batch()))
    assert sae.threshold == 0, "computing losses must change nothing"
    for _ in range(3):
        sae.after_step(losses, ema_decay=0.9)
    torch.testing.assert_close(sae.threshold, losses.min_active)
    assert (sae.encode(batch()) > 0).sum() == 3 * BATCH - 1  # all but the smallest itself


@every_architecture
def test_losses_change_nothing(architecture):
    sae = make(architecture)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    first = sae.training_losses(StepInput(batch())).total()
    torch.testing.assert_close(
        sae.training_losses(StepInput(batch())).total(), first, rtol=0, atol=0
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())


@every_architecture
def test_a_stack_equals_its_single_saes(architecture):
    stack, x = make(architecture, seed=[3, 4]), torch.stack([batch(1), batch(2)])
    singles = [make(architecture, seed=seed) for seed in (3, 4)]
    total = stack.training_losses(StepInput(x)).total()
    torch.testing.assert_close(
        total,
        torch.stack(
            [s.training_losses(StepInput(b)).total() for s, b in zip(singles, x, strict=True)]
        ),
    )
    torch.testing.assert_close(
        stack(x), torch.stack([s(b) for s, b in zip(singles, x, strict=True)])
    )
    for single, taken in zip(singles, stack.unstack(), strict=True):
        for name, tensor in single.state_dict().items():
            assert torch.equal(tensor, taken.state_dict()[name])
    stacked = gradients(stack, total.sum())
    for i, single in enumerate(singles):
        alone = gradients(single, single.training_losses(StepInput(x[i])).total())
        for ours, reference in zip(stacked, alone, strict=True):
            torch.testing.assert_close(ours[i], reference)


def test_unstacking_keeps_the_precision():
    stack = make("jump_relu", seed=[0, 1]).double()
    single = stack.unstack()[1]
    assert single.W_dec.dtype == torch.float64 and torch.equal(single.threshold, stack.threshold[1])


def test_a_threshold_below_zero_is_put_back_and_silent_latents_never_move_it():
    sae = make("jump_relu")
    with torch.no_grad():
        sae.threshold.zero_()
        sae.threshold[:5] = -0.2
        sae.b_enc[5] = -100.0  # silent, although 0 is within the kernel of its threshold
    losses = sae.training_losses(StepInput(batch()))
    (gradient,) = torch.autograd.grad(losses.sparsity, [sae.threshold])
    assert gradient[5] == 0 and (gradient[6:] != 0).any()
    sae.after_step(losses, ema_decay=0.9)
    assert (sae.threshold >= 0).all()


@every_architecture
def test_saved_and_loaded_is_the_same(architecture, tmp_path):
    sae, x = make(architecture), batch()
    sae.norm_factor = 0.25
    loaded = load_sae(save_sae(sae, tmp_path / "sae"))
    assert type(loaded) is type(sae) and loaded.config == sae.config
    assert torch.equal(loaded(x), sae(x)) and loaded.norm_factor == 0.25
    assert (
        json.loads((tmp_path / "sae" / "config.json").read_text())["architecture"] == architecture
    )
    save_sae(sae, tmp_path / "sae")  # the same again
    with pytest.raises(FileExistsError, match="another SAE; .*overwrite=True"):
        save_sae(make(architecture, seed=9), tmp_path / "sae")
    assert torch.equal(load_sae(tmp_path / "sae")(x), sae(x))
    save_sae(make(architecture, seed=9), tmp_path / "sae", overwrite=True)
    assert not torch.equal(load_sae(tmp_path / "sae")(x), sae(x))
    assert [p.name for p in tmp_path.iterdir()] == ["sae"], "nothing half-written is left"


@every_architecture
def test_folded_takes_raw_activations(architecture):
    sae, raw = make(architecture), 7 * batch()
    sae.norm_factor = 1 / 7
    folded = fold_norm_factor(sae)
    torch.testing.assert_close(folded.encode(raw), 7 * sae.encode(raw / 7))
    torch.testing.assert_close(folded(raw), 7 * sae(raw / 7))
    assert folded.norm_factor == 1 and torch.equal(folded.W_dec, sae.W_dec)


def test_a_full_disk_leaves_the_saved_sae_unharmed(tmp_path, monkeypatch):
    sae = make("topk")
    save_sae(sae, tmp_path / "sae")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("c2r_core.saes.files.save_file", full)
    with pytest.raises(OSError, match="free some space"):
        save_sae(make("topk", seed=1), tmp_path / "sae", overwrite=True)
    assert torch.equal(load_sae(tmp_path / "sae").W_dec, sae.W_dec)
    assert [p.name for p in tmp_path.iterdir()] == ["sae"]


def test_a_failing_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    sae = make("topk")
    save_sae(sae, tmp_path / "sae")
    rename = Path.rename

    def failing(path, target):
        if target == tmp_path / "sae":
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Could not write the SAE"):
        save_sae(make("topk", seed=1), tmp_path / "sae", overwrite=True)
    assert torch.equal(load_sae(tmp_path / "sae").W_dec, sae.W_dec)
    assert [p.name for p in tmp_path.iterdir()] == ["sae"]


def test_what_an_sae_was_trained_on_stays_with_it(tmp_path):
    sae = make("topk")
    sae.trained_on = {"model": "a-model", "steps": 10}
    folder = save_sae(sae, tmp_path / "sae", trained_on={"hook_name": "blocks.4", "steps": 20})
    loaded = load_sae(folder)
    assert loaded.trained_on == {"model": "a-model", "steps": 20, "hook_name": "blocks.4"}
    assert fold_norm_factor(loaded).trained_on == loaded.trained_on
    assert open_sae(folder).stated == {"model": "a-model", "steps": "20", "hook_name": "blocks.4"}
    config = json.loads((folder / "config.json").read_text())
    for name in ("trained_on", "config_sha256", "weights_sha256"):
        del config[name]
    config["format_version"] = 1  # as older versions wrote it
    (folder / "config.json").write_text(json.dumps(config))
    assert load_sae(folder).trained_on == open_sae(folder).stated == {}
    with pytest.raises(ValueError, match="expected text or a number"):
        save_sae(sae, tmp_path / "other", trained_on={"text": None})


def test_a_folder_of_other_files_is_not_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="other files"):
        save_sae(make("topk"), tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_only_own_saes_fold():
    with pytest.raises(TypeError, match="a Linear, not an SAE of c2r_core"):
        fold_norm_factor(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("seed", [0, [0, 1]], ids=["single", "stack"])
def test_an_architecture_gives_no_more_than_its_activation(tmp_path, monkeypatch, seed):
    monkeypatch.setitem(ARCHITECTURES, "cubic", None)  # and put back what was there

    @register
    class CubicSAE(SAE):
        architecture = "cubic"

        def activate(self, pre_acts):
            return pre_acts.relu() ** 3

    sae = create_sae("cubic", d_in=D_IN, d_sae=D_SAE, seed=seed)
    x = batch() if seed == 0 else torch.stack([batch(), batch(1)])
    losses = sae.training_losses(StepInput(x))
    assert (losses.sparsity == 0).all() and losses.sparsity.shape == sae.W_dec.shape[:-2]
    for i, single in enumerate(sae.unstack() if sae.n_stacked else [sae]):
        loaded = load_sae(save_sae(single, tmp_path / str(i)))
        own = batch(i)
        assert isinstance(loaded, CubicSAE) and torch.equal(loaded(own), single(own))
        error = (own - single(own)).square().sum(-1).mean()
        torch.testing.assert_close(losses.reconstruction.flatten()[i], error)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_not_positive_is_not_folded_in(factor):
    sae = make("topk")
    sae.norm_factor = factor
    with pytest.raises(ValueError, match=f"norm_factor is {factor}; expected a positive number"):
        fold_norm_factor(sae)


def test_damaged_folders_are_refused(tmp_path):
    folder = save_sae(make("topk"), tmp_path / "sae")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"d_sae": 41}))
    with pytest.raises(ValueError, match="config.json is not what was saved"):
        load_sae(folder)
    (folder / "config.json").write_text(json.dumps(config | {"format_version": 99}))
    with pytest.raises(ValueError, match="format version 99"):
        load_sae(folder)
    del config["config_sha256"], config["weights_sha256"]
    config["format_version"] = 1  # from here on nothing is compared but what must fit
    (folder / "config.json").write_text(json.dumps(config | {"d_sae": 41}))
    with pytest.raises(ValueError, match="does not fit"):
        load_sae(folder)
    (folder / "config.json").write_text(json.dumps(config | {"unknown": 1}))
    with pytest.raises(ValueError, match="one too many"):
        load_sae(folder)
    (folder / "config.json").write_text('{"cut')
    with pytest.raises(ValueError, match="damaged"):
        load_sae(folder)
    (folder / "sae.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="holds no sae.safetensors; .* save_sae"):
        load_sae(folder)
    with pytest.raises(FileNotFoundError, match="There is no folder .*nowhere"):
        load_sae(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "create, message",
    [
        (lambda: TopKSAE(8, 16, k=17), "k is 17; expected an integer from 1 to d_sae=16"),
        (lambda: BatchTopKSAE(8, 16, k=0), "k is 0"),
        (lambda: TopKSAE(0, 16, k=1), "d_in is 0"),
        (lambda: TopKSAE(8, 16, k=1, seed=[]), "empty sequence"),
        (lambda: ReLUSAE(8, 16, l1_weight=-1), "l1_weight is -1"),
        (lambda: ReLUAprilSAE(8, 16, l1_weight=float("nan")), "l1_weight is nan"),
        (lambda: GatedSAE(8, 16, l1_weight=-1), "l1_weight is -1"),
        (lambda: JumpReLUSAE(8, 16, target_l0=17), "target_l0 is 17; expected .* d_sae=16"),
        (lambda: JumpReLUSAE(8, 16, target_l0=0), "target_l0 is 0"),
        (lambda: JumpReLUSAE(8, 16, target_l0=2, bandwidth=0), "bandwidth is 0"),
        (lambda: JumpReLUSAE(8, 16, target_l0=2, sparsity_weight=-1), "sparsity_weight is -1"),
        (lambda: PAnnealSAE(8, 16, l1_weight=-1), "l1_weight is -1"),
        (lambda: PAnnealSAE(8, 16, l1_weight=1, p_end=0), "p_end is 0"),
        (lambda: PAnnealSAE(8, 16, l1_weight=1, anneal_start=1), "anneal_start is 1"),
        (
            lambda: MatryoshkaBatchTopKSAE(8, 16, k=2, group_fractions=(0.25, 0.25)),
            r"sizes \[4, 4\] sum to 8, not to d_sae=16",
        ),
        (lambda: MatryoshkaBatchTopKSAE(8, 9, k=2), "every group needs a latent"),
        (lambda: create_sae("top_k", d_in=8), "did you mean 'topk'. Known: batch_topk"),
        (lambda: make("topk").encode(torch.ones(3, 5)), "d_in=12"),
        (lambda: make("topk", seed=[0, 1])(torch.ones(3, D_IN)), "stack of 2 SAEs expects"),
        (lambda: save_sae(make("topk", seed=[0, 1]), "unused"), "unstack"),
        (lambda: make("topk").unstack(), "single SAE"),
    ],
)
def test_bad_input_is_refused(create, message):
    with pytest.raises(ValueError, match=message):
        create()


def test_what_an_architecture_takes_is_said():
    with pytest.raises(TypeError, match=r"'topk', …\): .*'k'\. It takes d_in, d_sae, k, "):
        create_sae("topk", d_in=8, d_sae=16)
    with pytest.raises(TypeError, match=r"'l1'\. It takes d_in"):
        create_sae("topk", d_in=8, d_sae=16, k=2, l1=1)
