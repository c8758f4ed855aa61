"""Matryoshka BatchTopK SAE: nested dictionaries, each of which must reconstruct alone
(Bussmann et al., arXiv 2503.17547)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from c2r_core.saes.base import reconstruction_loss
from c2r_core.saes.files import register
from c2r_core.saes.sparse import FeatureActs, SparseActs, decode_groups
from c2r_core.saes.topk import BatchTopKSAE

GROUP_FRACTIONS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)


@register
class MatryoshkaBatchTopKSAE(BatchTopKSAE):
    """BatchTopK whose first groups of latents must reconstruct x without the later ones.

    The reconstruction loss is the mean over the groups g of ‖x − x̂_g‖², x̂_g by the latents of
    groups 1 to g. The kept activations are chosen once, among all latents, and revival works on what
    all of them leave over. Each group is decoded once, and the prefixes are running sums.

    Parameters
    ----------
    d_in, d_sae, k, seed
        As in `BatchTopKSAE`.
    group_fractions : sequence of float
        Shares of the latents, from the most general group on, which sum to 1. Groups end at the
        latents nearest to their cumulated shares.

    Attributes
    ----------
    group_sizes : list of int
        Latents of each group; they sum to d_sae.
    """

    architecture = "matryoshka_batch_topk"
    hyper_parameters = ("k", "group_fractions")

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int,
        group_fractions: Sequence[float] = GROUP_FRACTIONS,
        *,
        seed: int | Sequence[int] = 0,
    ) -> None:
        super().__init__(d_in, d_sae, k, seed=seed)
        self.group_fractions = tuple(group_fractions)
        self.group_sizes = _group_sizes(self.group_fractions, d_sae)

    def reconstruct(self, x: Tensor, feature_acts: FeatureActs) -> tuple[Tensor, Tensor]:
        """Mean over the prefixes of their reconstruction loss, and the reconstruction by all."""
        if isinstance(feature_acts, SparseActs):
            written = decode_groups(feature_acts, self.W_dec, self.group_sizes).unbind(1)
        else:
            groups = (
                feature_acts.split(self.group_sizes, -1),
                self.W_dec.split(self.group_sizes, -2),
            )
            written = [acts @ rows for acts, rows in zip(*groups, strict=True)]
        prefixes = [*accumulate(written, initial=self.b_dec.unsqueeze(-2))][1:]
        errors = [reconstruction_loss(x, x_hat) for x_hat in prefixes]
        return torch.stack(errors).mean(0), prefixes[-1]


def _group_sizes(fractions: tuple[float, ...], d_sae: int) -> list[int]:
    ends = [round(share * d_sae) for share in accumulate(fractions)]
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    if abs(sum(fractions) - 1) > 1e-6 or sum(sizes) != d_sae:
        raise ValueError(
            f"group_fractions sum to {sum(fractions):g}, so the group sizes {sizes} sum to "
            f"{sum(sizes)}, not to d_sae={d_sae}; expected fractions that sum to 1."
        )
    if min(sizes) < 1:
        raise ValueError(
            f"group_fractions {fractions} give the group sizes {sizes} at d_sae={d_sae}; every "
            "group needs a latent: take a larger d_sae or fewer groups."
        )
    return sizes
