"""Toy data: the tree is what its parameters say; batches are reproducible; metrics find what is planted."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from c2r_core.data.batches import ToyBatches
from c2r_core.data.toy import FeatureTree, ToySample
from c2r_core.errors import NotEvaluable
from c2r_core.metrics.toy import _best_f1, evaluate_toy
from c2r_core.saes import ReLUSAE, fold_norm_factor

TREE = FeatureTree(d_in=24, n_parents=3, children_per_parent=4, n_singles=5)


def draw(n: int, seed: int = 0, tree: FeatureTree = TREE):
    return tree.sample(n, torch.Generator().manual_seed(seed))


def test_firing_rates_are_the_stated_ones():
    on = draw(200_000).features > 0
    torch.testing.assert_close(on.float().mean(0), TREE.probabilities, atol=0.004, rtol=0)
    parents, children = on[:, :3], on[:, TREE.children]
    assert not children[~parents].any(), "a child needs its parent"
    assert children.sum(-1).max() == 1, "children of one parent exclude each other"
    alone = (~children.any(-1))[parents].float().mean()
    assert alone == pytest.approx(TREE.parent_alone, abs=0.01)


def test_x_is_made_of_orthonormal_directions():
    sample = draw(100)
    torch.testing.assert_close(TREE.directions @ TREE.directions.T, torch.eye(TREE.n_features))
    torch.testing.assert_close(sample.x @ TREE.directions.T, sample.features)
    on = draw(50_000).features
    assert on[on > 0].mean() == pytest.approx(1, abs=0.01)
    assert on[on > 0].std() == pytest.approx(TREE.magnitude_sd, abs=0.01)


def test_random_streams_stay_what_they_were():
    """Or every kept number on the tree would silently be about other data."""
    features = draw(100).features
    assert (features > 0).sum(0).tolist() == [
        16,
        13,
        18,
        1,
        3,
        5,
        2,
        2,
        1,
        5,
        2,
        1,
        1,
        3,
        8,
        5,
        6,
        9,
        6,
        4,
    ]
    assert float(features.double().sum()) == pytest.approx(109.315792, rel=1e-5)
    assert TREE.directions[-1, :3].tolist() == pytest.approx(
        [-0.042054, -0.044782, -0.298367], abs=1e-5
    )
    assert TREE.norm_factor == pytest.approx(0.9876573386435754, rel=1e-12)


@pytest.mark.parametrize("cosine", [0.3, 0.6, 0.95])
def test_groups_have_the_cosine_asked_for(cosine):
    tree = FeatureTree(d_in=24, n_parents=2, n_singles=9, group_size=3, group_cosine=cosine)
    group = torch.full((3, 3), cosine).fill_diagonal_(1)
    expected = torch.block_diag(torch.eye(10), group, group, group)
    torch.testing.assert_close(tree.directions @ tree.directions.T, expected, atol=1e-5, rtol=0)
    plain = FeatureTree(d_in=24, n_parents=2, n_singles=9)
    torch.testing.assert_close(tree.directions[:10], plain.directions[:10])
    features = draw(50, tree=tree).features
    assert torch.equal(features, draw(50, tree=plain).features), "only directions may differ"


@pytest.mark.parametrize("correlation", [0.3, 1.0])
def test_groups_fire_together_as_often_as_asked_for(correlation):
    tree = FeatureTree(
        d_in=8,
        n_parents=0,
        n_singles=6,
        group_size=3,
        single_probability=0.2,
        group_correlation=correlation,
    )
    on = draw(200_000, tree=tree).features > 0
    torch.testing.assert_close(on.float().mean(0), torch.full((6,), 0.2), atol=0.004, rtol=0)
    group = torch.full((3, 3), correlation).fill_diagonal_(1)
    expected = torch.block_diag(group, group)
    torch.testing.assert_close(torch.corrcoef(on.T.float()), expected, atol=0.015, rtol=0)


def test_groups_leave_the_other_features_alone():
    together = replace(TREE, group_size=5, group_correlation=0.5)
    assert torch.equal(
        draw(500).features[:, :15] > 0, draw(500, tree=together).features[:, :15] > 0
    )
    torch.testing.assert_close(together.directions, TREE.directions)


@pytest.mark.parametrize("changes", [{"group_cosine": 0.6}, {"group_correlation": 0.5}])
def test_grouped_batches_are_normalised(changes):
    tree = FeatureTree(
        d_in=24, n_parents=0, n_singles=20, single_probability=0.2, group_size=5, **changes
    )
    tree = replace(tree, group_cosine=0.6)
    x = ToyBatches(tree, 50_000)(0)
    assert x.square().sum(1).mean() == pytest.approx(1, abs=0.02)


def test_batches_are_normalised_and_depend_on_seed_and_step_alone():
    batches = ToyBatches(TREE, 20_000, seed=[3, 4, 3])
    x = batches(7)
    assert x.shape == (3, 20_000, 24)
    assert x[0].square().sum(1).mean() == pytest.approx(1, abs=0.02)
    assert torch.equal(x[0], x[2]) and not torch.equal(x[0], x[1])
    assert torch.equal(ToyBatches(TREE, 20_000, seed=4)(7), x[1])
    assert not torch.equal(batches(8)[0], x[0])


def perfect_sae(rows: torch.Tensor) -> ReLUSAE:
    """Reads each feature off its direction: right for orthonormal rows."""
    sae = ReLUSAE(TREE.d_in, len(rows), l1_weight=0.0)
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows.T)
        sae.b_enc.fill_(-1e-4)
    return sae


def test_a_perfect_dictionary_is_perfect():
    report = evaluate_toy(perfect_sae(TREE.directions), TREE, draw(20_000))
    assert report.mcc == pytest.approx(1) and report.recovery == report.uniqueness == 1
    assert report.absorption == 0 and report.near_duplicates == 0 and report.split_share == 0
    assert report.nearest_cosine == pytest.approx(0, abs=1e-5)
    assert report.latents_per_parent == report.latents_per_feature == 1
    assert report.detector_f1 == pytest.approx(1, abs=1e-3) and report.fvu < 1e-3
    assert report.detector_precision == 1 and report.split_share_at_08 == 0
    assert report.detector_best_f1 == pytest.approx(report.detector_f1, abs=1e-3)
    assert report.live_share == 1 and report.l0 == pytest.approx(
        float(TREE.probabilities.sum()), rel=0.05
    )


def test_planted_absorption_is_found():
    """Parent 0's latent is silent with child 0, whose latent has taken its direction in."""
    rows = TREE.directions.clone()
    child = int(TREE.children[0, 0])
    sae = perfect_sae(rows)
    with torch.no_grad():
        sae.W_enc[:, 0] -= 5 * rows[child]
        sae.W_dec[child] = (rows[child] + rows[0]) / 2**0.5
    sample = draw(50_000)
    report = evaluate_toy(sae, TREE, sample)
    # One of parent 0's four equally likely children, one of three parents.
    assert report.silent_with_child == pytest.approx(1 / 4 / 3, abs=0.01)
    assert report.silent_alone == 0 and report.absorption == report.silent_with_child
    assert report.child_latent_to_parent == pytest.approx(0.5**0.5 / 12, abs=1e-4)


