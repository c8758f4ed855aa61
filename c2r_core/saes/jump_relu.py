"""JumpReLU SAE: a learned threshold for each latent (Rajamanoharan et al., arXiv 2407.14435).

The jump has no useful derivative. Training takes, for the thresholds only, the expected derivative as
a kernel estimates it: pairs of latent and sample whose pre-activation lies within half a bandwidth
of the threshold.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from c2r_core.saes.base import SAE, StepInput, TrainingLosses, reconstruction_loss
from c2r_core.saes.files import register

INITIAL_THRESHOLD = 0.001


@register
class JumpReLUSAE(SAE):
    """f = z where z = relu((x − b_dec) W_enc + b_enc) exceeds the latent's threshold θ, else 0.

    Trained with ‖x − x̂‖² + sparsity_weight · (L0 / target_l0 − 1)², L0 being the active latents per
    sample, averaged over the batch. The trained parameter is θ itself, not its logarithm as in the
    paper: Adam moves a parameter by about lr a step, which in a short run is too little for a logarithm
    that has to grow a hundredfold. After each step a θ below 0 is put back to 0.

    Parameters
    ----------
    d_in, d_sae, seed
        As in `SAE`.
    target_l0 : float
        Active latents per sample to aim at, above 0, at most d_sae.
    sparsity_weight : float
        Weight of the squared relative distance from it, >= 0; its scale is that of ‖x‖².
    bandwidth : float
        Width of the kernel, in units of the activations, > 0; 0.001 in the paper.

    Attributes
    ----------
    threshold : (..., d_sae)
    """

    architecture = "jump_relu"
    hyper_parameters = ("target_l0", "sparsity_weight", "bandwidth")

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        target_l0: float,
        sparsity_weight: float = 1.0,
        bandwidth: float = 0.001,
        *,
        seed: int | Sequence[int] = 0,
    ) -> None:
        super().__init__(d_in, d_sae, seed=seed)
        if not 0 < target_l0 <= d_sae:
            raise ValueError(
                f"target_l0 is {target_l0}; expected a number above 0, at most d_sae={d_sae}."
            )
        if not sparsity_weight >= 0:
            raise ValueError(f"sparsity_weight is {sparsity_weight}; expected a number >= 0.")
        if not bandwidth > 0:
            raise ValueError(f"bandwidth is {bandwidth}; expected a positive number.")
        self._target_l0 = target_l0
        self.sparsity_weight, self.bandwidth = sparsity_weight, bandwidth
        self.threshold = nn.Parameter(torch.full_like(self.b_enc, INITIAL_THRESHOLD))

    @property
    def target_l0(self) -> float:
        """As given."""
        return self._target_l0

    def activate(self, pre_acts: Tensor) -> Tensor:
        """As in `SAE`."""
        return _JumpReLU.apply(pre_acts.relu(), self.threshold, self.bandwidth)

    def training_losses(self, step: StepInput) -> TrainingLosses:
        """As in `SAE`; the penalty reads the activations before the jump, below θ too."""
        acts = self.pre_acts(step.x, step.precision).to(step.x.dtype).relu()
        feature_acts = _JumpReLU.apply(acts, self.threshold, self.bandwidth)
        l0 = _Step.apply(acts, self.threshold, self.bandwidth).sum(-1).mean(-1)
        reconstruction = reconstruction_loss(step.x, self.decode(feature_acts))
        sparsity = self.sparsity_weight * (l0 / self.target_l0 - 1) ** 2
        return TrainingLosses(
            reconstruction, sparsity, torch.zeros_like(reconstruction), feature_acts
        )

    @torch.no_grad()
    def after_step(self, losses: TrainingLosses, ema_decay: float) -> None:
        """Put thresholds that the step moved below 0 back to 0."""
        self.threshold.clamp_(min=0)

    def fold_scale(self, factor: float) -> None:
        """As in `SAE`; the threshold has the units of the activations."""
        super().fold_scale(factor)
        with torch.no_grad():
            self.threshold /= factor


class _JumpReLU(torch.autograd.Function):
    """z · 1[z > θ] for z (..., batch, d_sae) and θ (..., d_sae); d/dθ is −θ/ε · K((z − θ)/ε)."""

    @staticmethod
    def forward(ctx, acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(acts, threshold)
        ctx.bandwidth = bandwidth
        return acts * (acts > threshold.unsqueeze(-2))

    @staticmethod
    def backward(ctx, grad: Tensor):
        acts, threshold = ctx.saved_tensors
        near = _near(acts, threshold, ctx.bandwidth)
        grad_threshold = -(threshold / ctx.bandwidth) * (grad * near).sum(-2)
        return grad * (acts > threshold.unsqueeze(-2)), grad_threshold, None


class _Step(torch.autograd.Function):
    """1[z > θ] for z (..., batch, d_sae) and θ (..., d_sae); d/dθ is −1/ε · K((z − θ)/ε), d/dz is 0."""

    @staticmethod
    def forward(ctx, acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(acts, threshold)
        ctx.bandwidth = bandwidth
        return (acts > threshold.unsqueeze(-2)).to(acts.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        acts, threshold = ctx.saved_tensors
        near = _near(acts, threshold, ctx.bandwidth)
        return None, -(grad * near).sum(-2) / ctx.bandwidth, None


def _near(acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """The rectangle kernel K: where the activation is within half a bandwidth of the threshold.

    Silent latents do not count, for no threshold >= 0 could make them fire.
    """
    return ((acts - threshold.unsqueeze(-2)).abs() < bandwidth / 2) & (acts > 0)
