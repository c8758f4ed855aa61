"""How well a dictionary recovers the features of a `GatedForest`: as SynthSAEBench counts, and by how often
a feature fires."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from c2r_core.data.forest import GatedForest
from c2r_core.errors import NotEvaluable
from c2r_core.losses import nearest_neighbours
from c2r_core.metrics.reconstruction import evaluate_reconstruction
from c2r_core.metrics.toy import detection, mean_matched, trained_scale
from c2r_core.saes.interface import AnySAE

AT_ONCE = 1024
MIN_CASES = 30  # of a condition, below which its share is not evaluable


@dataclass(frozen=True)
class FrequencyBand:
    """Features that fire about equally often, and how well they are recovered."""

    lowest_rate: float
    highest_rate: float
    n_features: int
    recovery: float
    """Share that some latent matches at a cosine > 0.9."""
    best_cosine: float
    """Cosine with the latent of largest cosine, mean over features."""
    detector_f1: float
    """F1 of (that latent > 0) against the feature's presence, mean over features."""


@dataclass(frozen=True)
class ForestReport:
    """One SAE on fresh samples of a forest."""

    l0: float
    """Active latents per sample."""
    true_l0: float
    """True features per sample."""
    fvu: float
    """About the mean of x."""
    shrinkage: float
    """Mean ‖x̂‖ / ‖x‖."""
    live_share: float
    """Latents that fire at least once."""
    mcc: float
    """|cosine| of decoder rows and true directions, mean over the best one-to-one matching of as many pairs
    as the smaller side has (about a minute at 16 384 features and 4096 latents)."""
    uniqueness: float
    """Distinct nearest features, by |cosine| / latents."""
    precision: float
    """Of each latent against the presence of its nearest feature, mean over latents, 0 for one that never
    fires; so are recall and F1."""
    recall: float
    f1: float
    near_duplicates: float
    """Share of latents whose nearest other row is at cosine > 0.7."""
    absorption: float | None
    """P(parent's latent silent | parent and a child on) − P(it is silent | parent on, no child), mean over
    the parents of which some latent is nearest at cosine > 0.5 and both conditions hold in at least 30
    samples; null where there is none."""
    n_parents_evaluated: int
    bands: tuple[FrequencyBand, ...]
    """The features by how often they fire."""


@dataclass(frozen=True)
class ForestSample:
    """Held-out samples, and what all SAEs that are measured on them share. Made by `forest_sample`."""

    x: Tensor
    """(n, d_in), not normalised."""
    on: Tensor
    """Which features are on, bool (n, n_features)."""
    parents: Tensor
    """Numbers of the features that have children, (n_parents,)."""
    alone: Tensor
    """Parent on, none of its children on, bool (n, n_parents)."""
    with_child: Tensor
    """Parent on, and a child, bool (n, n_parents)."""
    present: Tensor
    """Samples in which each feature is on, (n_features,), float64."""


