"""Each latent's closest other latent, by the direction of its decoder row."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.autograd.function import once_differentiable

from c2r_core.speed import MIN_SPEED_UP, at_least, int8_product, int8_speed_up, true_indices

# Candidates for each row of a tile, at most; with more, a full comparison of the tile is as fast.
_CANDIDATES = 64
# Pairs whose rows are read at once: few, so that they stay in the cache.
_PAIRS = 2**9


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
            torch.cat([partners, every]).index_select(0, order),
            unit,
            torch.searchsorted(of_rows, every),
            mode="sum",
            per_sample_weights=grad_cosines.repeat(2).index_select(0, order),
        )
        along = torch.zeros_like(cosines)
        of_pairs = (grad_cosines * cosines).repeat(2).index_select(0, order)
        along.index_add_(0, of_rows, of_pairs)
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


class _Rows(NamedTuple):
    """Rows of a tile, rounded: they are `rough` times `scale`, but for at most `error` (a norm)."""

    where: slice
    rough: Tensor
    scale: float
    error: float


class _Pairs(NamedTuple):
    """Pairs of rows that may be neighbours, and the most that the cosine of each can be; all (n_pairs,)."""

    i: Tensor
    j: Tensor
    most: Tensor


def _search_in_tiles(unit: Tensor, tile: int) -> Neighbours:
    """The same for one dictionary, (d_sae, d_in); each pair is compared once and serves both rows.

    The cosines come tile by tile, of rows that may be rounded. With x = x̂ + e, what rounding does is bounded,

        |x · y − x̂ · ŷ| <= ‖e_x‖ ‖y‖ + ‖e_y‖ ‖x̂‖ <= ‖e_x‖ + ‖e_y‖ + ‖e_x‖ ‖e_y‖,

    so each rough cosine says how much the true one is at least and at most. A pair stays a candidate while
    its most is no less than what one of its rows has found already, so that no neighbour can be lost. The few
    that are left in the end are compared in full. Rows go in the order of their largest coordinate: so those
    of a tile lose about the same in rounding.
    """
    by_size = unit.abs().amax(1).argsort(stable=True)
    # In a tile by index, so that of equal partners the first is the lowest.
    order = torch.cat([rows.sort().values for rows in by_size.split(tile)])
    tiles = _rounded(unit.index_select(0, order), tile)
    best, left = torch.full_like(unit[:, 0], -torch.inf), []
    for n_before, a in enumerate(tiles):
        for b in tiles[n_before:]:
            left.append(_candidates(a, b, best, unit, order))
        left = [_still_likely(_Pairs(*map(torch.cat, zip(*left, strict=True))), best)]
    i, j, most = left[0]
    return _compared_best_first(unit, _Pairs(order[i], order[j], most))


def _rounded(unit: Tensor, tile: int) -> list[_Rows]:
    """The rows tile by tile: in int8 where products of it are fast, each tile at a scale of its own."""
    on_cpu, d_in = unit.device.type == "cpu", unit.shape[1]
    fits = d_in < 2**17  # so that no sum of products leaves int32
    in_int8 = on_cpu and fits and int8_speed_up() >= MIN_SPEED_UP
    # Another setting than "highest" lets PyTorch multiply in TF32 or bfloat16.
    is_exact = torch.get_float32_matmul_precision() == "highest" or unit.dtype == torch.float64
    slack = 2.5e-6 if in_int8 or is_exact else 5e-3  # of the products and of the comparison in full
    tiles = []
    for first, rows in zip(range(0, len(unit), tile), unit.split(tile), strict=True):
        where, scale, error = slice(first, first + len(rows)), 1.0, slack
        if in_int8:
            scale = rows.abs().max().item() / 127 or 1.0
            whole = (rows / scale).round()
            error += torch.linalg.vector_norm(rows - whole * scale, dim=1).max().item()
            rows = torch.nn.functional.pad(whole.to(torch.int8), (0, -d_in % 16))
        tiles.append(_Rows(where, rows, scale, error))
    return tiles


def _candidates(a: _Rows, b: _Rows, best: Tensor, unit: Tensor, order: Tensor) -> _Pairs:
    """Pairs of the two tiles that may be neighbours; raises `best`, what each row has found at least."""
    products = (
        int8_product(a.rough, b.rough) if a.rough.dtype == torch.int8 else a.rough @ b.rough.mT
    )
    scale, margin = a.scale * b.scale, a.error + b.error + a.error * b.error
    if a is b:
        products.fill_diagonal_(-(2**31))  # far below any product
    for rows, along in ((a, 1), (b, 0)):
        here = best[rows.where]
        here.copy_(torch.maximum(here, products.amax(along) * scale - margin))
    of_a, of_b = (_least((best[rows.where] - margin) / scale, products.dtype) for rows in (a, b))
    found = true_indices(at_least(products, torch.minimum(of_a[:, None], of_b)))
    if len(found) > _CANDIDATES * len(products):
        # Nearly all rows are alike here: the best of each is enough.
        found = _best_of_tile(unit[order[a.where]], unit[order[b.where]], is_diagonal=a is b)
    most = products.flatten().index_select(0, found) * scale + margin
    n_columns = products.shape[1]
    return _Pairs(found // n_columns + a.where.start, found % n_columns + b.where.start, most)


def _least(products: Tensor, dtype: torch.dtype) -> Tensor:
    """Bounds on products from below, in the products' own type."""
    return products.to(dtype) if dtype.is_floating_point else products.floor().to(dtype)


