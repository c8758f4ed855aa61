"""ReLU SAE whose L1 penalty is weighted by the decoder norms ("April update", Conerly et al.,
Transformer Circuits Thread, 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from c2r_core.saes.base import register
from c2r_core.saes.relu import ReLUSAE

RISING_SHARE = 0.05


@register
class ReLUAprilSAE(ReLUSAE):
    """f = relu((x − b_dec) W_enc + b_enc), trained with ‖x − x̂‖² + l1_weight · Σ_i f_i ‖w_i‖.

    Decoder rows are free: the penalty charges what a latent writes, so nothing is gained by a small
    f with a large w. They start at norm 1, within the range (0.05 to 1) that the update names. The weight
    rises linearly over the first 5 % of the training.

    Parameters
    ----------
    d_in, d_sae, seed
        As in `SAE`.
    l1_weight : float
        Weight of the penalty after its rise, >= 0; its scale is that of x.
    """

    architecture = "relu_april"
    unit_norm_decoder = False

    def l1_weight_at(self, progress: float) -> float:
        """As in `ReLUSAE`, rising from 0."""
        return self.l1_weight * min(1.0, progress / RISING_SHARE)

    def charged(self, feature_acts: Tensor) -> Tensor:
        """As in `ReLUSAE`, each activation weighted by the norm of its decoder row."""
        row_norms = torch.linalg.vector_norm(self.W_dec, dim=-1)
        return (feature_acts * row_norms.unsqueeze(-2)).sum(-1)
