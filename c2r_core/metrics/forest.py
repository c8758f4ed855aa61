"""How well a dictionary recovers the features of a `GatedForest`: as SynthSAEBench counts, and by how often
a feature fires."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    """Share that some latent matches at |cosine| > 0.9."""
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


@torch.no_grad()
def evaluate_forest(
    sae: AnySAE,
    forest: GatedForest,
    *,
    n_samples: int,
    generator: Generator,
    band_edges: Sequence[float] = (0.0, 1e-3, 3e-3, 1e-2, 3e-2, 1.0),
) -> ForestReport:
    """Measure one SAE trained on batches of a forest, streaming over fresh samples.

    Parameters
    ----------
    sae : any object with encode, decode and W_dec
        One of this package as `train` leaves it (it takes x · sae.norm_factor) or folded; any other takes x.
    n_samples : int
        Fresh samples, at least 1024.
    generator : torch.Generator
        Draws them.
    band_edges : sequence of float
        Rising rates; a band without features is left out.

    Raises ValueError if fewer samples are asked for. Raises NotEvaluable if no latent fires: nothing can be
    measured.
    """
    if n_samples < AT_ONCE:
        raise ValueError(f"n_samples is {n_samples}; expected at least {AT_ONCE}.")
    rows = torch.nn.functional.normalize(sae.W_dec.detach().float().cpu(), dim=-1)
    cosines = rows @ forest.directions.cpu().T
    nearest_feature, best_latent = cosines.abs().argmax(1), cosines.argmax(0)
    counts = _Counts(forest, nearest_feature, best_latent)
    scale = trained_scale(sae)

    def batches() -> Iterator[Tensor]:
        for _ in range(n_samples // AT_ONCE):
            sample = forest.sample(AT_ONCE, generator)
            x = sample.x * scale
            counts.add(sae.encode(x.to(sae.W_dec.device)).cpu() > 0, sample.features.cpu() > 0)
            yield x

    reconstruction, _ = evaluate_reconstruction(sae, batches())
    if not counts.fired.any():
        raise NotEvaluable(
            "No latent fires on the samples; the SAE is dead and cannot be measured."
        )
    absorption, n_parents = counts.absorption(cosines.amax(0) > 0.5)
    precision, recall, f1 = detection(
        counts.latent_hits, counts.fired, counts.present[nearest_feature]
    )
    return ForestReport(
        l0=reconstruction.l0,
        true_l0=float(counts.present.sum() / reconstruction.total_tokens_eval_reconstruction),
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
        bands=_bands(forest, cosines, counts, band_edges),
    )


class _Counts:
    """Who fired where, summed over batches in float64."""

    def __init__(self, forest: GatedForest, nearest_feature: Tensor, best_latent: Tensor) -> None:
        self.nearest_feature, self.best_latent = nearest_feature, best_latent
        self.parent_of = forest.parents.cpu()
        self.parents = self.parent_of.unique()
        self.parents = self.parents[self.parents >= 0]  # -1 is no parent
        self.fired, self.latent_hits = torch.zeros(2, len(nearest_feature), dtype=torch.float64)
        self.present, self.feature_hits = torch.zeros(2, len(best_latent), dtype=torch.float64)
        # For each parent, without and with a child: samples, and those in which its latent is silent.
        self.cases, self.silent = torch.zeros(2, 2, len(self.parents), dtype=torch.float64)

    def add(self, fires: Tensor, on: Tensor) -> None:
        self.fired += fires.sum(0)
        self.present += on.sum(0)
        self.latent_hits += (fires & on[:, self.nearest_feature]).sum(0)
        self.feature_hits += (fires[:, self.best_latent] & on).sum(0)
        child = self.parent_of >= 0
        n_children = torch.zeros(on.shape).index_add(1, self.parent_of[child], on[:, child].float())
        with_child, parent_on = n_children[:, self.parents] > 0, on[:, self.parents]
        silent = ~fires[:, self.best_latent[self.parents]]
        for row, condition in enumerate((parent_on & ~with_child, parent_on & with_child)):
            self.cases[row] += condition.sum(0)
            self.silent[row] += (condition & silent).sum(0)

    def absorption(self, has_latent: Tensor) -> tuple[float | None, int]:
        """Mean over the evaluable parents, and their number."""
        usable = (self.cases >= MIN_CASES).all(0) & has_latent[self.parents]
        if not usable.any():
            return None, 0
        alone, with_child = (self.silent / self.cases.clamp(min=1))[:, usable]
        return float((with_child - alone).mean()), int(usable.sum())


def _bands(
    forest: GatedForest, cosines: Tensor, counts: _Counts, edges: Sequence[float]
) -> tuple[FrequencyBand, ...]:
    fired = counts.fired[counts.best_latent]
    _, _, f1 = detection(counts.feature_hits, fired, counts.present)
    best, rates = cosines.amax(0).double(), forest.firing_rates.cpu()
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
