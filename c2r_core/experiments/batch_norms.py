"""How a latent's norm over a batch grows with the batch, and with it a penalty on such norms.

For a latent that fires with probability p in a sample, n_i = ‖f_{:,i}‖ over a batch of B samples is
a root of a sum of about B p squares. Where B p is large its mean is f √(B p), f being the root mean
square of the activations that are not 0: slope ½ in log B. Where B p is small a batch holds one
firing or none, so that the mean is f B p: slope 1. Both are upper bounds wherever a latent's
activations are alike: √N ≤ N for a whole number N, and E √N ≤ √(E N).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from c2r_core.losses import nearest_neighbours
from c2r_core.saes.interface import AnySAE


class FiringBlocks(NamedTuple):
    """Squared activations summed over blocks of samples, (n_blocks, d_sae), and firing rates (d_sae,).

    Both float64; a block has `size` samples.
    """

    energies: Tensor
    rates: Tensor
    size: int

    @property
    def magnitudes(self) -> Tensor:
        """Root mean square of each latent's activations that are not 0; NaN where none is."""
        n_samples = len(self.energies) * self.size
        return (self.energies.sum(0) / (self.rates * n_samples)).sqrt()


@torch.no_grad()
def firing_blocks(sae: AnySAE, chunks: Iterable[Tensor], size: int) -> FiringBlocks:
    """Encode samples and sum each latent's squared activations over blocks of `size` samples.

    Chunks are (n, d_in), in random order, so that a block is a random batch: the smallest of interest. A
    ValueError says if there are none, or if an n is no multiple of `size`.
    """
    energies, fires, n = [], 0, 0
    for chunk in chunks:
        if not len(chunk) or len(chunk) % size:
            raise ValueError(f"A chunk has {len(chunk)} samples; expected a multiple of {size}.")
        acts = sae.encode(chunk.to(sae.W_dec.device))
        fires = fires + (acts != 0).sum(0)
        energies.append(acts.double().square().unflatten(0, (-1, size)).sum(1).cpu())
        n += len(chunk)
    if not n:
        raise ValueError("There are no samples; expected at least one chunk.")
    return FiringBlocks(torch.cat(energies), fires.cpu().double() / n, size)


def mean_batch_norms(blocks: FiringBlocks, batch_sizes: Sequence[int]) -> Tensor:
    """Mean of each latent's norm over a batch joined from neighbouring blocks: float64, (n_sizes, d_sae).

    Batch sizes are multiples of `blocks.size`, at most as many samples as there are, else it is a ValueError.
    What is left over after the last whole batch is not used.
    """
    n_blocks = len(blocks.energies)
    norms = []
    for batch_size in batch_sizes:
        joined, rest = divmod(batch_size, blocks.size)
        if rest or not 1 <= joined <= n_blocks:
            raise ValueError(
                f"Batch size is {batch_size}; expected a multiple of {blocks.size} up to "
                f"{n_blocks * blocks.size}."
            )
        whole = blocks.energies[: n_blocks // joined * joined]
        norms.append(whole.unflatten(0, (-1, joined)).sum(1).sqrt().mean(0))
    return torch.stack(norms)


def log_slopes(batch_sizes: Sequence[int], norms: Tensor) -> Tensor:
    """Least-squares slope of log norm on log batch size, (d_sae,); NaN for a latent that is silent.

    Norms are (n_sizes, d_sae), from `mean_batch_norms`, of at least two sizes.
    """
    x = torch.tensor(batch_sizes, dtype=torch.float64).log()
    x = x - x.mean()
    slopes = (x.unsqueeze(1) * norms.double().log()).sum(0) / x.square().sum()
    return torch.where((norms > 0).all(0), slopes, float("nan"))


def rate_groups(rates: Tensor, n_groups: int, at_least: float = 0.0) -> list[Tensor]:
    """Indices of the latents that fire, in equally large groups from the rarest to the most frequent.

    Rates, (d_sae,), are shares of samples in which a latent fires. Latents with a rate below `at_least` are
    left out, as are silent ones: with few firings a rate is hardly known. A ValueError says if fewer latents
    than groups are left.
    """
    order = torch.argsort(rates, stable=True)
    order = order[(rates[order] > 0) & (rates[order] >= at_least)]
    if len(order) < n_groups:
        raise ValueError(f"{len(order)} latents fire often enough; expected at least {n_groups}.")
    return [torch.from_numpy(part) for part in np.array_split(order.numpy(), n_groups)]


@torch.no_grad()
def neighbour_similarities(W_dec: Tensor, live: Tensor) -> Tensor:
    """s_i, the squared positive cosine with the nearest live neighbour; NaN where a latent is not live.

    W_dec is (d_sae, d_in), `live` (d_sae,) of bool.
    """
    cosine = nearest_neighbours(W_dec[live].double()).cosine.cpu()
    similarities = torch.full((len(W_dec),), float("nan"), dtype=torch.float64)
    similarities[live.cpu()] = cosine.clamp(min=0).square()
    return similarities
