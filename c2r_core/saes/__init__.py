"""Sparse autoencoders: one file a family, each registered under its name.

A new architecture is a class with the `register` decorator in a file that is imported: here, by one line,
or anywhere else."""

from c2r_core.saes.base import SAE, StepInput, TrainingLosses
from c2r_core.saes.files import (
    ARCHITECTURES,
    create_sae,
    fold_norm_factor,
    load_sae,
    register,
    save_sae,
)
from c2r_core.saes.gated import GatedSAE
from c2r_core.saes.interface import AnySAE
from c2r_core.saes.jump_relu import JumpReLUSAE
from c2r_core.saes.matryoshka import MatryoshkaBatchTopKSAE
from c2r_core.saes.relu import PAnnealSAE, ReLUAprilSAE, ReLUSAE
from c2r_core.saes.sparse import SparseActs
from c2r_core.saes.topk import BatchTopKSAE, TopKSAE

__all__ = [
    "ARCHITECTURES",
    "SAE",
    "AnySAE",
    "BatchTopKSAE",
    "GatedSAE",
    "JumpReLUSAE",
    "MatryoshkaBatchTopKSAE",
    "PAnnealSAE",
    "ReLUAprilSAE",
    "ReLUSAE",
    "SparseActs",
    "StepInput",
    "TopKSAE",
    "TrainingLosses",
    "create_sae",
    "fold_norm_factor",
    "load_sae",
    "register",
    "save_sae",
]
