"""Each latent's closest other latent, by the direction of its decoder row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.autograd.function import once_differentiable

from c2r_core.speed import MIN_SPEED_UP, bfloat16_speed_up, true_indices

# Candidates for each row of a tile, at most, and pairs whose rows are read at once.
_CANDIDATES, _PAIRS = 16, 2**12


class Neighbours(NamedTuple):
    """Result of `nearest_neighbours`; both fields have the shape (..., d_sae) and carry no gradient."""

    index: Tensor
    cosine: Tensor


@torch.no_grad()
def nearest_neighbours(
    W_dec: Tensor, *, chunk_size: int | None = None, generator: Generator | None = None
) -> Neighbours:
    """Index and cosine of each latent's closest other latent.

    Parameters
    ----------
    W_dec : Tensor, shape (..., d_sae, d_in)
        Decoder rows; need not be normalised. Rows of zero norm have cosine 0 to everything.
        Leading dimensions are independent dictionaries.
    chunk_size : int, optional
        Search only within random chunks of this size (8192 in the paper, arXiv 2606.30609).
        None searches all latents, in tiles, so that memory stays bounded.
    generator : torch.Generator, optional
        Draws the chunks; required with `chunk_size` below d_sae, so that a run can be repeated.

    Returns
    -------
    Neighbours
        Ties go to the lowest index (of the shuffled order inside a chunk).

    Raises
    ------
    ValueError
        If W_dec has fewer than two dimensions or two rows, or holds a NaN or an infinity;
        if chunk_size is below 2, or needs a generator that was not given.
    """
    unit = unit_rows(check_decoder(W_dec).detach())
    d_sae = unit.shape[-2]
    if chunk_size is None or chunk_size >= d_sae:
        return _search(unit)
    if chunk_size < 2:
        raise ValueError(
            f"chunk_size is {chunk_size}; a chunk needs at least 2 latents to hold a pair."
        )
    if generator is None:
        raise ValueError(
            f"chunk_size={chunk_size} is below d_sae={d_sae}, so chunks are drawn at random: "
            "pass generator=torch.Generator(...).manual_seed(...), or chunk_size=None for the exact search."
        )
    order = torch.randperm(d_sae, generator=generator, device=generator.device).to(unit.device)
    chunks = list(order.split(chunk_size))
    if len(chunks[-1]) == 1:  # one latent alone has no neighbour: let it join the chunk before
        chunks[-2:] = [torch.cat(chunks[-2:])]
    index = torch.empty(unit.shape[:-1], dtype=torch.long, device=unit.device)
    cosine = torch.empty(unit.shape[:-1], dtype=unit.dtype, device=unit.device)
    for chunk in chunks:
        found = _search(unit[..., chunk, :])
        index[..., chunk] = chunk[found.index]
        cosine[..., chunk] = found.cosine
    return Neighbours(index, cosine)


def pair_cosines(W_dec: Tensor, index: Tensor) -> Tensor:
    """Cosine of each row with the row that `index` names, with gradient to both rows.

    The search for neighbours compares all pairs; its derivative needs only these d_sae pairs.

    Parameters
    ----------
    W_dec : Tensor, shape (..., d_sae, d_in)
    index : Tensor of int64, shape (..., d_sae)

    Returns
    -------
    Tensor, shape (..., d_sae)
    """
    d_sae, d_in = W_dec.shape[-2:]
    first_row = torch.arange(0, index.numel(), d_sae, device=index.device)
    partners = (index + first_row.reshape(*index.shape[:-1], 1)).flatten()
    return _PairCosines.apply(W_dec.reshape(-1, d_in), partners).reshape(index.shape)


class _PairCosines(torch.autograd.Function):
    """Cosine of each row with that of its partner: (n, d_in) and (n,) -> (n,).

    A row's gradient is the weighted sum of the rows that it is paired with, by itself or by them, without the
    part along itself: one sparse product.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, partners: Tensor) -> Tensor:
        unit = unit_rows(rows)
        cosines = torch.linalg.vecdot(unit, unit.index_select(0, partners))
        ctx.save_for_backward(rows, unit, partners, cosines)
        return cosines

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_cosines: Tensor):
        rows, unit, partners, cosines = ctx.saved_tensors
        every = torch.arange(len(rows), device=rows.device)
        of_rows, order = torch.cat([every, partners]).sort(stable=True)
        across = torch.nn.functional.embedding_bag(
            torch.cat([partners, every])[order],
            unit,
            torch.searchsorted(of_rows, every),
            mode="sum",
            per_sample_weights=grad_cosines.repeat(2)[order],
        )
        along = torch.zeros_like(cosines)
        along.index_add_(0, of_rows, (grad_cosines * cosines).repeat(2)[order])
        norms = torch.linalg.vector_norm(rows, dtype=unit.dtype, dim=1, keepdim=True)
        gradient = torch.addcmul(across, along.unsqueeze(1), unit, value=-1)
        return gradient.div_(norms.clamp(min=1e-12)).to(rows.dtype), None


