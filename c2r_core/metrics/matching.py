"""Latents of two dictionaries matched one to one, such that the sum of their cosines is largest."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from c2r_core.losses.neighbours import check_decoder, unit_rows

EXACT_LIMIT = 16_384
"""Widest pair of dictionaries to match exactly."""

DENSE_LIMIT = 4096
"""Widest pair of dictionaries whose cosines are all held at once; of wider ones candidates are matched."""

_N_CANDIDATES = 32
"""Nearest partners of each row that are matched first; further ones are added where they could be needed."""
_TOLERANCE = 1e-6

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

    Up to `exact_limit`² pairs this is the optimum: the Hungarian method up to DENSE_LIMIT² pairs, beyond them
    on candidates that are proved to suffice (both scipy). Wider dictionaries are matched in rounds: pairs
    that are each other's nearest are taken out, until the rest can be matched exactly. That mean cosine is a
    lower bound on the optimum; `mean_at_most` is an upper one, the mean of the best cosines if partners could
    be shared. Rows may have any norm; those of zero norm have cosine 0 to everything.

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
        in_a, in_b = _matched(rows_a[left_a], rows_b[left_b])
        pairs.append((left_a[in_a], left_b[in_b]))
    latents_a, latents_b = (torch.cat(side) for side in zip(*pairs, strict=True))
    latents_a, order = latents_a.sort()
    latents_b = latents_b[order]
    cosine = (rows_a[latents_a] * rows_b[latents_b]).sum(1)
    if mean_at_most is None:
        mean_at_most = float(cosine.double().mean())
    return Matching(latents_a, latents_b, cosine, mean_at_most)


def _matched(rows_a: Tensor, rows_b: Tensor) -> tuple[Tensor, Tensor]:
    """The optimum: the rows of a that are matched, rising, and those of b that they are matched with."""
    from scipy.optimize import linear_sum_assignment  # slow to import

    if len(rows_a) * len(rows_b) <= DENSE_LIMIT**2:
        # Minus the cosines, since scipy would copy the whole matrix to maximise.
        found = linear_sum_assignment((-rows_a @ rows_b.T).numpy())
    elif len(rows_a) <= len(rows_b):
        found = np.arange(len(rows_a)), _match_candidates(rows_a, rows_b)
    else:
        partners = _match_candidates(rows_b, rows_a)
        order = partners.argsort()
        found = partners[order], order
    in_a, in_b = map(torch.from_numpy, found)
    return in_a, in_b


def _match_candidates(rows_a: Tensor, rows_b: Tensor) -> np.ndarray:
    """The partner of each row of a, of which there are no more than of b, in the optimal matching.

    Only the `_N_CANDIDATES` nearest partners of each row, of either side, are matched. The matching's dual
    prices then say which rows of a could still gain by another partner: those pairs are added, until there
    are none. By the duality of linear programs it is then the optimum over all pairs.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    nearest, n_b = _nearest(rows_a, rows_b), len(rows_b)
    everyone = np.arange(len(rows_a))
    pairs = [everyone * n_b + everyone]  # so that all can be matched
    pairs += [(everyone[:, None] * n_b + nearest.of_a).ravel()]
    pairs += [(nearest.of_b * n_b + np.arange(n_b)[:, None]).ravel()]
    n_known = 0
    while True:
        known = np.unique(np.concatenate(pairs))
        a, b = np.divmod(known, n_b)
        cosine = _cosines(rows_a, rows_b, a, b)
        # Weights are positive, since scipy takes a zero for no pair.
        graph = csr_array((2 - cosine, (a, b)), shape=(len(rows_a), n_b))
        partners = min_weight_full_bipartite_matching(graph)[1].astype("int64")
        own = _cosines(rows_a, rows_b, everyone, partners)
        prices = _prices(a, b, cosine - own[a], partners, n_b)
        worth = own - prices[partners]
        # Every pair that is no candidate has a cosine of at most `last_of_a`, and prices are not negative.
        doubtful = np.flatnonzero(worth < nearest.last_of_a - _TOLERANCE)
        added = []
        for rows in np.array_split(doubtful, 1 + len(doubtful) * n_b // _BLOCK_ENTRIES):
            gains = rows_a[rows] @ rows_b.T - torch.from_numpy(prices).float()
            best = gains.topk(min(_N_CANDIDATES, n_b), dim=1)
            better = best.values.numpy() > worth[rows, None] + _TOLERANCE
            added.append((rows[:, None] * n_b + best.indices.numpy())[better])
        if not any(map(len, added)) or len(known) == n_known:
            return partners
        n_known = len(known)
        pairs = [a * n_b + b, *added]


def _cosines(rows_a: Tensor, rows_b: Tensor, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines of pairs, float64, a block at a time."""
    at_once = max(1, _BLOCK_ENTRIES // rows_a.shape[1])
    starts = range(0, len(a), at_once)
    parts = [
        (rows_a[a[i : i + at_once]] * rows_b[b[i : i + at_once]]).sum(1).double() for i in starts
    ]
    return torch.cat(parts).numpy()


def _prices(
    a: np.ndarray, b: np.ndarray, gain: np.ndarray, partners: np.ndarray, n_b: int
) -> np.ndarray:
    """The lowest prices (n_b,), none negative, at which no row of a would rather have another candidate.

    `gain` is the cosine of each candidate pair minus that of the matched pair of the same row.
    """
    order = b.argsort(kind="stable")
    b, gain, from_ = b[order], gain[order], partners[a[order]]
    starts = np.flatnonzero(np.diff(b, prepend=-1))
    prices = np.zeros(n_b)
    for _ in range(n_b + 1):  # so many steps has the longest chain of prices that raise each other
        asked = np.maximum.reduceat(prices[from_] + gain, starts)
        rises = asked > prices[b[starts]] + 1e-10
        if not rises.any():
            break
        prices[b[starts[rises]]] = asked[rises]
    return prices


class _Nearest(NamedTuple):
    of_a: np.ndarray
    """The nearest rows of b to each row of a, (n_a, m)."""
    of_b: np.ndarray
    """The nearest rows of a to each row of b, (n_b, m)."""
    last_of_a: np.ndarray
    """The lowest cosine among `of_a`, (n_a,)."""


def _nearest(rows_a: Tensor, rows_b: Tensor) -> _Nearest:
    m = min(_N_CANDIDATES, len(rows_a))
    of_a, last = [], []
    best_of_b = torch.full((len(rows_b), m), -torch.inf), torch.zeros(len(rows_b), m).long()
    block = max(m, _BLOCK_ENTRIES // len(rows_b))
    for start in range(0, len(rows_a), block):
        cosines = rows_a[start : start + block] @ rows_b.T
        best = cosines.topk(m, dim=1)
        of_a.append(best.indices)
        last.append(best.values[:, -1])
        turned = cosines.T.contiguous()
        best = turned.topk(min(m, turned.shape[1]), dim=1)
        values = torch.cat([best_of_b[0], best.values], 1)
        indices = torch.cat([best_of_b[1], best.indices + start], 1)
        best = values.topk(m, dim=1)
        best_of_b = best.values, indices.gather(1, best.indices)
    return _Nearest(torch.cat(of_a).numpy(), best_of_b[1].numpy(), torch.cat(last).double().numpy())


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
