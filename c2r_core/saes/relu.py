"""ReLU SAEs with an L1 penalty, and two that change the penalty alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from c2r_core.losses.c2r import power
from c2r_core.saes.base import SAE, StepInput
from c2r_core.saes.files import register

RISING_SHARE = 0.05


@register
class ReLUSAE(SAE):
    """f = relu((x − b_dec) W_enc + b_enc), trained with ‖x − x̂‖² + l1_weight · Σ f.

    Decoder rows have norm 1 (Bricken et al., 2023).

    Parameters
    ----------
    d_in, d_sae, seed
        As in `SAE`.
    l1_weight : float
        Weight of the L1 norm of the activations, >= 0; its scale is that of x.
    """

    architecture = "relu"
    hyper_parameters = ("l1_weight",)
    resamples = True

    def __init__(
        self, d_in: int, d_sae: int, l1_weight: float, *, seed: int | Sequence[int] = 0
    ) -> None:
        super().__init__(d_in, d_sae, seed=seed)
        if not l1_weight >= 0:
            raise ValueError(f"l1_weight is {l1_weight}; expected a number >= 0.")
        self.l1_weight = l1_weight

    def activate(self, pre_acts: Tensor) -> Tensor:
        """As in `SAE`."""
        return pre_acts.relu()

    def sparsity(self, feature_acts: Tensor, step: StepInput) -> Tensor:
        """As in `SAE`."""
        return self.l1_weight * feature_acts.sum(-1).mean(-1)


@register
class ReLUAprilSAE(ReLUSAE):
    """`ReLUSAE` whose L1 is weighted by the decoder norms: ‖x − x̂‖² + l1_weight · Σ_i f_i ‖w_i‖.

    Decoder rows are free: the penalty charges what a latent writes, so nothing is gained by a small f
    with a large w. They start at norm 1, within the range (0.05 to 1) that the "April update" names
    (Conerly et al., Transformer Circuits Thread, 2024). The weight rises linearly over the first 5 % of
    the training. Parameters are those of `ReLUSAE`.
    """

    architecture = "relu_april"
    unit_norm_decoder = False

    def sparsity(self, feature_acts: Tensor, step: StepInput) -> Tensor:
        """As in `SAE`."""
        row_norms = torch.linalg.vector_norm(self.W_dec, dim=-1)
        weight = self.l1_weight * min(1.0, step.progress / RISING_SHARE)
        return weight * (feature_acts * row_norms.unsqueeze(-2)).sum(-1).mean(-1)


@register
class PAnnealSAE(ReLUSAE):
    """`ReLUSAE` whose penalty moves from L1 towards L0: ‖x − x̂‖² + weight(p) · Σ f^p.

    p is 1 until the share `anneal_start` of the training and then falls linearly to `p_end` (Karvonen et
    al., arXiv 2408.00113). As p falls, Σ f^p of small activations grows, so the paper lowers the weight at
    each change of p by the ratio of the two sums over recent batches. Here the whole product of these ratios
    is taken from the batch at hand: weight(p) = l1_weight · Σ f / Σ f^p, held constant in the gradient.
    Both agree where the distribution of activations stays the same; ours needs no memory. The penalty's
    value is therefore that of L1 at every p, and what annealing changes is its gradient, which p < 1 takes
    from strong activations and puts on weak ones. A silent latent gets gradient 0.

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
        super().__init__(d_in, d_sae, l1_weight, seed=seed)
        if not 0 < p_end <= 1:
            raise ValueError(f"p_end is {p_end}; expected an exponent above 0, at most 1.")
        if not 0 <= anneal_start < 1:
            raise ValueError(f"anneal_start is {anneal_start}; expected a share from 0 to below 1.")
        self.p_end, self.anneal_start = p_end, anneal_start

    def p_at(self, progress: float) -> float:
        """Exponent of the penalty after this share of the training."""
        annealed = max(0.0, progress - self.anneal_start) / (1 - self.anneal_start)
        return 1 + (self.p_end - 1) * annealed

    def sparsity(self, feature_acts: Tensor, step: StepInput) -> Tensor:
        """As in `SAE`."""
        l1 = feature_acts.sum(-1).mean(-1)
        lp = power(feature_acts, self.p_at(step.progress)).sum(-1).mean(-1)
        rescaling = (l1 / lp.clamp(min=torch.finfo(lp.dtype).tiny)).detach()
        return self.l1_weight * rescaling * lp
