"""The gated forest keeps its promises, and its measures find what is planted."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from c2r_core import ReLUSAE
from c2r_core.data.batches import ToyBatches
from c2r_core.data.forest import GatedForest
from c2r_core.errors import NotEvaluable
from c2r_core.metrics.forest import evaluate_forest, forest_sample

SMALL = GatedForest(
    n_features=40,
    d_in=64,
    n_roots=3,
    branching=3,
    depth=2,
    max_probability=0.5,
    min_probability=0.05,
    correlation_scale=0.0,
    bias_norm=0.0,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(forest: GatedForest, n: int = 50_000):
    return forest.sample(n, generator(1))


def held_out(n_samples: int):
    return forest_sample(SMALL, n_samples, generator())


def changed(**values) -> GatedForest:
    return dataclasses.replace(SMALL, **values)


def test_parents_and_levels_agree():
    assert [len(level) for level in SMALL.levels] == SMALL.level_sizes == [3, 9, 27]
    assert (SMALL.parents[SMALL.levels[0]] == -1).all()
    for above, below in zip(SMALL.levels, SMALL.levels[1:], strict=False):
        assert SMALL.parents[below].tolist() == above.repeat_interleave(3).tolist()
    child = SMALL.parents >= 0
    rarer = SMALL.probabilities[child] <= SMALL.probabilities[SMALL.parents[child]]
    assert rarer.all() and child.sum() == 36


def test_frequency_follows_zipfs_law():
    p = SMALL.probabilities
    assert p[0] == 0.5 and p[-1] == 0.05 and (p.diff() < 0).all()
    weight = (p - 0.05) / 0.45
    assert weight[3] == pytest.approx((4**-0.5 - 40**-0.5) / (1 - 40**-0.5))


def test_children_need_their_parent_and_exclude_each_other():
    on = sample(SMALL).features > 0
    child = (SMALL.parents >= 0).nonzero().flatten()
    assert on[:, child].any()
    assert not (on[:, child] & ~on[:, SMALL.parents[child]]).any()
    for below in SMALL.levels[1:]:
        assert int(on[:, below].unflatten(1, (-1, 3)).sum(2).max()) == 1


def test_rates_of_a_tree_are_the_exact_ones():
    """One root with two children: P(child) = P(root) · q · (1 − q'/2), by hand."""
    forest = GatedForest(
        n_features=3,
        d_in=8,
        n_roots=1,
        branching=2,
        depth=1,
        max_probability=0.5,
        min_probability=0.2,
        compensates=False,
        correlation_scale=0.0,
        magnitude_sd=0.0,
    )
    root, first, second = forest.probabilities.tolist()
    expected = [root, root * first * (1 - second / 2), root * second * (1 - first / 2)]
    assert forest.firing_rates.tolist() == pytest.approx(expected, abs=0.01)
    compensated = dataclasses.replace(forest, compensates=True).drawn_probabilities
    assert compensated.tolist() == pytest.approx([root, first / root, second / root])


def test_features_on_their_own_fire_as_meant():
    forest = changed(n_roots=0, magnitude_sd=0.0)
    assert (forest.parents == -1).all()
    torch.testing.assert_close(forest.firing_rates, forest.probabilities, atol=0.01, rtol=0)


def test_firing_is_correlated_only_where_it_is_asked_for():
    def largest_correlation(scale: float) -> float:
        forest = changed(n_roots=0, correlation_scale=scale, correlation_rank=5)
        on = (sample(forest).features > 0).float()
        return float(torch.corrcoef(on.T).fill_diagonal_(0).abs().max())

    assert largest_correlation(0.0) < 0.03 and largest_correlation(0.3) > 0.1


@pytest.mark.parametrize("cosine", [0.0, 0.5])
def test_directions_have_norm_one_and_the_parents_cosine(cosine):
    directions = changed(d_in=512, parent_cosine=cosine).directions
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(40))
    child = SMALL.parents >= 0
    with_parent = (directions[child] * directions[SMALL.parents[child]]).sum(1)
    assert with_parent.mean() == pytest.approx(cosine, abs=0.02)


def test_samples_are_scaled_and_repeatable():
    batches = ToyBatches(SMALL, 4096, [1, 2])
    x = batches(3)
    assert torch.equal(x, batches(3)) and not torch.equal(x[0], x[1])
    assert x.square().sum(-1).mean() == pytest.approx(1, abs=0.05)
    one, other = (dataclasses.replace(SMALL, seed=seed).directions for seed in (0, 1))
    assert not torch.equal(one, other)


def drawn_plainly(forest: GatedForest, n: int, generator: torch.Generator) -> torch.Tensor:
    """The features as the definition says it, level by level and dense: the reference for `sample`."""
    common = torch.randn(n, forest.correlation_rank, generator=generator)
    own = torch.randn(n, forest.n_features, generator=generator)
    on = common @ forest._loadings.mT + own * forest._own_sd > forest._thresholds
    noise = torch.randn(n, forest.n_features, generator=generator)
    features = (forest.mean_magnitudes + forest._magnitude_sds * noise).relu() * on
    for above, below in zip(forest.levels, forest.levels[1:], strict=False):
        children = features[:, below].unflatten(1, (-1, forest.branching))
        lots = torch.rand(children.shape, generator=generator) * (children > 0)
        winner = torch.zeros_like(children).scatter(2, lots.argmax(2, keepdim=True), 1.0)
        scale = (features[:, above] / forest.mean_magnitudes[above]).unsqueeze(2)
        features[:, below] = (children * winner * scale).flatten(1)
    return features


