"""p-annealing: a ReLU SAE whose penalty moves from L1 towards L0 (Karvonen et al., arXiv 2408.00113)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from c2r_core.saes.base import SAE, TrainingLosses, reconstruction_loss, register


@register
class PAnnealSAE(SAE):
    """f = relu((x − b_dec) W_enc + b_enc), trained with ‖x − x̂‖² + weight(p) · Σ f^p.

    p is 1 until the share `anneal_start` of the training and then falls linearly to `p_end`. As p falls,
    Σ f^p of small activations grows, so the paper lowers the weight at each change of p by the ratio of
    the two sums over recent batches. Here the whole product of these ratios is taken from the batch at
    hand: weight(p) = l1_weight · Σ f / Σ f^p, held constant in the gradient. Both agree where the
    distribution of activations stays the same; ours needs no memory. The penalty's value is therefore
    that of L1 at every p, and what annealing changes is its gradient, which p < 1 takes from strong
    activations and puts on weak ones. A silent latent gets gradient 0.

    Parameters
    ----------
    d_in, d_sae, seed
        As in `SAE`.
    l1_weight : float
        Weight of the penalty while p = 1, >= 0; its scale is that of x.
    p_end : float
        Exponent at the end of the training, above 0, at most 1; 0.2 in the paper.
    anneal_start : float
        Share of the training after which p begins to fall, 0 to below 1.
    """

    architecture = "p_anneal"
    hyper_parameters = ("l1_weight", "p_end", "anneal_start")
    resamples = True

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        l1_weight: float,
        p_end: float = 0.2,
        anneal_start: float = 0.1,
        *,
        seed: int | Sequence[int] = 0,
    ) -> None:
        super().__init__(d_in, d_sae, seed=seed)
        if not l1_weight >= 0:
            raise ValueError(f"l1_weight is {l1_weight}; expected a number >= 0.")
        if not 0 < p_end <= 1:
            raise ValueError(f"p_end is {p_end}; expected an exponent above 0, at most 1.")
        if not 0 <= anneal_start < 1:
            raise ValueError(f"anneal_start is {anneal_start}; expected a share from 0 to below 1.")
        self.l1_weight, self.p_end, self.anneal_start = l1_weight, p_end, anneal_start

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations (..., batch, d_sae) of x (..., batch, d_in)."""
        return self.pre_acts(x).relu()

    def p_at(self, progress: float) -> float:
        """Exponent of the penalty after this share of the training."""
        annealed = max(0.0, progress - self.anneal_start) / (1 - self.anneal_start)
        return 1 + (self.p_end - 1) * annealed

    def training_losses(
        self,
        x: Tensor,
        *,
        progress: float = 1.0,
        dead: Tensor | None = None,
        precision: torch.dtype | None = None,
    ) -> TrainingLosses:
        """As in `SAE`; has no auxiliary loss, so `dead` changes nothing."""
        feature_acts = self.pre_acts(x, precision).relu().to(x.dtype)
        reconstruction = reconstruction_loss(x, self.decode(feature_acts))
        l1 = feature_acts.sum(-1).mean(-1)
        lp = _sum_of_powers(feature_acts, self.p_at(progress)).mean(-1)
        rescaling = (l1 / lp.clamp(min=torch.finfo(lp.dtype).tiny)).detach()
        return TrainingLosses(
            reconstruction=reconstruction,
            sparsity=self.l1_weight * rescaling * lp,
            aux_k=torch.zeros_like(reconstruction),
            feature_acts=feature_acts,
        )


def _sum_of_powers(feature_acts: Tensor, p: float) -> Tensor:
    """Σ f^p over the latents; gradient 0 at f = 0, where that of a p < 1 is infinite."""
    active = feature_acts > 0
    return torch.where(active, torch.where(active, feature_acts, 1.0) ** p, 0.0).sum(-1)
