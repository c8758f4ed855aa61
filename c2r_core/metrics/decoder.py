"""What decoder rows tell by themselves. C²R and OrtSAE optimise this directly: a diagnostic, never
the headline."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from c2r_core.errors import NotEvaluable
from c2r_core.losses import nearest_neighbours
from c2r_core.metrics import metric
from c2r_core.metrics.inputs import Inputs
from c2r_core.metrics.reconstruction import streamed


@dataclass(frozen=True)
class Decoder:
    """Cosine of each decoder row with its nearest neighbour. A diagnostic, never the headline: C²R and
    OrtSAE optimise it directly."""

    average_max_decoder_cosine_sim: float
    quantiles: dict[str, float]
    share_above_07: float
    share_above_09: float
    n_latents: int
    """Latents that count, both as latent and as neighbour."""


@metric(
    "decoder",
    group="core",
    headline={"average_max_decoder_cosine_sim": "none"},
    reads_model=False,
)
def measure_decoder(inputs: Inputs) -> Decoder:
    """Over all latents; needs neither a model nor text."""
    return decoder_summary(inputs.sae.W_dec)


@metric("live_decoder", group="core", headline={"average_max_decoder_cosine_sim": "none"})
def measure_live_decoder(inputs: Inputs) -> Decoder:
    """Over the latents that fire on held-out tokens."""
    _, density = streamed(inputs)
    return decoder_summary(inputs.sae.W_dec, density > 0)


def decoder_summary(W_dec: Tensor, live: Tensor | None = None) -> Decoder:
    """Summary of nearest-neighbour cosines over live latents.

    Parameters
    ----------
    W_dec : Tensor, shape (d_sae, d_in)
    live : Tensor of bool, shape (d_sae,), optional
        Latents that count; None takes all.

    Raises NotEvaluable if fewer than two latents are live, or a row is not finite.
    """
    rows = (W_dec if live is None else W_dec[live.to(W_dec.device)]).detach().float()
    if not rows.isfinite().all():
        raise NotEvaluable("A NaN or an infinity is among the decoder rows.")
    if len(rows) < 2:
        raise NotEvaluable(f"{len(rows)} latents are live; a nearest neighbour needs at least 2.")
    cosines = nearest_neighbours(rows).cosine.double().cpu().numpy()
    levels = (0.05, 0.25, 0.5, 0.75, 0.95)
    return Decoder(
        average_max_decoder_cosine_sim=float(cosines.mean()),
        quantiles={f"{q:g}": float(np.quantile(cosines, q)) for q in levels},
        share_above_07=float((cosines > 0.7).mean()),
        share_above_09=float((cosines > 0.9).mean()),
        n_latents=len(rows),
    )
