"""The training loop, its recipe and its regularisers."""

from c2r_core.training.history import History
from c2r_core.training.regularisers import C2R, Orthogonality, Regulariser
from c2r_core.training.schedules import TrainConfig
from c2r_core.training.trainer import DivergedError, train

__all__ = [
    "C2R",
    "DivergedError",
    "History",
    "Orthogonality",
    "Regulariser",
    "TrainConfig",
    "train",
]
