"""Each latent's closest other latent, by the direction of its decoder row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor

# A block of cosines holds at most this many entries (64 MiB in float32), however wide the dictionary.
_BLOCK_ENTRIES = 2**24


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
        None searches all latents, in blocks, so that memory stays bounded.
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
    unit = unit_rows(W_dec)
    d_sae, d_in = unit.shape[-2:]
    flat = unit.reshape(-1, d_in)
    first_row = torch.arange(0, len(flat), d_sae, device=flat.device).reshape(*index.shape[:-1], 1)
    partners = flat.index_select(0, (index + first_row).flatten())
    return (flat * partners).sum(-1).reshape(index.shape)


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
    if not torch.isfinite(W_dec).all():
        raise ValueError(
            "W_dec holds a NaN or an infinity; the training has diverged: go back to a checkpoint "
            "or lower lr."
        )
    return W_dec


def _search(unit: Tensor) -> Neighbours:
    d_sae = unit.shape[-2]
    n_copies = unit[..., 0, 0].numel()
    block = max(1, _BLOCK_ENTRIES // (d_sae * n_copies))
    found = []
    with torch.autocast(unit.device.type, enabled=False):
        for start in range(0, d_sae, block):
            cosines = unit[..., start : start + block, :] @ unit.mT
            cosines.diagonal(offset=start, dim1=-2, dim2=-1).fill_(-torch.inf)
            found.append(cosines.max(-1))
    return Neighbours(
        index=torch.cat([f.indices for f in found], dim=-1),
        cosine=torch.cat([f.values for f in found], dim=-1).clamp_(-1.0, 1.0),
    )
