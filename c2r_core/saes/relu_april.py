"""ReLU SAE whose L1 penalty is weighted by the decoder norms ("April update", Conerly et al.,
Transformer Circuits Thread, 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from c2r_core.saes.base import SAE, TrainingLosses, reconstruction_loss, register


@register
class ReLUAprilSAE(SAE):
    """f = relu((x − b_dec) W_enc + b_enc), trained with ‖x − x̂‖² + l1_weight · Σ_i f_i ‖w_i‖.

    Decoder rows are free: the penalty charges what a latent writes, so nothing is gained by a small
    f with a large w. They start at norm 1, within the range (0.05 to 1) that the update names. Its
    warm-up of the weight over the first 5 % of the steps is left out.

    Parameters
    ----------
    d_in, d_sae, seed
        As in `SAE`.
    l1_weight : float
        Weight of the penalty, >= 0; its scale is that of x.
    """

    architecture = "relu_april"
    hyper_parameters = ("l1_weight",)
    unit_norm_decoder = False
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
        row_norms = torch.linalg.vector_norm(self.W_dec, dim=-1)
        written = (feature_acts * row_norms.unsqueeze(-2)).sum(-1)
        return TrainingLosses(
            reconstruction=reconstruction,
            sparsity=self.l1_weight * written.mean(-1),
            aux_k=torch.zeros_like(reconstruction),
            feature_acts=feature_acts,
        )
