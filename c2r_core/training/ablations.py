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

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from c2r_core.losses.neighbours import nearest_neighbours, pair_cosines
from c2r_core.saes.sparse import FeatureActs, SparseActs
from c2r_core.training.regularisers import Regulariser, register_regulariser, written_norms

# Cost of each latent from s_i, n_i and n_j, all (..., d_sae).
PAIR_COSTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "unweighted_sum": lambda s, n_i, n_j: n_i + n_j,
    "product": lambda s, n_i, n_j: s * n_i * n_j,
    "minimum": lambda s, n_i, n_j: s * torch.minimum(n_i, n_j),
}


@dataclass(frozen=True)
class PairAblation(Regulariser):
    """The mean over the latents of `PAIR_COSTS[name]`. Parameters are those of `C2R`."""

    _: KW_ONLY
    chunk_size: int | None = None

    def __call__(self, feature_acts: FeatureActs, W_dec: Tensor, generator: Generator) -> Tensor:
        """As in `Regulariser`."""
        index = nearest_neighbours(W_dec, chunk_size=self.chunk_size, generator=generator).index
        similarity = pair_cosines(W_dec, index).relu() ** 2
        return self.pair_costs(feature_acts, W_dec, index, similarity).mean(-1)

    def pair_costs(
        self, feature_acts: FeatureActs, W_dec: Tensor, index: Tensor, similarity: Tensor
    ) -> Tensor:
        """Cost of each latent with its neighbour; index, similarity and result are (..., d_sae)."""
        norms = written_norms(feature_acts, W_dec)
        return PAIR_COSTS[self.name](similarity, norms, norms.gather(-1, index))


for _name in PAIR_COSTS:
    register_regulariser(type(_name, (PairAblation,), {"name": _name}))


@register_regulariser
class CoActivation(PairAblation):
    """mean_i s_i Σ_b f_bi f_bj ‖w_i‖ ‖w_j‖; needs the dense activations, and makes them if it must."""

    name: ClassVar[str] = "co_activation"

    def pair_costs(self, feature_acts, W_dec, index, similarity):
        """As in `PairAblation`."""
        acts = feature_acts.to_dense() if isinstance(feature_acts, SparseActs) else feature_acts
        written = acts * torch.linalg.vector_norm(W_dec, dim=-1).unsqueeze(-2)
        partners = written.gather(-1, index.unsqueeze(-2).expand(written.shape))
        return similarity * (written * partners).sum(-2)


@register_regulariser
class GroupLasso(Regulariser):
    """mean_i n_i, an ℓ2,1 norm over the batch."""

    name: ClassVar[str] = "group_lasso"

    def __call__(self, feature_acts: FeatureActs, W_dec: Tensor, generator: Generator) -> Tensor:
        """As in `Regulariser`."""
        return written_norms(feature_acts, W_dec).mean(-1)
