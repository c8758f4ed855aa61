"""The recipe, its schedules, resume, purity of logging, and what it refuses."""

from __future__ import annotations

import errno
import itertools
from dataclasses import dataclass, replace
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from architectures import every_architecture, new_sae
from c2r_core.data.batches import ToyBatches
from c2r_core.data.toy import FeatureTree
from c2r_core.losses import c2r_loss, nearest_neighbours, orthogonality_loss
from c2r_core.saes import (
    BatchTopKSAE,
    PAnnealSAE,
    ReLUAprilSAE,
    ReLUSAE,
    StepInput,
    TopKSAE,
    load_sae,
    save_sae,
)
from c2r_core.training import C2R, DivergedError, Orthogonality, TrainConfig, train
from c2r_core.training.checkpoints import read_checkpoint, write_checkpoint
from c2r_core.training.resampling import resample_dead
from c2r_core.training.update import (
    clip_factors,
    geometric_median,
    in_memory_order,
    set_gradients,
)

TREE = FeatureTree(d_in=20, n_parents=2, children_per_parent=2, n_singles=4)


def small_config(**changes) -> TrainConfig:
    return TrainConfig(**{"steps": 12, "lr": 5e-3, "log_every": 4, "checkpoint_every": 5} | changes)


def run(sae=None, config=None, regularisers=None, batch=32, seed=0, **options):
    regularisers = [C2R(0.1)] if regularisers is None else regularisers
    sae = sae or BatchTopKSAE(20, 30, k=2, seed=seed)
    history = train(
        sae,
        ToyBatches(TREE, batch, seed),
        config or small_config(),
        regularisers,
        progress=False,
        **options,
    )
    return sae, history


def assert_same_state(one, other, **tolerance):
    for (name, ours), theirs in zip(
        one.state_dict().items(), other.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


EXACT = {"rtol": 0, "atol": 0}


def test_training_reduces_the_error_and_keeps_rows_at_norm_one():
    sae, history = run(config=small_config(steps=150))
    errors = [record["reconstruction"] for record in history.records]
    assert errors[-1] < 0.5 * errors[0]
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(30))
    assert sae.threshold > 0


@pytest.mark.parametrize("bound", [1e-3, 1e9])
def test_first_step_is_adam_on_the_documented_total(bound):
    """One step by hand: own loss, bounded, and λ T C²R by the same factor; parallel part removed."""
    config = small_config(
        steps=1, warmup_share=0, decay_share=0, aux_k_coefficient=0, clip_norm=bound
    )
    trained, _ = run(ReLUSAE(20, 30, l1_weight=0.02, seed=1), config, [C2R(0.3, every=4)])
    sae, x = ReLUSAE(20, 30, l1_weight=0.02, seed=1), ToyBatches(TREE, 32, 0)(0)
    with torch.no_grad():
        sae.b_dec.copy_(geometric_median(x))
    f = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    x_hat = f @ sae.W_dec + sae.b_dec
    own = ((x - x_hat) ** 2).sum() / 32 + 0.02 * f.sum() / 32
    parameters, gradients = list(sae.parameters()), []
    for loss in (own, 0.3 * 4 * c2r_loss(f, sae.W_dec)):
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        found = [
            torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)
        ]
        rows = next(g for p, g in zip(parameters, found, strict=True) if p is sae.W_dec)
        rows -= (rows * sae.W_dec.detach()).sum(1, keepdim=True) * sae.W_dec.detach()
        gradients.append(found)
    factor = min(1.0, bound / torch.cat([g.flatten() for g in gradients[0]]).norm().item())
    assert (factor < 0.01) == (bound < 1)
    for p, of_loss, of_penalty in zip(parameters, *gradients, strict=True):
        p.grad = factor * (of_loss + of_penalty)
    for p, q in zip(parameters, trained.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-6 * factor)
    torch.optim.Adam(parameters, lr=5e-3).step()
    with torch.no_grad():
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    assert_same_state(trained, sae, rtol=1e-3, atol=1e-4)


