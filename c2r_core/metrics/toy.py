"""How well a dictionary recovers features that are known, on toy data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from c2r_core.data.toy import FeatureTree, ToySample
from c2r_core.errors import NotEvaluable
from c2r_core.saes.interface import AnySAE


@dataclass(frozen=True)
class ToyReport:
    """Means over features, each defined in `evaluate_toy`.

    Absorption of a parent is silent_with_child − silent_alone: how much more often its latent is
    silent, parent on, when a child is on too.
    """

    mcc: float
    recovery: float
    uniqueness: float
    detector_precision: float
    detector_recall: float
    detector_f1: float
    latents_per_feature: float
    latents_per_parent: float
    split_share: float
    split_share_at_08: float
    near_duplicates: float
    nearest_cosine: float
    absorption: float
    silent_with_child: float
    silent_alone: float
    child_latent_to_parent: float
    fvu: float
    l0: float
    live_share: float


@torch.no_grad()
def evaluate_toy(sae: AnySAE, tree: FeatureTree, sample: ToySample) -> ToyReport:
    """Measure one SAE trained on `ToyBatches(tree, ...)`.

    - mcc: |cosine| of decoder rows and true directions, mean over the best one-to-one matching.
    - recovery: share of true directions with a latent at |cosine| > 0.9.
    - uniqueness: distinct features among the live latents' best matches / live latents.
    - detector_precision, _recall, _f1: (latent > 0) against the feature's presence, means over
      features.
    - latents_per_feature, latents_per_parent: live latents at cosine > 0.6 with the direction.
    - split_share, split_share_at_08: share of features with two or more such latents, at cosine
      0.6 and 0.8.
    - nearest_cosine: cosine of a live latent with its nearest live neighbour, mean over latents.
    - near_duplicates: share of live latents for which it is > 0.7.
    - absorption and its two terms; child_latent_to_parent: cosine of a child's latent with the
      parent's direction, 0 where nothing is absorbed.
    - fvu, l0 and live_share (latents that fire at least once) on the sample.

    A feature's latent is the live latent of largest cosine with its direction. What is about parents
    is NaN in a tree that has none.

    Parameters
    ----------
    sae : any object with encode, decode and W_dec
        Takes x · tree.norm_factor.
    tree : FeatureTree
    sample : ToySample
        Held-out samples, x not normalised.

    Raises
    ------
    NotEvaluable
        If no latent fires on the sample: nothing can be measured.
    """
    x = sample.x * tree.norm_factor
    acts = sae.encode(x)
    live = (acts > 0).any(0)
    if not live.any():
        raise NotEvaluable("No latent fires on the sample; the SAE is dead and cannot be measured.")
    rows = torch.nn.functional.normalize(sae.W_dec[live], dim=-1)
    cosines = rows @ tree.directions.T
    best = cosines.argmax(0)
    on, fires = sample.features > 0, acts[:, live][:, best] > 0

    both = (fires & on).double()
    absolute = (torch.nn.functional.normalize(sae.W_dec, dim=-1) @ tree.directions.T).abs().numpy()
    matched = absolute[linear_sum_assignment(-absolute)]
    latents = (cosines > 0.6).sum(0).double()
    parents = slice(0, tree.n_parents)
    silent_with_child, silent_alone = _silence(tree, on, fires)
    nearest = (rows @ rows.T).fill_diagonal_(-1).max(1).values
    child_cosines = cosines[best[tree.children], torch.arange(tree.n_parents).unsqueeze(1)]
    error = (x - sae.decode(acts)).double().square().sum()
    spread = (x - x.mean(0)).double().square().sum()
    return ToyReport(
        mcc=float(matched.mean()),
        recovery=float((absolute.max(0) > 0.9).mean()),
        uniqueness=len(cosines.argmax(1).unique()) / len(rows),
        detector_precision=float(both.sum(0).div(fires.sum(0).clamp(min=1)).mean()),
        detector_recall=float(both.sum(0).div(on.sum(0).clamp(min=1)).mean()),
        detector_f1=float((2 * both.sum(0) / (fires.sum(0) + on.sum(0)).clamp(min=1)).mean()),
        latents_per_feature=float(latents.mean()),
        latents_per_parent=float(latents[parents].mean()),
        split_share=float((latents >= 2).double().mean()),
        split_share_at_08=float(((cosines > 0.8).sum(0) >= 2).double().mean()),
        near_duplicates=float((nearest > 0.7).double().mean()),
        nearest_cosine=float(nearest.mean()),
        absorption=float((silent_with_child - silent_alone).nanmean()),
        silent_with_child=float(silent_with_child.nanmean()),
        silent_alone=float(silent_alone.nanmean()),
        child_latent_to_parent=float(child_cosines.mean()),
        fvu=float(error / spread),
        l0=float((acts != 0).sum(1).double().mean()),
        live_share=float(live.double().mean()),
    )


def _silence(tree: FeatureTree, on: Tensor, fires: Tensor) -> tuple[Tensor, Tensor]:
    """P(parent's latent silent | parent on, and a child on / no child on), each (n_parents,).

    NaN for a parent that the sample never shows so: it is not evaluable, and left out of means.
    """
    parent_on = on[:, : tree.n_parents]
    silent = ~fires[:, : tree.n_parents]
    child_on = on[:, tree.children].any(-1)
    with_child, alone = parent_on & child_on, parent_on & ~child_on

    def share(condition: Tensor) -> Tensor:
        return (silent & condition).sum(0).double() / condition.sum(0)

    return share(with_child), share(alone)
