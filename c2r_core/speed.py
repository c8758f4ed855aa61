"""What rests on the machine: how fast it multiplies, measured, and how it best looks through a mask."""

from __future__ import annotations

import time
from functools import cache

import numpy as np
import torch
from torch import Tensor

MIN_SPEED_UP = 1.2
"""How many times as fast as float32 bfloat16 must be to be worth what it loses."""


@cache
def bfloat16_speed_up() -> float:
    """How many times as fast as in float32 this processor multiplies in bfloat16: timed, once a process."""

    def seconds(x: Tensor) -> float:
        started = time.perf_counter()
        x @ x.mT
        return time.perf_counter() - started

    x = torch.ones(512, 512)
    times = [(seconds(x), seconds(x.bfloat16())) for _ in range(5)]
    full, half = (min(column) for column in zip(*times, strict=True))
    return full / half


def true_indices(mask: Tensor) -> Tensor:
    """Where a mask is true, rising, as indices into its flattened form: int64, shape (n_true,)."""
    if mask.device.type == "cpu":  # NumPy is several times as fast where few are
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero()[:, 0]