def test_a_tight_bound_leaves_a_rare_penalty_its_strength():
    """However small the bound and rare the penalty, a larger weight pushes duplicates further apart."""

    def alike(weight):
        config = small_config(steps=150, lr=1e-3, clip_norm=1e-3)
        sae, _ = run(ReLUSAE(20, 30, l1_weight=0.01, seed=1), config, [C2R(weight, every=5)])
        return float(nearest_neighbours(sae.W_dec).cosine.relu().square().mean())

    left = [alike(weight) for weight in (0.0, 0.03, 0.3)]
    assert all(more < 0.9 * less for less, more in itertools.pairwise(left)), left


@every_architecture
@pytest.mark.parametrize("penalty", [C2R, Orthogonality])
@pytest.mark.parametrize("seed", [0, [0, 1]], ids=["single", "stack"])
def test_every_architecture_trains_with_every_penalty(architecture, penalty, seed, tmp_path):
    def trained(weight):
        sae = new_sae(architecture, 20, 30 if "matryoshka" not in architecture else 32, seed)
        config = small_config(steps=30, lr=1e-3, log_every=1)
        history = train(sae, ToyBatches(TREE, 32, seed), config, [penalty(weight)], progress=False)
        return sae, history

    sae, history = trained(0.3)
    assert not torch.equal(sae.W_dec, trained(0.0)[0].W_dec), "the penalty must reach the decoder"
    errors = torch.tensor([record["reconstruction"] for record in history.records])
    assert (errors[-5:].mean(0) < errors[:5].mean(0)).all()
    norms = sae.W_dec.detach().norm(dim=-1)
    at_one = torch.allclose(norms, torch.ones_like(norms), atol=1e-5)
    assert at_one == sae.unit_norm_decoder, "free rows must move, the others must not"
    x = ToyBatches(TREE, 32, 7)(0)
    for single in sae.unstack() if sae.n_stacked else [sae]:
        loaded = load_sae(save_sae(single, tmp_path / "sae", overwrite=True))
        assert torch.equal(loaded(x), single(x)) and torch.equal(loaded.encode(x), single.encode(x))


def test_free_rows_follow_the_plain_gradient():
    """One step by hand where the decoder is free: nothing removed from the gradient, no rescaling.

    It is the first step, in which the weight of the L1 penalty is still 0.
    """
    config = small_config(steps=1, warmup_share=0, decay_share=0)
    trained, _ = run(ReLUAprilSAE(20, 30, l1_weight=0.02, seed=1), config, [C2R(0.3)])
    sae, x = ReLUAprilSAE(20, 30, l1_weight=0.02, seed=1), ToyBatches(TREE, 32, 0)(0)
    with torch.no_grad():
        sae.b_dec.copy_(geometric_median(x))
    f = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    written = f * sae.W_dec.norm(dim=1)
    loss = ((x - f @ sae.W_dec - sae.b_dec) ** 2).sum() / 32
    loss.backward(retain_graph=True)
    of_own_loss = torch.cat([p.grad.flatten() for p in sae.parameters()]).norm()
    (0.3 * c2r_loss(written, sae.W_dec)).backward()
    for p in sae.parameters():
        p.grad *= (1 / of_own_loss).clamp(max=1)
    torch.optim.Adam(sae.parameters(), lr=5e-3).step()
    assert_same_state(trained, sae, rtol=1e-4, atol=1e-5)


def test_regularisers_act_on_every_tth_step_from_start():
    config = small_config(steps=8, log_every=1)
    _, history = run(config=config, regularisers=[C2R(0.1, every=3, start=2)])
    values = [record.get("c2r") for record in history.records]
    assert values[:2] == [None, None] and values[2] == values[3] == values[4] != values[5]
    assert values[5] == values[6] == values[7], "the last value is logged until the next"


def test_a_stronger_penalty_means_less_similar_rows():
    similarity = []
    for weight in (0.0, 0.3):
        sae, _ = run(config=small_config(steps=200), regularisers=[Orthogonality(weight)])
        similarity.append(orthogonality_loss(sae.W_dec).item())
    assert similarity[1] < 0.5 * similarity[0]


