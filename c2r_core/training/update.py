"""Pieces of the recipe, each for a single SAE (…) or a stack (n_stacked, …)."""

from __future__ import annotations

from collections.abc import Sequence

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
def without_parallel(gradient: Tensor, W_dec: Tensor) -> Tensor:
    """The gradient of decoder rows without the part along each row, which renormalising undoes."""
    along = torch.linalg.vecdot(gradient, W_dec).unsqueeze(-1)
    return torch.addcmul(gradient, along, W_dec, value=-1)


Gradients = Sequence[Tensor | None]
"""One for each parameter, None for one that has none; all of a single SAE, or of a stack."""


@torch.no_grad()
def clip_factors(gradients: Gradients, max_norm: float, *, stacked: bool) -> Tensor:
    """By what to multiply the gradients of each SAE so that their common norm is at most max_norm.

    Shape (), or (n_stacked,).
    """
    keep = 1 if stacked else 0
    norms = [
        torch.linalg.vector_norm(g, dim=tuple(range(keep, g.ndim)))
        for g in gradients
        if g is not None
    ]
    norm = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    return (max_norm / norm.clamp(min=1e-12)).clamp(max=1.0)


def add_gradients(some: Gradients, others: Gradients) -> list[Tensor | None]:
    """Their sums; changes neither."""
    pairs = zip(some, others, strict=True)
    return [b if a is None else a if b is None else a + b for a, b in pairs]


def in_memory_order(parameter: Tensor, tensor: Tensor | None = None) -> Tensor:
    """A parameter's memory, without gradient, as a tensor that is walked row by row.

    That of W_enc has a row for each latent, as W_dec has. Fused Adam takes such a tensor as it is, and
    would copy any other, at every step. `tensor`, of the parameter's shape, is turned as the parameter
    is; and turned back, given in that order.
    """
    tensor = parameter if tensor is None else tensor
    is_turned = parameter.ndim > 1 and not parameter.is_contiguous()
    return tensor.detach().mT if is_turned else tensor.detach()


def set_gradients(
    parameters: Sequence[Tensor], memory: Sequence[Tensor], gradients: Gradients, factors: Tensor
) -> None:
    """Give each parameter, and its memory, its gradient times the factor of its SAE.

    factors has the shape () or (n_stacked,). What a gradient takes is kept from step to step.
    """
    for p, own, gradient in zip(parameters, memory, gradients, strict=True):
        if gradient is None:
            own.grad = p.grad = None
            continue
        if own.grad is None:
            own.grad = torch.empty_like(own)
            p.grad = in_memory_order(p, own.grad)
        factor = factors.reshape(factors.shape + (1,) * (own.ndim - factors.ndim))
        torch.mul(in_memory_order(p, gradient), factor, out=own.grad)


@torch.no_grad()
def normalise_rows(W_dec: Tensor) -> None:
    """Bring every decoder row back to norm 1."""
    W_dec /= torch.linalg.vector_norm(W_dec, dim=-1, keepdim=True).clamp(min=1e-12)
