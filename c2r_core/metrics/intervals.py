"""Confidence intervals of means and of paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """A mean and the ends of its confidence interval."""

    mean: float
    low: float
    high: float


def paired_interval(
    arm: Sequence[float], baseline: Sequence[float], *, scale: float = 1.0, level: float = 0.95
) -> Interval:
    """Interval of the mean of arm − scale · baseline, paired by seed (Student's t).

    Parameters
    ----------
    arm, baseline : sequences of float of equal length
        Entry i of both is the same seed on the same data.
    scale : float
        ½ asks whether the arm at least halves the baseline: it does if `high` is at most 0.
    level : float
        Coverage of the interval.

    Raises
    ------
    ValueError
        If the lengths differ, there are fewer than two pairs, or a value is not finite.
    """
    first, second = np.asarray(arm, dtype=float), np.asarray(baseline, dtype=float)
    if first.shape != second.shape or first.ndim != 1 or len(first) < 2:
        raise ValueError(
            f"Got {first.shape} and {second.shape} values; expected two sequences of equal length "
            "with at least two pairs, or there is no spread to measure."
        )
    return mean_interval(first - scale * second, level=level)


def mean_interval(values: Sequence[float] | np.ndarray, *, level: float = 0.95) -> Interval:
    """Interval of the mean of at least two independent values (Student's t).

    Raises
    ------
    ValueError
        If there are fewer than two values, or one is not finite.
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(
            f"Got {values.tolist()}; expected at least two finite values. Leave out what was not "
            "evaluable, in pairs."
        )
    mean = float(values.mean())
    error = float(values.std(ddof=1)) / len(values) ** 0.5
    half_width = float(stats.t.ppf(0.5 + level / 2, len(values) - 1)) * error
    return Interval(mean, mean - half_width, mean + half_width)
