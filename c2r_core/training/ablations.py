"""C²R with one part changed: which term does what?

With ŵ_i, j = j(i) and s_i as in `c2r_core.losses.c2r`, and n_i = ‖w_i‖ · ‖f_{:,i}‖, C²R is
mean_i s_i (n_i + n_j). The ablations, each a mean over the latents i too:

    unweighted_sum   n_i + n_j                         without the similarity
    product          s_i n_i n_j                       bites only where both fire
    minimum          s_i min(n_i, n_j)                 the weaker of the pair alone
    co_activation    s_i Σ_b f_bi f_bj ‖w_i‖ ‖w_j‖     both fire in the same sample
    group_lasso      n_i                               without pairs at all

The product and the co-activation grow with the square of the activations and with the batch size, the
others as C²R does: their weights are not comparable with λ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from c2r_core.losses.neighbours import nearest_neighbours, neighbour_cosines
from c2r_core.saes.sparse import FeatureActs, SparseActs
from c2r_core.training.regularisers import check_schedule, register_regulariser, written_norms


@dataclass(frozen=True)
class _PairAblation:
    """A penalty on each latent and its nearest neighbour. Parameters are those of `C2R`."""

    weight: float | Sequence[float]
    every: int = 1
    start: int = 0
    chunk_size: int | None = None
    warmup: int = 0
    name: ClassVar[str]

    def __post_init__(self) -> None:
        check_schedule(self)

    def __call__(self, feature_acts: FeatureActs, W_dec: Tensor, generator: Generator) -> Tensor:
        """As in `Regulariser`."""
        index = nearest_neighbours(W_dec, chunk_size=self.chunk_size, generator=generator).index
        similarity = neighbour_cosines(W_dec, index).relu() ** 2
        return self.pair_costs(feature_acts, W_dec, index, similarity).mean(-1)

    def pair_costs(
        self, feature_acts: FeatureActs, W_dec: Tensor, index: Tensor, similarity: Tensor
    ) -> Tensor:
        """Cost of each latent with its neighbour; index, similarity and result are (..., d_sae)."""
        raise NotImplementedError


@register_regulariser
@dataclass(frozen=True)
class UnweightedSum(_PairAblation):
    """mean_i (n_i + n_j): C²R with every similarity taken as 1."""

    name: ClassVar[str] = "unweighted_sum"

    def pair_costs(self, feature_acts, W_dec, index, similarity):
        """As in `_PairAblation`."""
        norms = written_norms(feature_acts, W_dec)
        return norms + norms.gather(-1, index)


@register_regulariser
@dataclass(frozen=True)
class PairProduct(_PairAblation):
    """mean_i s_i n_i n_j."""

    name: ClassVar[str] = "product"

    def pair_costs(self, feature_acts, W_dec, index, similarity):
        """As in `_PairAblation`."""
        norms = written_norms(feature_acts, W_dec)
        return similarity * norms * norms.gather(-1, index)


@register_regulariser
@dataclass(frozen=True)
class PairMinimum(_PairAblation):
    """mean_i s_i min(n_i, n_j)."""

    name: ClassVar[str] = "minimum"

    def pair_costs(self, feature_acts, W_dec, index, similarity):
        """As in `_PairAblation`."""
        norms = written_norms(feature_acts, W_dec)
        return similarity * torch.minimum(norms, norms.gather(-1, index))


@register_regulariser
@dataclass(frozen=True)
class CoActivation(_PairAblation):
    """mean_i s_i Σ_b f_bi f_bj ‖w_i‖ ‖w_j‖; needs the dense activations, and makes them if it must."""

    name: ClassVar[str] = "co_activation"

    def pair_costs(self, feature_acts, W_dec, index, similarity):
        """As in `_PairAblation`."""
        acts = feature_acts.to_dense() if isinstance(feature_acts, SparseActs) else feature_acts
        written = acts * torch.linalg.vector_norm(W_dec, dim=-1).unsqueeze(-2)
        partners = written.gather(-1, index.unsqueeze(-2).expand(written.shape))
        return similarity * (written * partners).sum(-2)


@register_regulariser
@dataclass(frozen=True)
class GroupLasso:
    """mean_i n_i, an ℓ2,1 norm over the batch. Parameters are those of `C2R`."""

    weight: float | Sequence[float]
    every: int = 1
    start: int = 0
    warmup: int = 0
    name: ClassVar[str] = "group_lasso"

    def __post_init__(self) -> None:
        check_schedule(self)

    def __call__(self, feature_acts: FeatureActs, W_dec: Tensor, generator: Generator) -> Tensor:
        """As in `Regulariser`."""
        return written_norms(feature_acts, W_dec).mean(-1)
