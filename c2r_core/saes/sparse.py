"""Activations of which only the non-zero entries are stored, and the products a sparse step needs.

Of the six dense products of a training step only the encoder's forward product must be dense: it
decides which entries are kept. Everything else touches only those batch · k entries.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class ByLatent(NamedTuple):
    """The entries of a SparseActs once more, latent by latent, each latent's in the order of the samples.

    Fields
    ------
    order : Tensor of int64, shape (n_entries,)
        Where each entry is in the SparseActs.
    samples : Tensor of int64, shape (n_entries,)
    offsets : Tensor of int64, shape (d_sae,)
        Where each latent's entries begin.
    """

    order: Tensor
    samples: Tensor
    offsets: Tensor


@dataclass(frozen=True, eq=False)
class SparseActs:
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

    @cached_property
    def ends(self) -> Tensor:
        """Where the entries of all samples begin, and where the last one's end: int64, shape (batch + 1,)."""
        return torch.cat([self.offsets, self.offsets.new_tensor([len(self.latents)])])

    @cached_property
    def samples(self) -> Tensor:
        """Sample of each entry, int64, shape (n_entries,)."""
        batch = torch.arange(len(self.offsets), device=self.offsets.device)
        return batch.repeat_interleave(self.ends.diff())

    @cached_property
    def by_latent(self) -> ByLatent:
        """The same entries latent by latent; sorted once, for all products that need it."""
        latents, order = self.latents.sort(stable=True)
        every = torch.arange(self.d_sae, device=latents.device)
        starts = torch.searchsorted(latents, every)
        return ByLatent(order, self.samples.index_select(0, order), starts)

    def with_values(self, values: Tensor) -> SparseActs:
        """Other values of the same entries; what is known of where these are is kept."""
        others = SparseActs(values, self.latents, self.offsets, self.d_sae)
        known = {"ends": self.ends, "samples": self.samples, "by_latent": self.by_latent}
        others.__dict__.update(known)
        return others

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
    return _Decode.apply(feature_acts.values, W_dec, feature_acts)


def decode_groups(feature_acts: SparseActs, W_dec: Tensor, sizes: list[int]) -> Tensor:
    """What each group of consecutive latents writes, shape (batch, len(sizes), d_in)."""
    starts = torch.tensor([0, *sizes[:-1]], device=W_dec.device).cumsum(0)
    samples = torch.arange(len(feature_acts.offsets), device=W_dec.device).unsqueeze(1)
    stored = feature_acts.samples * feature_acts.d_sae + feature_acts.latents  # rising
    offsets = torch.searchsorted(stored, (samples * feature_acts.d_sae + starts).flatten())
    groups = SparseActs(feature_acts.values, feature_acts.latents, offsets, feature_acts.d_sae)
    return decode_sparse(groups, W_dec).unflatten(0, (-1, len(sizes)))


class _Decode(torch.autograd.Function):
    """What the decoder writes, differentiable in the activations and the decoder.

    Each entry's gradient is the product of its latent's row and its sample's gradient, and that of the rows
    is summed latent by latent: on a CPU both take half as long as the derivative of embedding_bag.
    """

    @staticmethod
    def forward(ctx, values, W_dec, feature_acts: SparseActs):
        ctx.save_for_backward(values, W_dec)
        ctx.entries = feature_acts
        return F.embedding_bag(
            feature_acts.latents,
            W_dec,
            feature_acts.offsets,
            mode="sum",
            per_sample_weights=values,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_written):
        values, W_dec = ctx.saved_tensors
        feature_acts, grad_written = ctx.entries.with_values(values), grad_written.contiguous()
        grad_values = products_at(feature_acts, grad_written, W_dec)
        return grad_values, sum_by_latent(feature_acts, grad_written), None


class EncodeKept(torch.autograd.Function):
    """Values of the kept pre-activations, differentiable in the encoder and the decoder bias.

    Takes the pre-activations that the dense product gave for the kept entries, and where they are;
    backward is the derivative of that product at these entries only. The samples x get no gradient.
    """

    @staticmethod
    def forward(ctx, kept: SparseActs, x_centred, W_enc, b_enc, b_dec):
        ctx.save_for_backward(x_centred, W_enc)
        ctx.kept = kept
        return kept.values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_values):
        x_centred, W_enc = ctx.saved_tensors
        grad_rows = sum_by_latent(ctx.kept.with_values(grad_values), x_centred)
        grad_b_enc = torch.zeros_like(W_enc[0]).index_add_(0, ctx.kept.latents, grad_values)
        grad_b_dec = -(W_enc @ grad_b_enc)
        return None, None, grad_rows.mT, grad_b_enc, grad_b_dec


def sum_by_latent(feature_acts: SparseActs, x: Tensor) -> Tensor:
    """feature_acts.to_dense().T @ x, shape (d_sae, d_in), from the stored entries; x (batch, d_in)."""
    order, samples, offsets = feature_acts.by_latent
    values = feature_acts.values.index_select(0, order)
    return F.embedding_bag(samples, x, offsets, mode="sum", per_sample_weights=values)


def products_at(entries: SparseActs, x: Tensor, W_dec: Tensor) -> Tensor:
    """(x @ W_dec.T) at the stored entries alone, shape (n_entries,); x (batch, d_in)."""
    shape = (len(x), entries.d_sae)
    full = torch.promote_types(x.dtype, torch.float32)  # PyTorch has no such product in half
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        where = torch.sparse_csr_tensor(
            entries.ends,
            entries.latents,
            torch.zeros_like(entries.values, dtype=full),
            shape,
            check_invariants=False,
        )
        found = torch.sparse.sampled_addmm(where, x.to(full), W_dec.mT.to(full), beta=0)
    return found.values().to(x.dtype)
