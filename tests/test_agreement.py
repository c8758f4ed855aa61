"""Agreement of runs: planted permutations, random dictionaries, and bounds that must hold."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from c2r_core.errors import NotEvaluable
from c2r_core.metrics.agreement import compare_saes, random_baseline
from c2r_core.metrics.matching import match_latents
from c2r_core.saes import TopKSAE

D_IN, D_SAE = 16, 40


class Linear:
    """relu(x W_enc) with decoder rows W_dec, and no encoder that a metric could see."""

    def __init__(self, W_dec, encoder=None):
        self.W_dec = W_dec
        self.encoder = W_dec.T if encoder is None else encoder

    def encode(self, x):
        return torch.relu(x @ self.encoder)

    def decode(self, feature_acts):
        return feature_acts @ self.W_dec


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def permuted_and_rescaled(sae, seed=0):
    """The same SAE with its latents in another order and scale moved from decoder to encoder."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(sae.d_sae, generator=generator)
    scale = torch.rand(sae.d_sae, generator=generator) + 0.5
    copy = TopKSAE(sae.d_in, sae.d_sae, k=sae.k)
    with torch.no_grad():
        copy.W_dec.copy_(sae.W_dec[order] * scale[:, None])
        copy.W_enc.copy_(sae.W_enc[:, order] * 2)
        copy.b_enc.copy_(sae.b_enc[order] * 2)
    return copy, order


# -- matching ----------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(n_a=st.integers(2, 12), n_b=st.integers(2, 12), seed=st.integers(0, 999))
def test_matching_is_one_to_one_and_lies_between_its_bounds(n_a, n_b, seed):
    a, b = normal(n_a, 4, seed=seed), normal(n_b, 4, seed=seed + 1000)
    exact, rounds = match_latents(a, b), match_latents(a, b, exact_limit=1)
    cosines = torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T
    optimum = cosines.numpy()[linear_sum_assignment(cosines.numpy(), maximize=True)].mean()
    for found in (exact, rounds):
        assert len(found.cosine) == min(n_a, n_b)
        assert found.latents_a.tolist() == sorted(set(found.latents_a.tolist()))
        assert len(set(found.latents_b.tolist())) == len(found.latents_b)
        torch.testing.assert_close(found.cosine, cosines[found.latents_a, found.latents_b])
    assert float(exact.cosine.mean()) == pytest.approx(optimum, abs=1e-6)
    assert exact.mean_at_most == pytest.approx(optimum, abs=1e-6)
    assert float(rounds.cosine.mean()) <= optimum + 1e-6 <= rounds.mean_at_most + 2e-6


def test_rounds_are_the_greedy_matching():
    a, b = normal(60, 8), normal(50, 8, seed=1)
    cosines = torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T
    greedy = {}
    for flat in cosines.flatten().argsort(descending=True).tolist():
        i, j = divmod(flat, 50)
        if i not in greedy and j not in greedy.values():
            greedy[i] = j
    found = match_latents(a, b, exact_limit=1)
    assert dict(zip(found.latents_a.tolist(), found.latents_b.tolist(), strict=True)) == greedy
    assert float(found.cosine.mean()) < float(match_latents(a, b).cosine.mean())


def test_blocks_of_the_wide_search_change_nothing(monkeypatch):
    a, b = normal(60, 8), normal(50, 8, seed=1)
    whole = match_latents(a, b, exact_limit=10)
    monkeypatch.setattr("c2r_core.metrics.matching._BLOCK_ENTRIES", 7 * 50)
    blocks = match_latents(a, b, exact_limit=10)
    assert torch.equal(whole.latents_b, blocks.latents_b)
    assert blocks.mean_at_most == pytest.approx(whole.mean_at_most)


@pytest.mark.parametrize("spread", [1.0, 0.1, 0.0])
@pytest.mark.parametrize("sizes", [(60, 60), (40, 60), (60, 40)])
def test_candidates_give_the_optimum(sizes, spread, monkeypatch):
    """Also where the nearest partners of many rows are the same few."""
    a, b = (normal(n, 8, seed=n + i) for i, n in enumerate(sizes))
    crowd = normal(8, seed=9)
    a[10:], b[30:] = crowd + spread * a[10:], crowd + spread * b[30:]
    dense = match_latents(a, b)
    for module, value in {"DENSE_LIMIT": 1, "_N_CANDIDATES": 2, "_BLOCK_ENTRIES": 7 * 50}.items():
        monkeypatch.setattr(f"c2r_core.metrics.matching.{module}", value)
    found = match_latents(a, b)
    assert found.latents_a.tolist() == sorted(set(found.latents_a.tolist()))
    assert len(set(found.latents_b.tolist())) == min(sizes)
    assert float(found.cosine.mean()) == pytest.approx(float(dense.cosine.mean()), abs=1e-6)
    assert found.mean_at_most == pytest.approx(dense.mean_at_most, abs=1e-6)
    if spread == 1:
        assert torch.equal(found.latents_b, dense.latents_b)


