"""How well a dictionary recovers the features of a `GatedForest`: as SynthSAEBench counts, and by how often
a feature fires."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Generator, Tensor

from c2r_core.data.forest import GatedForest
from c2r_core.errors import NotEvaluable
from c2r_core.saes.interface import AnySAE

AT_ONCE = 1024
MIN_CASES = 30  # of a condition, below which its share is not evaluable


@dataclass(frozen=True)
class FrequencyBand:
    """Features that fire about equally often, and how well they are recovered.

    recovery is the share that some latent matches at |cosine| > 0.9, best_cosine the mean of their best
    matches, detector_f1 the mean F1 of (best latent > 0) against the feature's presence.
    """

    lowest_rate: float
    highest_rate: float
    n_features: int
    recovery: float
    best_cosine: float
    detector_f1: float


@dataclass(frozen=True)
class BenchmarkReport:
    """What `evaluate_benchmark` measures; each value is defined there."""

    l0: float
    true_l0: float
    fvu: float
    shrinkage: float
    live_share: float
    mcc: float
    uniqueness: float
    precision: float
    recall: float
    f1: float
    near_duplicates: float
    absorption: float | None
    n_parents_evaluated: int
    bands: list[FrequencyBand]


@torch.no_grad()
def evaluate_benchmark(
    sae: AnySAE,
    forest: GatedForest,
    *,
    n_samples: int,
    generator: Generator,
    band_edges: Sequence[float] = (0.0, 1e-3, 3e-3, 1e-2, 3e-2, 1.0),
) -> BenchmarkReport:
    """Measure one SAE trained on batches of a forest, streaming over fresh samples.

    - mcc: |cosine| of decoder rows and true directions, mean over the best one-to-one matching of as
      many pairs as the smaller side has (about a minute at 16 384 features and 4096 latents).
    - precision, recall, f1: each latent against the presence of the feature it is nearest to by
      |cosine|; means over latents, 0 for one that never fires.
    - uniqueness: distinct nearest features / latents.
    - near_duplicates: share of latents whose nearest other row is at cosine > 0.7.
    - l0, true_l0: active latents, and true features, per sample.
    - shrinkage: mean ‖x̂‖ / ‖x‖. fvu is about the mean of x. live_share: latents that fire at least once.
    - absorption: P(parent's latent silent | parent and a child on) − P(it is silent | parent on, no
      child), mean over the parents of which some latent is nearest at cosine > 0.5 and both
      conditions hold in at least 30 samples; None where there is none.
    - bands: the features by how often they fire; a feature's best latent is the one of largest cosine.

    Parameters
    ----------
    sae : any object with encode, decode and W_dec
        Takes x · forest.norm_factor.
    n_samples : int
        Fresh samples, at least 1024.
    band_edges : sequence of float
        Rising rates; a band without features is left out.

    Raises
    ------
    ValueError
        If fewer samples are asked for.
    NotEvaluable
        If no latent fires: nothing can be measured.
    """
    if n_samples < AT_ONCE:
        raise ValueError(f"n_samples is {n_samples}; expected at least {AT_ONCE}.")
    rows = torch.nn.functional.normalize(sae.W_dec.cpu(), dim=-1)
    cosines = rows @ forest.directions.T
    nearest_feature = cosines.abs().argmax(1)
    best_latent = cosines.argmax(0)
    sums = _Sums(len(rows), forest)
    for _ in range(n_samples // AT_ONCE):
        sample = forest.sample(AT_ONCE, generator)
        x = sample.x * forest.norm_factor
        acts = sae.encode(x.to(sae.W_dec.device)).cpu()
        x_hat = sae.decode(acts.to(sae.W_dec.device)).cpu()
        sums.add(x, x_hat, acts > 0, sample.features > 0, nearest_feature, best_latent)
    if not sums.fired.any():
        raise NotEvaluable("No latent fires on the samples; the SAE is dead and cannot be measured.")

    absolute = cosines.abs().numpy()
    matched = absolute[linear_sum_assignment(absolute, maximize=True)]
    absorption, n_parents = sums.absorption(cosines.amax(0) > 0.5)
    n, both = sums.n, sums.latent_hits
    present = sums.present[nearest_feature]
    return BenchmarkReport(
        l0=float(sums.fired.sum() / n),
        true_l0=float(sums.present.sum() / n),
        fvu=float(sums.error / (sums.squares - sums.total.square().sum() / n)),
        shrinkage=float(sums.norm_ratio / n),
        live_share=float((sums.fired > 0).double().mean()),
        mcc=float(matched.mean()),
        uniqueness=len(nearest_feature.unique()) / len(rows),
        precision=float((both / sums.fired.clamp(min=1)).mean()),
        recall=float((both / present.clamp(min=1)).mean()),
        f1=float((2 * both / (sums.fired + present).clamp(min=1)).mean()),
        near_duplicates=_near_duplicates(rows),
        absorption=absorption,
        n_parents_evaluated=n_parents,
        bands=_bands(forest, cosines, sums, best_latent, band_edges),
    )


class _Sums:
    """Running sums over batches, in float64."""

    def __init__(self, n_latents: int, forest: GatedForest) -> None:
        self.forest = forest
        self.n = 0
        self.error = self.squares = self.norm_ratio = 0.0
        self.total = torch.zeros(forest.d_in, dtype=torch.float64)
        self.fired = torch.zeros(n_latents, dtype=torch.float64)
        self.latent_hits = torch.zeros(n_latents, dtype=torch.float64)
        self.present = torch.zeros(forest.n_features, dtype=torch.float64)
        self.feature_hits = torch.zeros(forest.n_features, dtype=torch.float64)
        self.parents = forest.parents.unique()[1:]  # -1 is no parent
        # For each parent, without and with a child: samples, and those in which its latent is silent.
        self.cases = torch.zeros(2, len(self.parents), dtype=torch.float64)
        self.silent = torch.zeros(2, len(self.parents), dtype=torch.float64)

    def add(
        self,
        x: Tensor,
        x_hat: Tensor,
        fires: Tensor,
        on: Tensor,
        nearest_feature: Tensor,
        best_latent: Tensor,
    ) -> None:
        self.n += len(x)
        self.error += float((x - x_hat).double().square().sum())
        self.squares += float(x.double().square().sum())
        self.total += x.double().sum(0)
        self.norm_ratio += float(
            (x_hat.norm(dim=1) / x.norm(dim=1).clamp(min=1e-12)).double().sum()
        )
        self.fired += fires.sum(0)
        self.present += on.sum(0)
        self.latent_hits += (fires & on[:, nearest_feature]).sum(0)
        self.feature_hits += (fires[:, best_latent] & on).sum(0)
        if len(self.parents):
            child = self.forest.parents >= 0
            with_child = torch.zeros(on.shape).index_add(
                1, self.forest.parents[child], on[:, child].float()
            )
            with_child = with_child[:, self.parents] > 0
            parent_on = on[:, self.parents]
            silent = ~fires[:, best_latent[self.parents]]
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
    forest: GatedForest,
    cosines: Tensor,
    sums: _Sums,
    best_latent: Tensor,
    edges: Sequence[float],
) -> list[FrequencyBand]:
    f1 = 2 * sums.feature_hits / (sums.fired[best_latent] + sums.present).clamp(min=1)
    best = cosines.amax(0).double()
    bands = []
    for low, high in zip(edges, edges[1:], strict=False):
        inside = (forest.firing_rates > low) & (forest.firing_rates <= high)
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
    return bands


def _near_duplicates(rows: Tensor) -> float:
    cosines = rows @ rows.T
    return float((cosines.fill_diagonal_(-1).amax(1) > 0.7).double().mean())
