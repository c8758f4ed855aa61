"""Synthetic activations whose true features are known.

A tree of features in the style of Noa Nabeshima's toy model: a child's probability is conditional
on its parent being on. (Benchmarks that draw children independently and then switch them off with
their parent have other firing rates for the same numbers.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Generator, Tensor


class ToySample(NamedTuple):
    """x (n, d_in) and the magnitudes (n, n_features) of the true features it is made of."""

    x: Tensor
    features: Tensor


class Features(Protocol):
    """Synthetic features that can be sampled from: `FeatureTree`, `GatedForest`."""

    @property
    def norm_factor(self) -> float:
        """The c for which E‖c·x‖² = 1."""
        ...

    def sample(self, n: int, generator: Generator) -> ToySample:
        """Draw n samples; x is not normalised."""
        ...


@dataclass(frozen=True)
class FeatureTree:
    """Parents with mutually exclusive children, and single features, on directions of norm 1.

    Features are numbered parents first, then each parent's children in turn, then the singles. The
    singles may come in groups that are correlated, in direction or in when they are on; everything
    else is orthogonal and independent.

    Parameters
    ----------
    d_in : int
        Width of x; at least the number of features, since directions are independent.
    n_parents, children_per_parent, n_singles : int
    parent_probability : float
        P(parent on), independent of the other parents.
    parent_alone : float
        P(no child on | parent on); otherwise exactly one child is on, each equally likely.
    single_probability : float
        P(single on), independent of all that is not in its group.
    magnitude_sd : float
        A feature that is on has magnitude abs(1 + magnitude_sd · normal).
    seed : int
        Draws the directions.
    group_size : int
        Singles in a group; divides n_singles.
    group_cosine : float
        Cosine of the directions of two singles of a group, in [0, 1).
    group_correlation : float
        Correlation of two singles of a group being on, in [0, 1]: each takes, with probability
        √group_correlation, its group's common draw instead of its own.
    """

    d_in: int = 64
    n_parents: int = 8
    children_per_parent: int = 4
    n_singles: int = 20
    parent_probability: float = 0.15
    parent_alone: float = 0.3
    single_probability: float = 0.05
    magnitude_sd: float = 0.1
    seed: int = 0
    group_size: int = 1
    group_cosine: float = 0.0
    group_correlation: float = 0.0

    def __post_init__(self) -> None:
        shares = ("parent_probability", "parent_alone", "single_probability", "group_correlation")
        for name in shares:
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name} is {value}; expected a number between 0 and 1.")
        if self.group_size < 1 or self.n_singles % self.group_size:
            raise ValueError(
                f"group_size is {self.group_size}; expected a divisor of the {self.n_singles} singles."
            )
        if not 0 <= self.group_cosine < 1:
            raise ValueError(
                f"group_cosine is {self.group_cosine}; expected a cosine from 0 to below 1."
            )
        if self.n_features > self.d_in:
            raise ValueError(
                f"{self.n_features} features need d_in >= {self.n_features} to be orthonormal, "
                f"but d_in is {self.d_in}: raise d_in or take fewer features."
            )

    @property
    def n_children(self) -> int:
        """Number of child features of all parents together."""
        return self.n_parents * self.children_per_parent

    @property
    def n_features(self) -> int:
        """Number of true features."""
        return self.n_parents + self.n_children + self.n_singles

    @property
    def children(self) -> Tensor:
        """Feature numbers of each parent's children, (n_parents, children_per_parent)."""
        first = self.n_parents
        shape = self.n_parents, self.children_per_parent
        return torch.arange(first, first + self.n_children).reshape(shape)

    @cached_property
    def directions(self) -> Tensor:
        """True directions, rows of norm 1, (n_features, d_in); orthogonal but within a group."""
        generator = torch.Generator().manual_seed(self.seed)
        square = torch.randn(self.d_in, self.d_in, generator=generator)
        directions = torch.linalg.qr(square).Q[: self.n_features].contiguous()
        if self.group_cosine:
            first = self.n_features - self.n_singles
            directions[first:] = self._lean_together(directions[first:])
        return directions

    def _lean_together(self, singles: Tensor) -> Tensor:
        """Orthonormal rows, leant towards their group's sum until they have the group's cosine.

        The symmetric square root of a group's matrix of cosines, (1 − c)·1 + c·J with J all ones,
        does this: own · 1 + common · J.
        """
        size, cosine = self.group_size, self.group_cosine
        own = (1 - cosine) ** 0.5
        common = ((1 + (size - 1) * cosine) ** 0.5 - own) / size
        groups = singles.unflatten(0, (-1, size))
        return (own * groups + common * groups.sum(1, keepdim=True)).flatten(0, 1)

    @property
    def probabilities(self) -> Tensor:
        """P(feature on), (n_features,)."""
        child = self.parent_probability * (1 - self.parent_alone) / max(1, self.children_per_parent)
        return torch.tensor(
            [self.parent_probability] * self.n_parents
            + [child] * self.n_children
            + [self.single_probability] * self.n_singles
        )

    @property
    def norm_factor(self) -> float:
        """The c for which E‖c·x‖² = 1 (where magnitude_sd is well below 1, if directions lean)."""
        mean_square = float(self.probabilities.sum()) * (1 + self.magnitude_sd**2)
        p = self.single_probability
        both_on = p**2 + self.group_correlation * p * (1 - p)
        ordered_pairs = self.n_singles * (self.group_size - 1)
        return (mean_square + ordered_pairs * both_on * self.group_cosine) ** -0.5

    def sample(self, n: int, generator: Generator) -> ToySample:
        """Draw n samples; x is not normalised."""
        parents = torch.rand(n, self.n_parents, generator=generator) < self.parent_probability
        draw = torch.rand(n, self.n_parents, generator=generator)
        # The draw's part above parent_alone is cut into equal pieces, one for each child.
        piece = (draw - self.parent_alone) / (1 - self.parent_alone) * self.children_per_parent
        which = torch.where(parents & (draw >= self.parent_alone), piece, -1.0).floor().long()
        children = which.unsqueeze(-1) == torch.arange(self.children_per_parent)
        singles = self._draw_singles(n, generator) < self.single_probability
        on = torch.cat([parents, children.flatten(1), singles], dim=1)
        noise = torch.randn(n, self.n_features, generator=generator)
        features = torch.where(on, (1 + self.magnitude_sd * noise).abs(), 0.0)
        return ToySample(features @ self.directions, features)

    def _draw_singles(self, n: int, generator: Generator) -> Tensor:
        """A uniform number for every sample and single, (n, n_singles), alike within a group."""
        own = torch.rand(n, self.n_singles, generator=generator)
        if not self.group_correlation:
            return own
        n_groups = self.n_singles // self.group_size
        common = torch.rand(n, n_groups, generator=generator)
        takes_common = torch.rand(n, self.n_singles, generator=generator)
        return torch.where(
            takes_common < self.group_correlation**0.5,
            common.repeat_interleave(self.group_size, 1),
            own,
        )
