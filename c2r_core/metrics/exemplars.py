"""An untrained dictionary: what a number of latents scores without having learnt anything."""

from __future__ import annotations

import torch
from torch import Tensor

from c2r_core.errors import NotEvaluable


class ExemplarDictionary:
    """An untrained dictionary: each decoder row is the direction of a sample, seen from the mean.

    A latent's activation is its row's product with x − mean, where that is positive and above one common
    threshold, such that on the `activations` given, (n, d_in), a sample has `l0` active latents in the mean:
    what `n_latents` score without having learnt anything. The seed draws the samples that become rows.

    Raises NotEvaluable if there are fewer samples than latents, or no latent is asked for.
    """

    def __init__(self, activations: Tensor, n_latents: int, l0: float, *, seed: int = 0) -> None:
        if not 1 <= n_latents <= len(activations):
            raise NotEvaluable(
                f"{n_latents} latents were asked for and there are {len(activations)} samples; each "
                "latent is a sample of its own"
            )
        x = activations.float()
        self.mean = x.mean(0)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(x), generator=generator)[:n_latents].to(x.device)
        self.W_dec = torch.nn.functional.normalize(x[chosen] - self.mean, dim=1)
        # A few thousand samples place the threshold well, and keep the sort small.
        acts = self._products(x[:: max(1, len(x) // 2000)])
        active = min(acts.numel(), max(1, round(l0 * len(acts))))
        lowest = float(acts.flatten().topk(active).values[-1])
        # A little below it, so that samples which are equal are all active or none.
        self.threshold = max(1e-6, lowest * (1 - 1e-5))

    def _products(self, x: Tensor) -> Tensor:
        return (x.float() - self.mean) @ self.W_dec.T

    def encode(self, x: Tensor) -> Tensor:
        acts = self._products(x)
        return acts * (acts >= self.threshold)

    def decode(self, feature_acts: Tensor) -> Tensor:
        return feature_acts @ self.W_dec + self.mean
