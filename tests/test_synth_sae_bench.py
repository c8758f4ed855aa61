"""SynthSAEBench is the published world: by its published figures, by hand, and by SAELens's generator."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from c2r_core.data.batches import ToyBatches
from c2r_core.data.synth_sae_bench import SynthSAEBench, pushed_apart

FULL = SynthSAEBench(apart_steps=0)
SMALL = SynthSAEBench(n_features=120, d_in=16, n_roots=4, branching=3, depth=2)
N = 100_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_defaults_have_the_published_size_and_sparsity():
    """About 34 features are on in a sample, and 25 of the first 4096 (SAELens's documentation)."""
    assert (FULL.n_features, FULL.d_in, sum(FULL.level_sizes)) == (16384, 768, 10880)
    on = FULL.sample(2048, generator()).features > 0
    assert on.sum(1).double().mean() == pytest.approx(34.5, abs=0.6)
    assert on[:, :4096].sum(1).double().mean() == pytest.approx(25.2, abs=0.6)


def test_the_defaults_are_the_published_constants():
    """Those of SAELens's documentation, page SynthSAEBench."""
    assert dataclasses.asdict(SynthSAEBench()) == {
        "n_features": 16384,
        "d_in": 768,
        "n_roots": 128,
        "branching": 4,
        "depth": 3,
        "zipf_exponent": 0.5,
        "max_probability": 0.4,
        "min_probability": 5e-4,
        "compensates": True,
        "correlation_rank": 25,
        "correlation_scale": 0.1,
        "parent_cosine": 0.0,
        "first_magnitude": 5.0,
        "last_magnitude": 4.0,
        "magnitude_sd": 0.5,
        "bias_norm": 0.5,
        "apart_steps": 100,
        "apart_lr": 3e-4,
        "seed": 0,
    }
    half_normal = FULL._magnitude_sds
    assert (half_normal >= 0).all()
    assert half_normal.square().mean() == pytest.approx(0.5, abs=0.02), "|N(0.5, 0.5)|: 0.5² + 0.5²"
    assert float(FULL._constant.norm()) == pytest.approx(0.5)


def test_trees_take_the_first_ranks():
    assert torch.cat(SMALL.levels).tolist() == list(range(4 + 12 + 36))
    assert SMALL.parents[:10].tolist() == [-1] * 4 + [0, 0, 0, 1, 1, 1]
    assert (SMALL.parents[52:] == -1).all()
    alone = dataclasses.replace(SMALL, n_roots=0)
    assert alone.levels == [] and torch.equal(alone.drawn_probabilities, alone.probabilities)


def test_a_child_makes_up_for_its_parent_and_its_siblings():
    p, drawn = SMALL.probabilities.tolist(), SMALL.drawn_probabilities
    given = [p[child] / p[1] for child in (7, 8, 9)]
    by_hand = [q * (1 + sum(given) - q) for q in given]
    assert drawn[7:10].tolist() == pytest.approx(by_hand)
    assert drawn[:4].tolist() == p[:4] and drawn[52:].tolist() == p[52:] and drawn.max() <= 1
    plain = dataclasses.replace(SMALL, compensates=False)
    assert torch.equal(plain.drawn_probabilities, plain.probabilities)


def test_directions_are_pushed_apart_and_keep_their_norm():
    def mean_square_cosine(steps: int) -> float:
        directions = dataclasses.replace(SMALL, apart_steps=steps).directions
        torch.testing.assert_close(directions.norm(dim=1), torch.ones(120))
        return float((directions @ directions.T).fill_diagonal_(0).square().mean())

    untouched, some, many = (mean_square_cosine(steps) for steps in (0, 100, 1000))
    assert untouched > 1.05 * some > 1.1 * many


def test_directions_of_a_push_that_was_stopped_are_not_kept(monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    forest = dataclasses.replace(SMALL, seed=5)
    with monkeypatch.context() as patch:
        patch.setattr("c2r_core.data.synth_sae_bench.pushed_apart", stopped)
        with pytest.raises(KeyboardInterrupt):
            _ = forest.directions
    assert torch.equal(forest.directions, dataclasses.replace(SMALL, seed=5).directions)


@pytest.mark.parametrize("wrong", [{"apart_steps": -1}, {"apart_lr": 0.0}])
def test_impossible_pushes_are_refused(wrong):
    with pytest.raises(ValueError, match=r"apart_steps is .* and apart_lr .*; expected at least 0"):
        SynthSAEBench(**wrong)


def test_batches_of_it_are_scaled():
    x = ToyBatches(SMALL, 4096, 0)(0)
    assert x.square().sum(-1).mean() == pytest.approx(1, abs=0.05)


# -- SAELens's generator ------------------------------------------------------------------------


def saelens_model(forest: SynthSAEBench):
    synthetic = pytest.importorskip("sae_lens.synthetic")
    return synthetic.SyntheticModel(
        synthetic.SyntheticModelConfig(
            num_features=forest.n_features,
            hidden_dim=forest.d_in,
            firing_probability=synthetic.ZipfianFiringProbabilityConfig(
                exponent=forest.zipf_exponent,
                max_prob=forest.max_probability,
                min_prob=forest.min_probability,
            ),
            hierarchy=synthetic.HierarchyConfig(
                total_root_nodes=forest.n_roots,
                branching_factor=forest.branching,
                max_depth=forest.depth,
                mutually_exclusive_portion=1.0,
                compensate_probabilities=True,
                scale_children_by_parent=True,
            ),
            mean_firing_magnitudes=synthetic.LinearMagnitudeConfig(
                start=forest.first_magnitude, end=forest.last_magnitude
            ),
            std_firing_magnitudes=forest.magnitude_sd,
            seed=0,
        )
    )


@pytest.mark.parametrize("forest", [SMALL, FULL], ids=["small", "full"])
def test_saelens_draws_features_as_often(forest):
    theirs = saelens_model(forest).activation_generator.firing_probabilities
    torch.testing.assert_close(forest.drawn_probabilities.float(), theirs, atol=1e-6, rtol=1e-5)


def test_samples_have_the_rates_and_magnitudes_of_saelens():
    forest = dataclasses.replace(SMALL, correlation_scale=0.0)
    same_sd = torch.full((forest.n_features,), forest.magnitude_sd)
    forest.__dict__["_magnitude_sds"] = same_sd  # theirs are drawn by another generator
    torch.manual_seed(0)
    samples = (
        forest.sample(N, generator()).features,
        saelens_model(forest).activation_generator.sample(N),
    )
    often = forest.probabilities > 0.02
    rates = [(one > 0).double().mean(0) for one in samples]
    torch.testing.assert_close(*rates, atol=0.008, rtol=0)  # four standard errors of a difference
    for moment in (1, 2):
        means = [((one**moment).sum(0) / (one > 0).sum(0))[often] for one in samples]
        torch.testing.assert_close(*means, atol=0, rtol=0.05)


def test_correlated_draws_scatter_as_saelens_s_do():
    forest = dataclasses.replace(SMALL, correlation_scale=0.15)
    synthetic = pytest.importorskip("sae_lens.synthetic")
    model = saelens_model(forest)
    factor, own = forest._loadings, forest._own_sd.square()
    correlation = synthetic.LowRankCorrelationMatrix(factor, own)
    generate = synthetic.ActivationGenerator(
        num_features=forest.n_features,
        firing_probabilities=forest.drawn_probabilities.float(),
        modify_activations=model.hierarchy.modifier,
        correlation_matrix=correlation,
    )
    torch.manual_seed(0)
    counts = [
        (features > 0).sum(1).double()
        for features in (forest.sample(N, generator()).features, generate.sample(N))
    ]
    for moment in (torch.mean, torch.var):
        ours, theirs = (float(moment(count)) for count in counts)
        assert ours == pytest.approx(theirs, rel=0.03)


def test_directions_are_pushed_as_saelens_does_it():
    library = pytest.importorskip("sae_lens.synthetic.feature_dictionary")
    rows = torch.nn.functional.normalize(torch.randn(300, 32, generator=generator()), dim=1)
    theirs = library.orthogonalize_embeddings(rows, num_steps=100, lr=3e-4)
    torch.testing.assert_close(pushed_apart(rows, 100, 3e-4), theirs, atol=1e-5, rtol=0)
