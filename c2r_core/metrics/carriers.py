"""The latent that carries a concept in each sample, and what the carriers of n samples say.

The definition is in the docstring of `c2r_core.metrics.assignment`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from c2r_core.errors import NotEvaluable
from c2r_core.metrics.encoding import encode_sparse
from c2r_core.saes.interface import AnySAE

if TYPE_CHECKING:
    from scipy.sparse import csr_array

N_HALVES = 1000
NO_CARRIER = -1

ROWS_AT_ONCE = 8192
"""Decoder rows that are in memory in float64 at a time."""


class CarrierRule(NamedTuple):
    """When the latent that writes most of a concept counts as its carrier; the defaults are version 1.0's."""

    min_cosine: float = 0.1
    """cos(w_i, u) is at least this."""
    min_share: float = 0.4
    """f_i (w_i · u) is at least this share of x · u."""


STANDARD_RULE = CarrierRule()


class Carried(NamedTuple):
    """What an SAE makes of n samples."""

    acts: csr_array
    """Feature activations, (n, d_sae)."""
    carriers: Tensor
    """Of each concept in each sample, (n_concepts, n)."""

    @property
    def n_live(self) -> int:
        """Latents that fire at all."""
        return len(np.unique(self.acts.indices))

    @property
    def l0(self) -> float:
        """Mean number of active latents per sample."""
        return self.acts.nnz / self.acts.shape[0]


def carry(
    sae: AnySAE,
    activations: Tensor,
    directions: Tensor,
    acts: csr_array | None = None,
    rule: CarrierRule = STANDARD_RULE,
) -> Carried:
    """The SAE's feature activations, unless they are at hand, and the `carriers` of each direction."""
    acts = encode_sparse(sae, activations) if acts is None else acts
    return Carried(acts, carriers(activations, acts, sae.W_dec, directions, rule))


def carriers(
    activations: Tensor,
    feature_acts: csr_array,
    W_dec: Tensor,
    directions: Tensor,
    rule: CarrierRule = STANDARD_RULE,
) -> Tensor:
    """The latent that carries each direction in each sample, or `NO_CARRIER` (−1): int, (n_concepts, n).

    `activations` are (n, d_in), `feature_acts` (n, d_sae), `W_dec` (d_sae, d_in) with rows of any norm, since
    scale may move between a latent's activation and its row; `directions` (n_concepts, d_in) of any norm.
    Nothing carries a direction that is zero. Ties go to the lowest number. Memory is that of one direction's
    products with the activations that are not zero, beside 8 bytes for each concept and latent or sample.

    >>> from scipy.sparse import csr_array
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> carriers(x, csr_array(x.numpy()), torch.eye(2), torch.tensor([[1.0, 0.0]]))
    tensor([[ 0, -1]])
    """
    tiny = torch.finfo(torch.float64).tiny
    units = directions.cpu().double()
    units = units / units.norm(dim=1, keepdim=True).clamp_min(tiny)
    along, norms = [], []
    for rows in W_dec.detach().split(ROWS_AT_ONCE):
        rows = rows.cpu().double()
        along.append(units @ rows.T)
        norms.append(rows.norm(dim=1))
    along = torch.cat(along, dim=1)
    cosines = along / torch.cat(norms).clamp_min(tiny)
    totals = (units @ activations.cpu().double().T).numpy()
    found = [
        _carriers_of_one(feature_acts, *of_one, rule)
        for of_one in zip(along.numpy(), cosines.numpy(), totals, strict=True)
    ]
    return torch.from_numpy(np.stack(found))


def _carriers_of_one(
    acts: csr_array, along: np.ndarray, cosine: np.ndarray, total: np.ndarray, rule: CarrierRule
) -> np.ndarray:
    """(n,); w_i · u and cos(w_i, u) are (d_sae,), x · u is (n,). Entries of a row rise by latent."""
    found = np.full(acts.shape[0], NO_CARRIER)
    fires = np.flatnonzero(np.diff(acts.indptr))
    if not len(fires):
        return found
    written = acts.data.astype(float) * along[acts.indices]
    most = np.maximum.reduceat(written, acts.indptr[fires])
    row_of = np.repeat(np.arange(len(fires)), np.diff(acts.indptr)[fires])
    at = np.flatnonzero(written == most[row_of])
    first = at[np.diff(row_of[at], prepend=-1) > 0]
    latent, total = acts.indices[first], total[fires]
    writes = (most >= rule.min_share * total) & (total > 0)
    counts = writes & (cosine[latent] >= rule.min_cosine)
    found[fires[counts]] = latent[counts]
    return found