def test_cosine_is_signed():
    rows = torch.eye(4)
    assert match_latents(rows, -rows).cosine.max() == 0
    assert match_latents(rows, torch.cat([-rows, rows])).latents_b.tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("W_dec", "message"),
    [
        (torch.ones(5, 3), "same d_in"),
        (torch.ones(5), "d_sae, d_in"),
        (torch.ones(1, 4), "d_sae >= 2"),
        (torch.full((5, 4), torch.nan), "NaN"),
        (torch.ones(2, 5, 4), "same d_in"),
    ],
)
def test_what_cannot_be_matched_is_explained(W_dec, message):
    with pytest.raises(ValueError, match=message):
        match_latents(torch.ones(5, 4), W_dec)
    with pytest.raises(ValueError, match="exact_limit is 0"):
        match_latents(torch.ones(5, 4), torch.ones(5, 4), exact_limit=0)


# -- the report --------------------------------------------------------------------------------


def test_a_permuted_and_rescaled_copy_agrees_in_everything():
    sae = TopKSAE(D_IN, D_SAE, k=5, seed=1)
    copy, order = permuted_and_rescaled(sae)
    assert torch.equal(order[match_latents(sae.W_dec, copy.W_dec).latents_b], torch.arange(D_SAE))
    report = compare_saes(sae, copy, [normal(3000, D_IN)])
    for agreement in (report.all_latents, report.live_latents):
        assert agreement.pw_mcc == pytest.approx(1) == agreement.pw_mcc_at_most
        assert agreement.shared_share == agreement.encoder_shared_share == 1
        assert agreement.both_shared_share == 1
        assert agreement.random.mean < agreement.random.high < 0.9
    functional = report.functional
    assert functional.mean_correlation == pytest.approx(1)
    assert functional.median_correlation == pytest.approx(1) and functional.share_above_07 == 1
    assert functional.n_evaluable + functional.n_not_evaluable == D_SAE
    assert report.n_tokens == 3000


def test_random_dictionaries_score_the_baseline():
    outside = 0
    for seed in range(20):
        a, b = normal(D_SAE, D_IN, seed=2 * seed), normal(D_SAE, D_IN, seed=2 * seed + 1)
        baseline = random_baseline(a, b, same_covariance=False, seed=seed, n_draws=5)
        score = float(match_latents(a, b).cosine.mean())
        outside += not baseline.low <= score <= baseline.high
    assert outside <= 4  # 1 is expected at 95 %


def test_rows_in_a_common_subspace_agree_by_covariance_alone():
    # Both dictionaries crowd into the same 3 of 16 directions, and share nothing else.
    crowd = torch.cat([torch.ones(3), torch.full((D_IN - 3,), 0.05)])
    a, b = normal(D_SAE, D_IN) * crowd, normal(D_SAE, D_IN, seed=1) * crowd
    report = compare_saes(Linear(a), Linear(b), [normal(100, D_IN)], n_draws=5)
    agreement = report.all_latents
    assert agreement.pw_mcc > agreement.random.high + 0.2
    chance = agreement.random_of_same_covariance
    assert chance.low - 0.02 < agreement.pw_mcc < chance.high + 0.02


def test_shares_count_decoder_and_encoder_apart():
    rows = torch.eye(D_IN)[:4]
    first, second = TopKSAE(D_IN, 4, k=4), TopKSAE(D_IN, 4, k=4)
    with torch.no_grad():
        for sae in (first, second):
            sae.W_dec.copy_(rows)
            sae.W_enc.copy_(rows.T)
        second.W_dec[0, 8] = 2.0  # decoder cosine 0.45, below 0.7
        second.W_enc[8, 0] = second.W_enc[8, 1] = 2.0
    agreement = compare_saes(first, second, [normal(50, D_IN)]).all_latents
    assert agreement.shared_share == 0.75
    assert agreement.encoder_shared_share == agreement.both_shared_share == 0.5
    agreement = compare_saes(first, Linear(rows), [normal(50, D_IN)]).all_latents
    assert agreement.encoder_shared_share is agreement.both_shared_share is None


