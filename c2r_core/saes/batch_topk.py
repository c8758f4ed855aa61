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
        return largest_entries(pre_acts.flatten(-2), n_kept)

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


def largest_entries(values: Tensor, n: int, group: int = 16) -> Tensor:
    """Indices of the n largest entries along the last dimension, in any order; exact.

    A top-n entry lies in one of the n groups with the largest maxima: for each better group there
    is a better entry. So only those groups are searched, several times as fast on a CPU when n is a
    small part of the entries.
    """
    length = values.shape[-1]
    if length % group or length // group <= n:
        return values.topk(n, dim=-1, sorted=False).indices
    groups = values.unflatten(-1, (-1, group))
    best_groups = groups.amax(-1).topk(n, dim=-1, sorted=False).indices
    entries = best_groups.unsqueeze(-1) * group + torch.arange(group, device=values.device)
    entries = entries.flatten(-2)
    best = values.gather(-1, entries).topk(n, dim=-1, sorted=False).indices
    return entries.gather(-1, best)
