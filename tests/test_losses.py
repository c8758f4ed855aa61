"""C²R, OrtSAE and the neighbour search against golden values, limits and invariances."""

from __future__ import annotations

import doctest
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from c2r_core.losses import (
    c2r,
    c2r_from_norms,
    c2r_loss,
    nearest_neighbours,
    neighbours,
    orthogonality_loss,
)
from c2r_core.losses.neighbours import _search

GOLDEN = ["c2r_small", "c2r_medium", "c2r_sparse"]
DATA = Path(__file__).parent / "data"


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}.npz") as arrays:
        return dict(arrays)


def leaf(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).requires_grad_()


def assert_close_to_largest(actual: torch.Tensor, expected: np.ndarray, tolerance: float) -> None:
    assert torch.isfinite(actual).all()
    largest = np.nanmax(np.abs(expected))
    # The reference has a NaN where a pair is silent and alpha < 1; ours is defined as 0 there.
    worst = np.abs(actual.numpy() - np.nan_to_num(expected, nan=0.0)).max()
    assert worst <= tolerance * largest


def random_case(seed: int, batch: int = 12, d_sae: int = 9, d_in: int = 5):
    rng = torch.Generator().manual_seed(seed)
    acts = torch.randn(batch, d_sae, generator=rng, dtype=torch.float64).relu()
    W_dec = torch.randn(d_sae, d_in, generator=rng, dtype=torch.float64)
    return acts, W_dec


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_c2r_equals_the_published_values(name, alpha):
    reference = golden(name)
    acts, W_dec = leaf(reference["acts"]), leaf(reference["W_dec"])
    loss = c2r_loss(acts, W_dec, alpha)
    loss.backward()
    assert loss.item() == pytest.approx(float(reference[f"alpha{alpha}_loss"]), rel=1e-5)
    assert_close_to_largest(acts.grad, reference[f"alpha{alpha}_grad_acts"], 1e-4)
    assert_close_to_largest(W_dec.grad, reference[f"alpha{alpha}_grad_W_dec"], 1e-4)


@pytest.mark.parametrize("name", GOLDEN)
def test_orthogonality_equals_the_published_values(name):
    reference = golden(name)
    W_dec = leaf(reference["W_dec"])
    loss = orthogonality_loss(W_dec)
    loss.backward()
    assert loss.item() == pytest.approx(float(reference["orth_loss"]), rel=1e-5)
    assert_close_to_largest(W_dec.grad, reference["orth_grad_W_dec"], 1e-4)


def test_the_example_in_the_docstring_is_right():
    assert doctest.testmod(c2r).attempted > 0
    assert doctest.testmod(c2r).failed == 0


def test_c2r_with_every_norm_a_half_is_orthogonality():
    _, W_dec = random_case(0)
    W_dec.requires_grad_()
    halves = torch.full((len(W_dec),), 0.5, dtype=torch.float64)
    ours, theirs = c2r_from_norms(halves, W_dec), orthogonality_loss(W_dec)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, W_dec), torch.autograd.grad(theirs, W_dec))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_gradients_agree_with_finite_differences(alpha):
    acts, W_dec = random_case(1, batch=4, d_sae=6, d_in=4)
    acts = acts + 0.1  # away from the kink at a silent latent
    assert torch.autograd.gradcheck(
        lambda a, w: c2r_loss(a, w, alpha), (acts.requires_grad_(), W_dec.requires_grad_())
    )


@pytest.mark.parametrize("alpha", [0.25, 1.0, 3.0])
def test_silent_latents_and_zero_rows_have_finite_gradients(alpha):
    acts, W_dec = random_case(2)
    acts[:, :4] = 0
    W_dec[1] = W_dec[0]  # a silent pair of duplicates: infinite slope in the plain formula
    W_dec[5] = 0
    acts.requires_grad_()
    W_dec.requires_grad_()
    c2r_loss(acts, W_dec, alpha).backward()
    assert torch.isfinite(acts.grad).all() and torch.isfinite(W_dec.grad).all()
    assert (acts.grad[:, 0] == 0).all()


