"""Toy data: the tree is what its parameters say; batches are reproducible; metrics find what is planted."""

from __future__ import annotations

import pytest
import torch

from c2r_core.data.toy import FeatureTree, ToyBatches, ToySample
from c2r_core.metrics.toy import evaluate_toy
from c2r_core.saes import ReLUSAE

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
    assert report.latents_per_parent == report.latents_per_feature == 1
    assert report.detector_f1 == pytest.approx(1, abs=1e-3) and report.fvu < 1e-3
    assert report.detector_precision == 1 and report.split_share_at_08 == 0
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


def test_planted_duplicates_are_found():
    rows = torch.cat([TREE.directions, TREE.directions[:2]])
    report = evaluate_toy(perfect_sae(rows), TREE, draw(5_000))
    assert report.near_duplicates == pytest.approx(4 / 22)
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
    with pytest.raises(ValueError, match="dead"):
        evaluate_toy(sae, TREE, draw(100))


@pytest.mark.parametrize(
    "changes, message",
    [({"d_in": 19}, "need d_in >= 20"), ({"parent_alone": 1.2}, "parent_alone is 1.2")],
)
def test_bad_trees_are_refused(changes, message):
    arguments = {"d_in": 24, "n_parents": 3, "children_per_parent": 4, "n_singles": 5}
    with pytest.raises(ValueError, match=message):
        FeatureTree(**arguments | changes)


def test_a_parent_that_is_always_alone_has_no_children_on():
    tree = FeatureTree(d_in=24, n_parents=3, children_per_parent=4, n_singles=5, parent_alone=1.0)
    assert not (draw(1000, tree=tree).features[:, tree.children.flatten()] > 0).any()
