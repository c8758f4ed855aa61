"""Activations of which only the non-zero entries are stored, and the products a sparse step needs.

Of the six dense products of a training step only the encoder's forward product must be dense: it
decides which entries are kept. Everything else touches only those batch · k entries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class SparseActs(NamedTuple):
    """Activations of a batch, sample by sample.

    Sample b holds the entries offsets[b] to offsets[b + 1] (or the end), its latents in rising order. A
    stored value may be 0.

    Fields
    ------
    values : Tensor, shape (n_entries,)
    latents : Tensor of int64, shape (n_entries,)
    offsets : Tensor of int64, shape (batch,)
    d_sae : int
    """

    values: Tensor
    latents: Tensor
    offsets: Tensor
    d_sae: int

    @property
    def samples(self) -> Tensor:
        """Sample of each entry, int64, shape (n_entries,)."""
        ends = torch.cat([self.offsets[1:], self.offsets.new_tensor([len(self.latents)])])
        batch = torch.arange(len(self.offsets), device=self.offsets.device)
        return batch.repeat_interleave(ends - self.offsets)

    def to_dense(self) -> Tensor:
        """The same activations as a Tensor of shape (batch, d_sae)."""
        dense = self.values.new_zeros(len(self.offsets), self.d_sae)
        return dense.index_put((self.samples, self.latents), self.values)


FeatureActs = Tensor | SparseActs


def latent_norms(feature_acts: FeatureActs) -> Tensor:
    """Euclidean norm of each latent's activations over the batch, shape (..., d_sae)."""
    if isinstance(feature_acts, SparseActs):
        squares = feature_acts.values.new_zeros(feature_acts.d_sae)
        squares = squares.index_add(0, feature_acts.latents, feature_acts.values**2)
        fired = squares > 0  # the root's slope at 0 is infinite; a silent latent gets gradient 0
        return torch.where(fired, torch.where(fired, squares, 1.0).sqrt(), 0.0)
    return torch.linalg.vector_norm(feature_acts, dim=-2)


def firing_counts(feature_acts: FeatureActs) -> Tensor:
    """Number of samples of the batch in which each latent is active, shape (..., d_sae)."""
    if isinstance(feature_acts, SparseActs):
        active = feature_acts.latents[feature_acts.values != 0]
        return torch.bincount(active, minlength=feature_acts.d_sae)
    return (feature_acts != 0).sum(-2)


def decode_sparse(feature_acts: SparseActs, W_dec: Tensor) -> Tensor:
    """feature_acts.to_dense() @ W_dec, shape (batch, d_in), from the stored entries alone."""
    written = F.embedding_bag(
        feature_acts.latents,
        W_dec.detach(),
        feature_acts.offsets,
        mode="sum",
        per_sample_weights=feature_acts.values,
    )
    return _GradientOfRows.apply(written, W_dec, feature_acts)


def decode_groups(feature_acts: SparseActs, W_dec: Tensor, sizes: list[int]) -> Tensor:
    """What each group of consecutive latents writes, shape (batch, len(sizes), d_in)."""
    starts = torch.tensor([0, *sizes[:-1]], device=W_dec.device).cumsum(0)
    samples = torch.arange(len(feature_acts.offsets), device=W_dec.device).unsqueeze(1)
    stored = feature_acts.samples * feature_acts.d_sae + feature_acts.latents  # rising
    offsets = torch.searchsorted(stored, (samples * feature_acts.d_sae + starts).flatten())
    return decode_sparse(feature_acts._replace(offsets=offsets), W_dec).unflatten(
        0, (-1, len(sizes))
    )


class _GradientOfRows(torch.autograd.Function):
    """Leaves what the decoder wrote as it is, and gives the decoder its gradient.

    That of embedding_bag is the same, but twice as slow on a CPU.
    """

    @staticmethod
    def forward(ctx, written, W_dec, feature_acts: SparseActs | tuple):
        values, latents, offsets, ctx.d_sae = feature_acts
        ctx.save_for_backward(values.detach(), latents, offsets)
        return written.view_as(written)

    @staticmethod
    def backward(ctx, grad_written):
        entries = SparseActs(*ctx.saved_tensors, ctx.d_sae)
        return grad_written, sum_by_latent(entries, grad_written), None


class EncodeKept(torch.autograd.Function):
    """Values of the kept pre-activations, differentiable in the encoder and the decoder bias.

    Takes the pre-activations that the dense product gave for the kept entries, and where they are;
    backward is the derivative of that product at these entries only. The samples x get no gradient.
    """

    @staticmethod
    def forward(ctx, kept: SparseActs | tuple, x_centred, W_enc, b_enc, b_dec):
        values, latents, offsets, _ = kept
        ctx.save_for_backward(latents, offsets, x_centred, W_enc)
        return values.clone()

    @staticmethod
    def backward(ctx, grad_values):
        latents, offsets, x_centred, W_enc = ctx.saved_tensors
        grad_rows = sum_by_latent(
            SparseActs(grad_values, latents, offsets, W_enc.shape[-1]), x_centred
        )
        grad_b_enc = torch.zeros_like(W_enc[0]).index_add_(0, latents, grad_values)
        grad_b_dec = -(W_enc @ grad_b_enc)
        return None, None, grad_rows.mT, grad_b_enc, grad_b_dec


def sum_by_latent(feature_acts: SparseActs, x: Tensor) -> Tensor:
    """feature_acts.to_dense().T @ x, shape (d_sae, d_in), from the stored entries; x (batch, d_in)."""
    by_latent = torch.argsort(feature_acts.latents, stable=True)
    latents = torch.arange(feature_acts.d_sae, device=x.device)
    return F.embedding_bag(
        feature_acts.samples[by_latent],
        x,
        torch.searchsorted(feature_acts.latents[by_latent], latents),
        mode="sum",
        per_sample_weights=feature_acts.values[by_latent],
    )
