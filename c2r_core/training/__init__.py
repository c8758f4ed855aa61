"""The training loop, its recipe and its regularisers."""

from c2r_core.losses.strength import (
    PAPER_STRENGTH,
    strength_from_weight,
    weight_from_strength,
)
from c2r_core.training import ablations, forms  # noqa: F401  registers them
from c2r_core.training.config import TrainConfig
from c2r_core.training.distributed import train_distributed
from c2r_core.training.history import History
from c2r_core.training.regularisers import (
    C2R,
    REGULARISERS,
    Orthogonality,
    Regulariser,
    create_regulariser,
    register_regulariser,
)
from c2r_core.training.sharded import create_shard, gather_shards, train_sharded
from c2r_core.training.tracking import tensorboard, tracked
from c2r_core.training.trainer import DivergedError, train

__all__ = [
    "C2R",
    "PAPER_STRENGTH",
    "REGULARISERS",
    "DivergedError",
    "History",
    "Orthogonality",
    "Regulariser",
    "TrainConfig",
    "create_regulariser",
    "create_shard",
    "gather_shards",
    "register_regulariser",
    "strength_from_weight",
    "tensorboard",
    "tracked",
    "train",
    "train_distributed",
    "train_sharded",
    "weight_from_strength",
]
