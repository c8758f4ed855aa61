"""What the latents of a shard compute of a step, and what the processes tell each other for it.

The formulas are those of `c2r_core.saes.topk` and `c2r_core.losses`; here sums run over the shards too.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from c2r_core.losses.c2r import power
from c2r_core.losses.neighbours import unit_rows
from c2r_core.saes.base import SAE, StepInput, TrainingLosses, reconstruction_loss
from c2r_core.saes.sparse import EncodeKept, SparseActs, decode_sparse
from c2r_core.saes.topk import TopKSAE, largest_entries
from c2r_core.training.distributed import total

# Rows that are told to the others at once, and that these compare them with at once.
_BLOCK = 4096


def sharded_losses(sae: SAE, step: StepInput) -> TrainingLosses:
    """The losses of the SAE that all shards are, with gradient to this one; feature_acts are its own."""
    x, n_latents, k = step.x, len(sae.b_enc), sae._k_at(step.progress)
    with torch.no_grad():
        pre_acts = sae.pre_acts(x, step.precision)
        if isinstance(sae, TopKSAE):
            kept = _among_largest(pre_acts, k)
        else:
            kept = _among_largest(pre_acts.flatten().unsqueeze(0), k * len(x))
        kept = kept.sort().values  # sample by sample
        kept_values = pre_acts.flatten().index_select(0, kept).to(x.dtype)
        starts = torch.arange(0, pre_acts.numel(), n_latents, device=x.device)
        offsets = torch.searchsorted(kept, starts)
        centred = x - sae.b_dec
    entries = SparseActs(kept_values, kept % n_latents, offsets, n_latents)
    values = EncodeKept.apply(entries, centred, sae.W_enc, sae.b_enc, sae.b_dec).relu()
    feature_acts = entries.with_values(values)

    written = decode_sparse(feature_acts, sae.W_dec)
    if dist.get_rank() == 0:
        written = written + sae.b_dec
    x_hat = _SumOverShards.apply(written)
    reconstruction = reconstruction_loss(x, x_hat)
    aux_k = torch.zeros_like(reconstruction)
    if step.dead is not None:
        aux_k = aux_k + _aux_k_loss(sae, x, step.dead, (x - x_hat).detach())
    least = torch.cat([values.detach()[values > 0], values.new_tensor([torch.inf])]).min()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return TrainingLosses(
        reconstruction, torch.zeros_like(reconstruction), aux_k, feature_acts, least
    )


def _aux_k_loss(sae: SAE, x: Tensor, dead: Tensor, residual: Tensor) -> Tensor | float:
    """Error of the residual's reconstruction by the strongest dead latents of all shards, over its
    variance."""
    n_dead = int(total(dead.sum()))
    if n_dead == 0:
        return 0.0
    dead_acts = F.linear(x - sae.b_dec, sae.W_enc.mT[dead], sae.b_enc[dead])
    kept = torch.zeros_like(dead_acts, dtype=torch.bool)
    kept.view(-1)[_among_largest(dead_acts.detach(), min(x.shape[-1] // 2, n_dead))] = True
    acts = torch.where(kept, dead_acts, 0.0).relu()
    error = reconstruction_loss(residual, _SumOverShards.apply(acts @ sae.W_dec[dead]))
    variance = (residual - residual.mean(0)).square().sum(-1).mean()
    return error / variance.clamp(min=torch.finfo(variance.dtype).tiny)


def pair_terms(norms: Tensor, W_dec: Tensor, index: Tensor, alpha: float) -> Tensor:
    """C²R's term of each own latent, shape (n_latents,); index is its neighbour's, in the whole SAE.

    A neighbour's row and norm get their gradient where they are held.
    """
    unit = unit_rows(W_dec)
    neighbours = _rows_of_all(torch.cat([unit, norms.unsqueeze(1)], dim=1), index)
    similarity = (unit * neighbours[:, :-1]).sum(-1).relu() ** 2
    return similarity * power(norms + neighbours[:, -1], alpha)


@torch.no_grad()
def neighbours_of_shard(W_dec: Tensor) -> Tensor:
    """Index in the whole SAE of each own latent's nearest neighbour in direction; ties: the lowest."""
    unit, rank = unit_rows(W_dec), dist.get_rank()
    n_latents = len(unit)
    best = unit.new_full((n_latents,), -torch.inf)
    index = torch.zeros(n_latents, dtype=torch.long, device=unit.device)
    for holder in range(dist.get_world_size()):
        for start in range(0, n_latents, _BLOCK):
            theirs = unit[
                start : start + _BLOCK
            ].clone()  # of another holder: only the shape counts
            dist.broadcast(theirs, holder)
            for first in range(0, n_latents, _BLOCK):
                own = slice(first, first + _BLOCK)
                cosines = unit[own] @ theirs.mT
                if holder == rank and first == start:  # no latent is its own neighbour
                    cosines.fill_diagonal_(-torch.inf)
                cosine, column = cosines.max(-1)
                better = cosine > best[own]
                best[own] = torch.where(better, cosine, best[own])
                index[own] = torch.where(better, holder * n_latents + start + column, index[own])
    return index


