"""Regularisers: the registry, their schedules, the decoder-norm form, the ablations by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator

from architectures import batch, make
from c2r_core import c2r_loss, create_regulariser
from c2r_core.losses import nearest_neighbours
from c2r_core.saes import StepInput
from c2r_core.saes.sparse import SparseActs
from c2r_core.training import (
    C2R,
    PAPER_STRENGTH,
    REGULARISERS,
    Orthogonality,
    strength_from_weight,
    weight_from_strength,
)

every_regulariser = pytest.mark.parametrize("name", sorted(REGULARISERS))


def random_case(seed: int = 0, batch: int = 6, d_sae: int = 7, d_in: int = 4):
    rng = torch.Generator().manual_seed(seed)
    acts = torch.randn(batch, d_sae, generator=rng, dtype=torch.float64).relu()
    acts[:, 2] = 0  # a latent that is silent in the whole batch
    W_dec = torch.randn(d_sae, d_in, generator=rng, dtype=torch.float64)
    return acts, W_dec


def value(name: str, acts, W_dec, **options):
    return create_regulariser(name, weight=1.0, **options)(acts, W_dec, torch.Generator())


def pairs(acts, W_dec):
    """s, n_i, n_j, and the activations of both latents times their row norms, pair by pair."""
    for i in range(len(W_dec)):
        cosines = [torch.cosine_similarity(W_dec[i], W_dec[j], dim=0) for j in range(len(W_dec))]
        j = max((j for j in range(len(W_dec)) if j != i), key=lambda j: cosines[j].item())
        one, other = acts[:, i] * W_dec[i].norm(), acts[:, j] * W_dec[j].norm()
        yield max(0.0, cosines[j].item()) ** 2, one.norm(), other.norm(), one, other


BY_HAND = {
    "c2r": lambda s, n_i, n_j, f_i, f_j: s * (n_i + n_j),
    "pair_penalty": lambda s, n_i, n_j, f_i, f_j: s * (n_i + n_j),
    "unweighted_sum": lambda s, n_i, n_j, f_i, f_j: n_i + n_j,
    "product": lambda s, n_i, n_j, f_i, f_j: s * n_i * n_j,
    "minimum": lambda s, n_i, n_j, f_i, f_j: s * min(n_i, n_j),
    "co_activation": lambda s, n_i, n_j, f_i, f_j: s * sum(f_i * f_j),
    "group_lasso": lambda s, n_i, n_j, f_i, f_j: n_i,
    "orthogonality": lambda s, n_i, n_j, f_i, f_j: torch.tensor(s, dtype=torch.float64),
}


@pytest.mark.parametrize("name", sorted(BY_HAND))
def test_value_by_hand(name):
    acts, W_dec = random_case()
    costs = [BY_HAND[name](*pair) for pair in pairs(acts, W_dec)]
    assert value(name, acts, W_dec) == pytest.approx(sum(costs).item() / len(costs), rel=1e-9)


@every_regulariser
def test_gradients_are_those_of_the_value(name):
    acts, W_dec = random_case(1)
    acts = acts + 0.1  # away from the kink at a silent latent
    assert torch.autograd.gradcheck(
        lambda a, w: value(name, a, w), (acts.requires_grad_(), W_dec.requires_grad_())
    )


@every_regulariser
def test_silent_latents_have_finite_gradients_and_stacks_are_independent(name):
    cases = [random_case(seed) for seed in (0, 1)]
    acts, W_dec = (torch.stack(part).requires_grad_() for part in zip(*cases, strict=True))
    stacked = value(name, acts, W_dec)
    torch.testing.assert_close(stacked, torch.stack([value(name, *case) for case in cases]))
    gradients = torch.autograd.grad(stacked.sum(), [acts, W_dec], allow_unused=True)
    assert all(g is None or torch.isfinite(g).all() for g in gradients)


@every_regulariser
def test_sparse_activations_give_the_value_of_dense_ones(name):
    sae = make("batch_topk")
    acts = sae.training_losses(StepInput(batch())).feature_acts
    assert isinstance(acts, SparseActs)
    torch.testing.assert_close(
        value(name, acts, sae.W_dec), value(name, acts.to_dense(), sae.W_dec)
    )


@every_regulariser
def test_rescaling_a_latent_changes_nothing(name):
    """f / c with c · w writes the same: no penalty may be lowered for nothing."""
    acts, W_dec = random_case()
    scale = torch.rand(len(W_dec), generator=torch.Generator().manual_seed(3)).double() + 0.1
    rescaled = value(name, acts / scale, W_dec * scale.unsqueeze(1))
    torch.testing.assert_close(rescaled, value(name, acts, W_dec))


def test_the_published_form_is_an_option_and_can_be_driven_to_zero():
    acts, W_dec = random_case()
    published = value("c2r", acts, W_dec, decoder_norm=False)
    torch.testing.assert_close(published, c2r_loss(acts, W_dec))
    smaller = value("c2r", acts / 1000, W_dec * 1000, decoder_norm=False)
    torch.testing.assert_close(smaller, published / 1000)
    unit = torch.nn.functional.normalize(W_dec, dim=1)
    torch.testing.assert_close(value("c2r", acts, unit), c2r_loss(acts, unit))


def test_only_the_minimum_product_and_co_activation_spare_a_pair_that_fires_apart():
    """Two parallel latents of which one is silent: what C²R charges and its ablations do not."""
    acts, W_dec = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.1]])
    free = {name for name in REGULARISERS if value(name, acts, W_dec) == 0}
    assert free == {"minimum", "product", "co_activation"}


def test_chunked_search_is_that_of_the_losses():
    acts, W_dec = random_case(d_sae=9)
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    index = nearest_neighbours(W_dec, chunk_size=3, generator=generators[0]).index
    norms = acts.norm(dim=0) * W_dec.norm(dim=1)
    ours = create_regulariser("unweighted_sum", weight=1.0, chunk_size=3)
    torch.testing.assert_close(ours(acts, W_dec, generators[1]), (norms + norms[index]).mean())


def test_warm_up_rises_linearly_from_start():
    penalty = C2R(0.1, every=2, start=3, warmup=4)
    strengths = [penalty.strength_at(step) for step in range(10)]
    assert strengths == [0, 0, 0, 0.5, 0, 1.5, 0, 2, 0, 2]
    assert Orthogonality(0.1, start=1).strength_at(1) == 1


@every_regulariser
def test_bad_schedules_are_refused(name):
    for wrong in ({"weight": -1.0}, {"every": 0}, {"start": -1}, {"warmup": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is "):
            create_regulariser(name, **{"weight": 1.0} | wrong)


def test_unknown_regularisers_list_the_known_ones():
    with pytest.raises(ValueError, match="'l1'; known are: c2r, co_activation, .*group_lasso"):
        create_regulariser("l1", weight=0.1)
    assert dataclasses.asdict(create_regulariser("c2r", weight=0.1)) == dataclasses.asdict(C2R(0.1))


# -- strength ---------------------------------------------------------------------------------


def test_the_papers_weight_is_the_papers_strength():
    paper = {"batch_size": 2048, "d_sae": 65536}
    assert weight_from_strength(PAPER_STRENGTH, **paper) == 5.0
    assert strength_from_weight(5.0, **paper) == PAPER_STRENGTH == pytest.approx(0.884, abs=5e-4)


@given(
    strength=st.floats(0, 1e3),
    batch_size=st.integers(1, 10**6),
    d_sae=st.integers(1, 10**6),
    alpha=st.floats(0.1, 3),
    mean_square_norm=st.floats(1e-3, 1e3),
)
def test_weight_and_strength_are_inverse(strength, **setting):
    weight = weight_from_strength(strength, **setting)
    assert strength_from_weight(weight, **setting) == pytest.approx(strength, rel=1e-12)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_equal_strength_is_an_equal_share_of_the_loss(alpha):
    """Batch repeated, activations scaled, dictionary doubled: the penalty keeps its share."""
    generator = Generator().manual_seed(0)
    acts, rows = torch.rand(8, 6, generator=generator), torch.randn(6, 5, generator=generator)

    def share(acts, W_dec, scale):
        setting = {"batch_size": len(acts), "d_sae": len(W_dec), "alpha": alpha}
        weight = weight_from_strength(0.7, **setting, mean_square_norm=scale**2)
        penalty = C2R(weight, alpha=alpha, decoder_norm=False)(acts * scale, W_dec, generator)
        return weight * penalty / scale**2

    one = share(acts, rows, 1.0)
    torch.testing.assert_close(share(acts.repeat(4, 1), rows, 1.0), one)
    torch.testing.assert_close(share(acts, rows, 3.0), one)
    # Twice the latents, each firing for half of the samples, in subspaces of their own.
    torch.testing.assert_close(
        share(torch.block_diag(acts, acts), torch.block_diag(rows, rows), 1.0), one
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("strength", -1),
        ("batch_size", 0),
        ("d_sae", 0),
        ("alpha", 0),
        ("mean_square_norm", float("nan")),
    ],
)
def test_a_strength_out_of_range_is_an_error(name, value):
    setting = {"strength": 1.0, "batch_size": 8, "d_sae": 4} | {name: value}
    with pytest.raises(ValueError, match=f"{name} is {value}; expected"):
        weight_from_strength(**setting)
