"""Dead latents of a ReLU SAE drawn anew from badly reconstructed samples (Bricken et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from c2r_core.saes.base import SAE

# The encoder of a new latent is this much shorter than those of the live ones are on average.
ENCODER_SHARE = 0.2


@torch.no_grad()
def resample_dead(sae: SAE, dead: Tensor, x: Tensor, moments: Sequence[Tensor], seed: int) -> None:
    """Point each dead latent at a sample, drawn with a probability in proportion to its squared loss.

    Its decoder row and encoder column take the sample's direction (from b_dec), the row at the mean norm
    of live rows, the column at 0.2 of that of live columns; its bias and its moments in Adam become
    0. The published recipe draws from 819 200 samples, this one from the batch at hand.

    Parameters
    ----------
    sae : SAE
        Changed in place.
    dead : Tensor of bool, shape (..., d_sae)
    x : Tensor, shape (..., batch, d_in)
    moments : sequence of Tensor
        What Adam remembers of the latents, (..., d_sae) or (..., d_sae, d_in); changed in place.
    seed : int
        Of the draw; each SAE of a stack draws as it would alone.
    """
    errors = (x - sae(x)).square().sum(-1)
    copies = range(sae.n_stacked) if sae.n_stacked is not None else [...]
    for i in copies:
        own, chances = dead[i], errors[i].double().square().cpu()
        if not own.any() or not chances.sum() > 0:
            continue
        generator = Generator().manual_seed(seed)
        drawn = torch.multinomial(chances, int(own.sum()), replacement=True, generator=generator)
        directions = x[i][drawn.to(x.device)] - sae.b_dec[i]
        directions = torch.nn.functional.normalize(directions, dim=-1)
        live = own if own.all() else ~own
        rows, columns = sae.W_dec[i], sae.W_enc[i].mT  # both (d_sae, d_in)
        rows[own] = directions * rows[live].norm(dim=-1).mean()
        columns[own] = directions * ENCODER_SHARE * columns[live].norm(dim=-1).mean()
        sae.b_enc[i][own] = 0
        for moment in moments:
            moment[i][own] = 0
