"""Other forms of C²R: who moves, what is charged, and from which likeness on.

C²R and OrtSAE charge every latent for its nearest neighbour. With ŵ_i the unit decoder row and j a neighbour
of i,

    L = (1/F) Σ_i Σ_j  max(0, ŵ_i · ŵ_j − margin)² · charge(i, j)

and C²R is charge = n_i + n_j, OrtSAE charge = 1. Two observations lead to other forms. The gradient of C²R
moves *both* rows of a pair, so that a general latent is pushed off its true direction because a specific one
has swallowed it. And it reaches neighbours that are no more alike than random directions are, where nothing
is redundant. So here a form says:

- `moves`: "both" rows, or the "rarer" latent's alone, by the norm over the batch;
- `charge`: "norms", as in C²R; "held norms", the same without gradient, so that nothing is shrunk;
  "constant", as in OrtSAE; "silent partner", n_i over the samples in which j is silent and n_j over those in
  which i is, without gradient, so that a general and a specific latent that fire together cost nothing;
- `margin`: the cosine below which nothing is charged;
- `n_neighbours`: how many of the nearest latents are charged for;
- `fade_start`, `fade_steps`: from which step on, and in how many steps, the weight falls to 0.

`PairPenalty(weight)` is C²R. This module is an experiment: study `forms` compares them.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Generator, Tensor

from c2r_core.losses.neighbours import nearest_neighbours, unit_rows
from c2r_core.saes.sparse import FeatureActs, SparseActs
from c2r_core.training.regularisers import Regulariser, register_regulariser, written_norms

Charge = Literal["norms", "held norms", "constant", "silent partner"]
Moves = Literal["both", "rarer"]


@register_regulariser
@dataclass(frozen=True)
class PairPenalty(Regulariser):
    """A form of C²R; see the module. Its parameters are those of `Regulariser` and the module's list.

    Raises
    ------
    ValueError
        If charge or moves is unknown, the margin is not in [0, 1), or a number is out of range.
    """

    _: KW_ONLY
    charge: Charge = "norms"
    moves: Moves = "both"
    margin: float = 0.0
    n_neighbours: int = 1
    fade_start: int | None = None
    fade_steps: int = 1
    name: ClassVar[str] = "pair_penalty"

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, known in (("charge", get_args(Charge)), ("moves", get_args(Moves))):
            if getattr(self, field) not in known:
                expected = ", ".join(map(repr, known))
                raise ValueError(
                    f"{field} is {getattr(self, field)!r}; expected one of {expected}."
                )
        if not 0 <= self.margin < 1:
            raise ValueError(f"margin is {self.margin}; expected a cosine in [0, 1).")
        if self.n_neighbours < 1 or self.fade_steps < 1:
            raise ValueError(
                f"n_neighbours is {self.n_neighbours} and fade_steps {self.fade_steps}; expected "
                "whole numbers >= 1."
            )

    def strength_at(self, step: int) -> float:
        """As in `Regulariser`, falling to 0 from `fade_start` on."""
        strength = super().strength_at(step)
        if self.fade_start is None or step < self.fade_start:
            return strength
        return strength * max(0.0, 1 - (step - self.fade_start) / self.fade_steps)

    def __call__(self, feature_acts: FeatureActs, W_dec: Tensor, generator: Generator) -> Tensor:
        """As in `Regulariser`."""
        norms = written_norms(feature_acts, W_dec)
        neighbours = nearest(W_dec, self.n_neighbours)
        costs = [
            self._likeness(W_dec, norms.detach(), partner)
            * self._charge(norms, feature_acts, partner)
            for partner in neighbours.unbind(-1)
        ]
        return torch.stack(costs).sum(0).mean(-1)

    def _likeness(self, W_dec: Tensor, norms: Tensor, partner: Tensor) -> Tensor:
        """Squared cosine above the margin of each latent and its partner; all (..., d_sae)."""
        unit = unit_rows(W_dec)
        if self.moves == "both":
            cosines = (unit * _rows(unit, partner)).sum(-1)
        else:
            own = torch.arange(unit.shape[-2], device=unit.device).expand(partner.shape)
            own_is_rarer = norms <= norms.gather(-1, partner)
            rarer = torch.where(own_is_rarer, own, partner)
            other = torch.where(own_is_rarer, partner, own)
            cosines = (_rows(unit, rarer) * _rows(unit.detach(), other)).sum(-1)
        return (cosines - self.margin).relu() ** 2

    def _charge(self, norms: Tensor, feature_acts: FeatureActs, partner: Tensor) -> Tensor:
        """What likeness costs each latent with its partner, (..., d_sae)."""
        if self.charge == "constant":
            return torch.ones_like(norms)
        if self.charge == "silent partner":
            return norms_while_silent(feature_acts, norms.detach(), partner)
        if self.charge == "held norms":
            norms = norms.detach()
        return norms + norms.gather(-1, partner)


@torch.no_grad()
def norms_while_silent(feature_acts: FeatureActs, norms: Tensor, partner: Tensor) -> Tensor:
    """n_i over the samples in which i's partner is silent, plus n_partner over those in which i is.

    Parameters
    ----------
    feature_acts : Tensor (..., batch, d_sae) or SparseActs
    norms : Tensor, shape (..., d_sae)
        Of `written_norms`: over all samples. Where the scale of decoder rows is free it is in them.
    partner : Tensor of int64, shape (..., d_sae)

    Returns
    -------
    Tensor, shape (..., d_sae)
    """
    acts = feature_acts.to_dense() if isinstance(feature_acts, SparseActs) else feature_acts
    of_partner = acts.gather(-1, partner.unsqueeze(-2).expand(acts.shape))
    own_squares = acts.square().sum(-2)
    alone = (acts.square() * (of_partner == 0)).sum(-2)
    partner_alone = (of_partner.square() * (acts == 0)).sum(-2)
    share = (alone / own_squares.clamp(min=1e-30)).sqrt()
    partner_share = (partner_alone / own_squares.gather(-1, partner).clamp(min=1e-30)).sqrt()
    return norms * share + norms.gather(-1, partner) * partner_share


@torch.no_grad()
def nearest(W_dec: Tensor, n: int) -> Tensor:
    """The n other latents of largest cosine to each, int64, shape (..., d_sae, n), nearest first.

    A ValueError says if there are no n others.
    """
    if n == 1:
        return nearest_neighbours(W_dec).index.unsqueeze(-1)
    unit = unit_rows(W_dec)
    d_sae = unit.shape[-2]
    if n >= d_sae:
        raise ValueError(f"n_neighbours is {n}; expected fewer than the {d_sae} latents.")
    found = []
    for rows in torch.arange(d_sae, device=unit.device).split(1024):
        cosines = unit[..., rows, :] @ unit.mT
        itself = rows[:, None].expand(*cosines.shape[:-1], 1)
        found.append(cosines.scatter(-1, itself, -torch.inf).topk(n, dim=-1).indices)
    return torch.cat(found, dim=-2)


def _rows(unit: Tensor, index: Tensor) -> Tensor:
    """Rows of each dictionary, (..., d_sae, d_in), by index (..., d_sae)."""
    d_sae, d_in = unit.shape[-2:]
    flat = unit.reshape(-1, d_in)
    first = torch.arange(0, len(flat), d_sae, device=flat.device).reshape(*index.shape[:-1], 1)
    return flat.index_select(0, (index + first).flatten()).reshape(*index.shape, d_in)
