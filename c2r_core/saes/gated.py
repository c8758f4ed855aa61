"""Gated SAE: which latents fire, and how strongly, are estimated apart
(Rajamanoharan et al., arXiv 2404.16014)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from c2r_core.saes.base import SAE, StepInput, TrainingLosses, reconstruction_loss
from c2r_core.saes.files import register


@register
class GatedSAE(SAE):
    """f = 1[g > 0] · relu(m), with the gate g and the magnitude m two affine maps of one projection.

        g = (x − b_dec) W_enc + b_enc
        m = exp(r_mag) · (x − b_dec) W_enc + b_mag

    Trained with ‖x − x̂(f)‖² + l1_weight · Σ relu(g) + ‖x − x̂_frozen(relu(g))‖². The last term keeps
    the gate honest, since the first gives it no gradient; the decoder of that term (W_dec and b_dec) is
    held constant. L1 thus shrinks the gate and leaves the magnitudes f alone; the
    weight is several times that of a `ReLUSAE` of equal L0. Regularisers act on f.

    Parameters
    ----------
    d_in, d_sae, seed
        As in `SAE`.
    l1_weight : float
        Weight of the L1 norm of the gate's positive part, >= 0; its scale is that of x.

    Attributes
    ----------
    b_enc : (..., d_sae), bias of the gate; b_mag : (..., d_sae); r_mag : (..., d_sae)
    """

    architecture = "gated"
    hyper_parameters = ("l1_weight",)

    def __init__(
        self, d_in: int, d_sae: int, l1_weight: float, *, seed: int | Sequence[int] = 0
    ) -> None:
        super().__init__(d_in, d_sae, seed=seed)
        if not l1_weight >= 0:
            raise ValueError(f"l1_weight is {l1_weight}; expected a number >= 0.")
        self.l1_weight = l1_weight
        self.b_mag = nn.Parameter(torch.zeros_like(self.b_enc))
        self.r_mag = nn.Parameter(torch.zeros_like(self.b_enc))

    def activate(self, pre_acts: Tensor) -> Tensor:
        """As in `SAE`; pre_acts are the gates g."""
        projection = pre_acts - self.b_enc.unsqueeze(-2)
        magnitude = self.r_mag.exp().unsqueeze(-2) * projection + self.b_mag.unsqueeze(-2)
        return magnitude.relu() * (pre_acts > 0)

    def training_losses(self, step: StepInput) -> TrainingLosses:
        """As in `SAE`, with the error of the gate's own reconstruction."""
        gate = self.pre_acts(step.x, step.precision).to(step.x.dtype)
        feature_acts = self.activate(gate)
        reconstruction = reconstruction_loss(step.x, self.decode(feature_acts))
        gate_acts = gate.relu()
        by_gate = gate_acts @ self.W_dec.detach() + self.b_dec.detach().unsqueeze(-2)
        return TrainingLosses(
            reconstruction=reconstruction,
            sparsity=self.l1_weight * gate_acts.sum(-1).mean(-1),
            aux_k=torch.zeros_like(reconstruction),
            feature_acts=feature_acts,
            gate_reconstruction=reconstruction_loss(step.x, by_gate),
        )

    def fold_scale(self, factor: float) -> None:
        """As in `SAE`; the magnitudes' bias has the units of x, their scale r_mag has none."""
        super().fold_scale(factor)
        with torch.no_grad():
            self.b_mag /= factor
