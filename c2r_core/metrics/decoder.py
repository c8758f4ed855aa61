"""What decoder rows tell by themselves. C²R and OrtSAE optimise this directly: a diagnostic, never
the headline."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from c2r_core.losses import nearest_neighbours


@dataclass(frozen=True)
class NeighbourCosines:
    """Cosine of each live latent's decoder row with its nearest live neighbour."""

    mean: float
    quantiles: dict[str, float]
    share_above_07: float
    share_above_09: float
    n_live: int


def neighbour_cosines(W_dec: Tensor, live: Tensor | None = None) -> NeighbourCosines:
    """Summary of nearest-neighbour cosines over live latents.

    Parameters
    ----------
    W_dec : Tensor, shape (d_sae, d_in)
    live : Tensor of bool, shape (d_sae,), optional
        Latents that count, both as latent and as neighbour; None takes all.

    Raises
    ------
    ValueError
        If fewer than two latents are live.
    """
    rows = W_dec if live is None else W_dec[live]
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} latents are live; a nearest neighbour needs at least 2.")
    cosines = nearest_neighbours(rows).cosine.double().cpu().numpy()
    levels = (0.05, 0.25, 0.5, 0.75, 0.95)
    return NeighbourCosines(
        mean=float(cosines.mean()),
        quantiles={f"{q:g}": float(np.quantile(cosines, q)) for q in levels},
        share_above_07=float((cosines > 0.7).mean()),
        share_above_09=float((cosines > 0.9).mean()),
        n_live=len(rows),
    )