def test_a_latent_that_leaks_a_little_is_still_a_detector():
    """A latent that also answers faintly to every other feature: bad at threshold 0, good above the leak."""
    leaking = perfect_sae(TREE.directions)
    with torch.no_grad():
        leaking.W_enc.add_(0.05 * TREE.directions.sum(0)[:, None])
    clean, report = (
        evaluate_toy(sae, TREE, draw(5_000)) for sae in (perfect_sae(TREE.directions), leaking)
    )
    assert report.detector_f1 < 0.5 < 0.97 * clean.detector_f1 < report.detector_best_f1


def test_the_best_threshold_by_hand():
    acts = torch.tensor([[3.0, 0.0], [2.0, 1.0], [2.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    on = torch.tensor([[1, 0], [1, 1], [0, 0], [1, 1], [0, 1]], dtype=torch.bool)
    # Above 2 two ties stay together: 1/3 and 2/3 of the hits; all four firing find all three: 6/7.
    # The second column: both firing, one hit of three present: 2/5; silent samples cannot be won.
    assert _best_f1(acts, on).tolist() == pytest.approx([6 / 7, 2 / 5])


def test_the_best_threshold_is_the_best_of_all():
    """Against every activation as a threshold, with ties, a column that never fires and one never on."""
    draws = torch.Generator().manual_seed(0)
    acts = (torch.randn(300, 6, generator=draws) * 4).round().relu() / 4
    on = torch.rand(300, 6, generator=draws) < 0.2
    acts[:, 0], on[:, 1] = 0.0, False
    fires = acts > torch.cat([torch.zeros(1), acts.flatten().unique()])[:, None, None]
    f1 = 2 * (fires & on).sum(1) / (fires.sum(1) + on.sum(0)).clamp(min=1)
    torch.testing.assert_close(_best_f1(acts, on), f1.amax(0).double(), rtol=1e-6, atol=1e-9)
    assert _best_f1(acts, on)[:2].tolist() == [0, 0]


def test_a_folded_sae_scores_as_it_did():
    sae = perfect_sae(TREE.directions)
    sae.norm_factor = TREE.norm_factor
    trained, folded = (evaluate_toy(one, TREE, draw(2_000)) for one in (sae, fold_norm_factor(sae)))
    assert trained.fvu == pytest.approx(folded.fvu, rel=1e-3)
    assert trained.l0 == folded.l0 and trained.mcc == pytest.approx(folded.mcc)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_sae_on_a_gpu_is_measured_too():
    sample, sae = draw(2_000), perfect_sae(TREE.directions)
    expected = evaluate_toy(sae, TREE, sample)
    found = evaluate_toy(sae.to("cuda"), TREE, sample)
    assert found.mcc == pytest.approx(expected.mcc, abs=1e-4)
    assert found.detector_f1 == pytest.approx(expected.detector_f1, abs=1e-3)


def test_planted_duplicates_are_found():
    rows = torch.cat([TREE.directions, TREE.directions[:2]])
    report = evaluate_toy(perfect_sae(rows), TREE, draw(5_000))
    assert report.near_duplicates == pytest.approx(4 / 22)
    assert report.nearest_cosine == pytest.approx(4 / 22, abs=1e-5)
    assert report.latents_per_parent == pytest.approx(5 / 3)
    assert report.split_share == report.split_share_at_08 == pytest.approx(2 / 20)
    assert report.uniqueness == pytest.approx(20 / 22)


def test_a_parent_that_never_occurs_is_left_out_of_the_mean():
    sample = draw(5_000)
    features = sample.features.clone()
    features[:, [0, *TREE.children[0].tolist()]] = 0
    report = evaluate_toy(
        perfect_sae(TREE.directions), TREE, ToySample(features @ TREE.directions, features)
    )
    assert report.absorption == 0 and report.silent_alone == 0


def test_dead_latents_do_not_count():
    sae = perfect_sae(torch.cat([TREE.directions, TREE.directions[:2]]))
    with torch.no_grad():
        sae.b_enc[-2:] = -100
    report = evaluate_toy(sae, TREE, draw(5_000))
    assert report.near_duplicates == 0 and report.latents_per_parent == 1
    assert report.live_share == pytest.approx(20 / 22)
    with torch.no_grad():
        sae.b_enc.fill_(-100)
    with pytest.raises(NotEvaluable, match="dead"):
        evaluate_toy(sae, TREE, draw(100))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"d_in": 19}, "need d_in >= 20"),
        ({"parent_alone": 1.2}, "parent_alone is 1.2"),
        ({"group_size": 2}, "group_size is 2; expected a divisor of the 5 singles"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_cosine": 1.0}, "group_cosine is 1.0; expected a cosine from 0 to below 1"),
        ({"group_correlation": -0.1}, "group_correlation is -0.1"),
    ],
)
def test_bad_trees_are_refused(changes, message):
    arguments = {"d_in": 24, "n_parents": 3, "children_per_parent": 4, "n_singles": 5}
    with pytest.raises(ValueError, match=message):
        FeatureTree(**arguments | changes)


def test_a_parent_that_is_always_alone_has_no_children_on():
    tree = FeatureTree(d_in=24, n_parents=3, children_per_parent=4, n_singles=5, parent_alone=1.0)
    assert not (draw(1000, tree=tree).features[:, tree.children.flatten()] > 0).any()


def test_without_parents_the_rest_is_measured():
    tree = FeatureTree(d_in=12, n_parents=0, n_singles=10, group_size=5, group_cosine=0.6)
    sae = ReLUSAE(12, 10, l1_weight=0.0)
    with torch.no_grad():
        sae.W_dec.copy_(tree.directions)
        sae.W_enc.copy_(torch.linalg.pinv(tree.directions))
        sae.b_enc.fill_(-1e-4)
    report = evaluate_toy(sae, tree, draw(5_000, tree=tree))
    assert report.mcc == pytest.approx(1) and report.recovery == 1 and report.fvu < 1e-3
    assert report.nearest_cosine == pytest.approx(0.6) and report.near_duplicates == 0
    assert math.isnan(report.absorption) and math.isnan(report.latents_per_parent)
