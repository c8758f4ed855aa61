"""Pieces of the recipe, each for a single SAE (…) or a stack (n_stacked, …)."""

from __future__ import annotations

from collections.abc import Iterable

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
        along = torch.linalg.vecdot(W_dec.grad, W_dec).unsqueeze(-1)
        W_dec.grad.addcmul_(along, W_dec, value=-1)


@torch.no_grad()
def clip_factors(parameters: Iterable[Tensor], max_norm: float, *, stacked: bool) -> Tensor:
    """By what to multiply the gradients of each SAE so that their common norm is at most max_norm.

    Shape (), or (n_stacked,). A parameter without a gradient is left out.
    """
    keep = 1 if stacked else 0
    norms = torch.stack(
        [
            torch.linalg.vector_norm(p.grad, dim=tuple(range(keep, p.ndim)))
            for p in parameters
            if p.grad is not None
        ]
    )
    return (max_norm / torch.linalg.vector_norm(norms, dim=0).clamp(min=1e-12)).clamp(max=1.0)


@torch.no_grad()
def scale_gradients(parameters: Iterable[Tensor], factors: Tensor) -> None:
    """Multiply the gradients of each SAE by its factor, of shape () or (n_stacked,)."""
    if (factors < 1).any():
        for p in parameters:
            if p.grad is not None:
                p.grad *= factors.reshape(factors.shape + (1,) * (p.ndim - factors.ndim))


@torch.no_grad()
def normalise_rows(W_dec: Tensor) -> None:
    """Bring every decoder row back to norm 1."""
    W_dec /= torch.linalg.vector_norm(W_dec, dim=-1, keepdim=True).clamp(min=1e-12)