def _best_of_tile(a: Tensor, b: Tensor, *, is_diagonal: bool) -> Tensor:
    """Where in a @ b.mT each row's and each column's largest cosine is; in float64, on the processor."""
    cosines = a.cpu().double() @ b.cpu().double().mT
    if is_diagonal:
        cosines.fill_diagonal_(-torch.inf)
    rows, columns = (torch.arange(n) for n in cosines.shape)
    by_row = rows * len(columns) + cosines.argmax(1)
    by_column = cosines.argmax(0) * len(columns) + columns
    return torch.cat([by_row, by_column]).to(a.device)


def _still_likely(pairs: _Pairs, best: Tensor) -> _Pairs:
    """Those of which one row may have no better partner, when each has one of cosine `best`, (d_sae,)."""
    i, j, most = pairs
    least = torch.minimum(best.index_select(0, i), best.index_select(0, j))
    likely = true_indices(at_least(most, least))
    return _Pairs(*(part.index_select(0, likely) for part in pairs))


def _compared_best_first(unit: Tensor, pairs: _Pairs) -> Neighbours:
    """As `_compared`; each row's likeliest pair goes first, since most others then need no comparison."""
    i, j, most = pairs
    top = torch.full_like(unit[:, 0], -torch.inf)
    for rows in (i, j):
        top.scatter_reduce_(0, rows, most.to(top.dtype), "amax")
    first = _still_likely(pairs, top)
    return _compared(unit, _still_likely(pairs, _compared(unit, first).cosine))


def _compared(unit: Tensor, pairs: _Pairs) -> Neighbours:
    """Each row's best partner among pairs that hold every row; ties: the lowest."""
    i, j, _ = pairs
    in_parts = zip(i.split(_PAIRS), j.split(_PAIRS), strict=True)
    rows_of = partial(unit.index_select, 0)
    cosines = torch.cat([torch.linalg.vecdot(rows_of(a), rows_of(b)) for a, b in in_parts])
    cosines = cosines.cpu().repeat(2)
    rows, partners = torch.cat([i, j]).cpu(), torch.cat([j, i]).cpu()
    best = torch.full((len(unit),), -torch.inf, dtype=unit.dtype)
    best = best.scatter_reduce(0, rows, cosines, "amax")
    is_best = cosines == best[rows]
    index = torch.full((len(unit),), len(unit), dtype=torch.long)
    index = index.scatter_reduce(0, rows[is_best], partners[is_best], "amin")
    return Neighbours(index.to(unit.device), best.to(unit.device))