def unit_rows(W_dec: Tensor) -> Tensor:
    """Rows of W_dec at norm 1, in float32 at least: half precision would make near neighbours tie."""
    W_dec = W_dec.to(torch.promote_types(W_dec.dtype, torch.float32))
    return torch.nn.functional.normalize(W_dec, dim=-1)


def check_decoder(W_dec: Tensor) -> Tensor:
    """Return W_dec, or raise a ValueError that says what is wrong with it."""
    if W_dec.ndim < 2 or W_dec.shape[-2] < 2:
        raise ValueError(
            f"W_dec has shape {tuple(W_dec.shape)}; expected (d_sae, d_in), one row per latent, "
            "with d_sae >= 2."
        )
    if not torch.isfinite(W_dec.sum()) and not torch.isfinite(W_dec).all():
        raise ValueError(
            "W_dec holds a NaN or an infinity; the training has diverged: go back to a checkpoint "
            "or lower lr."
        )
    return W_dec


def _search(unit: Tensor) -> Neighbours:
    """Neighbours among rows of norm 1, (..., d_sae, d_in)."""
    tile = _tile(unit.device.type)
    with torch.autocast(unit.device.type, enabled=False):
        if unit.shape[-2] > tile:
            found = [_search_in_tiles(rows, tile) for rows in unit.reshape(-1, *unit.shape[-2:])]
            index, cosine = (torch.stack(parts) for parts in zip(*found, strict=True))
        else:
            cosines = unit @ unit.mT
            cosines.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)
            cosine, index = cosines.max(-1)
    shape = unit.shape[:-1]
    return Neighbours(index.reshape(shape), cosine.reshape(shape).clamp(-1.0, 1.0))


def _tile(device: str) -> int:
    """Rows of a tile of cosines: few on a processor, so that it is looked at while it is in the cache."""
    return 512 if device == "cpu" else 8192


def _search_in_tiles(unit: Tensor, tile: int) -> Neighbours:
    """The same for one dictionary, (d_sae, d_in); each pair is compared once and serves both rows.

    The cosines come tile by tile, in a precision that may be rough. A pair stays a candidate while its cosine
    is within `margin` of the best that one of its rows has met, so that no neighbour can be lost. The few
    that are left in the end are compared in full. Rows go in the order of what a sample gave them: so those
    of a tile have about the same best, and one pass over the tile, with one number, finds its candidates.
    """
    rough, margin = _rough(unit)
    best = _best_of_sample(rough).to(unit.dtype)
    # In a tile by index, so that of equal partners the first is the lowest.
    order = torch.cat([rows.sort().values for rows in best.argsort().split(tile)])
    best, rough, left = best[order], rough.index_select(0, order), []
    tiles = [slice(first, first + tile) for first in range(0, len(unit), tile)]
    for n_before, a in enumerate(tiles):
        pairs = []
        for b in tiles[n_before:]:
            cosines = rough[a] @ rough[b].mT
            if a == b:
                cosines.fill_diagonal_(-torch.inf)
            least = torch.minimum(best[a].min(), best[b].min()) - margin
            found = true_indices(cosines >= least.to(cosines.dtype))
            if len(found) > _CANDIDATES * len(cosines):
                # Nearly all rows are alike here: the best of each is enough.
                found = _best_of_tile(unit[order[a]], unit[order[b]], is_diagonal=a == b)
            n_columns, cosine = (
                cosines.shape[1],
                cosines.flatten().index_select(0, found).to(best.dtype),
            )
            i, j = found // n_columns + a.start, found % n_columns + b.start
            for rows in (i, j):
                best.scatter_reduce_(0, rows, cosine, "amax")
            pairs.append((i, j, cosine))
        left = [_still_likely(left + pairs, best - margin)]
    i, j, _ = left[0]
    return _compared(unit, order[i], order[j])


