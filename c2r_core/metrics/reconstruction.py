"""How well an SAE reconstructs activations, streaming in float64."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from c2r_core.saes.interface import AnySAE


@dataclass(frozen=True)
class ReconstructionReport:
    """Means over all tokens; formulas in `evaluate_reconstruction`."""

    fvu: float
    l0: float
    cosine: float
    norm_ratio: float
    relative_bias: float
    live_share: float
    dense_share: float
    n_tokens: int
    density: Tensor = field(repr=False)
    """Share of tokens in which each latent fires, float64, shape (d_sae,)."""

    @property
    def explained_variance(self) -> float:
        """1 − FVU."""
        return 1 - self.fvu


@torch.no_grad()
def evaluate_reconstruction(sae: AnySAE, chunks: Iterable[Tensor]) -> ReconstructionReport:
    """Measure an SAE on activations that come in chunks.

    - fvu = E‖x − x̂‖² / (E‖x‖² − ‖E x‖²), variance about the mean over all tokens;
    - l0 = mean count of f ≠ 0; live: fires at least once; dense: fires on over 10 % of tokens;
    - cosine of x and x̂; norm_ratio = mean ‖x̂‖/‖x‖; relative_bias = E‖x̂‖² / E[x·x̂].

    Parameters
    ----------
    sae : any object with encode, decode and W_dec
        Takes the chunks as they are: fold the normalising factor in first for raw activations.
    chunks : iterable of Tensor, each (n, d_in)

    Raises
    ------
    ValueError
        If there are no tokens, if all activations are equal (nothing can be explained), or if
        something is not finite.
    """
    device = sae.W_dec.device
    n, fires = 0, torch.zeros(sae.W_dec.shape[0], dtype=torch.float64, device=device)
    sums = dict.fromkeys(("error", "square", "x_hat", "product", "cosine", "ratio"), 0.0)
    total = torch.zeros(sae.W_dec.shape[1], dtype=torch.float64, device=device)
    for chunk in chunks:
        x = chunk.to(device)
        feature_acts = sae.encode(x)
        x_hat = sae.decode(feature_acts).double()
        fires += (feature_acts != 0).sum(0)
        x = x.double()
        squares, hat_squares = x.square().sum(-1), x_hat.square().sum(-1)
        products = (x * x_hat).sum(-1)
        norms, hat_norms = squares.sqrt().clamp(min=1e-12), hat_squares.sqrt()
        n += len(x)
        total += x.sum(0)
        sums["error"] += float((x - x_hat).square().sum())
        sums["square"] += float(squares.sum())
        sums["x_hat"] += float(hat_squares.sum())
        sums["product"] += float(products.sum())
        sums["cosine"] += float((products / (norms * hat_norms.clamp(min=1e-12))).sum())
        sums["ratio"] += float((hat_norms / norms).sum())
    if n == 0:
        raise ValueError("There are no tokens to evaluate on; expected at least one chunk.")
    variance = sums["square"] / n - float((total / n).square().sum())
    if not math.isfinite(variance + sums["error"]):
        raise ValueError("A NaN or an infinity is among the activations or their reconstructions.")
    if variance <= 0:
        raise ValueError(f"All {n} activations are equal, so there is no variance to explain.")
    density = fires / n
    return ReconstructionReport(
        fvu=sums["error"] / n / variance,
        l0=float(fires.sum()) / n,
        cosine=sums["cosine"] / n,
        norm_ratio=sums["ratio"] / n,
        relative_bias=sums["x_hat"] / sums["product"] if sums["product"] else float("nan"),
        live_share=float((fires > 0).double().mean()),
        dense_share=float((density > 0.1).double().mean()),
        n_tokens=n,
        density=density.cpu(),
    )
