"""Reconstruction, what the language model keeps, and the decoder's geometry."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from c2r_core.evaluate.report import Section
from c2r_core.metrics.decoder import neighbour_cosines
from c2r_core.metrics.inputs import Bench
from c2r_core.metrics.model_loss import compare_cross_entropy


class Reconstruction(Section):
    """How well and how sparsely held-out activations are written; dropped tokens do not count."""

    explained_variance: float
    """1 − fvu. SAEBench 0.6.0 takes the variance about zero under this name."""
    fvu: float
    """E‖x − x̂‖² / (E‖x‖² − ‖E x‖²) over all tokens."""
    cossim: float
    """Mean cosine of x and x̂."""
    l2_ratio: float
    """Mean of ‖x̂‖ / ‖x‖."""
    relative_reconstruction_bias: float | None
    """E‖x̂‖² / E[x·x̂]; null where x̂ is zero throughout."""
    l0: float
    """Mean number of active latents per token."""
    frac_alive: float
    """Share of latents that fire at all."""
    freq_over_1_percent: float
    """Share of latents that fire on over 1 % of the tokens."""
    freq_over_10_percent: float
    """Share of latents that fire on over 10 % of the tokens."""
    normalized_freq_over_1_percent: float
    """Their share of all firings; 0 if nothing fires."""
    normalized_freq_over_10_percent: float
    """Their share of all firings; 0 if nothing fires."""
    total_tokens_eval_reconstruction: int
    """Tokens measured."""


def measure_reconstruction(bench: Bench) -> Reconstruction:
    """FVU, L0, shrinkage and densities on held-out activations."""
    report = bench.reconstruction
    density = report.density
    n_firings = float(density.sum()) or 1.0
    over_1, over_10 = density > 0.01, density > 0.1
    return Reconstruction(
        explained_variance=report.explained_variance,
        fvu=report.fvu,
        cossim=report.cosine,
        l2_ratio=report.norm_ratio,
        relative_reconstruction_bias=report.relative_bias,
        l0=report.l0,
        frac_alive=report.live_share,
        freq_over_1_percent=float(over_1.double().mean()),
        freq_over_10_percent=report.dense_share,
        normalized_freq_over_1_percent=float(density[over_1].sum()) / n_firings,
        normalized_freq_over_10_percent=float(density[over_10].sum()) / n_firings,
        total_tokens_eval_reconstruction=report.n_tokens,
    )


class ModelPreservation(Section):
    """The language model's own loss with the activation replaced, in nats per predicted token.

    The first token of each context and tokens of huge norm keep their activation in every arm;
    SAEBench replaces them too. Ablation sets the activation to zero.
    """

    ce_loss_score: float | None
    """(ce_loss_with_ablation − ce_loss_with_sae) / (ce_loss_with_ablation − ce_loss_without_sae)."""
    ce_loss_with_ablation: float
    ce_loss_with_sae: float
    ce_loss_without_sae: float
    kl_div_score: float | None
    """(kl_div_with_ablation − kl_div_with_sae) / kl_div_with_ablation."""
    kl_div_with_ablation: float
    kl_div_with_sae: float
    """KL(p_model ‖ p_sae)."""
    ce_loss_score_mean_ablation: float | None
    """Ours: ce_loss_score with the mean activation as the floor."""
    ce_loss_with_mean_ablation: float
    n_predicted_tokens: int
    n_unchanged_tokens: int
    """Tokens that kept their activation."""


class _Zero:
    """Reconstructs nothing: ablation, for its KL divergence."""

    def __init__(self, W_dec: Tensor) -> None:
        self.W_dec = W_dec

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, feature_acts: Tensor) -> Tensor:
        return torch.zeros_like(feature_acts)


def measure_model_preservation(bench: Bench) -> ModelPreservation:
    """Cross-entropy and KL divergence on evenly spaced held-out contexts."""
    contexts = bench.activations.contexts
    n = min(bench.lm.cross_entropy_contexts, len(contexts))
    chosen = np.linspace(0, len(contexts) - 1, n).astype(int)
    reports = compare_cross_entropy(
        bench.language_model,
        {"sae": bench.sae, "ablation": _Zero(bench.sae.W_dec)},
        torch.from_numpy(contexts[chosen]),
        bench.lm.hook_name,
        drop_norm_ratio=bench.lm.drop_norm_ratio,
        median_norm=bench.activations.manifest.median_norm,
        precision=bench.precision,
    )
    report, kl_ablation = reports["sae"], reports["ablation"].kl
    return ModelPreservation(
        ce_loss_score=report.recovered_zero,
        ce_loss_with_ablation=report.ce_zero,
        ce_loss_with_sae=report.ce_sae,
        ce_loss_without_sae=report.ce_model,
        kl_div_score=(kl_ablation - report.kl) / kl_ablation if kl_ablation else None,
        kl_div_with_ablation=kl_ablation,
        kl_div_with_sae=report.kl,
        ce_loss_score_mean_ablation=report.recovered_mean,
        ce_loss_with_mean_ablation=report.ce_mean,
        n_predicted_tokens=report.n_tokens,
        n_unchanged_tokens=report.n_unchanged,
    )


class Decoder(Section):
    """Cosine of each decoder row with its nearest neighbour. A diagnostic, never the headline: C²R and
    OrtSAE optimise it directly."""

    average_max_decoder_cosine_sim: float
    quantiles: dict[str, float]
    share_above_07: float
    share_above_09: float
    n_latents: int
    """Latents that count."""


def measure_decoder(bench: Bench) -> Decoder:
    """Over all latents; needs neither a model nor text."""
    return _decoder(bench.sae.W_dec)


def measure_live_decoder(bench: Bench) -> Decoder:
    """Over the latents that fire on held-out tokens."""
    live = bench.reconstruction.density > 0
    return _decoder(bench.sae.W_dec[live.to(bench.sae.W_dec.device)])


def _decoder(rows: Tensor) -> Decoder:
    if not rows.isfinite().all():
        raise ValueError("A NaN or an infinity is among the decoder rows.")
    cosines = neighbour_cosines(rows.float())
    return Decoder(
        average_max_decoder_cosine_sim=cosines.mean,
        quantiles=cosines.quantiles,
        share_above_07=cosines.share_above_07,
        share_above_09=cosines.share_above_09,
        n_latents=cosines.n_live,
    )
