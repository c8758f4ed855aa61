"""Penalties on a dictionary and its activations: pure functions of tensors."""

from c2r_core.losses.c2r import c2r_from_norms, c2r_loss, orthogonality_loss
from c2r_core.losses.neighbours import Neighbours, nearest_neighbours

__all__ = [
    "Neighbours",
    "c2r_from_norms",
    "c2r_loss",
    "nearest_neighbours",
    "orthogonality_loss",
]
