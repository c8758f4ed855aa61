"""Reconstruction and dictionary metrics against plain formulas and known cases."""

from __future__ import annotations

import pytest
import torch

from c2r_core.metrics.decoder import decoder_summary
from c2r_core.metrics.reconstruction import evaluate_reconstruction
from c2r_core.saes import TopKSAE
from c2r_core.statistics import mean_interval, paired_interval


class Plain:
    """The least that a metric may ask for; scales x, and clears the last entries."""

    def __init__(self, scale: float, d: int = 6, keep: int = 6):
        self.W_dec = torch.eye(d)
        self.scale, self.keep = scale, keep

    def encode(self, x):
        return x * (torch.arange(x.shape[1]) < self.keep)

    def decode(self, feature_acts):
        return self.scale * feature_acts


def activations(n=500, seed=0):
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed)) + 3.0


def test_fvu_is_about_the_mean_over_all_tokens():
    x = activations()
    report, _ = evaluate_reconstruction(Plain(0.9), x.split(130))
    plain = (0.1 * x).square().sum() / (x - x.mean(0)).square().sum()
    assert report.fvu == pytest.approx(plain.item(), rel=1e-5)
    assert report.explained_variance == pytest.approx(1 - plain.item(), rel=1e-5)
    assert report.cossim == pytest.approx(1) and report.l2_ratio == pytest.approx(0.9)
    assert (
        report.relative_reconstruction_bias == pytest.approx(0.9)
        and report.total_tokens_eval_reconstruction == 500
    )


def test_predicting_the_mean_explains_nothing():
    x = activations()

    class Mean(Plain):
        def decode(self, feature_acts):
            return x.mean(0).expand_as(feature_acts)

    assert evaluate_reconstruction(Mean(1), [x])[0].fvu == pytest.approx(1, rel=1e-5)


def test_counts_of_latents():
    report, density = evaluate_reconstruction(Plain(1.0, keep=2), [activations()])
    assert report.l0 == report.num_alive == 2 and report.frac_alive == pytest.approx(1 / 3)
    assert report.freq_over_10_percent == pytest.approx(1 / 3)
    assert report.freq_under_001_percent == pytest.approx(2 / 3)
    assert report.normalized_freq_over_10_percent == 1
    assert density.tolist() == [1, 1, 0, 0, 0, 0]


def test_chunks_do_not_matter():
    sae, x = TopKSAE(6, 20, k=2), activations()
    (whole, densities), (parts, same) = (
        evaluate_reconstruction(sae, chunks) for chunks in ([x], x.split(7))
    )
    assert whole.fvu == pytest.approx(parts.fvu, rel=1e-6)
    assert torch.equal(densities, same) and whole.l0 == 2


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(ValueError, match="no tokens"):
        evaluate_reconstruction(Plain(1), [])
    with pytest.raises(ValueError, match="no variance"):
        evaluate_reconstruction(Plain(1), [torch.zeros(5, 6)])
    with pytest.raises(ValueError, match="NaN or an infinity"):
        evaluate_reconstruction(Plain(1), [torch.full((5, 6), torch.nan)])


def test_decoder_summary_count_live_latents_only():
    W_dec = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0.8, 0.6]])
    everyone = decoder_summary(W_dec)
    assert everyone.share_above_09 == pytest.approx(0.5)
    assert everyone.share_above_07 == pytest.approx(0.75)
    assert everyone.average_max_decoder_cosine_sim == pytest.approx((1 + 1 + 0.6 + 0.8) / 4)
    live = decoder_summary(W_dec, torch.tensor([True, False, True, True]))
    assert live.share_above_09 == 0 and live.n_latents == 3
    assert live.average_max_decoder_cosine_sim == pytest.approx((0.8 + 0.6 + 0.8) / 3)
    with pytest.raises(ValueError, match="1 latents are live"):
        decoder_summary(W_dec, torch.tensor([True, False, False, False]))


def test_paired_interval_is_students_t():
    interval = paired_interval([3.0, 5.0, 4.0], [2.0, 3.0, 1.0])
    assert interval.mean == pytest.approx(2)
    half = 4.302653 * 1.0 / 3**0.5  # t(0.975, 2 degrees of freedom) · sd / √n
    assert interval.low == pytest.approx(2 - half) and interval.high == pytest.approx(2 + half)
    halved = paired_interval([1.0, 1.0], [4.0, 4.0], scale=0.5)
    assert halved == (-1, -1, -1)
    assert mean_interval([1.0, 3.0]).mean == 2
    for arm, baseline in [([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([1.0, float("nan")], [1.0, 2.0])]:
        with pytest.raises(ValueError, match="pairs"):
            paired_interval(arm, baseline)
