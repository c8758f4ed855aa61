"""Confidence intervals of means and of paired differences, rank correlations, trade-offs.

All functions raise ValueError for sequences of different lengths, too few values, NaN or infinity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

N_RESAMPLES = 2000


class Interval(NamedTuple):
    """A mean and the ends of its confidence interval."""

    mean: float
    low: float
    high: float


def paired_interval(
    arm: Sequence[float], baseline: Sequence[float], *, scale: float = 1.0, level: float = 0.95
) -> Interval:
    """Interval of the mean of arm − scale · baseline, paired by seed (Student's t), of two pairs or more.

    Entry i of both is the same seed on the same data. A scale of ½ asks whether the arm at least halves the
    baseline: it does if `high` is at most 0.
    """
    first, second = _checked(2, "two pairs", arm, baseline)
    return mean_interval(first - scale * second, level=level)


def mean_interval(values: Sequence[float] | np.ndarray, *, level: float = 0.95) -> Interval:
    """Interval of the mean of at least two independent values (Student's t)."""
    from scipy.stats import t  # slow to import

    (values,) = _checked(2, "two values", values)
    mean = float(values.mean())
    error = float(values.std(ddof=1)) / len(values) ** 0.5
    half_width = float(t.ppf(0.5 + level / 2, len(values) - 1)) * error
    return Interval(mean, mean - half_width, mean + half_width)


def rank_correlation(
    x: Sequence[float], y: Sequence[float], *, level: float = 0.95, seed: int = 0
) -> Interval:
    """Spearman's rank correlation of at least five pairs, with a bootstrap interval (2000 draws of pairs)."""
    columns = _checked(5, "five pairs", x, y)
    return _bootstrap(lambda rows: _spearman(*rows), columns, level, seed)


def rank_correlation_lead(
    x: Sequence[float],
    rival: Sequence[float],
    y: Sequence[float],
    *,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """By how much |rank correlation| of x with y is ahead of that of its rival, on the same resamples."""

    def lead(rows: np.ndarray) -> np.ndarray:
        return abs(_spearman(rows[0], rows[2])) - abs(_spearman(rows[1], rows[2]))

    return _bootstrap(lead, _checked(5, "five pairs", x, rival, y), level, seed)


def cost_at(failure: Sequence[float], cost: Sequence[float], target: float) -> float:
    """Cost at which a trade-off first brings a failure down to a target, linear between its points.

    Two metrics trade against each other while a weight sweeps from nothing to too much; both have one entry
    a point, in order of the weight. The failure is what should be low, such as absorption; the cost such as
    FVU, or the weight itself, for the weight that is needed. Returned is the first point's cost if that is at
    the target already, and NaN, not evaluable, if no point is.

    >>> round(cost_at(failure=[0.4, 0.2, 0.0], cost=[0.0, 0.1, 0.5], target=0.1), 6)
    0.3
    """
    failure, cost = _checked(1, "one point", failure, cost)
    reached = np.flatnonzero(failure <= target)
    if not len(reached):
        return float("nan")
    last = reached[0]
    if last == 0:
        return float(cost[0])
    first = last - 1
    share = (failure[first] - target) / (failure[first] - failure[last])
    return float(cost[first] + share * (cost[last] - cost[first]))


def _checked(least: int, of_what: str, *sequences: Sequence[float] | np.ndarray) -> np.ndarray:
    """The sequences as rows of float64."""
    rows = [np.asarray(values, dtype=float) for values in sequences]
    shapes = [row.shape for row in rows]
    if len(set(shapes)) > 1 or rows[0].ndim != 1 or len(rows[0]) < least:
        raise ValueError(
            f"Got values of shapes {', '.join(map(str, shapes))}; expected sequences of equal length "
            f"with at least {of_what}."
        )
    if not np.isfinite(rows).all():
        raise ValueError(
            f"A value is NaN or infinite in {[row.tolist() for row in rows]}; leave out what was not "
            "evaluable, in pairs."
        )
    return np.array(rows)


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Along the last axis; NaN where one of them does not vary."""
    from scipy.stats import rankdata  # slow to import

    ranks = [rankdata(values, axis=-1) for values in (x, y)]
    spread = ranks[0].std(-1) * ranks[1].std(-1)
    centred = [values - values.mean(-1, keepdims=True) for values in ranks]
    together = (centred[0] * centred[1]).mean(-1)
    return np.divide(together, spread, out=np.full_like(together, np.nan), where=spread > 0)


def _bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], rows: np.ndarray, level: float, seed: int
) -> Interval:
    n = rows.shape[1]
    draws = np.random.default_rng(seed).integers(n, size=(N_RESAMPLES, n))
    low, high = np.nanquantile(statistic(rows[:, draws]), [0.5 - level / 2, 0.5 + level / 2])
    return Interval(float(statistic(rows)), float(low), float(high))
