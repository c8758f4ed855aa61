"""Latents of two dictionaries matched one to one, such that the sum of their cosines is largest."""

from __future__ import annotations

from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from c2r_core.losses.neighbours import check_decoder, unit_rows

EXACT_LIMIT = 16_384
"""Widest pair of dictionaries to match exactly: about 36 s of one core (4096: about 4.5 s)."""

# A block of cosines holds at most this many entries (64 MiB in float32).
_BLOCK_ENTRIES = 2**24


class Matching(NamedTuple):
    """One-to-one pairs of latents, in the order of the first dictionary; see `match_latents`."""

    latents_a: Tensor
    """Int, (n_pairs,), as `latents_b`; n_pairs is the size of the smaller dictionary."""
    latents_b: Tensor
    cosine: Tensor
    """Of the pair's decoder rows, signed, (n_pairs,)."""
    mean_at_most: float
    """No matching has a larger mean cosine; this one's own where it is exact."""


@torch.no_grad()
def match_latents(W_dec_a: Tensor, W_dec_b: Tensor, *, exact_limit: int = EXACT_LIMIT) -> Matching:
    """The one-to-one matching of decoder rows, (d_sae, d_in), with the largest sum of signed cosines.

    Up to `exact_limit`² pairs this is the optimum (Hungarian method, scipy). Wider dictionaries are matched
    in rounds: pairs that are each other's nearest are taken out, until the rest can be matched exactly. That
    mean cosine is a lower bound on the optimum; `mean_at_most` is an upper one, the mean of the best cosines
    if partners could be shared. Rows may have any norm; those of zero norm have cosine 0 to everything.

    Raises ValueError if a decoder has fewer than two rows, is not two-dimensional or holds a NaN, if their
    d_in differ, or if exact_limit is below 1.
    """
    if exact_limit < 1:
        raise ValueError(f"exact_limit is {exact_limit}; expected a positive number of latents.")
    rows_a, rows_b = (unit_rows(check_decoder(W_dec)).float().cpu() for W_dec in (W_dec_a, W_dec_b))
    if rows_a.ndim != 2 or rows_b.ndim != 2 or rows_a.shape[1] != rows_b.shape[1]:
        raise ValueError(
            f"The decoders have shapes {tuple(W_dec_a.shape)} and {tuple(W_dec_b.shape)}; expected "
            "(d_sae, d_in) with the same d_in."
        )
    pairs, left_a, left_b = [], torch.arange(len(rows_a)), torch.arange(len(rows_b))
    mean_at_most = None
    while len(left_a) * len(left_b) > exact_limit**2:
        best_of_a, best_of_b = _best_partners(rows_a[left_a], rows_b[left_b])
        if mean_at_most is None:
            n_pairs = min(len(rows_a), len(rows_b))
            best = (best_of_a.values, best_of_b.values)
            mean_at_most = min(float(v.topk(n_pairs).values.double().mean()) for v in best)
        partner = best_of_a.indices
        mutual = best_of_b.indices[partner] == torch.arange(len(left_a))
        pairs.append((left_a[mutual], left_b[partner[mutual]]))
        left_b = left_b[~torch.isin(left_b, pairs[-1][1])]
        left_a = left_a[~mutual]
    if len(left_a) and len(left_b):
        # Minus the cosines, since scipy would copy the whole matrix to maximise.
        found = linear_sum_assignment((-rows_a[left_a] @ rows_b[left_b].T).numpy())
        in_a, in_b = map(torch.from_numpy, found)
        pairs.append((left_a[in_a], left_b[in_b]))
    latents_a, latents_b = (torch.cat(side) for side in zip(*pairs, strict=True))
    latents_a, order = latents_a.sort()
    latents_b = latents_b[order]
    cosine = (rows_a[latents_a] * rows_b[latents_b]).sum(1)
    if mean_at_most is None:
        mean_at_most = float(cosine.double().mean())
    return Matching(latents_a, latents_b, cosine, mean_at_most)


class _Best(NamedTuple):
    values: Tensor
    indices: Tensor


def _best_partners(rows_a: Tensor, rows_b: Tensor) -> tuple[_Best, _Best]:
    """Each row's largest cosine with the other side, and with which (ties: the lowest index)."""
    best_of_b = _Best(torch.full((len(rows_b),), -torch.inf), torch.zeros(len(rows_b)).long())
    best_of_a = []
    block = max(1, _BLOCK_ENTRIES // len(rows_b))
    for start in range(0, len(rows_a), block):
        cosines = rows_a[start : start + block] @ rows_b.T
        best_of_a.append(cosines.max(1))
        values, indices = cosines.max(0)
        better = values > best_of_b.values
        best_of_b.values[better] = values[better]
        best_of_b.indices[better] = indices[better] + start
    return _Best(*(torch.cat(parts) for parts in zip(*best_of_a, strict=True))), best_of_b