@pytest.mark.parametrize("stop_at", [5, 19])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, stop_at):
    # dead_after=2: after 15 silent batches a latent is revived, so the counters matter too
    config = small_config(steps=24, dead_after=0.5)
    options = {"regularisers": [C2R(0.1, chunk_size=7, every=3)], "config": config}
    whole, history = run(**options)

    class Killed(Exception):
        pass

    class Dying(ToyBatches):
        def __call__(self, step):
            if step == stop_at:
                raise Killed
            return super().__call__(step)

    dying = Dying(TREE, 32, 0)

    sae, path = BatchTopKSAE(20, 30, k=2), tmp_path / "run.safetensors"
    with pytest.raises(Killed):
        train(
            sae, dying, options["config"], options["regularisers"], checkpoint=path, progress=False
        )
    resumed, resumed_history = run(checkpoint=path, **options)
    assert_same_state(resumed, whole, **EXACT)
    assert resumed_history.records == history.records


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    run(checkpoint=path)
    with pytest.raises(ValueError, match="another training: its regularisers"):
        run(checkpoint=path, regularisers=[C2R(0.2)])
    with pytest.raises(ValueError, match="hash of the new SAE and the first batch"):
        run(checkpoint=path, seed=1)
    with pytest.raises(ValueError, match="hash of the new SAE and the first batch"):
        run(checkpoint=path, batch=64)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="damaged"):
        run(checkpoint=path)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    run(checkpoint=path)
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("c2r_core.training.checkpoints.save_file", full)
    with pytest.raises(OSError, match="free some space"):
        run(checkpoint=path)  # goes on from step 10 ... and must save nothing more
        run(checkpoint=tmp_path / "new.safetensors")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]


def test_logging_and_checkpoints_do_not_change_the_result(tmp_path):
    quiet, _ = run(config=small_config(log_every=1000, checkpoint_every=1000))
    busy, _ = run(
        config=small_config(log_every=1, checkpoint_every=1), checkpoint=tmp_path / "c.safetensors"
    )
    assert_same_state(busy, quiet, **EXACT)


