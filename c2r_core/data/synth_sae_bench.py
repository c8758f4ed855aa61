"""SynthSAEBench-16k (Chanin & Garriga-Alonso, arXiv 2602.14687): the world of the published benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from c2r_core.data.forest import GatedForest


@dataclass(frozen=True)
class SynthSAEBench(GatedForest):
    """A `GatedForest` as SynthSAEBench defines it; the defaults are those of SynthSAEBench-16k.

    Three things differ from a plain `GatedForest`. The trees take the most frequent ranks, level by level, so
    that features on their own are the rarest. Where children compensate, they make up for their siblings too.
    And directions are pushed apart. The definition is that of the paper and of version 2 of the released
    model; version 1 does not scale children by their parents. The numbers drawn are not those of that model.

    Parameters
    ----------
    apart_steps, apart_lr : int, float
        Steps of Adam that push directions apart, and their size; see `pushed_apart`.
    others
        As in `GatedForest`, but for those three things.
    """

    n_features: int = 16384
    d_in: int = 768
    n_roots: int = 128
    apart_steps: int = 100
    apart_lr: float = 3e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.apart_steps < 0 or self.apart_lr <= 0:
            raise ValueError(
                f"apart_steps is {self.apart_steps} and apart_lr {self.apart_lr}; expected at least 0 "
                "steps, of a size above 0."
            )

    @cached_property
    def levels(self) -> list[Tensor]:
        """Feature numbers on each level: the first ranks are the roots, the next their children."""
        in_forest = torch.arange(sum(self.level_sizes))
        return list(in_forest.split(self.level_sizes)) if len(in_forest) else []

    @cached_property
    def drawn_probabilities(self) -> Tensor:
        """P(feature is drawn on), before any gate, (n_features,), float64.

        With q_i = P(i meant to fire) / P(parent meant to fire), a child that compensates is drawn with
        q_i (1 + Σ q_j), the sum over its siblings, or always if that is above 1.
        """
        drawn = self.probabilities.clone()
        if self.compensates:
            for above, below in zip(self.levels, self.levels[1:], strict=False):
                children = self.probabilities[below].unflatten(0, (-1, self.branching))
                given = children / self.probabilities[above].unsqueeze(1)
                drawn[below] = (given * (1 + given.sum(1, keepdim=True) - given)).flatten()
        return drawn.clamp(max=1)

    @cached_property
    def directions(self) -> Tensor:
        """True directions, rows of norm 1, (n_features, d_in)."""
        at_random = GatedForest.directions.func(
            self
        )  # not kept as this object's, should the pushing stop
        return pushed_apart(at_random, self.apart_steps, self.apart_lr)


def pushed_apart(directions: Tensor, steps: int, lr: float) -> Tensor:
    """Directions after a few steps of Adam against all squared cosines, scaled to norm 1; (n, d).

    The loss is Σ_{i≠j} (w_i · w_j)² + n Σ_i (‖w_i‖² − 1)². Its gradient goes through the (d, d) matrix WᵀW,
    so no matrix of n by n is made.
    """
    rows = directions.clone().requires_grad_()
    optimizer = torch.optim.Adam([rows], lr=lr)
    for _ in range(steps):
        with torch.no_grad():
            squares = rows.square().sum(1, keepdim=True)
            others = rows @ (rows.mT @ rows) - squares * rows
            rows.grad = 4 * (others + len(rows) * (squares - 1) * rows)
        optimizer.step()
    return torch.nn.functional.normalize(rows.detach(), dim=-1)
