"""Confidence intervals of means and of paired differences, rank correlations, trade-offs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

N_RESAMPLES = 2000


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


def rank_correlation(
    x: Sequence[float], y: Sequence[float], *, level: float = 0.95, seed: int = 0
) -> Interval:
    """Spearman's rank correlation, with a bootstrap interval over the pairs (2000 draws).

    Raises
    ------
    ValueError
        If the lengths differ, there are fewer than five pairs, or a value is not finite.
    """
    first, second = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if first.shape != second.shape or first.ndim != 1 or len(first) < 5:
        raise ValueError(
            f"Got {first.shape} and {second.shape} values; expected two sequences of equal length with "
            "at least five pairs."
        )
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("A value is NaN or infinite; leave out what was not evaluable, in pairs.")
    draws = [_spearman(first[rows], second[rows]) for rows in _resamples(len(first), seed)]
    low, high = np.nanquantile(draws, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(_spearman(first, second), float(low), float(high))


def rank_correlation_lead(
    x: Sequence[float],
    rival: Sequence[float],
    y: Sequence[float],
    *,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """By how much |rank correlation| of x with y is ahead of that of its rival, on the same resamples.

    Raises
    ------
    ValueError
        As `rank_correlation`.
    """
    rank_correlation(x, y), rank_correlation(rival, y)  # for their checks
    columns = np.array([x, rival, y], dtype=float)

    def lead(values: np.ndarray) -> float:
        return abs(_spearman(values[0], values[2])) - abs(_spearman(values[1], values[2]))

    draws = [lead(columns[:, rows]) for rows in _resamples(columns.shape[1], seed)]
    low, high = np.nanquantile(draws, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(lead(columns), float(low), float(high))


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    """NaN where one of them does not vary."""
    ranks = stats.rankdata(x), stats.rankdata(y)
    spread = ranks[0].std() * ranks[1].std()
    return float(np.cov(*ranks, bias=True)[0, 1] / spread) if spread else float("nan")


def _resamples(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(n, size=(N_RESAMPLES, n))


def cost_at(failure: Sequence[float], cost: Sequence[float], target: float) -> float:
    """Cost at which a trade-off first brings a failure down to a target, linear between its points.

    Two metrics trade against each other while a weight sweeps from nothing to too much.

    Parameters
    ----------
    failure : sequence of float
        What should be low, such as absorption: one entry a point, in order of the weight.
    cost : sequence of float of equal length
        What it costs, such as FVU; or the weight itself, for the weight that is needed.
    target : float

    Returns
    -------
    float
        The first point's cost if that is at the target already; NaN, not evaluable, if no point is.

    Raises
    ------
    ValueError
        If the lengths differ, there is no point, or a value is not finite.

    Examples
    --------
    >>> round(cost_at(failure=[0.4, 0.2, 0.0], cost=[0.0, 0.1, 0.5], target=0.1), 6)
    0.3
    """
    failure, cost = np.asarray(failure, dtype=float), np.asarray(cost, dtype=float)
    if failure.shape != cost.shape or failure.ndim != 1 or not len(failure):
        raise ValueError(
            f"Got {failure.shape} failures and {cost.shape} costs; expected two sequences of "
            "equal length with at least one point."
        )
    if not (np.isfinite(failure).all() and np.isfinite(cost).all()):
        raise ValueError(
            f"Got failures {failure.tolist()} and costs {cost.tolist()}; expected finite values."
        )
    reached = np.flatnonzero(failure <= target)
    if not len(reached):
        return float("nan")
    last = reached[0]
    if last == 0:
        return float(cost[0])
    first = last - 1
    share = (failure[first] - target) / (failure[first] - failure[last])
    return float(cost[first] + share * (cost[last] - cost[first]))