@given(seed=st.integers(0, 10_000), scale=st.floats(0.1, 10))
@settings(max_examples=25, deadline=None)
def test_invariances(seed, scale):
    acts, W_dec = random_case(seed)
    loss = c2r_loss(acts, W_dec)
    rng = torch.Generator().manual_seed(seed + 1)
    rows = torch.rand(len(W_dec), 1, generator=rng, dtype=torch.float64) + 0.1
    latents = torch.randperm(acts.shape[1], generator=rng)
    samples = torch.randperm(acts.shape[0], generator=rng)
    torch.testing.assert_close(c2r_loss(acts, W_dec * rows), loss)
    torch.testing.assert_close(c2r_loss(acts[:, latents], W_dec[latents]), loss)
    torch.testing.assert_close(c2r_loss(acts[samples], W_dec), loss)
    torch.testing.assert_close(c2r_loss(acts * scale, W_dec), loss * scale)
    repeated = acts.repeat(4, 1)  # four times the batch: √4 times the value
    torch.testing.assert_close(c2r_loss(repeated, W_dec), 2 * loss)


def test_orthogonal_rows_cost_nothing_and_opposite_rows_neither():
    acts = torch.rand(5, 4)
    assert c2r_loss(acts, torch.eye(4)).item() == 0
    assert c2r_loss(acts[:, :2], torch.tensor([[1.0, 0], [-1.0, 0]])).item() == 0


def test_one_latent_is_cheaper_than_two_for_the_same_energy():
    W_dec = torch.tensor([[1.0, 0.1], [1.0, -0.1]])
    together = torch.tensor([[1.0, 0.0]] * 8)
    apart = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 4)
    assert c2r_loss(apart, W_dec) > 1.3 * c2r_loss(together, W_dec)


def test_stacked_dictionaries_are_independent():
    cases = [random_case(seed) for seed in range(3)]
    acts = torch.stack([a for a, _ in cases])
    W_dec = torch.stack([w for _, w in cases])
    expected = torch.stack([c2r_loss(a, w, 2.0) for a, w in cases])
    torch.testing.assert_close(c2r_loss(acts, W_dec, 2.0), expected)


def rows_of_a_kind(kind, dtype):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(500, 30, generator=generator, dtype=dtype)
    if kind == "twins":  # told apart in the sixth digit
        rows[250:] = rows[:250] + 1e-5 * torch.randn(250, 30, generator=generator, dtype=dtype)
    elif kind == "alike":
        rows = 1 + 1e-3 * rows
    elif kind == "equal":
        rows = torch.ones_like(rows)
    elif kind == "some zero":
        rows[::7] = 0
    elif kind == "all zero":
        rows[:] = 0
    elif kind == "duplicates":
        rows[400:] = rows[:100]
    elif kind == "one large coordinate":  # so that rounding to int8 leaves nothing of the others
        rows[:, 3] = 1e3
    elif kind == "a few such rows":
        rows[::50, 3] = 1e3
    elif kind == "odd width":
        rows = rows[:, :29]
    elif kind == "one column":
        rows = rows[:, :1]
    return rows


KINDS = (
    "random, twins, alike, equal, some zero, all zero, duplicates, one large coordinate, a few such rows, "
    "odd width, one column"
)