def forest_sample(forest: GatedForest, n_samples: int, generator: Generator) -> ForestSample:
    """Draw samples to measure SAEs on: as many whole blocks of AT_ONCE as n_samples has.

    Raises ValueError if n_samples is less than one block.
    """
    if n_samples < AT_ONCE:
        raise ValueError(f"n_samples is {n_samples}; expected at least {AT_ONCE}.")
    parent_of = forest.parents.cpu()
    child = parent_of >= 0  # -1 is no parent
    parents = parent_of[child].unique()
    blocks = []
    for _ in range(n_samples // AT_ONCE):
        sample = forest.sample(AT_ONCE, generator)
        on = sample.features.cpu() > 0
        n_children = torch.zeros(on.shape).index_add(1, parent_of[child], on[:, child].float())
        parent_on, with_child = on[:, parents], n_children[:, parents] > 0
        blocks.append((sample.x, on, parent_on & ~with_child, parent_on & with_child))
    x, on, alone, with_child = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return ForestSample(x, on, parents, alone, with_child, on.sum(0).double())


@torch.no_grad()
def evaluate_forest(
    sae: AnySAE,
    forest: GatedForest,
    sample: ForestSample,
    *,
    band_edges: Sequence[float] = (0.0, 1e-3, 3e-3, 1e-2, 3e-2, 1.0),
) -> ForestReport:
    """Measure one SAE trained on batches of a forest.

    Parameters
    ----------
    sae : any object with encode, decode and W_dec
        One of this package as `train` leaves it (it takes x · sae.norm_factor) or folded; any other takes x.
    sample : ForestSample
        Of this forest, from `forest_sample`.
    band_edges : sequence of float
        Rising rates; a band without features is left out.

    Raises NotEvaluable if no latent fires: nothing can be measured.
    """
    rows = torch.nn.functional.normalize(sae.W_dec.detach().float().cpu(), dim=-1)
    cosines = rows @ forest.directions.cpu().T
    nearest_feature, best_latent = cosines.abs().argmax(1), cosines.argmax(0)
    chunks = (sample.x * trained_scale(sae)).split(AT_ONCE)
    reconstruction, _ = evaluate_reconstruction(sae, chunks)
    fires = torch.cat([sae.encode(x.to(sae.W_dec.device)).cpu() > 0 for x in chunks])
    fired = fires.sum(0).double()
    if not fired.any():
        raise NotEvaluable(
            "No latent fires on the samples; the SAE is dead and cannot be measured."
        )
    absorption, n_parents = _absorption(sample, fires[:, best_latent[sample.parents]], cosines)
    hits = (fires & sample.on[:, nearest_feature]).sum(0).double()
    precision, recall, f1 = detection(hits, fired, sample.present[nearest_feature])
    hits = (fires[:, best_latent] & sample.on).sum(0).double()
    _, _, f1_of_features = detection(hits, fired[best_latent], sample.present)
    return ForestReport(
        l0=reconstruction.l0,
        true_l0=float(sample.present.sum() / len(sample.x)),
        fvu=reconstruction.fvu,
        shrinkage=reconstruction.l2_ratio,
        live_share=reconstruction.frac_alive,
        mcc=mean_matched(cosines.abs()),
        uniqueness=len(nearest_feature.unique()) / len(rows),
        precision=float(precision.mean()),
        recall=float(recall.mean()),
        f1=float(f1.mean()),
        near_duplicates=float((nearest_neighbours(rows).cosine > 0.7).double().mean()),
        absorption=absorption,
        n_parents_evaluated=n_parents,
        bands=_bands(forest.firing_rates.cpu(), cosines, f1_of_features, band_edges),
    )


def _absorption(sample: ForestSample, fires: Tensor, cosines: Tensor) -> tuple[float | None, int]:
    """Mean over the evaluable parents, and their number; fires (n, n_parents) is of the parents' latents."""
    conditions = (sample.alone, sample.with_child)
    cases = torch.stack([condition.sum(0) for condition in conditions])
    silent = torch.stack([(condition & ~fires).sum(0) for condition in conditions])
    usable = (cases >= MIN_CASES).all(0) & (cosines.amax(0) > 0.5)[sample.parents]
    if not usable.any():
        return None, 0
    alone, with_child = (silent.double() / cases.clamp(min=1))[:, usable]
    return float((with_child - alone).mean()), int(usable.sum())


def _bands(
    rates: Tensor, cosines: Tensor, f1: Tensor, edges: Sequence[float]
) -> tuple[FrequencyBand, ...]:
    best = cosines.amax(0).double()
    bands = []
    for low, high in zip(edges, edges[1:], strict=False):
        inside = (rates > low) & (rates <= high)
        if inside.any():
            bands.append(
                FrequencyBand(
                    lowest_rate=low,
                    highest_rate=high,
                    n_features=int(inside.sum()),
                    recovery=float((best[inside] > 0.9).double().mean()),
                    best_cosine=float(best[inside].mean()),
                    detector_f1=float(f1[inside].mean()),
                )
            )
    return tuple(bands)
