"""Sparse autoencoders whose features can be trusted: SAEs, the C²R loss, and their measurement.

Everything named here can be imported from `c2r_core`; heavy libraries load where they are used.

>>> from c2r_core import BatchTopKSAE, C2R, TrainConfig, c2r_loss, train
"""

from c2r_core.losses import c2r_loss, nearest_neighbours, orthogonality_loss
from c2r_core.saes import (
    SAE,
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaBatchTopKSAE,
    PAnnealSAE,
    ReLUAprilSAE,
    ReLUSAE,
    TopKSAE,
    create_sae,
    fold_norm_factor,
    load_sae,
    save_sae,
)
from c2r_core.training import (
    C2R,
    History,
    Orthogonality,
    TrainConfig,
    create_regulariser,
    strength_from_weight,
    train,
    weight_from_strength,
)

__version__ = "0.1.0"

__all__ = [
    "C2R",
    "SAE",
    "BatchTopKSAE",
    "GatedSAE",
    "History",
    "JumpReLUSAE",
    "MatryoshkaBatchTopKSAE",
    "Orthogonality",
    "PAnnealSAE",
    "ReLUAprilSAE",
    "ReLUSAE",
    "TopKSAE",
    "TrainConfig",
    "c2r_loss",
    "create_regulariser",
    "create_sae",
    "fold_norm_factor",
    "load_sae",
    "nearest_neighbours",
    "orthogonality_loss",
    "save_sae",
    "strength_from_weight",
    "train",
    "weight_from_strength",
]