def _best_of_sample(rough: Tensor) -> Tensor:
    """Each row's largest cosine with the rows of a sample, shape (d_sae,)."""
    sample = torch.arange(0, len(rough), max(1, round(len(rough) ** 0.5 / 4)), device=rough.device)
    best = []
    for rows in torch.arange(len(rough), device=rough.device).split(_PAIRS):
        cosines = rough[rows] @ rough[sample].mT
        best.append(cosines.masked_fill_(rows[:, None] == sample, -torch.inf).amax(1))
    return torch.cat(best)


def _rough(unit: Tensor) -> tuple[Tensor, float]:
    """The rows in the fastest precision for products, and twice the largest error of a cosine of them."""
    is_float32, on_cpu = unit.dtype == torch.float32, unit.device.type == "cpu"
    if is_float32 and on_cpu and bfloat16_speed_up() >= MIN_SPEED_UP:
        rough = unit.bfloat16()
        # The most that a row loses in rounding.
        lost = torch.linalg.vector_norm(unit - rough, dim=-1).max().item()
        return rough, 2 * (2 * lost + lost**2) + 4 * torch.finfo(torch.bfloat16).eps / 2
    # Another setting than "highest" lets PyTorch multiply in TF32 or bfloat16.
    is_exact = torch.get_float32_matmul_precision() == "highest" or not is_float32
    return unit, 1e-5 if is_exact else 0.02


def _best_of_tile(a: Tensor, b: Tensor, *, is_diagonal: bool) -> Tensor:
    """Where in a @ b.mT each row's and each column's largest cosine is; in float64, on the processor."""
    cosines = a.cpu().double() @ b.cpu().double().mT
    if is_diagonal:
        cosines.fill_diagonal_(-torch.inf)
    rows, columns = (torch.arange(n) for n in cosines.shape)
    by_row = rows * len(columns) + cosines.argmax(1)
    by_column = cosines.argmax(0) * len(columns) + columns
    return torch.cat([by_row, by_column]).to(a.device)


def _still_likely(
    pairs: list[tuple[Tensor, Tensor, Tensor]], least: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of pairs (i, j, cosine), those whose cosine is at least that of one of their rows; least (d_sae,)."""
    i, j, cosine = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    likely = (cosine >= least[i]) | (cosine >= least[j])
    return i[likely], j[likely], cosine[likely]


def _compared(unit: Tensor, i: Tensor, j: Tensor) -> Neighbours:
    """Each row's best partner among the pairs (i, j), which hold it for every row; ties: the lowest."""
    parts = zip(i.split(_PAIRS), j.split(_PAIRS), strict=True)
    cosines = (
        torch.cat(
            [
                torch.linalg.vecdot(unit.index_select(0, a), unit.index_select(0, b))
                for a, b in parts
            ]
        )
        .repeat(2)
        .cpu()
    )
    rows, partners = torch.cat([i, j]).cpu(), torch.cat([j, i]).cpu()
    best = torch.full((len(unit),), -torch.inf, dtype=unit.dtype)
    best = best.scatter_reduce(0, rows, cosines, "amax")
    is_best = cosines == best[rows]
    index = torch.full((len(unit),), len(unit), dtype=torch.long)
    index = index.scatter_reduce(0, rows[is_best], partners[is_best], "amin")
    return Neighbours(index.to(unit.device), best.to(unit.device))
