"""Sparse autoencoders: one file a family, each registered under its name."""

from c2r_core.saes.base import (
    ARCHITECTURES,
    SAE,
    TrainingLosses,
    create_sae,
    fold_norm_factor,
    load_sae,
    register,
    save_sae,
)
from c2r_core.saes.batch_topk import BatchTopKSAE
from c2r_core.saes.relu import ReLUSAE
from c2r_core.saes.sparse import SparseActs
from c2r_core.saes.topk import TopKSAE

__all__ = [
    "ARCHITECTURES",
    "SAE",
    "BatchTopKSAE",
    "ReLUSAE",
    "SparseActs",
    "TopKSAE",
    "TrainingLosses",
    "create_sae",
    "fold_norm_factor",
    "load_sae",
    "register",
    "save_sae",
]
