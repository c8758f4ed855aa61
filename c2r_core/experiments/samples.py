"""Study `performance`: the random samples, dictionaries and activations on which it times."""

from __future__ import annotations

import torch
from torch import Tensor

from c2r_core.artefacts.profiles import PerformanceProfile


def sample_batches(sizes: PerformanceProfile, seed: int) -> list[Tensor]:
    """Four batches, (batch_size, d_in) each, of mean squared norm 1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, sizes.batch_size, sizes.d_in, generator=generator)
    return list(x / sizes.d_in**0.5)


def unit_rows(d_sae: int, d_in: int, seed: int) -> Tensor:
    """Decoder rows of norm 1, (d_sae, d_in)."""
    rows = torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=-1)


def term_inputs(d_sae: int, sizes: PerformanceProfile, seed: int) -> tuple[Tensor, Tensor]:
    """Feature activations (batch_size, d_sae), k of a sample on average, and decoder rows (d_sae, d_in)."""
    W_dec = unit_rows(d_sae, sizes.d_in, seed)
    acts = (sample_batches(sizes, seed)[0] @ W_dec.T).relu()
    least = acts.flatten().topk(sizes.batch_size * sizes.k).values[-1]
    return torch.where(acts >= least, acts, 0.0), W_dec
