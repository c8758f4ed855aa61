"""How well a dictionary recovers features that are known, on toy data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from c2r_core.data.toy import FeatureTree, ToySample
from c2r_core.errors import NotEvaluable
from c2r_core.losses import nearest_neighbours
from c2r_core.metrics.reconstruction import evaluate_reconstruction
from c2r_core.saes.interface import AnySAE


@dataclass(frozen=True)
class ToyReport:
    """Means over features. A feature's latent is the live latent of largest cosine with its direction; what
    is about parents is NaN in a tree that has none."""

    mcc: float
    """|cosine| of decoder rows and true directions, mean over the best one-to-one matching."""
    recovery: float
    """Share of true directions with a latent at |cosine| > 0.9."""
    uniqueness: float
    """Distinct features among the live latents' best matches / live latents."""
    detector_precision: float
    """Of (latent > 0) against the feature's presence, mean over features; so are recall and F1."""
    detector_recall: float
    detector_f1: float
    detector_best_f1: float
    """F1 of (latent > t) at each latent's best threshold t ≥ 0 on this sample: what is left when a latent
    only leaks a little where its feature is absent."""
    latents_per_feature: float
    """Live latents at cosine > 0.6 with the direction."""
    latents_per_parent: float
    split_share: float
    """Share of features with two or more such latents."""
    split_share_at_08: float
    """The same at cosine > 0.8."""
    near_duplicates: float
    """Share of live latents whose nearest live neighbour is at cosine > 0.7."""
    nearest_cosine: float
    """Cosine with the nearest live neighbour, mean over live latents; NaN with a single one."""
    absorption: float
    """silent_with_child − silent_alone: how much more often a parent's latent is silent, parent on, when a
    child is on too."""
    silent_with_child: float
    silent_alone: float
    child_latent_to_parent: float
    """Cosine of a child's latent with the parent's direction: 0 where nothing is absorbed."""
    fvu: float
    l0: float
    live_share: float
    """Latents that fire at least once on the sample."""


def trained_scale(sae: AnySAE) -> float:
    """What an SAE's inputs are to be multiplied by: an SAE of this package says so, others take them raw."""
    return float(getattr(sae, "norm_factor", 1.0))


def mean_matched(cosines: Tensor) -> float:
    """Mean cosine over the one-to-one matching of rows and columns with the largest sum."""
    from scipy.optimize import linear_sum_assignment  # slow to import

    values = cosines.numpy()
    return float(values[linear_sum_assignment(values, maximize=True)].mean())


def detection(hits: Tensor, fires: Tensor, present: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Precision, recall and F1 from counts, hits in float64; 0 where there is nothing to divide by."""
    precision, recall = hits / fires.clamp(min=1), hits / present.clamp(min=1)
    return precision, recall, 2 * hits / (fires + present).clamp(min=1)


@torch.no_grad()
def evaluate_toy(sae: AnySAE, tree: FeatureTree, sample: ToySample) -> ToyReport:
    """Measure one SAE trained on `ToyBatches(tree, ...)`; each value is defined at its field.

    Parameters
    ----------
    sae : any object with encode, decode and W_dec
        One of this package as `train` leaves it (it takes x · sae.norm_factor) or folded; any other takes x.
    sample : ToySample
        Held-out samples, x not normalised.

    Raises NotEvaluable if no latent fires on the sample: nothing can be measured.
    """
    x = sample.x * trained_scale(sae)
    reconstruction, _ = evaluate_reconstruction(sae, [x])
    acts = sae.encode(x.to(sae.W_dec.device)).cpu()
    live = (acts > 0).any(0)
    if not live.any():
        raise NotEvaluable("No latent fires on the sample; the SAE is dead and cannot be measured.")
    directions = tree.directions.cpu()
    rows = torch.nn.functional.normalize(sae.W_dec.detach().float().cpu(), dim=-1)
    absolute = (rows @ directions.T).abs()
    rows = rows[live]
    cosines = rows @ directions.T
    best = cosines.argmax(0)
    own = acts[:, live][:, best]
    on, fires = sample.features.cpu() > 0, own > 0
    precision, recall, f1 = detection((fires & on).sum(0).double(), fires.sum(0), on.sum(0))
    latents = (cosines > 0.6).sum(0).double()
    nearest = nearest_neighbours(rows).cosine if len(rows) > 1 else torch.tensor([torch.nan])
    silent_with_child, silent_alone = _silence(tree, on, fires)
    child_cosines = cosines[best[tree.children], torch.arange(tree.n_parents).unsqueeze(1)]
    return ToyReport(
        mcc=mean_matched(absolute),
        recovery=float((absolute.numpy().max(0) > 0.9).mean()),
        uniqueness=len(cosines.argmax(1).unique()) / len(rows),
        detector_precision=float(precision.mean()),
        detector_recall=float(recall.mean()),
        detector_f1=float(f1.mean()),
        detector_best_f1=float(_best_f1(own, on).mean()),
        latents_per_feature=float(latents.mean()),
        latents_per_parent=float(latents[: tree.n_parents].mean()),
        split_share=float((latents >= 2).double().mean()),
        split_share_at_08=float(((cosines > 0.8).sum(0) >= 2).double().mean()),
        near_duplicates=float((nearest > 0.7).double().mean()),
        nearest_cosine=float(nearest.mean()),
        absorption=float((silent_with_child - silent_alone).nanmean()),
        silent_with_child=float(silent_with_child.nanmean()),
        silent_alone=float(silent_alone.nanmean()),
        child_latent_to_parent=float(child_cosines.mean()),
        fvu=reconstruction.fvu,
        l0=reconstruction.l0,
        live_share=reconstruction.frac_alive,
    )


def _best_f1(acts: Tensor, on: Tensor) -> Tensor:
    """Largest F1 of (acts > t) over thresholds t ≥ 0, column by column of (n, n_features), float64."""
    sorted_acts, order = acts.sort(dim=0, descending=True)
    hits = on.gather(0, order).cumsum(0).double()
    n_above = torch.arange(1, len(acts) + 1).unsqueeze(1)
    f1 = 2 * hits / (n_above + on.sum(0))
    # A threshold lies between two activations that differ, and not below 0.
    below = torch.cat([sorted_acts[1:], torch.full_like(sorted_acts[:1], -torch.inf)])
    return f1.where((sorted_acts > 0) & (sorted_acts > below), 0.0).amax(0)


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
