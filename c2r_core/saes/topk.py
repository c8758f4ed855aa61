"""SAEs that keep a fixed number of activations: TopK, of each sample; BatchTopK, of each batch."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor

from c2r_core.saes.base import SAE, StepInput, TrainingLosses, reconstruction_loss
from c2r_core.saes.files import register
from c2r_core.saes.sparse import EncodeKept, FeatureActs, SparseActs, decode_sparse
from c2r_core.speed import true_indices

# The kept activations of a batch are looked for above this share of the threshold.
_BELOW = 0.9
# k falls from d_in to its target over this share of the training.
ANNEALED_SHARE = 0.01


class KSparseSAE(SAE):
    """Base of the SAEs that keep a fixed number of activations.

    A subclass implements `keep`, the choice of entries in training, and `activate`, that at inference.
    Training takes the sparse path for a single SAE and the dense one for a stack; both give the same
    values and gradients.
    """

    hyper_parameters = ("k",)

    def __init__(self, d_in: int, d_sae: int, k: int, *, seed: int | Sequence[int] = 0) -> None:
        super().__init__(d_in, d_sae, seed=seed)
        if not isinstance(k, Integral) or not 1 <= k <= d_sae:
            raise ValueError(f"k is {k!r}; expected an integer from 1 to d_sae={d_sae}.")
        self.k = int(k)

    @property
    def target_l0(self) -> float:
        """k."""
        return self.k

    def keep(self, pre_acts: Tensor, k: int) -> Tensor:
        """Entries to keep, as indices into pre_acts (..., batch, d_sae) with the last two
        dimensions flattened: (..., batch · k), int64, in any order."""
        raise NotImplementedError

    def reconstruct(self, x: Tensor, feature_acts: FeatureActs) -> tuple[Tensor, Tensor]:
        """Reconstruction loss, shape (...), and the reconstruction by all latents, as x."""
        if isinstance(feature_acts, SparseActs):
            x_hat = decode_sparse(feature_acts, self.W_dec) + self.b_dec
        else:
            x_hat = self.decode(feature_acts)
        return reconstruction_loss(x, x_hat), x_hat

    def training_losses(self, step: StepInput) -> TrainingLosses:
        """As in `SAE`. In a single SAE, feature_acts is a SparseActs."""
        return self._sparse_losses(step) if self.n_stacked is None else self.dense_losses(step)

    def dense_losses(self, step: StepInput) -> TrainingLosses:
        """The plain form of the training losses: the reference that the sparse path must equal."""
        x, dead = step.x, step.dead
        pre_acts = self.pre_acts(x, step.precision)
        kept = self.keep(pre_acts.detach(), self._k_at(step.progress))
        values = pre_acts.flatten(-2).gather(-1, kept).to(x.dtype).relu()
        feature_acts = torch.zeros_like(pre_acts, dtype=x.dtype).flatten(-2)
        feature_acts = feature_acts.scatter(-1, kept, values).unflatten(-1, pre_acts.shape[-2:])
        reconstruction, x_hat = self.reconstruct(x, feature_acts)
        aux_k = torch.zeros_like(reconstruction)
        if dead is not None:
            dead_acts = pre_acts.to(x.dtype).masked_fill(~dead.unsqueeze(-2), -torch.inf)
            aux_k = _aux_k_loss(dead_acts, self.W_dec, (x - x_hat).detach())
            aux_k = torch.where(dead.any(-1), aux_k, 0.0)
        return TrainingLosses(
            reconstruction, torch.zeros_like(aux_k), aux_k, feature_acts, _smallest_positive(values)
        )

    def _sparse_losses(self, step: StepInput) -> TrainingLosses:
        x, dead = step.x, step.dead
        with torch.no_grad():
            pre_acts = self.pre_acts(x, step.precision)
            kept = self.keep(pre_acts, self._k_at(step.progress)).sort().values  # sample by sample
            kept_values = pre_acts.flatten().index_select(0, kept).to(x.dtype)
            offsets = torch.searchsorted(
                kept, torch.arange(0, pre_acts.numel(), self.d_sae, device=x.device)
            )
            centred = x - self.b_dec
        entries = SparseActs(kept_values, kept % self.d_sae, offsets, self.d_sae)
        values = EncodeKept.apply(entries, centred, self.W_enc, self.b_enc, self.b_dec).relu()
        feature_acts = entries.with_values(values)
        reconstruction, x_hat = self.reconstruct(x, feature_acts)
        aux_k = torch.zeros_like(reconstruction)
        if dead is not None and dead.any():
            dead_acts = F.linear(x - self.b_dec, self.W_enc.mT[dead], self.b_enc[dead])
            aux_k = _aux_k_loss(dead_acts, self.W_dec[dead], (x - x_hat).detach())
        return TrainingLosses(
            reconstruction, torch.zeros_like(aux_k), aux_k, feature_acts, _smallest_positive(values)
        )

    def _k_at(self, progress: float) -> int:
        start = min(self.d_in, self.d_sae)
        if progress >= ANNEALED_SHARE or start <= self.k:
            return self.k
        return round(start + (self.k - start) * progress / ANNEALED_SHARE)


@register
class TopKSAE(KSparseSAE):
    """Keeps the k largest activations of each sample, in training and at inference
    (Gao et al., arXiv 2406.04093).

    Parameters
    ----------
    d_in, d_sae, seed
        As in `SAE`.
    k : int
        Activations kept per sample, 1 to d_sae.
    """

    architecture = "topk"

    def keep(self, pre_acts: Tensor, k: int) -> Tensor:
        """As in `KSparseSAE`: the k largest entries of every sample."""
        batch, d_sae = pre_acts.shape[-2:]
        latents = pre_acts.topk(k, dim=-1, sorted=False).indices
        first = torch.arange(0, batch * d_sae, d_sae, device=pre_acts.device)
        return (latents + first.unsqueeze(-1)).flatten(-2)

    def activate(self, pre_acts: Tensor) -> Tensor:
        """As in `SAE`."""
        kept = pre_acts.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(pre_acts).scatter(-1, kept.indices, kept.values.relu())


@register
class BatchTopKSAE(KSparseSAE):
    """Keeps the batch · k largest activations of the whole batch, so k per sample on average
    (Bussmann et al., arXiv 2412.06410).

    At inference a sample must not depend on its batch: there an activation is kept if it is above
    `threshold`, a running mean of the smallest activation kept in training.

    Parameters
    ----------
    d_in, d_sae, seed
        As in `SAE`.
    k : int
        Activations kept per sample on average, 1 to d_sae.
    """

    architecture = "batch_topk"

    def __init__(self, d_in: int, d_sae: int, k: int, *, seed: int | Sequence[int] = 0) -> None:
        super().__init__(d_in, d_sae, k, seed=seed)
        self.register_buffer("threshold", torch.zeros(self.W_dec.shape[:-2]))

    def keep(self, pre_acts: Tensor, k: int) -> Tensor:
        """As in `KSparseSAE`: the batch · k largest entries of the batch."""
        n, entries = pre_acts.shape[-2] * k, pre_acts.flatten(-2)
        if self.n_stacked is None and self.threshold > 0:
            return largest_above(entries, n, _BELOW * self.threshold)
        return largest_entries(entries, n)

    def activate(self, pre_acts: Tensor) -> Tensor:
        """As in `SAE`."""
        feature_acts = pre_acts.relu()
        return feature_acts * (feature_acts > self.threshold[..., None, None])

    @torch.no_grad()
    def after_step(self, losses: TrainingLosses, ema_decay: float) -> None:
        """Move the threshold towards the smallest activation that this step kept."""
        smallest = losses.min_active
        smallest = torch.where(torch.isfinite(smallest), smallest, self.threshold)
        decay = torch.where(self.threshold > 0, ema_decay, 0.0)
        self.threshold.copy_(decay * self.threshold + (1 - decay) * smallest)

    def fold_scale(self, factor: float) -> None:
        """As in `SAE`; the threshold has the units of the activations."""
        super().fold_scale(factor)
        self.threshold /= factor


def largest_above(values: Tensor, n: int, least: Tensor | float) -> Tensor:
    """As `largest_entries` for one dimension, looking only above `least` where n entries are; exact."""
    above = true_indices(values > least)
    if not n <= len(above) <= len(values) // 8:
        return largest_entries(values, n)
    # On a CPU index_select takes a quarter of the time of [].
    best = values.index_select(0, above).topk(n, sorted=False).indices
    return above.index_select(0, best)


def largest_entries(values: Tensor, n: int, group: int = 16) -> Tensor:
    """Indices of the n largest entries along the last dimension, in any order; exact.

    A top-n entry lies in one of the n groups with the largest maxima: for each better group there
    is a better entry. So only those groups are searched, several times as fast on a CPU when n is a
    small part of the entries.
    """
    length = values.shape[-1]
    if length % group or length // group <= n:
        return values.topk(n, dim=-1, sorted=False).indices
    # Entry j is of group j % n_groups, so that maxima are taken row by row.
    n_groups = length // group
    best_groups = values.unflatten(-1, (group, n_groups)).amax(-2).topk(n, sorted=False).indices
    first = torch.arange(0, length, n_groups, device=values.device)
    entries = (best_groups.unsqueeze(-1) + first).flatten(-2)
    best = values.gather(-1, entries).topk(n, dim=-1, sorted=False).indices
    return entries.gather(-1, best)


def _aux_k_loss(dead_acts: Tensor, W_dec: Tensor, residual: Tensor) -> Tensor:
    """Error of the residual's reconstruction by the strongest dead latents, over its variance.

    dead_acts (..., batch, n) are pre-activations, W_dec (..., n, d_in) their decoder rows. The
    gradient reaches these latents' decoder and encoder (and b_dec, through the encoder's input),
    but no latent that is alive: `residual` has none.
    """
    k_aux = min(residual.shape[-1] // 2, dead_acts.shape[-1])
    strongest = dead_acts.topk(k_aux, dim=-1, sorted=False)
    acts = torch.zeros_like(dead_acts).scatter(-1, strongest.indices, strongest.values.relu())
    error = reconstruction_loss(residual, acts @ W_dec)
    variance = (residual - residual.mean(-2, keepdim=True)).square().sum(-1).mean(-1)
    return error / variance.clamp(min=torch.finfo(variance.dtype).tiny)


def _smallest_positive(values: Tensor) -> Tensor:
    """Smallest value > 0 along the last dimension, infinity where there is none."""
    values = values.detach()
    return torch.where(values > 0, values, torch.inf).amin(-1)