@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_samples_have_the_plain_forms_rates_co_occurrences_and_magnitudes(scale):
    forest = changed(correlation_scale=scale, correlation_rank=5, bias_norm=0.5)
    n = 100_000
    x, features = forest.sample(n, generator(1))
    plain = drawn_plainly(forest, n, generator(2))
    torch.testing.assert_close(x, features @ forest.directions + forest._constant)
    together = [(one > 0).float().T @ (one > 0).float() / n for one in (features, plain)]
    torch.testing.assert_close(*together, atol=0.009, rtol=0)  # 4 standard errors of a difference
    for moment in (1, 2):
        means = [(one**moment).sum(0) / (one > 0).sum(0) for one in (features, plain)]
        torch.testing.assert_close(*means, atol=0, rtol=0.12)


def test_which_features_are_on_before_the_gates_is_the_plain_forms():
    """Where there are no trees the draws are the same numbers, not only as likely."""
    forest = changed(n_roots=0, correlation_scale=0.3, correlation_rank=5, magnitude_sd=0.0)
    drawn = forest.sample(5_000, generator(1)).features > 0
    assert torch.equal(drawn, drawn_plainly(forest, 5_000, generator(1)) > 0)


def dictionary(forest: GatedForest, rows: torch.Tensor) -> ReLUSAE:
    """An SAE that reads each row's feature exactly: the directions are independent."""
    sae = ReLUSAE(forest.d_in, len(rows), l1_weight=0.0)
    reading = torch.linalg.pinv(forest.directions.double()).float()
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(rows @ forest.directions, dim=1))
        sae.W_enc.copy_(reading @ torch.linalg.pinv(rows.double()).float())
        sae.b_enc.fill_(-1e-4)
    return sae


def test_the_true_dictionary_is_perfect():
    report = evaluate_forest(dictionary(SMALL, torch.eye(40)), SMALL, held_out(20_480))
    assert report.mcc == pytest.approx(1) and report.uniqueness == 1 and report.f1 > 0.999
    assert report.fvu < 1e-4 and report.l0 == pytest.approx(report.true_l0, rel=1e-3)
    assert report.absorption == pytest.approx(0, abs=1e-6) and report.n_parents_evaluated > 5
    assert sum(band.n_features for band in report.bands) == 40
    assert all(band.recovery == 1 and band.detector_f1 > 0.999 for band in report.bands)


def test_a_planted_absorption_is_found_exactly():
    """The latent of a child holds its parent too, and the parent's latent is silent then."""
    rows = torch.eye(40)
    level = SMALL.levels[1]
    rows[level, SMALL.parents[level]] = 1.0
    sae = dictionary(SMALL, rows)
    encode = sae.encode

    def absorbing(x):
        acts = encode(x)
        features = torch.linalg.pinv(SMALL.directions.double()).float()
        on = x @ features > 1e-3
        taken = torch.zeros_like(on).index_add(1, SMALL.parents[level], on[:, level])
        return acts.where(~taken, 0.0)

    sae.encode = absorbing
    report = evaluate_forest(sae, SMALL, held_out(20_480))
    n_roots, n_middle = 3, report.n_parents_evaluated - 3
    assert n_middle >= 0
    assert report.absorption == pytest.approx(n_roots / report.n_parents_evaluated, abs=0.02)


def test_a_random_dictionary_is_poor():
    report = evaluate_forest(ReLUSAE(64, 20, l1_weight=0.0), SMALL, held_out(2048))
    assert report.mcc < 0.5 and all(band.recovery == 0 for band in report.bands)
    assert report.absorption is None and report.n_parents_evaluated == 0


def test_what_cannot_be_measured_is_an_error():
    sae = ReLUSAE(64, 20, l1_weight=0.0)
    with pytest.raises(ValueError, match="n_samples is 10; expected at least 1024"):
        held_out(10)
    with torch.no_grad():
        sae.b_enc.fill_(-100)
    with pytest.raises(NotEvaluable, match="No latent fires"):
        evaluate_forest(sae, SMALL, held_out(1024))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_features": 1, "n_roots": 0}, "n_features is 1"),
        ({"min_probability": 0.6}, "expected 0 < min < max < 1"),
        ({"branching": 1}, "branching 1"),
        ({"n_roots": 4}, "4 trees hold 52 features"),
        ({"parent_cosine": 1.0}, "parent_cosine is 1.0"),
        ({"correlation_rank": 100, "correlation_scale": 0.1}, "Lower one of them"),
    ],
)
def test_an_impossible_forest_is_an_error(values, message):
    with pytest.raises(ValueError, match=message):
        changed(**values)
