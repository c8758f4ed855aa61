"""BatchTopK SAE: the batch · k largest activations of a batch (Bussmann et al., arXiv 2412.06410)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from c2r_core.saes.base import TrainingLosses, register
from c2r_core.saes.k_sparse import KSparseSAE


@register
class BatchTopKSAE(KSparseSAE):
    """Keeps the batch · k largest activations of the whole batch, so k per sample on average.

    At inference a sample must not depend on its batch: there an activation is kept if it is above
    `threshold`, a running mean of the smallest activation kept in training.

    Parameters
    ----------
    d_in, d_sae, seed
        As in `SAE`.
    k : int
        Activations kept per sample on average, 1 to d_sae.
    """

    architecture = "batch_topk"

    def __init__(self, d_in: int, d_sae: int, k: int, *, seed: int | Sequence[int] = 0) -> None:
        super().__init__(d_in, d_sae, k, seed=seed)
        self.register_buffer("threshold", torch.zeros(self.W_dec.shape[:-2]))

    def keep(self, pre_acts: Tensor, k: int) -> Tensor:
        """Flat indices of the batch · k largest entries of the batch."""
        n_kept = pre_acts.shape[-2] * k
        return pre_acts.flatten(-2).topk(n_kept, dim=-1, sorted=False).indices

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations (..., batch, d_sae) of x (..., batch, d_in)."""
        feature_acts = self.pre_acts(x).relu()
        return feature_acts * (feature_acts > self.threshold[..., None, None])

    @torch.no_grad()
    def update_statistics(self, losses: TrainingLosses, ema_decay: float) -> None:
        """Move the threshold towards the smallest activation that this step kept."""
        smallest = losses.min_active
        smallest = torch.where(torch.isfinite(smallest), smallest, self.threshold)
        decay = torch.where(self.threshold > 0, ema_decay, 0.0)
        self.threshold.copy_(decay * self.threshold + (1 - decay) * smallest)

    def fold_scale(self, factor: float) -> None:
        """As in `SAE`; the threshold has the units of the activations."""
        super().fold_scale(factor)
        self.threshold /= factor
