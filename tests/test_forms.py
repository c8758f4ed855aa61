"""Forms of C²R: the two that are known are special cases; the others do by hand what they say."""

from __future__ import annotations

import pytest
import torch
from torch import Generator

from c2r_core.losses import nearest_neighbours
from c2r_core.saes.sparse import SparseActs
from c2r_core.training import C2R, Orthogonality
from c2r_core.training.forms import PairPenalty, nearest, norms_while_silent


def case(
    batch: int = 9, d_sae: int = 8, d_in: int = 5, seed: int = 0, copies: tuple[int, ...] = ()
):
    rng = torch.Generator().manual_seed(seed)
    acts = torch.randn(*copies, batch, d_sae, generator=rng, dtype=torch.float64).relu()
    acts[..., 2] = 0  # a latent that is silent in the whole batch
    W_dec = torch.randn(*copies, d_sae, d_in, generator=rng, dtype=torch.float64)
    return acts.requires_grad_(), W_dec.requires_grad_()


def value_and_gradients(penalty, acts, W_dec):
    value = penalty(acts, W_dec, Generator())
    gradients = torch.autograd.grad(value.sum(), (acts, W_dec), allow_unused=True)
    return value.detach(), *gradients


@pytest.mark.parametrize("copies", [(), (3,)])
@pytest.mark.parametrize(
    "form, known", [({}, C2R), ({"charge": "constant"}, Orthogonality)], ids=["C²R", "OrtSAE"]
)
def test_c2r_and_ortsae_are_special_cases(copies, form, known):
    acts, W_dec = case(copies=copies)
    ours = value_and_gradients(PairPenalty(1.0, **form), acts, W_dec)
    expected = value_and_gradients(known(1.0), acts, W_dec)
    for own, other in zip(ours, expected, strict=True):
        assert own is other is None or torch.allclose(own, other, atol=1e-12)


def test_only_the_rarer_latent_of_a_pair_moves():
    W_dec = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]], requires_grad=True)
    acts = torch.tensor([[2.0, 1.0, 1.0], [2.0, 0.0, 1.0]], requires_grad=True)
    directed = PairPenalty(1.0, moves="rarer", charge="held norms")
    value, of_acts, of_rows = value_and_gradients(directed, acts, W_dec)
    n_0, n_1 = 8**0.5, 1.0
    assert value.item() == pytest.approx(2 * 0.8**2 * (n_0 + n_1) / 3)
    assert of_acts is None, "held norms shrink nothing"
    assert of_rows[0].norm() == of_rows[2].norm() == 0
    # Against the gradient the rarer row turns away from the other; both i = 0 and i = 1 charge the pair.
    away = torch.tensor([1.0, 0.0]) - 0.8 * torch.tensor([0.8, 0.6])
    assert torch.allclose(of_rows[1, :2], 2 * 2 * 0.8 * (n_0 + n_1) / 3 * away)


def test_below_the_margin_nothing_is_charged():
    W_dec = torch.tensor([[1.0, 0.0], [0.8, 0.6]], requires_grad=True)
    acts = torch.ones(4, 2)
    assert PairPenalty(1.0, margin=0.8)(acts, W_dec, Generator()).item() == pytest.approx(
        0, abs=1e-12
    )
    above = PairPenalty(1.0, charge="constant", margin=0.3)(acts, W_dec, Generator())
    assert above.item() == pytest.approx(0.5**2)


def test_latents_that_always_fire_together_cost_nothing_while_silence_is_charged():
    together = torch.tensor([[3.0, 1.0], [4.0, 2.0], [0.0, 0.0]])
    partner = torch.tensor([1, 0])
    norms = together.norm(dim=0)
    assert norms_while_silent(together, norms, partner).tolist() == [0.0, 0.0]
    apart = torch.tensor([[3.0, 0.0], [4.0, 0.0], [12.0, 2.0]])
    found = norms_while_silent(apart, apart.norm(dim=0), partner)
    assert found.tolist() == pytest.approx([5.0, 5.0]), "latent 0 fires alone twice, latent 1 never"


@pytest.mark.parametrize("charge", ["norms", "held norms", "constant", "silent partner"])
def test_sparse_activations_give_what_dense_ones_do(charge):
    acts, W_dec = case()
    samples, latents = acts.detach().nonzero().unbind(1)
    starts = torch.searchsorted(samples, torch.arange(len(acts)))
    sparse = SparseActs(acts[samples, latents], latents, starts, acts.shape[1])
    penalty = PairPenalty(1.0, charge=charge, moves="rarer", n_neighbours=2)
    for own, other in zip(
        value_and_gradients(penalty, acts, W_dec),
        value_and_gradients(lambda _, W, g: penalty(sparse, W, g), acts, W_dec),
        strict=True,
    ):
        assert own is other is None or torch.allclose(own, other, atol=1e-12)


def test_the_nearest_are_those_of_the_search_and_in_order():
    _, W_dec = case(d_sae=40)
    found = nearest(W_dec, 3)
    assert found[:, 0].tolist() == nearest_neighbours(W_dec).index.tolist()
    unit = torch.nn.functional.normalize(W_dec.detach(), dim=-1)
    cosines = (unit @ unit.T).fill_diagonal_(-2)
    assert found.tolist() == cosines.sort(descending=True).indices[:, :3].tolist()
    with pytest.raises(ValueError, match="n_neighbours is 40; expected fewer than the 40"):
        nearest(W_dec, 40)


def test_the_weight_falls_to_nothing():
    penalty = PairPenalty(1.0, every=2, fade_start=10, fade_steps=4)
    assert [penalty.strength_at(step) for step in (8, 9, 10, 12, 14, 20)] == [2, 0, 2, 1, 0, 0]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"charge": "norm"}, "charge is 'norm'; expected one of 'norms', 'held norms'"),
        ({"moves": "rare"}, "moves is 'rare'; expected one of 'both', 'rarer'"),
        ({"margin": 1.0}, r"margin is 1.0; expected a cosine in \[0, 1\)"),
        ({"n_neighbours": 0}, "n_neighbours is 0"),
        ({"fade_steps": 0}, "fade_steps 0; expected whole numbers >= 1"),
    ],
)
def test_a_wrong_setting_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        PairPenalty(1.0, **wrong)