def assignment_consistency(carried_by: Tensor) -> float:
    """AC = Σ n_i (n_i − 1) / (n (n − 1)) of n ≥ 2 samples carried by these latents: int, (n,), as of
    `carriers`.

    >>> assignment_consistency(torch.tensor([7, 7, 7, 2]))  # 6 of 12 ordered pairs agree
    0.5
    >>> assignment_consistency(torch.tensor([NO_CARRIER, NO_CARRIER]))
    0.0
    """
    _check_carriers(carried_by)
    return float(_consistency(carried_by[None])[0])


def consistency_interval(carried_by: Tensor, *, seed: int = 0) -> tuple[float, float]:
    """95 % interval of AC: the middle of what 1000 random halves of the n ≥ 4 samples score.

    A half drawn without replacement varies about the whole as the whole does about the truth (half-sampling,
    the delete-half jackknife of Shao & Wu 1989). A bootstrap would draw a sample twice, and a sample
    agrees with itself. Where no sample disagrees with another the interval has no width; see the page.
    """
    _check_carriers(carried_by, at_least=4)
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(N_HALVES, len(carried_by), generator=generator).argsort(1)
    scores = _consistency(carried_by[order[:, : len(carried_by) // 2]])
    low, high = scores.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def effective_latents(carried_by: Tensor) -> float | None:
    """exp(entropy) of the carriers: over how many equally busy latents the concept is spread.

    The entropy, in nats, is the plug-in estimate plus (K − 1) / 2n for K latents seen (Miller–Madow); it
    still falls short where there are more latents than samples (10 equal ones read 7.9 at n = 10).
    Samples without a carrier are left out; None if fewer than two have one.
    """
    _check_carriers(carried_by)
    counts = carried_by[carried_by != NO_CARRIER].unique(return_counts=True)[1]
    n = int(counts.sum())
    if n < 2:
        return None
    shares = counts.double() / n
    entropy = -(shares * shares.log()).sum() + (len(counts) - 1) / (2 * n)
    return float(entropy.exp())


def modal_latent(carried_by: Tensor) -> int | None:
    """The most frequent carrier (ties: the lowest number); None if no sample has one."""
    carried = carried_by[carried_by != NO_CARRIER]
    if not len(carried):
        return None
    latents, counts = carried.unique(return_counts=True)
    return int(latents[counts.argmax()])


def _consistency(carried_by: Tensor) -> Tensor:
    """AC of each row (..., n), float64."""
    n = carried_by.shape[-1]
    latents, codes = carried_by.unique(return_inverse=True)
    counts = torch.zeros(len(carried_by), len(latents), dtype=torch.float64)
    counts.scatter_add_(1, codes, torch.ones(codes.shape, dtype=torch.float64))
    counts = counts[:, latents != NO_CARRIER]
    return (counts * (counts - 1)).sum(1) / (n * (n - 1))


def _check_carriers(carried_by: Tensor, at_least: int = 2) -> None:
    if carried_by.ndim != 1 or len(carried_by) < at_least or carried_by.is_floating_point():
        raise ValueError(
            f"carried_by has shape {tuple(carried_by.shape)} and type {carried_by.dtype}; expected "
            f"the latents of at least {at_least} samples, as integers of shape (n,)."
        )


class Concepts(NamedTuple):
    """Samples, which of them hold each concept, and where it points; see `measure_assignment`."""

    activations: Tensor
    """(n, d_in)."""
    labels: Tensor
    """Bool, (n, n_concepts)."""
    directions: Tensor
    """(n_concepts, d_in)."""
    names: tuple[str, ...]


def check_concepts(concepts: Concepts, W_dec: Tensor) -> None:
    """Raise NotEvaluable if something is NaN or infinite, ValueError if it is not what `Concepts` says."""
    activations, labels, directions, names = concepts
    tensors = {
        "activations": activations,
        "labels": labels,
        "directions": directions,
        "the SAE's W_dec": W_dec,
    }
    shapes = [tuple(tensor.shape) for tensor in tensors.values()]
    if (
        any(len(shape) != 2 or 0 in shape for shape in shapes)
        or len(labels) != len(activations)
        or directions.shape != (labels.shape[1], activations.shape[1])
    ):
        given = ", ".join(f"{name} {shape}" for name, shape in zip(tensors, shapes, strict=True))
        raise ValueError(
            f"The shapes do not fit: {given}; expected (n, d_in), (n, n_concepts), (n_concepts, "
            "d_in) and (d_sae, d_in), none of them empty."
        )
    if labels.dtype != torch.bool:
        raise ValueError(f"labels are {labels.dtype}; expected bool, such as features > 0.")
    if len(names) != labels.shape[1]:
        raise ValueError(f"There are {len(names)} names for {labels.shape[1]} concepts.")
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise NotEvaluable(f"{name} hold NaN or infinite values.")
