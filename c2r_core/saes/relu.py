"""ReLU SAE with an L1 penalty and decoder rows of norm 1 (Bricken et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from c2r_core.saes.base import SAE, TrainingLosses, reconstruction_loss, register


@register
class ReLUSAE(SAE):
    """f = relu((x − b_dec) W_enc + b_enc), trained with ‖x − x̂‖² + l1_weight · Σ f.

    Parameters
    ----------
    d_in, d_sae, seed
        As in `SAE`.
    l1_weight : float
        Weight of the L1 norm of the activations, >= 0; its scale is that of x.
    """

    architecture = "relu"
    hyper_parameters = ("l1_weight",)
    resamples = True

    def __init__(
        self, d_in: int, d_sae: int, l1_weight: float, *, seed: int | Sequence[int] = 0
    ) -> None:
        super().__init__(d_in, d_sae, seed=seed)
        if not l1_weight >= 0:
            raise ValueError(f"l1_weight is {l1_weight}; expected a number >= 0.")
        self.l1_weight = l1_weight

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations (..., batch, d_sae) of x (..., batch, d_in)."""
        return self.pre_acts(x).relu()

    def training_losses(
        self,
        x: Tensor,
        *,
        progress: float = 1.0,
        dead: Tensor | None = None,
        precision: torch.dtype | None = None,
    ) -> TrainingLosses:
        """As in `SAE`; has no auxiliary loss, so `dead` changes nothing."""
        feature_acts = self.pre_acts(x, precision).relu().to(x.dtype)
        reconstruction = reconstruction_loss(x, self.decode(feature_acts))
        return TrainingLosses(
            reconstruction=reconstruction,
            sparsity=self.l1_weight_at(progress) * self.charged(feature_acts).mean(-1),
            aux_k=torch.zeros_like(reconstruction),
            feature_acts=feature_acts,
        )

    def l1_weight_at(self, progress: float) -> float:
        """Weight of the penalty after this share of the training."""
        return self.l1_weight

    def charged(self, feature_acts: Tensor) -> Tensor:
        """What the penalty charges each sample for: (..., batch, d_sae) -> (..., batch)."""
        return feature_acts.sum(-1)
