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
from c2r_core.saes.gated import GatedSAE
from c2r_core.saes.jump_relu import JumpReLUSAE
from c2r_core.saes.matryoshka import MatryoshkaBatchTopKSAE
from c2r_core.saes.p_anneal import PAnnealSAE
from c2r_core.saes.relu import ReLUSAE
from c2r_core.saes.relu_april import ReLUAprilSAE
from c2r_core.saes.sparse import SparseActs
from c2r_core.saes.topk import TopKSAE

__all__ = [
    "ARCHITECTURES",
    "SAE",
    "BatchTopKSAE",
    "GatedSAE",
    "JumpReLUSAE",
    "MatryoshkaBatchTopKSAE",
    "PAnnealSAE",
    "ReLUAprilSAE",
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
