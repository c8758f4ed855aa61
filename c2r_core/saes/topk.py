"""TopK SAE: the k largest activations of every sample (Gao et al., arXiv 2406.04093)."""

from __future__ import annotations

import torch
from torch import Tensor

from c2r_core.saes.base import register
from c2r_core.saes.k_sparse import KSparseSAE


@register
class TopKSAE(KSparseSAE):
    """Keeps the k largest activations of each sample, in training and at inference.

    Parameters
    ----------
    d_in, d_sae, seed
        As in `SAE`.
    k : int
        Activations kept per sample, 1 to d_sae.
    """

    architecture = "topk"

    def keep(self, pre_acts: Tensor, k: int) -> Tensor:
        """Flat indices of the k largest entries of every sample."""
        batch, d_sae = pre_acts.shape[-2:]
        latents = pre_acts.topk(k, dim=-1, sorted=False).indices
        first = torch.arange(0, batch * d_sae, d_sae, device=pre_acts.device)
        return (latents + first.unsqueeze(-1)).flatten(-2)

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations (..., batch, d_sae) of x (..., batch, d_in)."""
        kept = self.pre_acts(x).topk(self.k, dim=-1, sorted=False)
        empty = kept.values.new_zeros(*kept.values.shape[:-1], self.d_sae)
        return empty.scatter(-1, kept.indices, kept.values.relu())
