"""C²R under test: sparse autoencoders, the consistency loss, and their measurement.

Everything named here can be imported from `c2r_core`, and loads when it is first used.

>>> from c2r_core import BatchTopKSAE, C2R, TrainConfig, c2r_loss, train
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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


def __getattr__(name: str) -> object:
    """A public name, from the room that has it: so `c2r --help` need not wait for PyTorch."""
    if name in __all__:
        for room in ("losses", "saes", "training"):
            module = import_module(f"c2r_core.{room}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module 'c2r_core' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Public names and what is loaded."""
    return sorted({*globals(), *__all__})