@pytest.mark.parametrize("kind", KINDS.split(", "))
@pytest.mark.parametrize(
    "in_int8, tile",
    [(False, 64), (True, 64), (True, 499)],
    ids=["as it is", "int8", "int8 with a last tile of one row"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_search_in_tiles_is_exact(kind, in_int8, tile, dtype, monkeypatch):
    monkeypatch.setattr(neighbours, "_tile", lambda device: tile)
    monkeypatch.setattr(neighbours, "_PAIRS", 100)
    monkeypatch.setattr(neighbours, "_CANDIDATES", 16)  # so that those alike are more
    monkeypatch.setattr(neighbours, "int8_speed_up", lambda: 2.0 if in_int8 else 0.5)
    of_kind = rows_of_a_kind(kind, dtype)
    W_dec = torch.stack([of_kind, rows_of_a_kind("random", dtype)[:, : of_kind.shape[1]]])
    found = nearest_neighbours(W_dec)
    unit = torch.nn.functional.normalize(W_dec.double(), dim=-1)
    cosines = unit @ unit.mT
    cosines.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)
    exact = {"rtol": 0, "atol": 3e-7 if dtype == torch.float32 else 1e-12}
    torch.testing.assert_close(found.cosine.double(), cosines.amax(-1).clamp(max=1), **exact)
    of_index = cosines.gather(-1, found.index.unsqueeze(-1))[..., 0]
    torch.testing.assert_close(of_index, cosines.amax(-1), **exact)
    if kind in ("equal", "all zero"):
        assert found.index[0].tolist() == [1] + [0] * 499
    if kind == "duplicates":
        assert found.index[0, :100].tolist() == list(range(400, 500))


def test_rounding_to_int8_changes_no_neighbour(monkeypatch):
    rows = torch.randn(1500, 24, generator=torch.Generator().manual_seed(5))
    found = []
    for speed_up in (2.0, 0.5):
        monkeypatch.setattr(neighbours, "int8_speed_up", lambda speed_up=speed_up: speed_up)
        found.append(nearest_neighbours(rows))
    assert found[0].index.equal(found[1].index)
    assert found[0].cosine.equal(found[1].cosine)


@pytest.mark.parametrize("d_sae, chunk_size", [(40, 8), (41, 8), (41, 20)])
def test_chunked_search_is_exact_inside_each_chunk(d_sae, chunk_size):
    _, W_dec = random_case(4, d_sae=d_sae)
    chunked = nearest_neighbours(
        W_dec, chunk_size=chunk_size, generator=torch.Generator().manual_seed(7)
    )
    again = nearest_neighbours(
        W_dec, chunk_size=chunk_size, generator=torch.Generator().manual_seed(7)
    )
    assert torch.equal(chunked.index, again.index)
    assert (chunked.index != torch.arange(d_sae)).all()
    assert (chunked.cosine <= nearest_neighbours(W_dec).cosine + 1e-12).all()
    order = torch.randperm(d_sae, generator=torch.Generator().manual_seed(7))
    first = order[:chunk_size]
    inside = _search(torch.nn.functional.normalize(W_dec[first], dim=1))
    assert torch.equal(chunked.index[first], first[inside.index])


def test_half_precision_input_is_compared_in_float32():
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0625], [1.0, 0.03125]]).bfloat16()
    assert nearest_neighbours(rows).index.tolist() == [2, 2, 1]
    assert c2r_loss(torch.ones(2, 3).bfloat16(), rows).dtype == torch.float32


@pytest.mark.parametrize(
    "acts, W_dec, arguments, message",
    [
        (torch.ones(3, 4), torch.ones(5, 2), {}, "expected .* d_sae=5"),
        (torch.ones(3, 4), torch.ones(2, 4), {}, "transposed"),
        (torch.ones(4), torch.ones(4, 2), {}, "feature_acts has shape"),
        (torch.ones(3, 1), torch.ones(1, 2), {}, "d_sae >= 2"),
        (torch.ones(3, 4), torch.full((4, 2), torch.nan), {}, "W_dec holds a NaN"),
        (torch.full((3, 4), torch.inf), torch.ones(4, 2), {}, "feature_acts holds a NaN"),
        (torch.ones(3, 2, 4), torch.ones(4, 2), {}, "leading dimensions"),
        (torch.ones(3, 2, 4), torch.ones(2, 4, 2), {}, "leading dimensions"),
        (-torch.ones(3, 4), torch.ones(4, 2), {}, "negative values, the least -1"),
        (torch.ones(3, 4), torch.ones(4, 2), {"alpha": 0}, "alpha is 0"),
        (torch.ones(3, 4), torch.ones(4, 2), {"alpha": float("nan")}, "alpha is nan"),
        (torch.ones(3, 4), torch.ones(4, 2), {"chunk_size": 2}, "generator"),
        (torch.ones(3, 4), torch.ones(4, 2), {"chunk_size": 1}, "at least 2"),
    ],
)
def test_bad_input_is_refused(acts, W_dec, arguments, message):
    with pytest.raises(ValueError, match=message):
        c2r_loss(acts, W_dec, **arguments)