def test_dead_latents_count_among_all_only():
    encoder = torch.eye(D_IN).clone()
    encoder[:, 10:] = 0  # six dead latents, equal in both: they stayed where they began
    rows, other = torch.eye(D_IN), torch.eye(D_IN)
    other[:10] = normal(10, D_IN)
    report = compare_saes(Linear(rows, encoder), Linear(other, encoder), [normal(200, D_IN)])
    assert (report.live_latents.n_latents_a, report.live_latents.n_latents_b) == (10, 10)
    assert report.all_latents.pw_mcc > report.live_latents.pw_mcc + 0.1
    assert report.functional.n_not_evaluable >= 6

    dead = compare_saes(Linear(rows, 0 * encoder), Linear(other, encoder), [normal(9, D_IN)])
    assert dead.live_latents is None and "0 and 10 latents fire" in dead.live_not_evaluable
    assert dead.functional.mean_correlation is None and dead.functional.n_evaluable == 0
    json.dumps(asdict(dead), allow_nan=False)


def test_functional_agreement_is_pearson_whatever_the_chunks():
    a, b = normal(D_SAE, D_IN), normal(D_SAE, D_IN, seed=1)
    # An offset of a thousand would cost plain float32 sums all their digits.
    x = normal(2500, D_IN, seed=2) + 1000 * a[0] / a[0].norm()
    first, second = Linear(a), Linear(b)
    whole, parts = (compare_saes(first, second, chunks) for chunks in ([x], x.split(7)))
    mean = whole.functional.mean_correlation
    assert parts.functional.mean_correlation == pytest.approx(mean, abs=1e-6)
    matching = match_latents(a, b)
    acts = first.encode(x)[:, matching.latents_a].double(), second.encode(x).double()
    pairs = zip(acts[0].T.numpy(), acts[1][:, matching.latents_b].T.numpy(), strict=True)
    plain = [np.corrcoef(one, two)[0, 1] for one, two in pairs if one.std() > 0 < two.std()]
    assert len(plain) == whole.functional.n_evaluable < D_SAE
    assert mean == pytest.approx(np.mean(plain), abs=1e-6)


def test_a_constant_latent_has_no_correlation():
    class Constant(Linear):
        def encode(self, x):
            return torch.cat([torch.full((len(x), 1), 0.1), x[:, 1:]], dim=1)

    sae = Constant(torch.eye(4))
    functional = compare_saes(sae, sae, normal(3000, 4).split(1000)).functional
    assert (functional.n_evaluable, functional.n_not_evaluable) == (3, 1)


def test_same_seed_same_report_and_it_is_json():
    first, second = TopKSAE(D_IN, D_SAE, k=3, seed=0), TopKSAE(D_IN, 30, k=3, seed=1)
    x = normal(500, D_IN)
    report = compare_saes(first, second, [x], seed=4)
    assert compare_saes(first, second, [x], seed=4) == report
    assert compare_saes(first, second, [x], seed=5).all_latents.random != report.all_latents.random
    assert (report.all_latents.n_latents_a, report.all_latents.n_latents_b) == (D_SAE, 30)
    assert json.loads(json.dumps(asdict(report), allow_nan=False))["n_tokens"] == 500


def test_nothing_to_compare_on_is_an_error():
    sae = TopKSAE(D_IN, D_SAE, k=3)
    with pytest.raises(ValueError, match="no tokens"):
        compare_saes(sae, sae, [])
    with pytest.raises(ValueError, match="NaN or infinite"):
        compare_saes(sae, sae, [torch.full((3, D_IN), torch.nan)])
    with pytest.raises(ValueError, match="n_draws is 1"):
        compare_saes(sae, sae, [normal(9, D_IN)], n_draws=1)


def test_saes_of_two_widths_are_not_compared():
    a, b = TopKSAE(D_IN, D_SAE, k=5), TopKSAE(D_IN + 1, D_SAE, k=5)
    with pytest.raises(
        NotEvaluable, match=f"of widths {D_IN} and {D_IN + 1}; only SAEs of the same"
    ):
        compare_saes(a, b, [normal(10, D_IN)])