# -- what the processes tell each other -----------------------------------------------------------


def _among_largest(entries: Tensor, n: int) -> Tensor:
    """Of entries (rows, own columns), those among the n largest of their row in all processes.

    As indices into the flattened entries, in any order. The processes may have unlike numbers of columns, and
    have n in all. Ties for the last places fall alike in every process: each makes the same choice.
    """
    rank, world, (n_rows, n_columns) = dist.get_rank(), dist.get_world_size(), entries.shape
    largest = largest_entries(entries, min(n, n_columns))
    missing = n - largest.shape[-1]
    values = F.pad(entries.gather(-1, largest), (0, missing), value=-torch.inf).contiguous()
    of_all = [torch.empty_like(values) for _ in range(world)]
    dist.all_gather(of_all, values)
    chosen = torch.cat(of_all, dim=-1).topk(n, dim=-1, sorted=False).indices
    is_kept = torch.zeros(n_rows, world * n, dtype=torch.bool, device=entries.device)
    is_own_kept = is_kept.scatter_(-1, chosen, True)[:, rank * n : (rank + 1) * n - missing]
    first = n_columns * torch.arange(n_rows, device=entries.device)
    return (largest + first.unsqueeze(-1))[is_own_kept]


def _rows_of_all(table: Tensor, index: Tensor) -> Tensor:
    """Rows of the table of which every process holds as many, with gradient to each row where it is held."""
    n_rows, world = len(table), dist.get_world_size()
    wanted, place = index.unique(return_inverse=True)  # rising, so holder by holder
    n_wanted = torch.bincount(wanted // n_rows, minlength=world)
    n_asked = torch.empty_like(n_wanted)
    dist.all_to_all_single(n_asked, n_wanted)
    n_asked, n_wanted = n_asked.tolist(), n_wanted.tolist()
    asked = wanted.new_empty(sum(n_asked))
    dist.all_to_all_single(asked, wanted % n_rows, n_asked, n_wanted)
    return _Exchange.apply(table.index_select(0, asked), n_asked, n_wanted)[place]


class _Exchange(torch.autograd.Function):
    """Rows sent to each process, in turn, for those that each sends; gradients go back the same way."""

    @staticmethod
    def forward(ctx, sent: Tensor, n_sent: list[int], n_received: list[int]) -> Tensor:
        ctx.counts = n_received, n_sent
        received = sent.new_empty(sum(n_received), *sent.shape[1:])
        dist.all_to_all_single(received, sent.contiguous(), n_received, n_sent)
        return received

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _Exchange.apply(gradient, *ctx.counts), None, None


class _SumOverShards(torch.autograd.Function):
    """The sum over all processes, each of which computes the same loss of it: the gradient is as it is."""

    @staticmethod
    def forward(ctx, own: Tensor) -> Tensor:
        return total(own)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient
