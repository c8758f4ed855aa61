"""Pieces of the recipe, each for a single SAE (…) or a stack (n_stacked, …)."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def geometric_median(x: Tensor, iterations: int = 20) -> Tensor:
    """Point of least summed distance to the samples, by Weiszfeld's iteration.

    x (..., batch, d_in) -> (..., d_in).
    """
    median = x.mean(-2)
    for _ in range(iterations):
        distances = torch.linalg.vector_norm(x - median.unsqueeze(-2), dim=-1, keepdim=True)
        weights = 1 / distances.clamp(min=1e-6)
        median = (x * weights).sum(-2) / weights.sum(-2)
    return median


@torch.no_grad()
def remove_parallel_gradient(W_dec: Tensor) -> None:
    """Take from each decoder row's gradient the part along the row, which renormalising undoes."""
    if W_dec.grad is not None:
        along = (W_dec.grad * W_dec).sum(-1, keepdim=True)
        W_dec.grad -= along * W_dec


@torch.no_grad()
def clip_gradients(parameters: list[Tensor], max_norm: float, *, stacked: bool) -> Tensor:
    """Scale the gradients of each SAE so that their common norm is at most max_norm.

    Returns that norm before, one number for each SAE of a stack. A parameter without a gradient is left out.
    """
    keep = 1 if stacked else 0
    used = [p for p in parameters if p.grad is not None]
    norms = sum(p.grad.square().sum(dim=tuple(range(keep, p.ndim))) for p in used).sqrt()
    factors = (max_norm / norms.clamp(min=1e-12)).clamp(max=1.0)
    for p in used:
        p.grad *= factors.reshape(factors.shape + (1,) * (p.ndim - keep))
    return norms


@torch.no_grad()
def normalise_rows(W_dec: Tensor) -> None:
    """Bring every decoder row back to norm 1."""
    W_dec /= torch.linalg.vector_norm(W_dec, dim=-1, keepdim=True).clamp(min=1e-12)
