"""Synthetic activations at size: many features of very different frequency, in trees that gate them.

In the style of SynthSAEBench (Chanin & Garriga-Alonso, arXiv 2602.14687). Features are *drawn, then
gated*: each is drawn on or off, and then a child is switched off where its parent is off, and of
the children of one parent that are on only one stays. So a child fires less often than it is drawn, unlike in
`FeatureTree`, where a child's probability is conditional on its parent.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from c2r_core.data.toy import ToySample
from c2r_core.seeds import mix_seeds

CALIBRATION_SAMPLES = 2**16
"""Samples from which firing rates and the norm factor are measured, once."""


class Calibration(NamedTuple):
    """Measured on CALIBRATION_SAMPLES samples: P(feature on), shape (n_features,), and E‖x‖²."""

    firing_rates: Tensor
    mean_square_norm: float


@dataclass(frozen=True)
class GatedForest:
    """Features of Zipf-distributed frequency, some in trees, in more directions than d_in can hold apart.

    Features are numbered by frequency, the most frequent first. Those of the trees come level by level,
    roots first, spread evenly among those on their own, so that a child is rarer than its parent. The
    defaults have a sixteenth of the features of SynthSAEBench-16k; `SynthSAEBench` is that definition itself.

    Parameters
    ----------
    n_features, d_in : int
        Number of true features; width of x.
    n_roots, branching, depth : int
        Trees, children of every feature that is no leaf, and levels below the root; n_roots 0 makes
        all features independent of each other.
    zipf_exponent, max_probability, min_probability : float
        A feature of rank r is meant to fire with min + (max − min) · z(r), z being r^(−exponent) scaled
        to 1 at the first rank and 0 at the last.
    compensates : bool
        Whether a child is drawn more often by 1 / P(parent on), to make up for its parent's gate. What
        exclusive siblings take from each other is not made up for.
    correlation_rank, correlation_scale : int, float
        Gaussian copula of the draws: its correlation matrix is A Aᵀ off the diagonal, the entries of A,
        (n_features, rank), normal with this standard deviation. Scale 0 draws independently.
    parent_cosine : float
        Cosine of a child's direction with its parent's, in [0, 1); otherwise directions are random.
    first_magnitude, last_magnitude : float
        Mean magnitude of the most and of the least frequent feature, linear in rank between. A child's
        magnitude is scaled by its parent's over the parent's mean.
    magnitude_sd : float
        A feature's own standard deviation is abs(magnitude_sd · (1 + normal)), drawn once.
    bias_norm : float
        Norm of a constant that is added to every x.
    seed : int
        Draws directions, correlations, standard deviations and the constant.
    """

    n_features: int = 1024
    d_in: int = 96
    n_roots: int = 8
    branching: int = 4
    depth: int = 3
    zipf_exponent: float = 0.5
    max_probability: float = 0.4
    min_probability: float = 5e-4
    compensates: bool = True
    correlation_rank: int = 25
    correlation_scale: float = 0.1
    parent_cosine: float = 0.0
    first_magnitude: float = 5.0
    last_magnitude: float = 4.0
    magnitude_sd: float = 0.5
    bias_norm: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_features < 2 or self.d_in < 1:
            raise ValueError(
                f"n_features is {self.n_features} and d_in {self.d_in}; expected at least 2 and 1."
            )
        if not 0 < self.min_probability < self.max_probability < 1:
            raise ValueError(
                f"min_probability is {self.min_probability} and max_probability "
                f"{self.max_probability}; expected 0 < min < max < 1."
            )
        if self.n_roots < 0 or (self.n_roots and (self.branching < 2 or self.depth < 1)):
            raise ValueError(
                f"n_roots is {self.n_roots}, branching {self.branching}, depth {self.depth}; expected "
                "trees of at least 2 children and 1 level, or n_roots 0 for none."
            )
        if sum(self.level_sizes) > self.n_features:
            raise ValueError(
                f"{self.n_roots} trees hold {sum(self.level_sizes)} features, but n_features is "
                f"{self.n_features}: take fewer roots or levels."
            )
        if not 0 <= self.parent_cosine < 1:
            raise ValueError(f"parent_cosine is {self.parent_cosine}; expected 0 to below 1.")
        if not 0 <= self.correlation_rank * self.correlation_scale**2 < 0.9:
            raise ValueError(
                f"correlation_rank {self.correlation_rank} times correlation_scale "
                f"{self.correlation_scale} squared is 0.9 or more: nothing of a feature's own draw "
                "would be left. Lower one of them."
            )

    # -- the ground truth -------------------------------------------------------------------

    @property
    def level_sizes(self) -> list[int]:
        """Features on each level of the forest, roots first."""
        return [self.n_roots * self.branching**level for level in range(self.depth + 1)]

    @cached_property
    def levels(self) -> list[Tensor]:
        """Feature numbers on each level; the children of a level's i-th feature are the next level's
        entries i · branching to (i + 1) · branching − 1."""
        in_forest = sum(self.level_sizes)
        places = torch.linspace(0, self.n_features - 1, in_forest).round().long()
        return list(places.split(self.level_sizes)) if in_forest else []

    @cached_property
    def parents(self) -> Tensor:
        """Each feature's parent, −1 for roots and features on their own, (n_features,)."""
        parents = torch.full((self.n_features,), -1)
        for above, below in zip(self.levels, self.levels[1:], strict=False):
            parents[below] = above.repeat_interleave(self.branching)
        return parents

    @cached_property
    def probabilities(self) -> Tensor:
        """How often each feature is meant to fire, by Zipf's law, (n_features,), float64."""
        ranks = torch.arange(1, self.n_features + 1, dtype=torch.float64)
        weights = ranks**-self.zipf_exponent
        share = (weights - weights[-1]) / (weights[0] - weights[-1])
        return self.min_probability + (self.max_probability - self.min_probability) * share

    @cached_property
    def drawn_probabilities(self) -> Tensor:
        """P(feature is drawn on), before any gate, (n_features,), float64."""
        drawn = self.probabilities.clone()
        if self.compensates:
            child = self.parents >= 0
            drawn[child] = (drawn[child] / self.probabilities[self.parents[child]]).clamp(max=1)
        return drawn

    @cached_property
    def directions(self) -> Tensor:
        """True directions, rows of norm 1, (n_features, d_in)."""
        normal = torch.randn(self.n_features, self.d_in, generator=self._generator(0))
        directions = torch.nn.functional.normalize(normal, dim=-1)
        if self.parent_cosine:
            for below in self.levels[1:]:
                above = directions[self.parents[below]]
                own = directions[below]
                own = own - (own * above).sum(-1, keepdim=True) * above
                own = torch.nn.functional.normalize(own, dim=-1)
                c = self.parent_cosine
                directions[below] = c * above + (1 - c**2) ** 0.5 * own
        return directions

    @cached_property
    def mean_magnitudes(self) -> Tensor:
        """Mean magnitude of each feature before its parent scales it, (n_features,)."""
        return torch.linspace(self.first_magnitude, self.last_magnitude, self.n_features)

    @cached_property
    def firing_rates(self) -> Tensor:
        """P(feature on) after all gates, (n_features,), float64; measured."""
        return self._calibration.firing_rates

    @property
    def norm_factor(self) -> float:
        """The c for which E‖c·x‖² = 1; measured."""
        return self._calibration.mean_square_norm**-0.5

    # -- samples ----------------------------------------------------------------------------

    def sample(self, n: int, generator: Generator) -> ToySample:
        """Draw n samples; x is not normalised."""
        common = torch.randn(n, self.correlation_rank, generator=generator)
        own = torch.randn(n, self.n_features, generator=generator)
        on = own > torch.addmm(self._own_threshold, common, self._own_loadings)
        if self.levels:
            self._gate(on)
        # Few features are on now, so all that follows is about these alone, sample by sample.
        drawn = on.flatten().nonzero().squeeze(1)
        which = self._order[drawn % self.n_features]
        entries = drawn - drawn % self.n_features + which  # in the flattened features
        noise = torch.randn(len(which), generator=generator)
        magnitudes = (self.mean_magnitudes[which] + self._magnitude_sds[which] * noise).relu()
        parents = self.parents[which]
        features = torch.zeros(n * self.n_features)
        features[entries] = magnitudes.where(parents < 0, 0.0)
        children = ((parents >= 0) & (magnitudes > 0)).nonzero().squeeze(1)
        children = children[self._wins(entries[children], n, generator)]
        levels = self._level_of[which[children]]
        for level in range(1, len(self.levels)):
            own, above = children[levels == level], parents[children[levels == level]]
            scale = features[entries[own] - which[own] + above] / self.mean_magnitudes[above]
            features[entries[own]] = magnitudes[own] * scale
        first = torch.searchsorted(drawn, torch.arange(n) * self.n_features)
        x = torch.nn.functional.embedding_bag(
            which, self.directions, first, mode="sum", per_sample_weights=features[entries]
        )
        return ToySample(x + self._constant, features.unflatten(0, (n, self.n_features)))

    def _gate(self, on: Tensor) -> None:
        """Switch off, in place, features whose parent is off; on (n, n_features) is in `_order`."""
        *above, _ = by_level = on[:, : sum(self.level_sizes)].split(self.level_sizes, dim=1)
        for parents, children in zip(above, by_level[1:], strict=True):
            children.unflatten(1, (-1, self.branching)).logical_and_(parents.unsqueeze(2))

    def _wins(self, children: Tensor, n: int, generator: Generator) -> Tensor:
        """Which of the children that are on stays, of those of one parent in one sample: drawn by lot.

        Children are entries of the flattened features of n samples; bool, as they are.
        """
        which = children % self.n_features
        families = children - which + self.parents[which]
        lots = torch.rand(len(children), generator=generator, dtype=torch.float64)
        best = torch.zeros(n * self.n_features, dtype=torch.float64)
        return lots == best.scatter_reduce(0, families, lots, "amax")[families]

    @cached_property
    def _order(self) -> Tensor:
        """Features level by level, then those on their own: a level is a block, (n_features,)."""
        alone = torch.ones(self.n_features, dtype=torch.bool)
        for level in self.levels:
            alone[level] = False
        return torch.cat([*self.levels, alone.nonzero().squeeze(1)])

    @cached_property
    def _level_of(self) -> Tensor:
        """Level of each feature, 0 for those on their own, (n_features,)."""
        levels = torch.zeros(self.n_features, dtype=torch.long)
        for number, features in enumerate(self.levels):
            levels[features] = number
        return levels

    @cached_property
    def _own_threshold(self) -> Tensor:
        """What a feature's own draw must be above where the common draws are 0, in `_order`."""
        return (self._thresholds / self._own_sd)[self._order]

    @cached_property
    def _own_loadings(self) -> Tensor:
        """How much the common draws change that, (rank, n_features) in `_order`."""
        return -(self._loadings / self._own_sd.unsqueeze(1))[self._order].mT

    @cached_property
    def _loadings(self) -> Tensor:
        shape = self.n_features, self.correlation_rank
        loadings = self.correlation_scale * torch.randn(shape, generator=self._generator(1))
        squares = loadings.square().sum(1, keepdim=True)
        return loadings * (0.99 / squares.clamp(min=0.99)).sqrt()  # each keeps a draw of its own

    @cached_property
    def _own_sd(self) -> Tensor:
        return (1 - self._loadings.square().sum(1)).sqrt()

    @cached_property
    def _thresholds(self) -> Tensor:
        return torch.special.ndtri(1 - self.drawn_probabilities).float()

    @cached_property
    def _magnitude_sds(self) -> Tensor:
        normal = torch.randn(self.n_features, generator=self._generator(2))
        return (self.magnitude_sd * (1 + normal)).abs()

    @cached_property
    def _constant(self) -> Tensor:
        normal = torch.randn(self.d_in, generator=self._generator(3))
        return self.bias_norm * torch.nn.functional.normalize(normal, dim=0)

    @cached_property
    def _calibration(self) -> Calibration:
        generator = self._generator(4)
        fired = torch.zeros(self.n_features, dtype=torch.float64)
        squares, at_once = 0.0, 1024
        for _ in range(CALIBRATION_SAMPLES // at_once):
            sample = self.sample(at_once, generator)
            fired += (sample.features > 0).sum(0)
            squares += float(sample.x.double().square().sum())
        return Calibration(fired / CALIBRATION_SAMPLES, squares / CALIBRATION_SAMPLES)

    def _generator(self, stream: int) -> Generator:
        # Not the seeds themselves: an SAE of the same seed would start on the true directions.
        return torch.Generator().manual_seed(mix_seeds(self.seed, 10**6 + stream))