def test_when_checkpoints_are_written_is_no_part_of_a_run(tmp_path):
    class Dying(ToyBatches):
        def __call__(self, step):
            if step == 8:
                raise KeyboardInterrupt
            return super().__call__(step)

    whole, history = run()
    path, sae = tmp_path / "run.safetensors", BatchTopKSAE(20, 30, k=2)
    config, how = small_config(checkpoint_every=3), {"checkpoint": path, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        train(sae, Dying(TREE, 32, 0), config, [C2R(0.1)], **how)
    assert read_checkpoint(path)[1]["step"] == 6
    other = small_config(checkpoint_every=1000, checkpoint_minutes=0.5)
    resumed, again = run(config=other, checkpoint=path)
    assert_same_state(resumed, whole, **EXACT)
    assert again.records == history.records
    assert other.decides() == small_config().decides()
    assert replace(other, lr=1e-3).decides() != other.decides()
    with pytest.raises(ValueError, match="belongs to another training: its config"):
        run(config=replace(other, lr=1e-3), checkpoint=path)


def test_checkpoints_are_due_by_steps_and_by_minutes():
    config = small_config()  # 12 steps, every 5
    assert [step for step in range(12) if config.saves_after(step, 1e9)] == [4, 9, 11]
    timed = replace(config, checkpoint_minutes=0.5)
    assert timed.saves_after(0, 30.0) and not timed.saves_after(0, 29.9)
    assert [step for step in range(12) if timed.saves_after(step, 0.0)] == [4, 9, 11]


def test_a_checkpoint_is_written_when_its_minutes_have_passed(tmp_path, monkeypatch):
    clock, path, saved = itertools.count(step=25.0), tmp_path / "run.safetensors", []
    own_time = SimpleNamespace(monotonic=lambda: next(clock))
    monkeypatch.setattr("c2r_core.training.trainer.time", own_time)
    write = write_checkpoint

    def noted(path, tensors, state):
        saved.append(state["step"])
        write(path, tensors, state)

    monkeypatch.setattr("c2r_core.training.trainer.write_checkpoint", noted)
    # The clock goes on by 25 s each time it is looked at: after every step, and every checkpoint.
    timed = small_config(checkpoint_every=1000, checkpoint_minutes=1.0)
    sae, _ = run(config=timed, checkpoint=path)
    assert saved == [3, 6, 9, 12]
    assert_same_state(sae, run()[0], **EXACT)


@pytest.mark.parametrize("minutes", [0, -1.0, float("inf"), float("nan")])
def test_minutes_between_checkpoints_are_positive(minutes):
    with pytest.raises(ValueError, match="checkpoint_minutes is .*; expected a positive number"):
        TrainConfig(steps=1, checkpoint_minutes=minutes)


def test_a_stack_trains_each_sae_as_if_alone():
    """Same seeds, same data, its own weight each; clipping must not mix them either."""
    seeds, weights = [0, 1, 0], [0.0, 0.2, 0.2]
    stack = ReLUSAE(20, 30, l1_weight=0.02, seed=seeds)
    train(stack, ToyBatches(TREE, 32, seeds), small_config(lr=1e-3), [C2R(weights)], progress=False)
    for sae, seed, weight in zip(stack.unstack(), seeds, weights, strict=True):
        alone, _ = run(
            ReLUSAE(20, 30, l1_weight=0.02, seed=seed),
            small_config(lr=1e-3),
            [C2R(weight)],
            seed=seed,
        )
        assert_same_state(sae, alone, rtol=1e-3, atol=1e-4)


def test_dead_latents_are_revived():
    def live_after(coefficient):
        sae = TopKSAE(20, 30, k=2, seed=0)
        with torch.no_grad():
            sae.b_enc[:20] = -1.0  # silent from the start, but within reach
        config = small_config(steps=300, dead_after=5, aux_k_coefficient=coefficient)
        run(sae, config, [])
        return (sae.encode(ToyBatches(TREE, 500, 7)(0)) > 0).any(0).sum()

    assert live_after(1.0) > live_after(0.0)


def half_dead(sae):
    with torch.no_grad():
        sae.b_enc[..., :15] = -100.0  # far out of reach
    return sae


def resampling_config(**changes):
    return small_config(**{"steps": 60, "resample_every": 10, "lr": 1e-3} | changes)


@pytest.mark.parametrize("sae_class", [ReLUSAE, ReLUAprilSAE, PAnnealSAE])
def test_resampling_brings_dead_latents_back(sae_class):
    x = ToyBatches(TREE, 500, 7)(0)
    live = {}
    for every in (0, 10):
        sae = half_dead(sae_class(20, 30, l1_weight=0.01))
        run(sae, resampling_config(resample_every=every))
        live[every] = (sae.encode(x) > 0).any(0)
    assert not live[0][:15].any() and live[10].all()


def test_resampling_by_hand():
    sae, x = half_dead(ReLUSAE(20, 30, l1_weight=0.01)), ToyBatches(TREE, 32, 0)(0)
    optimiser = torch.optim.Adam(sae.parameters())
    sae.training_losses(StepInput(x)).total().backward()
    optimiser.step()
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    dead = torch.arange(30) < 15
    x[0] = x[0] + 50  # so badly reconstructed that it is drawn nearly always
    moments = []
    for parameter in (sae.W_enc, sae.b_enc, sae.W_dec):
        own = [optimiser.state[parameter][name] for name in ("exp_avg", "exp_avg_sq")]
        moments += [moment.mT for moment in own] if parameter is sae.W_enc else own
    resample_dead(sae, dead, x, moments, seed=0)
    to_worst = torch.nn.functional.normalize(x[0] - sae.b_dec, dim=0)
    assert ((sae.W_dec[dead] @ to_worst) > 0.999).sum() >= 14
    length = 0.2 * before["W_enc"][:, ~dead].norm(dim=0).mean()
    torch.testing.assert_close(
        sae.W_enc[:, dead], length * sae.W_dec[dead].T / sae.W_dec[dead].norm(dim=1)
    )
    assert (sae.b_enc[dead] == 0).all()
    for name in ("W_enc", "b_enc", "W_dec"):
        parameter, live = getattr(sae, name), (slice(None), ~dead) if name == "W_enc" else (~dead,)
        gone = (slice(None), dead) if name == "W_enc" else (dead,)
        assert torch.equal(parameter[live], before[name][live]), "live latents are left alone"
        for moment in ("exp_avg", "exp_avg_sq"):
            values = optimiser.state[parameter][moment]
            assert (values[gone] == 0).all() and (values[live] != 0).any()


def test_a_stack_resamples_each_sae_as_if_alone_and_a_resumed_run_too(tmp_path):
    config = resampling_config(checkpoint_every=15)
    stack = half_dead(ReLUSAE(20, 30, l1_weight=0.02, seed=[0, 1]))
    train(stack, ToyBatches(TREE, 32, [0, 1]), config, progress=False)
    for seed, sae in enumerate(stack.unstack()):
        alone, _ = run(half_dead(ReLUSAE(20, 30, l1_weight=0.02, seed=seed)), config, [], seed=seed)
        assert_same_state(sae, alone, rtol=1e-2, atol=1e-3)

    class Dying(ToyBatches):
        def __call__(self, step):
            if step == 18:
                raise KeyboardInterrupt
            return super().__call__(step)

    path, new = tmp_path / "run.safetensors", half_dead(ReLUSAE(20, 30, l1_weight=0.02, seed=1))
    with pytest.raises(KeyboardInterrupt):
        train(new, Dying(TREE, 32, 1), config, checkpoint=path, progress=False)
    fresh = half_dead(ReLUSAE(20, 30, l1_weight=0.02, seed=1))
    resumed, _ = run(fresh, config, [], seed=1, checkpoint=path)
    assert_same_state(resumed, alone, **EXACT)


def test_learning_rate_schedule():
    config = TrainConfig(steps=100, lr=1.0)
    rates = [config.lr_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[50] == 1.0
    assert rates[79] == 1.0 and rates[90] == pytest.approx(0.5) and rates[99] == pytest.approx(0.05)
    assert TrainConfig(steps=1000).ema_decay == pytest.approx(1 - 1 / 50)
    assert TrainConfig(steps=10**6).ema_decay == 0.999


def test_geometric_median_resists_an_outlier():
    x = torch.cat(
        [torch.randn(99, 3, generator=torch.Generator().manual_seed(0)), torch.full((1, 3), 1e4)]
    )
    assert geometric_median(x).norm() < 0.5 < x.mean(0).norm()


def test_clipping_bounds_each_sae_of_a_stack():
    p, unused = torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(2, 1))
    gradients = [torch.tensor([[3.0, 4.0, 0.0], [0.3, 0.4, 0.0]]), None]
    factors = clip_factors(gradients, 1.0, stacked=True)
    set_gradients([p, unused], [p, unused], gradients, factors)
    torch.testing.assert_close(p.grad, torch.tensor([[0.6, 0.8, 0.0], [0.3, 0.4, 0.0]]))
    assert unused.grad is None


def test_gradients_are_laid_out_as_their_parameters_memory():
    p = torch.nn.Parameter(torch.zeros(3, 2).mT)
    memory = in_memory_order(p)
    assert memory.shape == (3, 2) and memory.data_ptr() == p.data_ptr()
    for _ in range(2):
        set_gradients([p], [memory], [torch.arange(6.0).reshape(2, 3)], torch.tensor(1.0))
        assert memory.grad.is_contiguous() and memory.grad.data_ptr() == p.grad.data_ptr()
        assert torch.equal(p.grad.flatten(), torch.arange(6.0))


def test_history_plots_what_it_recorded():
    _, history = run()
    plt.plot([0, 1], [2, 3])  # another figure that is still open must stay as it is
    ax = history.plot("reconstruction")
    drawn = ax.lines[0].get_xydata()
    recorded = [[r["step"], r["reconstruction"]] for r in history.records]
    np.testing.assert_allclose(drawn, recorded)
    assert ax.get_xlabel() == "optimiser step"
    assert ax.get_legend() is None
    with pytest.raises(ValueError, match="there are: lr, reconstruction"):
        history.plot("loss")
    _, stack = run(ReLUSAE(20, 30, l1_weight=0.02, seed=[0, 1]), regularisers=[], seed=[0, 1])
    labels = [text.get_text() for text in stack.plot(label="no penalty").get_legend().get_texts()]
    assert labels == ["no penalty: mean and range of 2 SAEs"]


def test_divergence_names_step_terms_and_checkpoint(tmp_path):
    def exploding(step):
        return ToyBatches(TREE, 32, 0)(step) * (1e30 if step == 7 else 1)

    path = tmp_path / "run.safetensors"
    with pytest.raises(DivergedError, match=r"step 7: reconstruction .*run\.safetensors"):
        train(
            BatchTopKSAE(20, 30, k=2),
            exploding,
            small_config(),
            [C2R(0.1)],
            checkpoint=path,
            progress=False,
        )
    assert path.exists()


def test_a_diverging_penalty_never_reaches_a_checkpoint(tmp_path):
    @dataclass(frozen=True)
    class Exploding(Orthogonality):
        def __call__(self, feature_acts, W_dec, generator):
            calls.append(1)
            value = super().__call__(feature_acts, W_dec, generator)
            return value * (float("inf") if len(calls) > 7 else 1.0)

    calls, path = [], tmp_path / "run.safetensors"
    with pytest.raises(DivergedError, match=r"step 7: .*orthogonality inf.*last good checkpoint"):
        run(regularisers=[Exploding(0.1)], checkpoint=path)
    tensors, state = read_checkpoint(path)
    assert state["step"] == 5 and all(torch.isfinite(t).all() for t in tensors.values())


def test_encoder_in_bfloat16_trains_to_about_the_same():
    errors = {}
    for precision in ("float32", "bfloat16"):
        sae, history = run(config=small_config(steps=150, precision=precision))
        errors[precision] = history.records[-1]["reconstruction"]
        assert sae.W_enc.dtype == torch.float32
    assert errors["bfloat16"] == pytest.approx(errors["float32"], rel=0.2)
    assert errors["bfloat16"] != errors["float32"]


def test_an_sae_in_bfloat16_trains_and_goes_on_from_a_checkpoint(tmp_path):
    path, config = tmp_path / "run.safetensors", small_config(steps=40, clip_norm=0.1)
    sae, history = run(BatchTopKSAE(20, 30, k=2).bfloat16(), config, checkpoint=path)
    assert sae.W_dec.dtype == torch.bfloat16
    assert history.records[-1]["reconstruction"] < 0.8 * history.records[0]["reconstruction"]
    again, _ = run(BatchTopKSAE(20, 30, k=2).bfloat16(), config, checkpoint=path)
    assert_same_state(again, sae, **EXACT)


def test_a_parameter_without_gradient_stays_as_it_is(tmp_path):
    class WithUnused(ReLUSAE):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.unused = torch.nn.Parameter(torch.ones(30))

    path = tmp_path / "run.safetensors"
    plain, _ = run(ReLUSAE(20, 30, l1_weight=0.02))
    sae, _ = run(WithUnused(20, 30, l1_weight=0.02), checkpoint=path)
    assert (sae.unused == 1).all() and torch.equal(sae.W_dec, plain.W_dec)
    resumed, _ = run(WithUnused(20, 30, l1_weight=0.02), checkpoint=path)
    assert_same_state(resumed, sae, **EXACT)


class Described:
    """Batches that say how they are scaled and where they are from."""

    norm_factor = 0.25
    trained_on = {"model": "a-model", "text": "a corpus"}  # noqa: RUF012

    def __call__(self, step):
        return ToyBatches(TREE, 32, [0, 1])(step)


def test_the_sae_remembers_what_it_was_trained_on():
    sae = ReLUSAE(20, 30, l1_weight=0.02, seed=[0, 1])
    weights = [0.1, 0.2]
    train(sae, Described(), small_config(), [C2R(weights)], progress=False)
    for single, weight in zip(sae.unstack(), weights, strict=True):
        assert single.norm_factor == 0.25
        assert single.trained_on == Described.trained_on | {
            "steps": 12,
            "batch_size": 32,
            "lr": 5e-3,
            "regularisers": repr(C2R(weight)),
        }
    sae, _ = run(regularisers=[])
    assert sae.norm_factor == TREE.norm_factor and sae.trained_on["regularisers"] == "none"
    sae.norm_factor = 0.5  # by hand, where the batches do not say
    train(sae, lambda step: ToyBatches(TREE, 32, 0)(step), small_config(), progress=False)
    assert sae.norm_factor == 0.5 and "features" not in sae.trained_on


def test_a_first_batch_without_the_longest_samples_is_no_wrong_scale():
    def batches(step):  # one sample in 100 holds nearly all of E‖x‖² = 1
        x = ToyBatches(TREE, 50, 0)(step) * 0.1
        x[0] *= 0 if step % 2 == 0 else 1
        x[0, 0] += 0 if step % 2 == 0 else 99**0.5
        return x

    assert batches(0).square().sum(-1).mean() < 0.02
    train(TopKSAE(20, 30, k=2), batches, small_config(), progress=False)


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_batches_of_another_scale_are_refused(factor):
    def batches(step):
        return factor * ToyBatches(TREE, 1000, 0)(step)

    with pytest.raises(ValueError, match=r"E‖x‖² = .*Multiply the batches by"):
        train(BatchTopKSAE(20, 30, k=2), batches, small_config(), progress=False)
    config = small_config(mean_square_norm=None)
    assert train(BatchTopKSAE(20, 30, k=2), batches, config, progress=False).records
    config = small_config(mean_square_norm=factor**2)
    assert train(BatchTopKSAE(20, 30, k=2), batches, config, progress=False).records


def test_a_finished_training_goes_on_from_its_checkpoint_to_the_same(tmp_path):
    path = tmp_path / "run.safetensors"
    config = small_config(steps=12, log_every=5)
    sae, history = run(checkpoint=path, config=config, regularisers=[C2R(0.1, every=4)])
    assert read_checkpoint(path)[1]["step"] == 12
    again, its_history = run(checkpoint=path, config=config, regularisers=[C2R(0.1, every=4)])
    assert_same_state(again, sae, **EXACT)
    assert its_history.records == history.records


def test_a_trained_sae_is_no_new_one(tmp_path):
    path = tmp_path / "run.safetensors"
    sae, _ = run(checkpoint=path)
    with pytest.raises(ValueError, match="create it again"):
        run(sae, checkpoint=path)


@pytest.mark.parametrize("wrong", [C2R(0.1), "c2r", [c2r_loss]])
def test_regularisers_are_a_list_of_them(wrong):
    with pytest.raises(TypeError, match=r"expected (a list: \[C2R|Regulariser objects)"):
        run(regularisers=wrong)


def test_half_precision_batches_are_accepted():
    sae = TopKSAE(20, 30, k=2)
    train(sae, lambda step: ToyBatches(TREE, 32, 0)(step).half(), small_config(), progress=False)
    assert sae.W_dec.dtype == torch.float32


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: run(regularisers=[C2R(0.1), C2R(0.2)]), "each kind once"),
        (lambda: TrainConfig(steps=5, aux_k_coefficient=-1), "aux_k_coefficient is -1"),
        (lambda: run(batch=1), "at least 2"),
        (lambda: run(TopKSAE(21, 30, k=2)), "d_in=21"),
        (lambda: run(regularisers=[C2R([0.1, 0.2])]), "c2r has 2 weights"),
        (lambda: C2R(-0.1), "weight is -0.1"),
        (lambda: C2R(float("nan")), "weight is nan"),
        (lambda: C2R(0.1, alpha=0), "alpha is 0"),
        (lambda: Orthogonality(0.1, every=0), "every is 0"),
        (lambda: C2R(0.1, start=-1), "start is -1"),
        (lambda: TrainConfig(steps=0), "steps is 0"),
        (lambda: TrainConfig(steps=5, lr=0), "lr is 0"),
        (lambda: TrainConfig(steps=5, resample_every=-1), "resample_every is -1"),
        (lambda: run(config=resampling_config()), "BatchTopKSAE does not resample"),
        (lambda: TrainConfig(steps=5, precision="float16"), "precision is 'float16'"),
        (lambda: TrainConfig(steps=5, decay_share=1.5), "decay_share is 1.5"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(bad):
    def batches(step):
        x = ToyBatches(TREE, 32, 0)(step)
        if step == 3:
            x[4, 5] = bad
        return x

    with pytest.raises(ValueError, match="step 3 holds a NaN"):
        train(TopKSAE(20, 30, k=2), batches, small_config(), progress=False)


def test_a_penalty_without_a_gradient_is_refused():
    class Cut(C2R):
        def __call__(self, feature_acts, W_dec, generator):
            return super().__call__(feature_acts, W_dec, generator).detach()

    with pytest.raises(ValueError, match="c2r gives a value without a gradient"):
        run(regularisers=[Cut(0.1)])


def test_another_number_of_threads_changes_the_last_digits_only():
    def trained(n_threads):
        before = torch.get_num_threads()
        torch.set_num_threads(n_threads)
        sae, history = run(
            BatchTopKSAE(20, 3000, k=2), small_config(steps=4, log_every=1), batch=64
        )
        torch.set_num_threads(before)
        return sae.W_dec, [record["reconstruction"] for record in history.records]

    one, again, two = (trained(n) for n in (1, 1, 2))
    assert torch.equal(one[0], again[0]) and one[1] == again[1]
    assert two[1] == pytest.approx(one[1], rel=1e-5)
