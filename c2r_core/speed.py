"""What rests on the machine: how fast it multiplies, measured, and how it best looks through many numbers."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

MIN_SPEED_UP = 1.2
"""How many times as fast as float32 another format must be to be worth what it loses."""


@cache
def bfloat16_speed_up() -> float:
    """How many times as fast as in float32 this processor multiplies in bfloat16: timed, once a process."""
    return _speed_up(torch.bfloat16, lambda x: x @ x.mT)


@cache
def int8_speed_up() -> float:
    """The same for `int8_product`; 0 where this PyTorch has no such product, or a wrong one."""
    ones = torch.ones(2, 512, dtype=torch.int8)
    try:
        is_right = (int8_product(ones, ones) == 512).all()
    except (AttributeError, RuntimeError):
        return 0.0
    return _speed_up(torch.int8, lambda x: int8_product(x, x)) if is_right else 0.0


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.mT in int32 of rows in int8, (n, d) and (m, d) -> (n, m), on a processor.

    PyTorch's own function for it is private, and errs where d is 1 (pytorch/pytorch issue 195066).
    """
    return torch._int_mm(a, b.mT)


def _speed_up(dtype: torch.dtype, multiply: Callable[[Tensor], Tensor]) -> float:
    def seconds(product: Callable[[Tensor], Tensor], x: Tensor) -> float:
        started = time.perf_counter()
        product(x)
        return time.perf_counter() - started

    x = torch.ones(512, 512)
    times = [(seconds(lambda x: x @ x.mT, x), seconds(multiply, x.to(dtype))) for _ in range(5)]
    full, other = (min(column) for column in zip(*times, strict=True))
    return full / other


def at_least(values: Tensor, least: Tensor) -> Tensor:
    """values >= least, of one type."""
    if values.device.type == "cpu":  # NumPy is several times as fast
        return torch.from_numpy(np.greater_equal(values.numpy(), least.numpy()))
    return values >= least


def true_indices(mask: Tensor) -> Tensor:
    """Where a mask is true, rising, as indices into its flattened form: int64, shape (n_true,)."""
    if mask.device.type == "cpu":  # NumPy is several times as fast where few are
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero()[:, 0]
